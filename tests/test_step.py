"""The training step, and what a CUDA graph needs of it, checked without a GPU: by CUDA tensors that have no data, and
by a recorded step (twin.py). Each of these checks is shown to see the faults that it is for."""

import contextlib
import copy
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from common import SMALL, differences
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from twin import Twin, allow_capturable, storage, tensors, use_twin

import densenet
import train
from densenet import DenseNet
from lib.batches import Batches, epoch_randomness
from lib.cuda_graph import GraphedStep
from lib.data import Images
from lib.device import set_up_device
from lib.distributed import World

CPU = torch.device("cpu")


def set_up(opt="sgd", precision="fp32", graph=False, **arguments):
    """-> a small network, its optimizer, made for a graph if ``graph``, and the eager step"""
    args, _ = train.parse_args(["--opt", opt, "--precision", precision])
    torch.manual_seed(0)
    net = DenseNet(4, 10, **{"dropRate": 0.2} | arguments)
    optimizer, _ = train.make_optimizer(args, net, torch.device("cuda" if graph else "cpu"), World())
    return net, optimizer, train.make_step(args, net, optimizer, graphed=False)


def batches():
    """Two epochs, the last batch of each is smaller."""
    generator = torch.Generator().manual_seed(0)
    for size in (8, 8, 8, 3) * 2:
        images = torch.randn(size, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
        yield images, torch.randint(10, (size,), generator=generator)


def run(step, optimizer):
    """-> losses and errors of the steps; the rate falls between the epochs"""
    torch.manual_seed(1)
    results = []
    for i, (images, labels) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = 0.05 if i < 4 else 0.005
        results.append(step(images, labels, len(images)))
    return torch.stack(results)


def state_of(net, optimizer):
    return dict(net.state_dict()), optimizer.state_dict()["state"]


# --- loss and precision -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [1, 2])
def test_the_gradient_is_that_of_the_mean_loss_which_the_ranks_average(ranks):
    """A rank's loss is its sum over the global batch size / ranks: DDP averages over the ranks."""
    net, _, step = set_up()
    images, labels = next(batches())
    expected = copy.deepcopy(net)
    torch.manual_seed(1)
    loss = F.nll_loss(expected(images), labels) * ranks
    loss.backward()
    torch.manual_seed(1)
    found, error = step(images, labels, 8 / ranks)
    assert_close(found, loss.detach(), rtol=1e-6, atol=0)
    assert_close([p.grad for p in net.parameters()], [p.grad for p in expected.parameters()], rtol=1e-5, atol=1e-7)
    assert error in [ranks * 12.5 * wrong for wrong in range(9)]


@pytest.mark.parametrize("efficient", [True, False])
def test_bf16_keeps_weights_statistics_and_loss_in_float32(efficient):
    net, optimizer, step = set_up(precision="bf16", efficient=efficient)
    convolved = []
    net.conv1.register_forward_hook(lambda _, inputs, out: convolved.append(out.dtype))
    result = step(*next(batches()), 8)
    assert convolved == [torch.bfloat16]
    kept = [result, *net.state_dict().values(), *(p.grad for p in net.parameters()), *tensors(optimizer.state)]
    assert {value.dtype for value in kept if value.is_floating_point()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert net.eval()(next(batches())[0]).dtype == torch.float32  # log-probabilities


@pytest.mark.parametrize(("side", "batchSz", "size"), [(32, 64, 250), (32, 300, 300), (64, 16, 62), (224, 16, 16)])
def test_evaluation_takes_as_many_pixels_as_250_images_of_32x32_or_a_batch(side, batchSz, size):
    sizes = []
    images = SimpleNamespace(device=CPU, height=side, width=side, n=1, plain=lambda size, *_: sizes.append(size) or [])
    train.evaluate(torch.nn.Identity(), images, SimpleNamespace(batchSz=batchSz), World())
    assert sizes == [size]


# --- the device -------------------------------------------------------------------------------------------------

@pytest.fixture
def old_gpu(monkeypatch):
    for name, value in (("device_count", 1), ("is_available", True), ("get_device_capability", (7, 5)),
                        ("get_device_name", "Tesla T4"), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def refusal(capsys, save, *flags):
    assert train.main(["--save", str(save), *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and not save.exists()
    return err


@pytest.mark.usefixtures("old_gpu")
def test_a_driver_too_old_for_torch_is_refused_in_a_line_that_names_no_cuda(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    err = refusal(capsys, tmp_path / "run")
    assert "driver" in err and "--no-cuda" in err


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_bf16_and_tf32_are_refused_below_compute_capability_8(precision, capsys, tmp_path):
    err = refusal(capsys, tmp_path / "run", "--precision", precision)
    assert all(text in err for text in (precision, "Tesla T4", "7.5", "8.0", "valid is fp32"))


@pytest.mark.usefixtures("old_gpu")
def test_amds_gpus_have_bf16_whatever_their_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert set_up_device(train.parse_args(["--precision", "bf16"])[0], World()) == torch.device("cuda:0")


@pytest.mark.parametrize(("flags", "device", "ranks", "graph"), [
    ([], "cuda", 1, True), (["--no-graph"], "cuda", 1, False), ([], "cuda", 2, False), ([], "cpu", 1, False)])
def test_a_step_is_one_graph_on_a_single_gpu_unless_no_graph_is_given(flags, device, ranks, graph):
    assert train.uses_graph(train.parse_args(flags)[0], torch.device(device), World(size=ranks)) == graph


# --- CUDA tensors without data: they have a device and a shape, and refuse what mixes devices or reads a value --

def both_passes(x, spec, *parameters):
    """EfficientBlock.apply and the backward pass at once: autograd's engine would ask for a real GPU."""
    ctx = Mock()
    with torch.no_grad():
        results = densenet.EfficientBlock.forward(ctx, x, spec, *parameters)
        saved = ctx.save_for_backward.call_args.args
        dx, _, *gradients = densenet.EfficientBlock.gradients(spec, results[0], saved, len(parameters))
    for tensor, gradient in zip((x, *parameters), (dx, *gradients), strict=True):
        assert gradient.shape == tensor.shape and gradient.device == tensor.device
        assert gradient.dtype == (spec.dtype if gradient is dx else parameters[0].dtype)
    return results


class OnGpu(TorchDispatchMode):
    """Refuses a tensor that is not on the GPU, also for the moment in which torch.tensor(v, device="cuda") has one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert {tensor.device.type for tensor in tensors(args, kwargs, out)} <= {"cuda"}, f"{func} of a CPU tensor"
        return out


def step_on_fake_gpu(monkeypatch, opt="sgd", precision="fp32", **arguments):
    """A training step on CUDA tensors without data. -> how many dense blocks the efficient block computed"""
    blocks = []
    monkeypatch.setattr(densenet, "block_is_exact", lambda net, x: True)  # it refuses fake tensors
    monkeypatch.setattr(densenet.EfficientBlock, "apply", lambda *args: blocks.append(1) or both_passes(*args))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode():
        with torch.device("cuda"):
            net, optimizer, step = set_up(opt, precision, graph=True, **arguments)
            images, labels = torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()  # its state is made before a capture

        def set_gradients(loss):
            for p in net.parameters():
                p.grad = torch.ones_like(p)

        monkeypatch.setattr(torch.Tensor, "backward", set_gradients)
        with OnGpu():
            result = step(images, labels, 8)
        assert result.device.type == "cuda" and result.shape == (2,)
    return len(blocks)


@pytest.mark.parametrize(("opt", "precision", "arguments"), [
    ("sgd", "fp32", dict(efficient=True)), ("sgd", "bf16", dict(efficient=True, dropRate=0)),
    ("adam", "bf16", dict(efficient="max")), ("rmsprop", "fp32", dict(bottleneck=False)),
    ("adam", "fp32", dict(efficient=False)), ("sgd", "bf16", dict(efficient=False))])
def test_a_step_stays_on_the_gpu_and_waits_for_nothing(opt, precision, arguments, monkeypatch):
    blocks = step_on_fake_gpu(monkeypatch, opt, precision, **arguments)
    assert blocks == (3 if arguments.get("efficient", True) else 0)


def faulty_loss(fault):
    """F.nll_loss with something that a capture cannot hold."""
    original, constant = F.nll_loss, torch.ones(())

    def loss(output, labels, **how):
        result = original(output, labels, **how)
        if fault == "reads a value":
            return result * max(result.item(), 1)
        if fault == "makes a constant":
            return result * torch.tensor(1.0, device=result.device)
        return result * constant  # which stands outside, on the CPU
    return loss


FAULTS = ["reads a value", "makes a constant", "uses a tensor from outside"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_leaves_the_gpu_is_seen(fault, monkeypatch):
    monkeypatch.setattr(F, "nll_loss", faulty_loss(fault))
    with pytest.raises((DataDependentOutputException, AssertionError)):
        step_on_fake_gpu(monkeypatch)


def test_batches_are_made_on_the_gpu_and_wait_for_nothing():
    random = epoch_randomness(100, seed=1, epoch=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = Images(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.zeros(100, dtype=torch.long), ["a"])
        batches = Batches(images, [0.5] * 3, [0.25] * 3, torch.device("cuda"))
        for stream in (batches.augmented(random, 64), batches.plain(64)):
            shapes = [(x.shape[0], x.device.type, y.device.type) for x, y, _ in stream]
            assert shapes == [(64, "cuda", "cuda"), (36, "cuda", "cuda")]


# --- a recorded step --------------------------------------------------------------------------------------------

def recorded(monkeypatch, opt="sgd", wrap=lambda net, step: step, **arguments):
    """-> what keeps the recorded step from being a closed one, after some replays"""
    allow_capturable(monkeypatch)
    net, optimizer, step = set_up(opt, graph=True, **arguments)
    twin = Twin(wrap(net, step), net, optimizer, batch_size=8)
    images, labels = next(batches())
    twin(images, labels, 8)
    may_read = {storage(tensor) for tensor in (twin.images, twin.labels, *twin.state())}
    problems = [f"reads {tuple(tensor.shape)} from outside" for key, tensor in twin.graph.outside.items()
                if key not in may_read]
    where = [tensor.data_ptr() for tensor in twin.state()]
    for _ in range(2):
        twin(images, labels, 8)
        twin(images[:5], labels[:5], 5)  # a smaller batch
    return problems + ["state has moved"] * (where != [tensor.data_ptr() for tensor in twin.state()])


@pytest.mark.parametrize(("opt", "arguments"), [
    ("sgd", dict(efficient=True, dropRate=0)), ("adam", dict(efficient="max")), ("rmsprop", dict(efficient=False)),
    ("adam", dict(bottleneck=False))])
def test_a_recorded_step_reads_nothing_but_batch_weights_and_optimizer_state(opt, arguments, monkeypatch):
    assert recorded(monkeypatch, opt, **arguments) == []


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_a_recorded_step_that_reads_something_else_is_seen(fault, monkeypatch):
    monkeypatch.setattr(F, "nll_loss", faulty_loss(fault))
    assert recorded(monkeypatch) == ["reads () from outside"]


def test_a_recorded_step_that_replaces_a_buffer_or_reads_a_value_is_seen(monkeypatch):
    def replacing(net, step):
        def replace_and_step(*batch):
            net.bn1.running_mean = net.bn1.running_mean * 1
            return step(*batch)
        return replace_and_step

    assert "state has moved" in recorded(monkeypatch, wrap=replacing)
    monkeypatch.setattr(F, "nll_loss", faulty_loss("reads a value"))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorded(monkeypatch)


@pytest.mark.parametrize(("opt", "precision", "efficient"), [
    ("sgd", "fp32", True), ("rmsprop", "bf16", True), ("sgd", "bf16", False),
    pytest.param("adam", "fp32", "max", marks=pytest.mark.slow)])
def test_replays_do_what_the_eager_steps_do(opt, precision, efficient, monkeypatch):
    """The same losses, weights, statistics, momentum and dropout, although the step was tried out before the capture. A
    new rate is captured again, a smaller batch runs eagerly. Then from state as a resumed run has it."""
    allow_capturable(monkeypatch)
    net, optimizer, step = set_up(opt, precision, graph=True, efficient=efficient)
    net2, optimizer2, step2 = set_up(opt, precision, graph=True, efficient=efficient)
    for _ in range(2):
        twin = Twin(step2, net2, optimizer2, batch_size=8)
        assert run(twin, optimizer2).equal(run(step, optimizer))
        assert twin.captures == 2
        assert_close(state_of(net, optimizer), state_of(net2, optimizer2), rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_of_replays_is_the_run_of_eager_steps(images, tmp_path, monkeypatch):
    use_twin(monkeypatch)
    for name, flags in (("graph", []), ("eager", ["--no-graph"])):
        argv = ["--data", images, *SMALL, "--nEpochs", "2", "--dropRate", "0.2", "--save", str(tmp_path / name), *flags]
        assert train.main(argv) == 0
    assert {key.rpartition("/")[2] for key in differences(tmp_path / "graph", tmp_path / "eager")} == {"no_graph"}


# --- a capture that fails ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", ["warm_up", "on_side_stream"])
def test_if_the_step_cannot_be_tried_out_it_stays_eager_and_says_so_once(part, capsys, monkeypatch):
    net, optimizer, step = set_up()
    expected = run(step, optimizer)
    net2, optimizer2, step2 = set_up()
    twin = Twin(step2, net2, optimizer2, batch_size=8)

    def fail():
        if part == "on_side_stream":
            twin.step()  # the weights have moved by then
        raise RuntimeError("not permitted\nmore lines")

    monkeypatch.setattr(twin, part, fail)
    assert run(twin, optimizer2).equal(expected)
    assert_close(state_of(net, optimizer), state_of(net2, optimizer2), rtol=0, atol=0)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no CUDA graph" in err and "not permitted" in err


@contextlib.contextmanager
def invalid_capture(*_, **__):
    """Stands for torch.cuda.graph: what fails inside invalidates the capture, so its exit raises, too."""
    try:
        yield
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore lines")


@pytest.fixture
def failing(monkeypatch):
    """-> a function: GraphedStep on a CPU, whose capture fails by such an error"""
    def failing(kind, message):
        class Failing(GraphedStep):
            def on_side_stream(self):
                super().step()

            def step(self):  # while it is captured
                raise kind(message)

        return Failing

    monkeypatch.setattr(torch.cuda, "graph", invalid_capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    return failing


def test_a_failed_capture_ends_the_run_which_goes_on_without_a_graph(failing, images, tmp_path, capsys, monkeypatch):
    message = "CUDA error: operation not permitted when stream is capturing"
    monkeypatch.setattr(train, "GraphedStep", failing(RuntimeError, f"{message}\nmore lines"))
    monkeypatch.setattr(train, "uses_graph", lambda args, device, world: not args.no_graph)
    argv = ["--data", images, *SMALL, "--nEpochs", "1", "--save", str(tmp_path / "run")]
    assert train.main(argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
    assert "previous error" not in err and "--no-graph" in err
    assert train.main([*argv, "--resume", "--no-graph"]) == 0
    assert (tmp_path / "run/test.csv").read_text().count("\n") == 2


@pytest.mark.parametrize("part", ["step", "warm_up"])
@pytest.mark.parametrize(("kind", "message"), [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate"), (RuntimeError, "CUDA error: out of memory"),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (KeyboardInterrupt, "")])
def test_memory_and_ctrl_c_are_not_taken_for_a_graph_that_cannot_be_made(kind, message, part, failing, monkeypatch):
    net, optimizer, step = set_up()
    graphed = failing(kind, message)(step, net, optimizer, batch_size=8)
    monkeypatch.setattr(graphed, part, graphed.step)
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        graphed(*next(batches()), 8)


# --- the optimizer of a resumed run -----------------------------------------------------------------------------

def saved_by(net, optimizer):
    progress = dict.fromkeys(("scheduleEpochs", "mean", "std", "epoch", "best", "val", "test", "csvLengths"))
    return copy.deepcopy({"model": net.state_dict(), "optimizer": optimizer.state_dict()} | progress)


def resumed(saved, opt="sgd", graph=False):
    """-> as set_up, continued from this checkpoint"""
    net, optimizer, step = set_up(opt, graph=graph)
    net.to(memory_format=torch.channels_last)
    args, _ = train.parse_args(["--opt", opt])
    _, settings = train.make_optimizer(args, net, torch.device("cuda" if graph else "cpu"), World())
    train.load_checkpoint(saved, net, optimizer, settings, args)
    return net, optimizer, step


@pytest.mark.parametrize("opt", ["adam", "rmsprop"])
@pytest.mark.parametrize("of_gpu", [True, False])
def test_a_resumed_optimizer_takes_the_settings_of_its_device(of_gpu, opt, monkeypatch):
    """A GPU's checkpoint says capturable, with which a CPU's Adam would fail, and the other way round."""
    with monkeypatch.context() as patch:
        allow_capturable(patch)
        net, optimizer, step = set_up(opt, graph=of_gpu)
        run(step, optimizer)
        saved = saved_by(net, optimizer)
        expected = run(step, optimizer)
    if not of_gpu:
        allow_capturable(monkeypatch)
    _, optimizer2, step2 = resumed(saved, opt, graph=not of_gpu)
    assert optimizer2.param_groups[0]["capturable"] is not of_gpu
    assert_close(run(step2, optimizer2), expected, rtol=1e-4, atol=1e-4)


def test_loaded_momentum_has_the_parameters_memory_format():
    """A file's need not have it, and steps would be slow."""
    net, optimizer, step = set_up()
    run(step, optimizer)
    _, optimizer2, _ = resumed(saved_by(net, optimizer))
    assert all(moment["momentum_buffer"].stride() == p.stride() for p, moment in optimizer2.state.items())
    assert any(p.stride() != p.contiguous().stride() for p in optimizer2.state)
    assert_close(optimizer2.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
