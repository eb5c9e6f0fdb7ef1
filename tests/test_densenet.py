"""The network: its size, impossible arguments and inputs, and the same numbers as torchvision's."""

import ast
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from common import ROOT, efficient_blocks, relative, slow

import densenet
from densenet import DenseNet, torchvision_name


@pytest.fixture
def small() -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(growthRate=4, depth=10)


# --- geometry ---------------------------------------------------------------------------------------------------

ORIGINAL = dict(bottleneck=False, reduction=1.0, initChannels=16)  # the paper's networks without bottleneck


@pytest.mark.parametrize(("make", "arguments", "expected"), [
    ("DenseNet", dict(), 769_162), ("DenseNet", dict(growthRate=24, depth=250), 15_324_406),
    ("DenseNet", dict(growthRate=40, depth=190), 25_624_430),
    ("DenseNet", dict(depth=40, **ORIGINAL), 1_019_722), ("DenseNet", dict(depth=100, **ORIGINAL), 6_979_642),
    ("DenseNet", dict(growthRate=24, depth=100, **ORIGINAL), 27_249_082),
    ("densenet121", dict(), 7_978_856), ("densenet169", dict(), 14_149_480), ("densenet201", dict(), 20_013_928),
    ("densenet161", dict(), 28_681_000)])
def test_parameter_counts_of_the_paper(make, arguments, expected):
    with torch.device("meta"):
        net = getattr(densenet, make)(**arguments)
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(depth=101), "depth is 101; valid with bottleneck is 6n + 4, nearest 100 and 106"),
    (dict(depth=41, bottleneck=False), "depth is 41; valid without bottleneck is 3n + 4, nearest 40 and 43"),
    (dict(depth=4), "nearest 10"),
    (dict(depth=-3), "depth is -3; valid are whole numbers from 1"),
    (dict(depth=22, blockConfig=(3, 3, 3)), "depth is 22 and blockConfig (3, 3, 3); valid is one of them"),
    (dict(blockConfig=()), "blockConfig is []; valid are whole numbers from 1, one for each block"),
    (dict(blockConfig=(6, 0)), "blockConfig is [6, 0]"),
    (dict(reduction=0), "reduction is 0.0; valid is above 0 and at most 1"),
    (dict(reduction=float("nan")), "reduction is nan"),
    (dict(growthRate=1, depth=10, reduction=0.01), "leaves none of the 3 channels after block 1; valid is 1/3 to 1"),
    (dict(dropRate=1), "dropRate is 1.0; valid is from 0 to below 1"),
    (dict(efficient="min"), "efficient is 'min'; valid are True, False and 'max'"),
    *((dict([(name, 0)]), f"{name} is 0; valid are whole numbers from 1")
      for name in ("growthRate", "nClasses", "initChannels", "inChannels", "bnSize"))])
def test_impossible_geometry_is_refused_with_the_valid_values(arguments, message):
    with pytest.raises(ValueError) as error:
        DenseNet(**arguments)
    assert message in str(error.value)


# --- input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("shape", "message"), [
    ((2, 1, 32, 32), "input has shape (2, 1, 32, 32); valid is (N, 3, H, W)"),
    ((3, 32, 32), "input has shape (3, 32, 32); valid is (N, 3, H, W)"),
    ((2, 3, 3, 32), "input is 3x32, too small for the network's transitions, which halve it; valid is 4x4 or more")])
def test_impossible_input_is_refused(shape, message, small):
    with pytest.raises(ValueError) as error:
        small(torch.randn(shape))
    assert message in str(error.value)


@pytest.mark.parametrize(("blocks", "smallInputs", "least"), [
    ((2,), True, 1), ((1, 1, 1), True, 4), ((2, 3, 1, 2), False, 29)])
def test_the_smallest_input_of_each_number_of_blocks(blocks, smallInputs, least):
    net = DenseNet(4, blockConfig=blocks, smallInputs=smallInputs)
    assert net(torch.randn(8, 3, least, least)).shape == (8, 10)
    with pytest.raises(ValueError, match=f"valid is {least}x{least} or more"):
        net(torch.randn(8, 3, least, least - 1))


