"""The efficient dense block is the textbook's function: outputs, gradients, running statistics; and it is taken only
where that is so. Each test of exactness asserts the path, since a silent fallback would make them all pass."""

import contextlib
import copy
import random
from statistics import median

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from common import relative

import densenet
from densenet import DenseNet

PATHS = {True: "efficient", "max": "max", False: "textbook"}


def paths(net: DenseNet) -> list[str]:
    return [net.dense1.last_path, net.dense2.last_path, net.dense3.last_path]


def pair(efficient, seed=0, **arguments) -> tuple[DenseNet, DenseNet]:
    """The same network twice: textbook and efficient, with weights that are not the initial ones."""
    torch.manual_seed(seed)
    textbook = DenseNet(**arguments, efficient=False)
    for p in textbook.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.3, 0.6)  # gammas of both signs
    net = DenseNet(**arguments, efficient=efficient)
    net.load_state_dict(textbook.state_dict())
    return textbook, net


def step(net: DenseNet, x: torch.Tensor, labels: torch.Tensor, autocast=None) -> dict[str, torch.Tensor]:
    """-> everything a training step computes, by name"""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        out = net(x)
    F.nll_loss(out.float() if autocast else out, labels).backward()
    return {"out": out.detach(), "x": x.grad, **{f"grad {k}": p.grad for k, p in net.named_parameters()},
            **{k: b.clone() for k, b in net.named_buffers()}}


