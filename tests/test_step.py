"""The training step: precision, and one CUDA graph against the eager step, on a CPU by a twin of the graph."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import densenet
import runs
import train
from densenet import DenseNet


class Twin(runs.GraphedStep):
    """On a CPU: what a graph would replay runs instead, on the same tensors."""

    captures = 0

    def on_side_stream(self):
        self.step()

    def capture(self):
        self.captures += 1
        return self

    def replay(self):
        self.step()


def graphed(kind, net, optimizer, precision):
    return kind(functools.partial(train.train_step, net, optimizer, precision), net, optimizer, batchSz=8)


def set_up(opt, device="cpu", **arguments):
    torch.manual_seed(0)
    net = DenseNet(4, 10, dropRate=0.2, **arguments).to(device).train()
    more = {"momentum": 0.9, "nesterov": True} if opt == "SGD" else {"capturable": device == "cuda"}
    return net, getattr(torch.optim, opt)(net.parameters(), lr=0.05, weight_decay=1e-4, **more)


def batches(device="cpu"):
    """Two epochs, the last batch of each is smaller."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for n in (8, 8, 8, 3):
            images = torch.randn(n, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
            yield images.to(device), torch.randint(10, (n,), generator=generator).to(device)


def run(step, optimizer, device="cpu"):
    """-> the metrics; the rate falls between the epochs"""
    torch.manual_seed(1)
    results = []
    for i, (images, labels) in enumerate(batches(device)):
        optimizer.param_groups[0]["lr"] = 0.05 if i < 4 else 0.005
        results.append(step(images, labels, len(images)).clone())
    return torch.stack(results)


def state_of(net, optimizer):
    moments = {f"{i}.{name}": value for i, state in optimizer.state_dict()["state"].items()
               for name, value in state.items()}
    return net.state_dict() | moments


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], **tolerance or {"rtol": 0, "atol": 0},
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("opt", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize(("precision", "efficient"), [("fp32", True), ("fp32", "max"), ("fp32", False), ("bf16", True)])
def test_graphed_step_does_what_the_eager_one_does(opt, precision, efficient):
    """Warm-up leaves nothing behind: weights, statistics, momentum and random numbers are the eager step's."""
    net, optimizer = set_up(opt, efficient=efficient)
    eager = run(lambda *batch: train.train_step(net, optimizer, precision, *batch), optimizer)
    net2, optimizer2 = set_up(opt, efficient=efficient)
    step = graphed(Twin, net2, optimizer2, precision)
    assert run(step, optimizer2).equal(eager)
    assert step.captures == 2  # one for each rate; the smaller batch has none
    assert_same(state_of(net, optimizer), state_of(net2, optimizer2))


def test_resumed_graph_has_the_momentum_of_the_checkpoint():
    net, optimizer = set_up("SGD")
    run(lambda *batch: train.train_step(net, optimizer, "fp32", *batch), optimizer)
    net2, optimizer2 = copy.deepcopy((net, optimizer))
    eager = run(lambda *batch: train.train_step(net, optimizer, "fp32", *batch), optimizer)
    assert run(graphed(Twin, net2, optimizer2, "fp32"), optimizer2).equal(eager)
    assert_same(state_of(net, optimizer), state_of(net2, optimizer2))


@pytest.mark.parametrize("failing", ["warm_up", "on_side_stream", "capture"])
def test_where_capture_is_impossible_the_step_is_eager_and_says_so_once(failing, capsys, monkeypatch):
    net, optimizer = set_up("SGD")
    eager = run(lambda *batch: train.train_step(net, optimizer, "fp32", *batch), optimizer)
    net2, optimizer2 = set_up("SGD")
    step = graphed(Twin, net2, optimizer2, "fp32")

    def fail():
        if failing == "on_side_stream":
            step.step()  # the weights have moved by then
        raise RuntimeError("not permitted\nwhen capturing")

    monkeypatch.setattr(step, failing, fail)
    assert run(step, optimizer2).equal(eager)
    assert_same(state_of(net, optimizer), state_of(net2, optimizer2))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no CUDA graph" in err and "not permitted" in err


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_adam_moves_between_devices():
    """A GPU's checkpoint says capturable, with which a CPU's Adam would fail; and the other way round."""
    args, _ = train.parse_args(["--opt", "adam", "--depth", "10", "--growthRate", "4"])
    sets = train.data.ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1), list("0123456789"))
    net, optimizer = train.make_net_and_optimizer(args, sets, torch.device("cpu"), None)
    step = functools.partial(train.train_step, net, optimizer, "fp32")
    run(step, optimizer)
    saved = {"model": net.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}
    for group in saved["optimizer"]["param_groups"]:
        group["capturable"] = True
    net2, optimizer2 = train.make_net_and_optimizer(args, sets, torch.device("cpu"), copy.deepcopy(saved))
    assert run(functools.partial(train.train_step, net2, optimizer2, "fp32"), optimizer2).equal(run(step, optimizer))
    optimizer3 = train.make_net_and_optimizer(args, sets, torch.device("meta"), saved)[1]
    assert not optimizer3.param_groups[0]["capturable"]  # only a GPU's is