def test_a_replaced_stem_or_transition_takes_what_it_takes(small):
    small.trans1 = nn.Sequential(nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1))  # without pooling: 2x2 is enough
    assert small(torch.randn(8, 3, 2, 2)).shape == (8, 10)
    small.conv1 = nn.Sequential(nn.Conv2d(1, 3, 1), small.conv1)
    assert small(torch.randn(8, 1, 2, 2)).shape == (8, 10)


def test_log_probabilities_are_float32_under_autocast(small):
    x = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = small.eval()(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, small(x), rtol=0.05, atol=0.05)


def test_dropout_follows_every_convolution_but_the_first(monkeypatch):
    shapes = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: shapes.append((*x.shape[1:3], p, training)) or x)
    DenseNet(growthRate=4, depth=10, dropRate=0.2, efficient=False)(torch.randn(2, 3, 8, 8))
    assert shapes == [(channels, size, 0.2, True) for channels, size in (
        (16, 8), (4, 8), (6, 8), (16, 4), (4, 4), (5, 4), (16, 2), (4, 2))]


# --- torchvision's networks -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("depth", "bnSize"), [(22, 2), slow(100, 4)])
@pytest.mark.parametrize("efficient", [False, True, "max"])
def test_outputs_gradients_and_running_statistics_are_torchvisions(efficient, depth, bnSize):
    torch.manual_seed(0)
    ours = DenseNet(depth=depth, bnSize=bnSize, efficient=efficient).double()
    theirs = torchvision.models.DenseNet(12, ((depth - 4) // 6,) * 3, 24, bnSize, num_classes=10)
    theirs.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)  # our stem
    for name in ("norm0", "relu0", "pool0"):
        delattr(theirs.features, name)
    theirs.double().load_state_dict(ours.torchvision_state_dict())
    x, labels = torch.randn(3, 3, 36, 32, dtype=torch.float64), torch.tensor([1, 5, 9])
    xs = [x.clone().requires_grad_() for _ in range(2)]
    out, expected = ours(xs[0]), F.log_softmax(theirs(xs[1]), 1)
    assert efficient_blocks(out) == (3 if efficient else 0)
    for each in (out, expected):
        F.nll_loss(each, labels).backward()
    assert relative(out, expected) < 1e-12 and relative(xs[0].grad, xs[1].grad) < 1e-10
    gradients, buffers = ({name: p.grad for name, p in theirs.named_parameters()}, dict(theirs.named_buffers()))
    for name, p in ours.named_parameters():
        assert relative(p.grad, gradients[torchvision_name(name)]) < 1e-10, name
    for name, buffer in ours.named_buffers():
        assert relative(buffer, buffers[torchvision_name(name)]) < 1e-12, name


@pytest.mark.parametrize("name", ["densenet121", slow("densenet161"), slow("densenet169"), slow("densenet201")])
def test_imagenets_networks_equal_torchvisions_bit_for_bit(name):
    """In float32, by the textbook layers; the efficient block to rounding."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    ours = getattr(densenet, name)(efficient=False)
    ours.load_weights(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        block = copy.deepcopy(ours)
        block.efficient = True
        expected = theirs(x).log_softmax(1)
        assert ours(x).equal(expected)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=2e-5)
        assert all(value.equal(theirs.state_dict()[name]) for name, value in ours.torchvision_state_dict().items())
        assert ours.eval()(x).equal(theirs.eval()(x).log_softmax(1))


# --- among other tools and scripts ------------------------------------------------------------------------------

@pytest.mark.slow
def test_an_onnx_file_computes_the_same(small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[test]' brings it")
    pytest.importorskip("onnxscript")
    x = torch.randn(2, 3, 32, 32)
    torch.onnx.export(small.eval(), (x,), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), small(x).detach(), rtol=1e-4, atol=1e-5)


def test_no_script_imports_a_script_and_densenet_and_plot_nothing_of_the_project():
    scripts = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
    assert {"densenet", "plot", "train"} <= scripts.keys()
    for name, tree in scripts.items():
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        allowed = set() if name in ("densenet", "plot") else {"densenet", "lib"}
        assert {full.split(".")[0] for full in imported} & {*scripts, "lib", "tests"} <= allowed, name