def assert_exact(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Asserts that two results of ``step`` in float64 agree to 1e-10."""
    # a gradient that is nothing but rounding (a bias before a norm, say) is compared on the scale of all gradients
    scale = max(v.norm().item() for k, v in expected.items() if k.startswith("grad"))
    for key, value in expected.items():
        error = (found[key].double() - value.double()).norm().item()
        assert error <= 1e-10 * max(value.double().norm().item(), 1e-4 * scale), key


def inject_masks(monkeypatch) -> None:
    """Dropout whose mask depends only on which call of the step it is, and on the element: alike in any layout."""
    calls = []

    def dropout(x, p=0.5, training=True):
        generator = torch.Generator().manual_seed(len(calls))
        calls.append(p)
        mask = torch.rand(x.shape, generator=generator, dtype=torch.float64) >= p
        return x * mask.to(x.dtype) / (1 - p)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(densenet, "_restart_masks", calls.clear, raising=False)


def configuration(seed: int) -> dict:
    draw = random.Random(seed)
    bottleneck = draw.random() < 0.6
    return dict(
        arguments=dict(growthRate=draw.choice([1, 3, 4, 7, 12]), bottleneck=bottleneck,
                       depth=4 + (6 if bottleneck else 3) * draw.choice([1, 2, 4]),
                       reduction=draw.choice([0.5, 1.0, 0.37]), initChannels=draw.choice([None, 5, 16]),
                       dropRate=draw.choice([0.0, 0.0, 0.2, 0.5]), inChannels=draw.choice([1, 3])),
        n=draw.choice([1, 2, 5]), height=draw.choice([8, 9, 16, 21]), width=draw.choice([8, 11, 16]),
        momentum=draw.choice([0.1, 0.01, 1.0]), eps=draw.choice([1e-5, 1e-3]),
        efficient=draw.choice([True, "max"]), channels_last=draw.random() < 0.5, tile=draw.choice([2 * 88, 16384]))


@pytest.mark.parametrize("seed", range(24))
def test_exact_in_float64(seed, monkeypatch):
    c = configuration(seed)
    textbook, net = pair(c["efficient"], seed, **c["arguments"])
    x = torch.randn(c["n"], c["arguments"]["inChannels"], c["height"], c["width"], dtype=torch.float64)
    if c["channels_last"]:
        x = x.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (c["n"],))
    inject_masks(monkeypatch)
    if c["arguments"]["dropRate"] == 0:  # the masks would be others for several tiles
        monkeypatch.setattr(densenet, "TILE", c["tile"])
    results = []
    for each in (textbook, net):
        for m in each.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum, m.eps = c["momentum"], c["eps"]
        each.double()
        densenet._restart_masks()
        results.append(step(each, x, labels))
    assert paths(net) == [PATHS[c["efficient"]]] * 3 and paths(textbook) == ["textbook"] * 3
    assert_exact(*results)


@pytest.mark.slow
@pytest.mark.parametrize(("autocast", "allowed"), [(None, 2.0), (torch.bfloat16, 1.2)])
@pytest.mark.parametrize("efficient", [True, "max"])
def test_float32_and_bfloat16_are_no_worse_than_the_textbook(efficient, autocast, allowed):
    """Errors against float64: the median over all tensors, since a ReLU that flips at zero, on either side, puts 1e-3
    into some gradients; the mean over some seeds."""
    errors = {"textbook": 0.0, "ours": 0.0}
    for seed in range(4):
        textbook, net = pair(efficient, seed, growthRate=8, depth=22)
        for each in (textbook, net):
            for m in each.modules():
                if isinstance(m, nn.BatchNorm2d):
                    nn.init.ones_(m.weight), nn.init.zeros_(m.bias)
        x, labels = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
        truth = step(copy.deepcopy(textbook).double(), x.double(), labels)
        for name, each in (("textbook", textbook), ("ours", net)):
            found = step(each, x, labels, autocast)
            errors[name] += median(relative(found[k], v) for k, v in truth.items() if v.dtype == torch.float64)
        assert paths(net) == [PATHS[efficient]] * 3
    assert errors["ours"] <= allowed * errors["textbook"], errors


def test_running_statistics_are_updated_once_a_step():
    """The defect of checkpointing implementations: buffers updated by the recomputation as well."""
    for efficient in (True, "max"):
        textbook, net = pair(efficient, growthRate=4, depth=16)
        for _ in range(3):
            x, labels = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
            step(textbook, x, labels), step(net, x, labels)
        assert paths(net) == [PATHS[efficient]] * 3
        for (key, a), b in zip(net.named_buffers(), textbook.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=key)
            if key.endswith("num_batches_tracked"):
                assert a == 3, key


def test_every_parameter_gets_its_gradient_also_when_the_input_wants_none():
    textbook, net = pair(True, growthRate=4, depth=16)
    x, labels = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    for each in (textbook.double(), net.double()):
        F.nll_loss(each(x.double()), labels).backward()  # the image needs no gradient
    assert paths(net) == ["efficient"] * 3
    for (key, p), q in zip(net.named_parameters(), textbook.parameters(), strict=True):
        assert p.grad is not None and relative(p.grad, q.grad) < 1e-9, key


@pytest.mark.parametrize("efficient", [False, True, "max"])
def test_dropout_drops_on_every_path(efficient):
    net = DenseNet(growthRate=4, depth=16, dropRate=0.5, efficient=efficient)
    x = torch.randn(4, 3, 16, 16)
    torch.manual_seed(0)
    a = net(x)
    assert paths(net) == [PATHS[efficient]] * 3
    assert not torch.equal(a, net(x))  # other masks
    torch.manual_seed(0)
    assert torch.equal(a, net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("tile", [64, 16384])  # three tiles in the first block, and one
def test_dropout_with_torchs_own_masks_has_the_right_gradient(tile, monkeypatch):
    """By finite differences along a random direction, the masks held by the seed."""
    monkeypatch.setattr(densenet, "TILE", tile)
    for efficient in (True, "max"):
        net = pair(efficient, growthRate=4, depth=16, dropRate=0.3)[1].double()
        x, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.randint(10, (3,))

        def loss(net=net, x=x, labels=labels):
            torch.manual_seed(5)
            return F.nll_loss(net(x), labels)

        loss().backward()
        assert paths(net) == [PATHS[efficient]] * 3
        directions = [torch.randn_like(p) for p in net.parameters()]
        slope = sum((p.grad * d).sum() for p, d in zip(net.parameters(), directions, strict=True)).item()
        step, values = 1e-7, []
        with torch.no_grad():
            for sign in (1, -2):
                for p, d in zip(net.parameters(), directions, strict=True):
                    p += sign * step * d
                values.append(loss().item())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)


def test_gradients_accumulate_and_frozen_parameters_stay():
    textbook, net = pair(True, growthRate=4, depth=16)
    for each in (textbook, net):
        each.double()
        for key, p in each.named_parameters():
            p.requires_grad_("dense1" not in key and "bn2" not in key)
        for seed in (1, 2):
            x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
            F.nll_loss(each(x), torch.tensor([1, 2])).backward()
    assert paths(net) == ["efficient"] * 3
    for (key, p), q in zip(net.named_parameters(), textbook.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), key
        if p.grad is not None:
            assert relative(p.grad, q[1].grad) < 1e-9, key


@pytest.mark.parametrize("tile", [64, 16384])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_gradients_are_of_their_parameters_dtype_and_can_be_changed_in_place(autocast, tile, monkeypatch):
    monkeypatch.setattr(densenet, "TILE", tile)
    net = DenseNet(growthRate=4, depth=10)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = net(torch.randn(4, 3, 8, 8)).sum()
    parameters = [p for name, p in net.named_parameters() if "fc" not in name]  # torch's own are views there
    gradients = torch.autograd.grad(loss, parameters)
    assert paths(net) == ["efficient"] * 3
    before = [gradient.clone() for gradient in gradients]
    for p, gradient, value in zip(parameters, gradients, before, strict=True):
        assert gradient.dtype == p.dtype and torch.equal(gradient, value)  # no other gradient's change has reached it
        gradient.add_(p)


@pytest.mark.parametrize("efficient", [True, False])
def test_a_block_whose_reader_gives_no_gradient_gives_none(efficient):
    class WithoutGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    net = DenseNet(4, 10, efficient=efficient)
    (WithoutGradient.apply(net(torch.randn(2, 3, 8, 8))).sum() + net.fc.weight.sum()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["fc.weight"]


def test_second_derivative_is_refused_and_says_what_helps():
    net = DenseNet(growthRate=4, depth=10)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    out = net(x).sum()
    assert paths(net) == ["efficient"] * 3
    with pytest.raises(RuntimeError, match="efficient=False"):
        torch.autograd.grad(out, x, create_graph=True)
    net.efficient = False
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert x.grad is not None


def test_in_place_changes_between_forward_and_backward_are_noticed():
    net = DenseNet(growthRate=4, depth=10)
    out = net(torch.randn(2, 3, 8, 8)).sum()
    with torch.no_grad():
        net.dense2[0].conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_bytes_kept_for_backward():
    """Linear in depth, and the share of the textbook's that the block promises."""
    def kept(efficient, depth):
        storages = {}
        net = DenseNet(growthRate=4, depth=depth, efficient=efficient)
        parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = net(torch.randn(8, 3, 32, 32)).sum()
        assert paths(net) == [PATHS[efficient]] * 3
        del loss
        return sum(size for pointer, size in storages.items() if pointer not in parameters)

    textbook, efficient, least = ([kept(e, depth) for depth in (40, 76, 112)] for e in (False, True, "max"))
    assert efficient[2] - efficient[1] == pytest.approx(efficient[1] - efficient[0], rel=0.02)
    assert least[2] - least[1] == pytest.approx(least[1] - least[0], rel=0.02)
    assert textbook[2] - textbook[1] > 1.3 * (textbook[1] - textbook[0])
    assert efficient[2] < 0.16 * textbook[2] and least[2] < 0.05 * textbook[2]


# --- the allow-list ---------------------------------------------------------------------------------------------

class TwiceNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hook(*_):
    return None


def momentum_none(net):
    net.dense1[1].bn2.momentum = None


CHANGES = {
    "hook on a layer": lambda net: net.dense1[0].register_forward_hook(hook),
    "hook before a convolution": lambda net: net.dense1[1].conv2.register_forward_pre_hook(hook),
    "backward hook on a norm": lambda net: net.dense1[1].bn1.register_full_backward_hook(hook),
    "hook on the transition": lambda net: net.trans1.register_forward_hook(hook),
    "hook on the transition's convolution": lambda net: net.trans1.conv1.register_forward_hook(hook),
    "hook on the block": lambda net: net.dense1.register_forward_hook(hook),
    "another norm": lambda net: setattr(net.dense1[1], "bn1", TwiceNorm(net.dense1[1].bn1.num_features)),
    "an eps of its own": lambda net: setattr(net.dense1[1].bn2, "eps", 1e-3),
    "cumulative running statistics": momentum_none,
    "no running statistics": lambda net: setattr(
        net.dense1[1], "bn1", nn.BatchNorm2d(net.dense1[1].bn1.num_features, track_running_stats=False)),
    "no gamma and beta": lambda net: setattr(
        net.dense1[1], "bn1", nn.BatchNorm2d(net.dense1[1].bn1.num_features, affine=False)),
    "a norm in evaluation mode": lambda net: net.dense1[1].bn2.eval(),
    "the transition's norm in evaluation mode": lambda net: net.trans1.bn1.eval(),
    "a block in evaluation mode": lambda net: net.dense1.eval(),
    "a parametrised convolution": lambda net: nn.utils.parametrizations.weight_norm(net.dense1[1].conv1),
    "a padded convolution": lambda net: setattr(net.dense1[1].conv2, "padding_mode", "reflect"),
    "a dilated convolution": lambda net: (setattr(net.dense1[1].conv2, "dilation", (2, 2)),
                                          setattr(net.dense1[1].conv2, "padding", (2, 2))),
    "a convolution with bias": lambda net: setattr(net.dense1[1], "conv1", nn.Conv2d(12, 16, 1)),
    "a forward of its own": lambda net: setattr(net.dense1[1], "forward", net.dense1[1].forward),
    "unequal dropout": lambda net: setattr(net.dense1[1], "dropRate", 0.1),
    "an unknown layer": lambda net: net.dense1.append(nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_not_the_paper_s_block_takes_the_textbook_layers(change):
    net = DenseNet(growthRate=4, depth=16)
    x = torch.randn(2, 3, 16, 16)
    net(x)
    assert paths(net) == ["efficient"] * 3
    CHANGES[change](net)
    if change != "a padded convolution":  # reflecting needs its own bookkeeping in torch: the path alone is looked at
        net(x).sum().backward()
        assert paths(net) == ["textbook", "efficient", "efficient"]
    else:
        after = [net.trans1.bn1, net.trans1, net.trans1.conv1]
        assert not densenet.can_be_efficient(net.dense1, after, torch.randn(2, 8, 16, 16))


def test_evaluation_and_global_hooks_take_the_textbook_layers():
    net = DenseNet(growthRate=4, depth=10)
    x = torch.randn(2, 3, 16, 16)
    handle = nn.modules.module.register_module_forward_hook(hook)
    net(x)
    handle.remove()
    assert paths(net) == ["textbook"] * 3
    net(x)
    assert paths(net) == ["efficient"] * 3
    net.eval()(x)
    assert paths(net) == ["textbook"] * 3
    DenseNet(growthRate=4, depth=10).half()  # building is enough: float16 has no textbook on every CPU


def test_functorch_and_forward_mode_take_the_textbook_layers():
    net = DenseNet(growthRate=4, depth=10)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0  # torch.func allows no buffer to change: nothing changes
    parameters = {k: p.detach() for k, p in net.named_parameters()}
    x = torch.randn(4, 3, 8, 8)

    def loss(parameters, x):
        return torch.func.functional_call(net, (parameters, {k: b.clone() for k, b in net.named_buffers()}), (x,)).sum()

    gradients = torch.func.grad(loss)(parameters, x)
    assert paths(net) == ["textbook"] * 3
    net.zero_grad()
    net(x).sum().backward()
    assert paths(net) == ["efficient"] * 3
    for key, p in net.named_parameters():
        torch.testing.assert_close(p.grad, gradients[key], rtol=1e-3, atol=1e-4)


def test_no_grad_in_training_mode_updates_the_statistics():
    textbook, net = pair(True, growthRate=4, depth=10)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(x), textbook(x), rtol=1e-3, atol=1e-4)
    assert paths(net) == ["efficient"] * 3
    for a, b in zip(net.buffers(), textbook.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_value_a_channel_is_refused_like_the_textbook():
    net = DenseNet(growthRate=4, depth=10)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(1, 3, 4, 4))  # 1x1 in the last block


@pytest.mark.slow
def test_compiled_and_plain_calls_can_alternate():
    net = DenseNet(growthRate=4, depth=10)
    compiled = torch.compile(net, backend="eager")
    x = torch.randn(2, 3, 16, 16)
    net(x)
    compiled(x)
    net(x)
    assert paths(net) == ["efficient"] * 3
    assert net.bn1.num_batches_tracked == 3