def test_out_of_memory_is_not_taken_for_an_impossible_capture(monkeypatch):
    net, optimizer = set_up("SGD")
    step = graphed(Twin, net, optimizer, "fp32")
    monkeypatch.setattr(step, "warm_up", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        run(step, optimizer)


def test_bf16_keeps_weights_statistics_and_loss_in_float32():
    net, optimizer = set_up("SGD")
    seen = []
    net.conv1.register_forward_hook(lambda _, inputs, out: seen.append(out.dtype))
    images, labels = next(batches())
    loss = train.train_step(net, optimizer, "bf16", images, labels, 8)[0]
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in net.state_dict().values() if value.is_floating_point())
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    fresh, _ = set_up("SGD")
    with torch.autocast("cpu", torch.bfloat16):
        assert fresh.eval()(images).dtype == torch.float32  # log-probabilities


def test_the_loss_is_the_mean_and_the_share_scales_it():
    net, optimizer = set_up("SGD")
    images, labels = next(batches())
    twin = copy.deepcopy(net)
    torch.manual_seed(1)
    expected = F.nll_loss(twin(images), labels)
    expected.backward()
    torch.manual_seed(1)
    loss, error = train.train_step(net, optimizer, "fp32", images, labels, 8)
    torch.testing.assert_close(loss, expected.detach())
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert 0 <= error <= 100


class Saved:
    """What autograd keeps for EfficientBlock, whose two passes are called here without it."""

    def save_for_backward(self, *tensors):
        self.tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass


def both_passes(x, spec, *parameters):
    """EfficientBlock.apply and the backward pass at once: autograd's engine would ask for a real GPU."""
    with torch.no_grad():
        saved = Saved()
        results = densenet.EfficientBlock.forward(saved, x, spec, *parameters)
        dx, _, *gradients = densenet.EfficientBlock.gradients(spec, results[0], saved.tensors, len(parameters))
    for tensor, gradient in zip((x, *parameters), (dx, *gradients), strict=True):
        assert gradient.shape == tensor.shape and gradient.device == tensor.device
        assert gradient.dtype == parameters[0].dtype
    return results[0].to(parameters[0].dtype), *results[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("arguments", "opt"), [
    (dict(efficient=True), "SGD"), (dict(efficient="max"), "Adam"), (dict(efficient=True, dropRate=0.2), "RMSprop"),
    (dict(efficient="max", dropRate=0.2), "SGD"), (dict(efficient=True, bottleneck=False, dropRate=0.2), "SGD"),
    (dict(efficient=False), "SGD")])
def test_a_step_on_cuda_tensors_without_data_stays_on_the_gpu_and_waits_for_nothing(arguments, opt, dtype, monkeypatch):
    """Needs no GPU: fake tensors have a device and a shape, and refuse what mixes devices or reads a value."""
    monkeypatch.setattr(densenet, "can_be_efficient", lambda block, after, x: True)  # also for fake tensors
    monkeypatch.setattr(densenet, "activation_dtype", lambda x, parameter: dtype)
    monkeypatch.setattr(densenet.EfficientBlock, "apply", both_passes)
    with FakeTensorMode():
        with torch.device("cuda"):
            net = DenseNet(4, 10, **arguments).train()
            images, labels = torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
        more = {"momentum": 0.9, "nesterov": True} if opt == "SGD" else {"capturable": True}
        optimizer = getattr(torch.optim, opt)(net.parameters(), lr=0.1, weight_decay=1e-4, **more)

        def set_gradients(loss):
            for p in net.parameters():
                p.grad = torch.ones_like(p)

        monkeypatch.setattr(torch.Tensor, "backward", set_gradients)
        result = train.train_step(net, optimizer, "fp32", images, labels, 8)
        assert result.device.type == "cuda" and result.shape == (2,)
    assert net.dense1.last_path == {True: "efficient", "max": "max", False: "textbook"}[arguments["efficient"]]


def test_batches_are_made_on_the_gpu_and_wait_for_nothing():
    random = data.draw(100, seed=1, epoch=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, labels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.zeros(100, dtype=torch.long)
        batches = data.Batches(data.ImageSet(images, labels, ["a"]), [0.5] * 3, [0.25] * 3, torch.device("cuda"))
        for stream in (batches.augmented(random, 64), batches.plain(64)):
            shapes = [(x.shape[0], x.device.type, y.device.type) for x, y in stream]
            assert shapes == [(64, "cuda", "cuda"), (36, "cuda", "cuda")]


def test_what_would_wait_or_mix_devices_is_seen():
    with FakeTensorMode():
        on_gpu = torch.ones(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            on_gpu.sum().item()
        with pytest.raises(RuntimeError, match="device"):
            on_gpu + torch.ones(3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("opt", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize("efficient", [True, False])
def test_on_a_gpu_the_graph_does_what_the_eager_step_does(opt, efficient):
    net, optimizer = set_up(opt, "cuda", efficient=efficient)
    eager = run(lambda *batch: train.train_step(net, optimizer, "fp32", *batch), optimizer, "cuda")
    net2, optimizer2 = set_up(opt, "cuda", efficient=efficient)
    step = graphed(runs.GraphedStep, net2, optimizer2, "fp32")
    torch.testing.assert_close(run(step, optimizer2, "cuda"), eager, rtol=1e-4, atol=1e-4)
    assert step.possible
    assert_same(state_of(net, optimizer), state_of(net2, optimizer2), rtol=1e-3, atol=1e-4)
