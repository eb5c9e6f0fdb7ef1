"""Training on a GPU: pytest -m gpu. Two epochs of the sample a run, with a CUDA graph and without, bit for bit."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts, in whichever test that is


import pytest
import torch
from common import SMALL, about, differences, stopped_at

import train
from densenet import DenseNet
from lib import memory

FLAGS = [*(flag for flag in SMALL if flag != "--no-cuda"), "--nEpochs", "2"]
EFFICIENT = {"textbook": "no", "efficient": "yes", "max": "max"}
ONLY_GRAPH = ("/flags/no_graph", "/capturable")  # where a run with a graph and one without may differ


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield torch.device("cuda:0")
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]
    torch.cuda.empty_cache()


pytestmark = pytest.mark.gpu


@pytest.fixture
def run(sample, tmp_path, capsys):
    """Trains with these flags into the directory ``name`` -> the directory"""
    def run(name, *flags):
        capsys.readouterr()
        assert train.main(["--data", sample, *FLAGS, *flags, "--save", str(tmp_path / name)]) == 0
        assert capsys.readouterr().err == ""  # no warning, such as of a graph that was not possible
        return tmp_path / name
    return run


def keep_eager(monkeypatch):
    """Steps without a graph, by the optimizer of a graph: Adam counts steps on the GPU there and rounds otherwise."""
    make_step = train.make_step
    monkeypatch.setattr(train, "make_step", lambda args, net, optimizer, _: make_step(args, net, optimizer, False))


def assert_graph_changes_nothing(run, monkeypatch, *flags):
    with_graph = run("graph", "--deterministic", *flags)
    with monkeypatch.context() as patch:
        keep_eager(patch)
        eager = run("eager", "--deterministic", *flags)
    assert differences(with_graph, eager) == []


@pytest.mark.parametrize("opt", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("path", EFFICIENT)
def test_a_run_with_a_graph_is_the_run_without(path, opt, run, monkeypatch):
    """Two epochs, so two learning rates of sgd; the last batch of each is smaller and runs without the graph."""
    assert_graph_changes_nothing(run, monkeypatch, "--efficient", EFFICIENT[path], "--opt", opt)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("path", EFFICIENT)
def test_a_run_with_a_graph_is_the_run_without_in_less_precision(path, precision, run, monkeypatch):
    assert_graph_changes_nothing(run, monkeypatch, "--efficient", EFFICIENT[path], "--precision", precision)


@pytest.mark.parametrize("path", EFFICIENT)
def test_a_graph_draws_the_dropout_that_the_steps_without_it_draw(path, run, monkeypatch):
    assert_graph_changes_nothing(run, monkeypatch, "--efficient", EFFICIENT[path], "--dropRate", "0.2")


def test_no_graph_changes_nothing_but_the_flag(run):
    with_graph, without = run("graph", "--deterministic"), run("without", "--deterministic", "--no-graph")
    assert [name for name in differences(with_graph, without) if not name.endswith(ONLY_GRAPH)] == []


@pytest.mark.parametrize("flags", [[], ["--no-graph"], ["--dropRate", "0.2", "--efficient", "yes"]])
def test_a_deterministic_run_can_be_repeated(flags, run):
    assert differences(run("a", "--deterministic", *flags), run("b", "--deterministic", *flags)) == []


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_default_flags_train_with_the_textbook_layers_and_a_graph(precision, run, gpu, monkeypatch):
    steps = []
    graphed = train.GraphedStep
    monkeypatch.setattr(train, "GraphedStep", lambda *args: steps.append(graphed(*args)) or steps[0])
    directory = run("run", "--precision", precision)
    assert steps[0].graph is not None
    assert about(directory)["path"] == "textbook" and "fits" in about(directory)["pathReason"]
    assert about(directory)["environment"]["device"] == torch.cuda.get_device_name(gpu)
    losses = [float(row.split(",")[1]) for row in (directory / "train.csv").read_text().splitlines()[1:]]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


@pytest.mark.parametrize("flags", [[], ["--no-graph"], ["--opt", "adam"], ["--opt", "rmsprop", "--efficient", "yes"],
                                   ["--dropRate", "0.2", "--efficient", "max"], ["--precision", "bf16"]])
def test_a_run_resumed_in_the_middle_is_the_uninterrupted_run(flags, run, sample, tmp_path):
    whole = run("whole", "--deterministic", *flags)
    argv = ["--data", sample, *FLAGS, "--deterministic", *flags, "--save", str(tmp_path / "half")]
    assert stopped_at("train_epoch", 2, argv) == 143
    assert train.main([*argv, "--resume"]) == 0
    assert differences(whole, tmp_path / "half") == []


@pytest.mark.parametrize("opt", ["sgd", "adam"])
def test_a_gpus_run_goes_on_with_a_cpu_and_back(opt, sample, tmp_path, capsys):
    argv = ["--data", sample, *SMALL[:-1], "--opt", opt, "--save", str(tmp_path / "run")]
    assert train.main([*argv, "--nEpochs", "1"]) == 0
    assert train.main([*argv, "--nEpochs", "2", "--resume", "--no-cuda"]) == 0
    assert "device is cpu" in capsys.readouterr().err
    assert train.main([*argv, "--nEpochs", "3", "--resume", "--device", "cuda"]) == 0
    assert train.main(["--evaluate", str(tmp_path / "run/latest.pth")]) == 0
    assert (tmp_path / "run/test.csv").read_text().count("\n") == 4


def peak_of_a_step(path, gpu, **flags):
    """Bytes of a whole step, without what libraries try out in the first ones."""
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(0)
    net = DenseNet(12, 40, efficient={"textbook": False, "efficient": True, "max": "max"}[path], **flags)
    net = net.to(gpu, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    images = torch.randn(64, 3, 32, 32, device=gpu).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (64,), device=gpu)
    for i in range(4):
        if i == 3:
            torch.cuda.reset_peak_memory_stats(gpu)
        train.train_step(net, optimizer, "fp32", images, labels, 64)
    assert net.dense1.last_path == path
    return torch.cuda.max_memory_allocated(gpu), net


def test_the_block_takes_less_memory_than_the_textbook_and_max_less_again(gpu):
    textbook, efficient, less = (peak_of_a_step(path, gpu)[0] for path in ("textbook", "efficient", "max"))
    assert less < efficient < 0.6 * textbook


@pytest.mark.parametrize("dropRate", [0, 0.2])
def test_a_step_of_the_textbook_fits_where_the_arithmetic_says_so(dropRate, gpu):
    peak, net = peak_of_a_step("textbook", gpu, dropRate=dropRate)
    args, _ = train.parse_args(["--dropRate", str(dropRate)])
    counted = memory.step_bytes(net, args, 32, data_bytes=64 * 3 * 32 * 32 * 4, batch_size=64, on_gpu=True)
    assert 0.8 * counted < peak < counted / memory.USABLE_SHARE
