"""Training on a GPU: pytest -m gpu. Two epochs of the sample a run, with a CUDA graph and without, bit for bit."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts, in whichever test that is

import pytest
import torch
from common import SMALL, checkpoint, differences
from twin import tensors

import train
from densenet import DenseNet
from lib.batches import Batches
from lib.data import Images
from lib.distributed import World

pytestmark = pytest.mark.gpu
FLAGS = [*(flag for flag in SMALL if flag != "--no-cuda"), "--nEpochs", "2"]


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield torch.device("cuda:0")
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]
    torch.cuda.empty_cache()


@pytest.fixture
def run(sample, tmp_path, capsys):
    """Trains with these flags into the directory ``name`` -> the directory"""
    def run(name, *flags):
        capsys.readouterr()
        assert train.main(["--data", sample, *FLAGS, *flags, "--save", str(tmp_path / name)]) == 0
        assert capsys.readouterr().err == ""  # no warning, such as of a graph that was not possible
        return tmp_path / name
    return run


@pytest.fixture
def captures(monkeypatch):
    """A list with an entry for each capture"""
    captures, capture = [], train.GraphedStep.capture
    monkeypatch.setattr(train.GraphedStep, "capture", lambda self: captures.append(self) or capture(self))
    return captures


@pytest.mark.parametrize("flags", [
    "--efficient no --opt sgd", "--efficient yes --opt adam", "--efficient max --opt rmsprop",
    "--efficient no --opt adam --precision tf32", "--efficient yes --opt sgd --precision tf32",
    "--efficient no --opt sgd --precision bf16 --dropRate 0.2", "--efficient yes --opt rmsprop --precision bf16",
    "--efficient max --opt sgd --precision bf16 --dropRate 0.2"])
def test_a_run_with_a_graph_is_the_run_without(flags, run, captures, monkeypatch):
    """Two epochs, so two learning rates of sgd; the last batch of each is smaller and runs without the graph."""
    flags = ["--deterministic", *flags.split()]
    with_graph = run("graph", *flags)
    assert len(captures) == (2 if "sgd" in flags else 1)
    # by the optimizer of a graph: without, Adam counts its steps on the CPU and rounds otherwise
    make_step = train.make_step
    monkeypatch.setattr(train, "make_step", lambda args, net, optimizer, _: make_step(args, net, optimizer, False))
    assert differences(with_graph, run("eager", *flags)) == []
    assert len(captures) == (2 if "sgd" in flags else 1)


@pytest.mark.parametrize("flags", [[], ["--no-graph", "--efficient", "yes", "--dropRate", "0.2"]])
def test_a_deterministic_run_can_be_repeated(flags, run):
    assert differences(run("a", "--deterministic", *flags), run("b", "--deterministic", *flags)) == []


@pytest.mark.parametrize("flags", [
    [], ["--no-graph", "--opt", "adam"], ["--opt", "adam", "--dropRate", "0.2", "--efficient", "yes"]])
def test_a_run_resumed_in_the_middle_is_the_uninterrupted_run(flags, run, sample, tmp_path, monkeypatch):
    whole, train_epoch = run("whole", "--deterministic", *flags), train.train_epoch

    def stop_in_epoch_2(step, batches, args, epoch, *rest):
        if epoch == 2:
            raise FloatingPointError("stopped")
        return train_epoch(step, batches, args, epoch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", stop_in_epoch_2)
        argv = ["--data", sample, *FLAGS, "--deterministic", *flags, "--save", str(tmp_path / "half")]
        assert train.main(argv) == 1
    assert differences(whole, run("half", "--deterministic", *flags, "--resume")) == []


@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_a_gpus_run_goes_on_with_a_cpu_and_back(opt, sample, tmp_path):
    argv = ["--data", sample, *FLAGS[:-2], "--opt", opt, "--save", str(tmp_path / "run")]
    assert train.main([*argv, "--nEpochs", "1"]) == 0
    assert {tensor.device.type for tensor in tensors(checkpoint(tmp_path / "run"))} == {"cpu"}
    assert train.main([*argv, "--nEpochs", "2", "--resume", "--no-cuda"]) == 0
    assert train.main([*argv, "--nEpochs", "3", "--resume", "--device", "cuda"]) == 0
    assert train.main(["--evaluate", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/test.csv").read_text().count("\n") == 4


# --- memory -----------------------------------------------------------------------------------------------------

def peak_of(function, gpu):
    """-> bytes that it takes at most, when libraries have tried out what they need"""
    torch.backends.cudnn.benchmark = False
    function()
    torch.cuda.reset_peak_memory_stats(gpu)
    function()
    return torch.cuda.max_memory_allocated(gpu)


def step_and_evaluation(gpu, growthRate, depth, efficient):
    """-> a training step and an evaluation of this network, functions without arguments"""
    args, _ = train.parse_args([])
    net = DenseNet(growthRate, depth, efficient=efficient).to(gpu, memory_format=torch.channels_last)
    optimizer, _ = train.make_optimizer(args, net, gpu, World())
    step = train.make_step(args, net, optimizer, graphed=False)
    images = Images(torch.zeros(500, 3, 32, 32, dtype=torch.uint8), torch.zeros(500, dtype=torch.long), ["a"] * 10)
    batches = Batches(images, [0.5] * 3, [0.25] * 3, gpu)
    batch, labels, size = next(batches.plain(args.batchSz))
    return lambda: step(batch, labels, size), lambda: train.evaluate(net, batches, args, World())


def test_the_block_takes_less_memory_than_the_textbook_and_max_less_again(gpu):
    textbook, block, less = (peak_of(step_and_evaluation(gpu, 12, 100, mode)[0], gpu) for mode in (False, True, "max"))
    assert less < block < 0.4 * textbook


def test_evaluation_of_bc_190_40_takes_no_more_than_a_textbook_step(gpu):
    if torch.cuda.get_device_properties(gpu).total_memory < 40 * 2**30:
        pytest.skip("the textbook's step needs a GPU of 40 GiB")
    step, evaluation = step_and_evaluation(gpu, 40, 190, False)
    assert peak_of(evaluation, gpu) < peak_of(step, gpu)
