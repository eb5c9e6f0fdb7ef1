"""The training step: precision, and one CUDA graph against the eager step, on a CPU by a twin of the graph."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import slow
from twin import Twin, allow_capturable

import train
from densenet import DenseNet
from lib.distributed import World
from lib.image_set import ImageSet
from lib.sets import Sets


def graphed(net, optimizer, precision):
    return Twin(functools.partial(train.train_step, net, optimizer, precision), net, optimizer, batch_size=8)


def set_up(opt, device="cpu", capturable=False, **arguments):
    torch.manual_seed(0)
    net = DenseNet(4, 10, dropRate=0.2, **arguments).to(device).train()
    more = {"momentum": 0.9, "nesterov": True} if opt == "SGD" else {"capturable": capturable}
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


@pytest.mark.slow
@pytest.mark.parametrize("opt", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize(("precision", "efficient"), [("fp32", True), ("fp32", "max"), ("fp32", False), ("bf16", True)])
def test_graphed_step_does_what_the_eager_one_does(opt, precision, efficient, monkeypatch):
    """Warm-up leaves nothing behind: weights, statistics, momentum and random numbers are the eager step's."""
    allow_capturable(monkeypatch)
    net, optimizer = set_up(opt, capturable=True, efficient=efficient)
    eager = run(lambda *batch: train.train_step(net, optimizer, precision, *batch), optimizer)
    net2, optimizer2 = set_up(opt, capturable=True, efficient=efficient)
    step = graphed(net2, optimizer2, precision)
    assert run(step, optimizer2).equal(eager)
    assert step.captures == 2  # one for each rate; the smaller batch has none
    assert_same(state_of(net, optimizer), state_of(net2, optimizer2))


@pytest.mark.slow
def test_resumed_graph_has_the_momentum_of_the_checkpoint():
    net, optimizer = set_up("SGD")
    run(lambda *batch: train.train_step(net, optimizer, "fp32", *batch), optimizer)
    net2, optimizer2 = copy.deepcopy((net, optimizer))
    eager = run(lambda *batch: train.train_step(net, optimizer, "fp32", *batch), optimizer)
    assert run(graphed(net2, optimizer2, "fp32"), optimizer2).equal(eager)
    assert_same(state_of(net, optimizer), state_of(net2, optimizer2))


@pytest.mark.parametrize("failing", ["warm_up", slow("on_side_stream")])
def test_if_the_warm_up_fails_the_step_is_eager_and_says_so_once(failing, capsys, monkeypatch):
    net, optimizer = set_up("SGD")
    eager = run(lambda *batch: train.train_step(net, optimizer, "fp32", *batch), optimizer)
    net2, optimizer2 = set_up("SGD")
    step = graphed(net2, optimizer2, "fp32")

    def fail():
        if failing == "on_side_stream":
            step.step()  # the weights have moved by then
        raise RuntimeError("not permitted\nwhen capturing")

    monkeypatch.setattr(step, failing, fail)
    assert run(step, optimizer2).equal(eager)
    assert_same(state_of(net, optimizer), state_of(net2, optimizer2))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no CUDA graph" in err and "not permitted" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_adam_moves_between_devices():
    """A GPU's checkpoint says capturable, with which a CPU's Adam would fail; and the other way round."""
    args, _ = train.parse_args(["--opt", "adam", "--depth", "10", "--growthRate", "4"])
    images = ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1), list("0123456789"))
    sets = Sets(images, None, images, [0.5] * 3, [0.25] * 3, {})

    def make(device, saved):
        return train.make_net_and_optimizer(args, sets, torch.device(device), World(), {"path": "efficient"}, saved)

    net, optimizer = make("cpu", None)
    step = functools.partial(train.train_step, net, optimizer, "fp32")
    run(step, optimizer)
    saved = {"model": net.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}
    for group in saved["optimizer"]["param_groups"]:
        group["capturable"] = True
    net2, optimizer2 = make("cpu", copy.deepcopy(saved))
    assert run(functools.partial(train.train_step, net2, optimizer2, "fp32"), optimizer2).equal(run(step, optimizer))
    optimizer3 = make("meta", saved)[1]
    assert not optimizer3.param_groups[0]["capturable"]  # only under a CUDA graph it is


@pytest.mark.parametrize(("flags", "device", "ranks", "graph"), [
    ([], "cuda", 1, True), (["--no-graph"], "cuda", 1, False), ([], "cuda", 2, False), ([], "cpu", 1, False)])
def test_which_steps_are_a_graph(flags, device, ranks, graph):
    args, _ = train.parse_args(flags)
    assert train.uses_graph(args, torch.device(device), World(size=ranks, local_size=ranks)) == graph


@pytest.mark.parametrize(("device", "side", "training_size", "size"), [
    ("cuda", 32, 64, 1000), ("cuda", 224, 16, 20), ("cuda", 224, 64, 64), ("cpu", 32, 64, 250), ("cpu", 512, 1, 1)])
def test_evaluation_takes_as_many_pixels_whatever_the_image_size(device, side, training_size, size):
    batches = SimpleNamespace(device=torch.device(device), height=side, width=side)
    assert train.evaluation_size(batches, training_size) == size


def test_out_of_memory_is_not_taken_for_an_impossible_capture(monkeypatch):
    net, optimizer = set_up("SGD")
    step = graphed(net, optimizer, "fp32")
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
