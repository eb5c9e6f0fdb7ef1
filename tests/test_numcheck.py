"""numcheck.py: correct gradients pass, wrong ones are found, and the check itself is sound."""

import re

import matplotlib.image
import pytest
import torch
import torch.nn as nn
from common import one_line, refused
from faults import plant, scaled, scaled_in_block, without_mean

import densenet
import numcheck
from densenet import Bottleneck, DenseNet, SingleLayer, Transition
from lib.compare import settle_kinks

SMALL = ["--depth", "10", "--growthRate", "3"]
NAMES = ["SingleLayer", "Bottleneck", "Transition", "efficient blocks of SingleLayer", "efficient blocks of Bottleneck",
         "efficient blocks of Bottleneck, max", "network, textbook", "network, efficient", "network, max"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def first_wrong(module, *size):
    """-> the first gradient of the module that the check finds wrong"""
    case = numcheck.make_case("", module, torch.randn(size), "cpu", by_element=not isinstance(module, DenseNet))
    return numcheck.check_case(case)[0]


def test_all_gradients_are_right_and_the_figure_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(numcheck, "PLOTTED_STEPS", numcheck.PLOTTED_STEPS[::6])
    assert numcheck.main([*SMALL, "--plot", str(tmp_path / "numcheck.png")]) == 0
    out, err = capsys.readouterr()
    rows = re.findall(r"^(\S.*?)  +\d+  +(\S+)  ok$", out, re.MULTILINE)
    assert [name for name, _ in rows[:9]] == NAMES and all(float(error) < 1e-7 for _, error in rows)
    assert err == "" and re.match(r"all gradients agree; the largest error is \S+ of", out.splitlines()[-1])
    image = matplotlib.image.imread(tmp_path / "numcheck.png")[..., :3]
    assert image.shape == (600, 1800, 3) and 0.02 < (image < 0.9).any(2).mean() < 0.3
    if not torch.cuda.is_available():
        assert "skipped CUDA with cuDNN on and off: this machine has no GPU that PyTorch can use" in out


@pytest.mark.parametrize("layer", [SingleLayer, Bottleneck, Transition])
@pytest.mark.parametrize("fault, place", [(scaled, "conv1.weight"), (without_mean, "input")])
def test_a_wrong_gradient_of_a_layer_is_found(fault, place, layer, monkeypatch):
    plant(monkeypatch, fault)
    assert first_wrong(layer(4, 3), 2, 4, 4, 4) == place


@pytest.mark.parametrize("fault, place", [(scaled, "dense2.0"), (without_mean, "trans1")])
def test_a_wrong_gradient_of_one_layer_is_found_in_the_network(fault, place, monkeypatch):
    plant(monkeypatch, fault, n=4)  # dense2.0 alone reads 4 channels
    assert first_wrong(DenseNet(3, 10, initChannels=5, efficient=False), 4, 3, 8, 8) == place


@pytest.mark.parametrize("efficient", [True, "max"])
@pytest.mark.parametrize("which, place", [("weight", "dense3.0"), ("input", "trans2")])
def test_a_wrong_gradient_of_the_efficient_block_is_found(which, place, efficient, monkeypatch):
    scaled_in_block(monkeypatch, which)
    assert first_wrong(DenseNet(3, 10, initChannels=5, efficient=efficient), 4, 3, 8, 8) == place


def test_a_wrong_gradient_is_named_in_the_last_line_and_the_exit_status_is_1(capsys, monkeypatch):
    scaled_in_block(monkeypatch, "weight")
    assert numcheck.main(SMALL) == 1
    out = capsys.readouterr().out
    place = "CPU, efficient blocks of SingleLayer, gradient of dense2.0.conv1.weight"
    assert out.endswith(f"\nfirst difference: {place}\n")
    assert out.count("ok\n") == 4 and out.count("DIFFERS") == 5


def test_the_error_falls_with_the_square_of_the_step_and_rises_with_rounding():
    case = numcheck.make_case("", Bottleneck(4, 2), torch.randn(2, 4, 4, 4), "cpu")
    tensors = [t for [t] in case.inputs.values()]
    before = [t.detach().clone() for t in tensors]
    at = {step: numcheck.error_at(case.function, tensors, step) for step in (1e-4, 1e-5, 1e-6, 1e-10)}
    assert 30 < at[1e-4] / at[1e-5] < 300 and at[1e-10] > 30 * at[1e-6] and at[1e-6] < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_after_settle_kinks_no_relu_has_an_input_near_zero_and_only_biases_have_moved_a_little():
    net, x = DenseNet(4, 10, efficient=True).double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    before = {name: p.clone() for name, p in net.named_parameters()}
    least = settle_kinks(net, x)
    nearest = []
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        assert not norm._forward_hooks
        norm.register_forward_hook(lambda _, inputs, out: nearest.append(out.abs().min().item()))
    net(x)
    assert len(nearest) == 9 and min(nearest) == pytest.approx(least) and least > 1e-4
    for name, p in net.named_parameters():
        moved = (p - before[name]).abs().max().item()
        assert moved < 0.1 if re.search(r"bn\d\.bias", name) else moved == 0


def test_it_fails_if_the_textbook_runs_instead_of_the_efficient_block(capsys, monkeypatch):
    monkeypatch.setattr(densenet, "block_is_exact", lambda net, x: False)
    assert numcheck.main(SMALL) == 1
    out, err = capsys.readouterr()
    assert one_line(err, "numcheck.py: error: ").endswith("so the check says nothing\n") and "agree" not in out


@pytest.mark.parametrize("args, named", [
    (["--depth", "23"], "nearest 22 and 28"), (["--growthRate", "1"], "from 2 to 64"),
    (["--plot", "figure.pdf"], "ends in .png")])
def test_bad_input_is_refused_in_one_line(args, named, capsys):
    assert named in refused(numcheck.main, capsys, *args)
