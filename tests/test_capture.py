"""What a CUDA graph needs of the training step, checked without a GPU: by fake CUDA tensors, by a recorded step, and by
a stand-in for torch.cuda.graph. Each check is shown to see the fault that it is for."""

import functools
import signal

import pytest
import torch
import torch.nn.functional as F
from common import SMALL
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from twin import Twin, allow_capturable, storage, tensors

import densenet
import train
from densenet import DenseNet
from lib.batches import Batches, draw
from lib.cuda_graph import GraphedStep
from lib.image_set import ImageSet
from lib.signals import Stopped


class Saved:
    """What autograd keeps for EfficientBlock, whose two passes are called here without it."""

    def save_for_backward(self, *tensors):
        self.tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


def both_passes(x, spec, *parameters):
    """EfficientBlock.apply and the backward pass at once: autograd's engine would ask for a real GPU."""
    with torch.no_grad():
        saved = Saved()
        results = densenet.EfficientBlock.forward(saved, x, spec, *parameters)
        dx, _, *gradients = densenet.EfficientBlock.gradients(spec, results[0], saved.tensors, len(parameters))
    for tensor, gradient in zip((x, *parameters), (dx, *gradients), strict=True):
        assert gradient.shape == tensor.shape and gradient.device == tensor.device
        assert gradient.dtype == (spec.dtype if gradient is dx else parameters[0].dtype)
    return results[0].to(parameters[0].dtype), *results[1:]


