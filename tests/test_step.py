"""The training step, and what a CUDA graph needs of it, checked without a GPU: by CUDA tensors that have no data, and
by a recorded step (twin.py). Each of these checks is shown to see the faults that it is for."""

import contextlib
import copy
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from common import SMALL, checkpoint, differences, one_line, refused, slow
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from twin import Twin, allow_capturable, storage, tensors, use_twin

import densenet
import train
from densenet import DenseNet
from lib.batches import Batches, epoch_randomness
from lib.cli import Failure
from lib.cuda_graph import GraphedStep
from lib.data import Images
from lib.device import set_up_device
from lib.distributed import World


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

def test_two_ranks_average_to_the_gradient_loss_and_error_of_the_whole_batch():
    """A rank's loss is its sum over half of the global batch size: DDP averages over the ranks."""
    net, _, step = set_up()
    images, labels = next(batches())
    expected = copy.deepcopy(net)
    torch.manual_seed(1)
    loss = F.nll_loss(expected(images), labels) * 2
    loss.backward()
    torch.manual_seed(1)
    found, error = step(images, labels, images_per_rank=4)
    assert_close(found, loss.detach(), rtol=1e-6, atol=0)
    assert_close([p.grad for p in net.parameters()], [p.grad for p in expected.parameters()], rtol=1e-5, atol=1e-7)
    assert error in [25 * wrong for wrong in range(9)]


def test_bf16_convolves_in_bfloat16_and_keeps_weights_statistics_and_loss_in_float32():
    net, optimizer, step = set_up(precision="bf16")
    convolved = []
    net.conv1.register_forward_hook(lambda _, inputs, out: convolved.append(out.dtype))
    result = step(*next(batches()), 8)
    assert convolved == [torch.bfloat16]
    kept = [result, *net.state_dict().values(), *(p.grad for p in net.parameters()), *tensors(optimizer.state)]
    assert {value.dtype for value in kept if value.is_floating_point()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert net.eval()(next(batches())[0]).dtype == torch.float32  # log-probabilities


@pytest.mark.parametrize(("side", "batchSz", "size"), [(32, 300, 300), (64, 16, 62)])
def test_evaluation_takes_as_many_pixels_as_250_images_of_32x32_or_a_batch(side, batchSz, size):
    sizes, cpu = [], torch.device("cpu")
    images = SimpleNamespace(device=cpu, height=side, width=side, n=1, plain=lambda size, *_: sizes.append(size) or [])
    train.evaluate(torch.nn.Identity(), images, SimpleNamespace(batchSz=batchSz), World())
    assert sizes == [size]


# --- the device -------------------------------------------------------------------------------------------------

@pytest.fixture
def old_gpu(monkeypatch):
    for name, value in (("device_count", 1), ("is_available", True), ("get_device_capability", (7, 5)),
                        ("get_device_name", "Tesla T4"), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.mark.usefixtures("old_gpu")
def test_a_driver_too_old_for_torch_is_refused_in_a_line_that_names_no_cuda(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(train.main, capsys, "--save", tmp_path / "run")
    assert "the driver may be too old" in said and "train with --no-cuda" in said


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_bf16_and_tf32_are_refused_below_compute_capability_8(precision, capsys, tmp_path):
    said = refused(train.main, capsys, "--save", tmp_path / "run", "--precision", precision)
    assert f"--precision {precision} needs" in said and "8.0; Tesla T4 has 7.5: valid is fp32" in said


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_tf32_is_used_only_if_it_is_asked_for_which_amds_gpus_allow_at_any_capability(precision, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert set_up_device(train.parse_args(["--precision", precision])[0], World()) == torch.device("cuda:0")
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")


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
    """A training step on CUDA tensors without data must stay on the GPU, and wait for nothing."""
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
    assert len(blocks) == (3 if net.efficient else 0)


def test_batches_are_made_on_the_gpu_and_wait_for_nothing():
    random = epoch_randomness(100, seed=1, epoch=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = Images(torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.zeros(100, dtype=torch.long), ["a"])
        batches = Batches(images, [0.5] * 3, [0.25] * 3, torch.device("cuda"))
        for stream in (batches.augmented(random, 64), batches.plain(64)):
            shapes = [(x.shape[0], x.device.type, y.device.type) for x, y, _ in stream]
            assert shapes == [(64, "cuda", "cuda"), (36, "cuda", "cuda")]


# --- a recorded step --------------------------------------------------------------------------------------------

def replay_steps(monkeypatch, opt="sgd", precision="fp32", **arguments):
    """Replays must do what eager steps do, and read nothing but batch, weights and optimizer state."""
    allow_capturable(monkeypatch)
    net, optimizer, step = set_up(opt, precision, graph=True, **arguments)
    net2, optimizer2, step2 = set_up(opt, precision, graph=True, **arguments)
    for _ in range(2):  # then from state as a resumed run has it
        twin = Twin(step2, net2, optimizer2, batch_size=8)
        assert run(twin, optimizer2).equal(run(step, optimizer))
        assert twin.captures == 2  # a new rate is captured again, a smaller batch runs eagerly
        assert_close(state_of(net, optimizer), state_of(net2, optimizer2), rtol=0, atol=0)
        assert twin.graph.outside.keys() <= {storage(tensor) for tensor in (twin.images, twin.labels, *twin.state())}


@pytest.mark.parametrize("check", [step_on_fake_gpu, replay_steps])
@pytest.mark.parametrize(("opt", "precision", "arguments"), [
    ("sgd", "fp32", dict(efficient=True)), ("rmsprop", "bf16", dict(bottleneck=False, dropRate=0)),
    ("sgd", "bf16", dict(efficient=False)), slow("adam", "fp32", dict(efficient="max"))])
def test_a_step_is_one_that_a_graph_can_hold(opt, precision, arguments, check, monkeypatch):
    check(monkeypatch, opt, precision, **arguments)


@pytest.mark.parametrize("check", [step_on_fake_gpu, replay_steps])
@pytest.mark.parametrize("fault", ["reads a value", "makes a constant", "uses a tensor from outside"])
def test_a_step_that_a_graph_cannot_hold_is_seen(fault, check, monkeypatch):
    nll_loss, constant = F.nll_loss, torch.ones(())

    def faulty_loss(output, labels, **how):
        loss = nll_loss(output, labels, **how)
        if fault == "reads a value":
            return loss * max(loss.item(), 1)
        if fault == "makes a constant":
            return loss * torch.tensor(1.0, device=loss.device)
        return loss * constant  # which stands outside, on the CPU

    monkeypatch.setattr(F, "nll_loss", faulty_loss)
    with pytest.raises((DataDependentOutputException, Failure, AssertionError)):
        check(monkeypatch)


def test_a_run_of_replays_is_the_run_of_eager_steps(flags, whole, tmp_path, monkeypatch):
    use_twin(monkeypatch)
    assert train.main([*flags, "--save", str(tmp_path)]) == 0
    assert differences(whole, tmp_path) == []


# --- a capture that fails ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def invalid_capture(*_, **__):
    """Stands for torch.cuda.graph: what fails inside invalidates the capture, so its exit raises, too."""
    try:
        yield
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def failing(monkeypatch, part, kind, message):
    """-> GraphedStep on a CPU, in which the warm-up fails after the weights have moved, or the capture"""
    class Failing(GraphedStep):
        def on_side_stream(self):
            super().step()
            if part == "warm-up":
                raise kind(f"{message}\nmore lines")

        def step(self):  # while it is captured
            raise kind(f"{message}\nmore lines")

    monkeypatch.setattr(torch.cuda, "graph", invalid_capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    return Failing


def test_if_the_step_cannot_be_tried_out_the_run_stays_eager_and_says_so_once(flags, whole, tmp_path, capsys,
                                                                              monkeypatch):
    use_twin(monkeypatch)
    monkeypatch.setattr(train, "GraphedStep", failing(monkeypatch, "warm-up", RuntimeError, "not permitted"))
    assert train.main([*flags, "--save", str(tmp_path)]) == 0
    said = one_line(capsys.readouterr().err, "train.py: warning: ")
    assert "no CUDA graph" in said and "not permitted" in said and "more lines" not in said
    assert differences(whole, tmp_path) == []


def test_a_failed_capture_ends_the_run_which_goes_on_without_a_graph(flags, whole, tmp_path, capsys, monkeypatch):
    use_twin(monkeypatch)
    monkeypatch.setattr(train, "GraphedStep", failing(monkeypatch, "capture", RuntimeError, "not permitted"))
    assert train.main([*flags, "--save", str(tmp_path)]) == 1
    said = one_line(capsys.readouterr().err)
    assert "cannot be captured as a CUDA graph (not permitted); start again with --no-graph" in said
    assert train.main([*flags, "--save", str(tmp_path), "--resume", "--no-graph"]) == 0
    assert {name.partition("/")[2] for name in differences(whole, tmp_path)} == {"flags/no_graph"}


@pytest.mark.parametrize("part", ["warm-up", "capture"])
@pytest.mark.parametrize(("kind", "message"), [(RuntimeError, "CUDA error: out of memory"), (KeyboardInterrupt, "")])
def test_memory_and_ctrl_c_are_not_taken_for_a_graph_that_cannot_be_made(kind, message, part, monkeypatch):
    net, optimizer, step = set_up()
    with pytest.raises(kind, match=f"^{message}\nmore lines$"):
        failing(monkeypatch, part, kind, message)(step, net, optimizer, batch_size=8)(*next(batches()), 8)


# --- the optimizer of a resumed run -----------------------------------------------------------------------------

def test_adams_run_with_a_graph_goes_on_without_and_back(images, tmp_path, monkeypatch):
    """A GPU's checkpoint says capturable, with which a CPU's Adam would fail, and the other way round."""
    argv = ["--data", images, *SMALL, "--opt", "adam", "--save", str(tmp_path), "--resume", "--nEpochs"]
    for epochs, has_graph in (("1", True), ("2", False), ("3", True)):
        with monkeypatch.context() as patch:
            if has_graph:
                use_twin(patch)
            assert train.main([*argv, epochs]) == 0
        assert checkpoint(tmp_path)["optimizer"]["param_groups"][0]["capturable"] is has_graph


def test_loaded_momentum_has_the_parameters_memory_format():
    """A file's need not have it, and steps would be slow."""
    net, optimizer, step = set_up()
    run(step, optimizer)
    progress = dict.fromkeys(("scheduleEpochs", "mean", "std", "epoch", "best", "val", "test", "csvLengths"))
    saved = copy.deepcopy(train.state_dicts(net, optimizer) | progress)
    net.to(memory_format=torch.channels_last)
    train.load_checkpoint(saved, net, optimizer, {}, train.parse_args([])[0])
    assert all(moment["momentum_buffer"].stride() == p.stride() for p, moment in optimizer.state.items())
    assert any(p.stride() != p.contiguous().stride() for p in optimizer.state)
    assert_close(optimizer.state_dict()["state"], saved["optimizer"]["state"], rtol=0, atol=0)