class OnGpu(TorchDispatchMode):
    """Refuses a tensor that is not on the GPU, also for the moment in which torch.tensor(v, device="cuda") has one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert {tensor.device.type for tensor in tensors(args, kwargs, out)} <= {"cuda"}, f"{func} of a CPU tensor"
        return out


def step_on_fake_gpu(monkeypatch, arguments, opt, dtype=torch.float32):
    """A training step on CUDA tensors without data -> the network"""
    monkeypatch.setattr(densenet, "can_be_efficient", lambda block, after, x: True)  # also for fake tensors
    monkeypatch.setattr(densenet, "activation_dtype", lambda x, parameter: dtype)
    monkeypatch.setattr(densenet.EfficientBlock, "apply", both_passes)
    with FakeTensorMode():
        with torch.device("cuda"):
            net = DenseNet(4, 10, **arguments).train()
            images, labels = torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
        more = {"momentum": 0.9, "nesterov": True} if opt == "SGD" else {"capturable": True}
        optimizer = getattr(torch.optim, opt)(net.parameters(), lr=0.1, weight_decay=1e-4, **more)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()  # its state is made before a capture

        def set_gradients(loss):
            for p in net.parameters():
                p.grad = torch.ones_like(p)

        monkeypatch.setattr(torch.Tensor, "backward", set_gradients)
        with OnGpu():
            result = train.train_step(net, optimizer, "fp32", images, labels, 8)
        assert result.device.type == "cuda" and result.shape == (2,)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("arguments", "opt"), [
    (dict(efficient=True), "SGD"), (dict(efficient="max"), "Adam"), (dict(efficient=True, dropRate=0.2), "RMSprop"),
    (dict(efficient="max", dropRate=0.2), "SGD"), (dict(efficient=True, bottleneck=False, dropRate=0.2), "SGD"),
    (dict(efficient=False), "SGD")])
def test_a_step_on_cuda_tensors_without_data_stays_on_the_gpu_and_waits_for_nothing(arguments, opt, dtype, monkeypatch):
    """Needs no GPU: fake tensors have a device and a shape, and refuse what mixes devices or reads a value."""
    net = step_on_fake_gpu(monkeypatch, arguments, opt, dtype)
    assert net.dense1.last_path == {True: "efficient", "max": "max", False: "textbook"}[arguments["efficient"]]


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
        step_on_fake_gpu(monkeypatch, dict(efficient=True), "SGD")


def test_batches_are_made_on_the_gpu_and_wait_for_nothing():
    random = draw(100, seed=1, epoch=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, labels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.zeros(100, dtype=torch.long)
        batches = Batches(ImageSet(images, labels, ["a"]), [0.5] * 3, [0.25] * 3, torch.device("cuda"))
        for stream in (batches.augmented(random, 64), batches.plain(64)):
            shapes = [(x.shape[0], x.device.type, y.device.type) for x, y, _ in stream]
            assert shapes == [(64, "cuda", "cuda"), (36, "cuda", "cuda")]


# --- closed capture ---------------------------------------------------------------------------------------------

def recorded(monkeypatch, opt="SGD", efficient=True, eager=train.train_step, **arguments):
    """-> what keeps the recorded step from being a closed one, after some replays"""
    allow_capturable(monkeypatch)
    torch.manual_seed(0)
    net = DenseNet(4, 10, efficient=efficient, **arguments).train()
    more = {"momentum": 0.9} if opt == "SGD" else {"capturable": True}
    optimizer = getattr(torch.optim, opt)(net.parameters(), lr=0.01, **more)
    step = Twin(functools.partial(eager, net, optimizer, "fp32"), net, optimizer, batch_size=8)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))
    step(images, labels, 8)
    may_read = {storage(tensor) for tensor in (step.images, step.labels, *step.state())}
    problems = [f"reads {tuple(tensor.shape)} from outside" for key, tensor in step.graph.outside.items()
                if key not in may_read]
    where = [tensor.data_ptr() for tensor in step.state()]
    for _ in range(2):
        step(images, labels, 8)
        step.eager(images[:5], labels[:5], 8)  # a smaller batch
    return problems + ["state has moved"] * (where != [tensor.data_ptr() for tensor in step.state()])


@pytest.mark.parametrize("opt", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize(("efficient", "dropRate", "bottleneck"), [
    (True, 0, True), ("max", 0.2, True), (False, 0.2, True), (True, 0.2, False)])
def test_a_captured_step_reads_nothing_but_batch_weights_and_optimizer_state(opt, efficient, dropRate, bottleneck,
                                                                             monkeypatch):
    assert recorded(monkeypatch, opt, efficient, dropRate=dropRate, bottleneck=bottleneck) == []


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_a_captured_step_that_reads_something_else_is_seen(fault, monkeypatch):
    monkeypatch.setattr(F, "nll_loss", faulty_loss(fault))
    assert recorded(monkeypatch) == ["reads () from outside"]


def test_a_captured_step_that_replaces_a_buffer_or_reads_a_value_is_seen(monkeypatch):
    def replacing(net, *rest):
        net.bn1.running_mean = net.bn1.running_mean * 1
        return train.train_step(net, *rest)

    assert "state has moved" in recorded(monkeypatch, eager=replacing)
    monkeypatch.setattr(F, "nll_loss", faulty_loss("reads a value"))
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorded(monkeypatch)


# --- a capture that fails ---------------------------------------------------------------------------------------

class FailingGraph:
    """Stands for torch.cuda.graph: what fails inside invalidates the capture, so its exit raises too, and leaves the
    stream as it is."""

    capturing = False

    def __init__(self, graph, stream=None):
        pass

    def __enter__(self):
        FailingGraph.capturing = True

    def __exit__(self, *_):
        FailingGraph.capturing = False
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore lines")


class OnCpu(GraphedStep):
    def on_side_stream(self):
        self.step()


@pytest.fixture
def failing_capture(monkeypatch):
    """-> a function: with it, each training's capture fails by this error"""
    def fail(error):
        def loss(*args, original=F.nll_loss, **how):
            if FailingGraph.capturing:
                raise error
            return original(*args, **how)

        monkeypatch.setattr(torch.cuda, "graph", FailingGraph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(train, "GraphedStep", OnCpu)
        monkeypatch.setattr(train, "uses_graph", lambda args, device, world: not args.no_graph)
        monkeypatch.setattr(F, "nll_loss", loss)
    return fail


def test_a_failed_capture_ends_the_run_which_goes_on_without_a_graph(failing_capture, images, tmp_path, capsys):
    failing_capture(RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines"))
    argv = ["--data", images, *SMALL, "--nEpochs", "1", "--save", str(tmp_path / "run")]
    assert train.main(argv) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "operation not permitted when stream is capturing" in err
    assert "previous error" not in err and "--no-graph" in err and "Traceback" not in err
    assert train.main([*argv, "--resume", "--no-graph"]) == 0
    assert (tmp_path / "run/test.csv").read_text().count("\n") == 2


@pytest.mark.parametrize(("error", "status", "told"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "out of memory"),
    (RuntimeError("CUDA error: out of memory"), 1, "out of memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 1,
     "out of memory"),
    (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM")])
def test_memory_and_a_signal_are_not_taken_for_a_failed_capture(error, status, told, failing_capture, images, tmp_path,
                                                                capsys):
    failing_capture(error)
    argv = ["--data", images, *SMALL, "--nEpochs", "1", "--save", str(tmp_path / "run")]
    assert train.main(argv) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and told in err
