"""The network itself: sizes, geometry, equality with an independent implementation, use in other people's code."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from common import relative, slow
from torchvision.models.feature_extraction import create_feature_extractor

from densenet import DenseNet


@pytest.mark.parametrize(("arguments", "parameters"), [
    (dict(), 769_162),
    (dict(nClasses=100), 800_032),
    (dict(depth=40, bottleneck=False, reduction=1.0), 1_059_298),
    (dict(depth=40, bottleneck=False, reduction=1.0, initChannels=16), 1_019_722),
    (dict(depth=100, bottleneck=False, reduction=1.0), 7_083_538),
    (dict(depth=100, bottleneck=False, reduction=1.0, initChannels=16), 6_979_642),
    (dict(depth=250, growthRate=24), 15_324_406),
    (dict(depth=190, growthRate=40), 25_624_430),
])
def test_parameter_counts_of_the_paper(arguments, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in DenseNet(**arguments).parameters()) == parameters


@pytest.mark.parametrize("bnSize", [1, 4, 6])
def test_parameter_count_by_layer_arithmetic(bnSize):
    k, c, total = 12, 24, 3 * 24 * 9
    for block in range(3):
        for _ in range(16):
            total += 2 * c + c * bnSize * k + 2 * bnSize * k + bnSize * k * k * 9
            c += k
        if block < 2:
            total += 2 * c + c * (c // 2)
            c //= 2
    net = DenseNet(bnSize=bnSize)
    assert net.arguments["bnSize"] == bnSize
    assert sum(p.numel() for p in net.parameters()) == total + 2 * c + c * 10 + 10


def test_state_dict_keys_and_call_of_the_ancestor():
    net = DenseNet(growthRate=12, depth=22, reduction=0.5, bottleneck=True, nClasses=10)
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = ["conv1.weight"]
    for b in (1, 2, 3):
        for i in range(3):
            for part in ("1", "2"):
                expected += [f"dense{b}.{i}.bn{part}.{n}" for n in norm] + [f"dense{b}.{i}.conv{part}.weight"]
        if b < 3:
            expected += [f"trans{b}.bn1.{n}" for n in norm] + [f"trans{b}.conv1.weight"]
    expected += [f"bn1.{n}" for n in norm] + ["fc.weight", "fc.bias"]
    assert list(net.state_dict()) == expected
    original = DenseNet(12, 13, 1.0, 10, False)
    assert [k for k in original.state_dict() if k.startswith("dense1.2")] == \
        [f"dense1.2.bn1.{n}" for n in norm] + ["dense1.2.conv1.weight"]


def torchvision_key(key: str) -> str:
    """Our name of a weight -> torchvision's."""
    if key.startswith("dense"):
        block, layer, rest = key.split(".", 2)
        rest = rest.replace("bn", "norm")
        return f"features.denseblock{block[5:]}.denselayer{int(layer) + 1}.{rest}"
    if key.startswith("trans"):
        block, rest = key.split(".", 1)
        return f"features.transition{block[5:]}." + rest.replace("bn1", "norm").replace("conv1", "conv")
    return {"conv1": "features.conv0", "bn1": "features.norm5", "fc": "classifier"}[key.split(".")[0]] + \
        "." + key.split(".", 1)[1]


def torchvision_network(growthRate: int, layers: int, **arguments) -> nn.Module:
    """torchvision's independent DenseNet-BC with a CIFAR stem."""
    net = torchvision.models.DenseNet(growthRate, (layers,) * 3, 2 * growthRate, num_classes=10, **arguments)
    net.features.conv0 = nn.Conv2d(3, 2 * growthRate, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        delattr(net.features, name)
    # its last transition's successor is called norm5 after ImageNet's five stages; three blocks keep the name
    return net


@pytest.mark.parametrize("efficient", [slow(False), True, slow("max")])
def test_equals_torchvision_in_outputs_gradients_and_running_statistics(efficient):
    torch.manual_seed(0)
    ours = DenseNet(growthRate=12, depth=100, efficient=efficient).double()
    theirs = torchvision_network(12, 16).double()
    assert sum(p.numel() for p in theirs.parameters()) == 769_162
    theirs.load_state_dict({torchvision_key(k): v for k, v in ours.state_dict().items()}, strict=True)
    x, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 5, 9])
    xs = [x.clone().requires_grad_() for _ in range(2)]
    losses = F.nll_loss(ours(xs[0]), labels), F.cross_entropy(theirs(xs[1]), labels)
    for loss in losses:
        loss.backward()
    assert ours.dense2.last_path == {False: "textbook", True: "efficient", "max": "max"}[efficient]
    assert relative(losses[0], losses[1]) < 1e-12
    assert relative(xs[0].grad, xs[1].grad) < 1e-10
    gradients = {k: p.grad for k, p in theirs.named_parameters()}
    for key, p in ours.named_parameters():
        assert relative(p.grad, gradients[torchvision_key(key)]) < 1e-10, key
    buffers = dict(theirs.named_buffers())
    for key, b in ours.named_buffers():
        assert relative(b, buffers[torchvision_key(key)]) < 1e-12, key
    ours.eval(), theirs.eval()
    assert relative(ours(x), F.log_softmax(theirs(x), 1)) < 1e-12


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize(("n", "height", "width"), [(1, 32, 32), (2, 64, 64), (3, 33, 47), (5, 4, 7), (1, 9, 8)])
def test_any_input_size_and_a_batch_of_one(n, height, width, efficient):
    net = DenseNet(growthRate=4, depth=10, nClasses=7, efficient=efficient)
    x = torch.randn(n, 3, height, width)
    for mode in (net.train(), net.eval()):
        out = mode(x)
        assert out.shape == (n, 7)
        torch.testing.assert_close(out.exp().sum(1), torch.ones(n))
        features = mode.features(x)
        assert features.shape == (n, net.fc.in_features)
        torch.testing.assert_close(F.log_softmax(net.fc(features), 1), out)


def test_rows_do_not_depend_on_each_other_in_evaluation():
    net = DenseNet(growthRate=4, depth=10).eval()
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_every_layer_reads_all_layers_before_it(bottleneck):
    net = DenseNet(growthRate=4, depth=28 if bottleneck else 16, bottleneck=bottleneck).eval()
    x = torch.randn(1, 3, 16, 16)
    seen = []
    for layer in net.dense2:
        layer.bn1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    net(x)
    before, n, first = list(seen), len(net.dense2), net.dense2[0].bn1.num_features
    for source in range(n):
        seen.clear()
        last = net.dense2[source].conv2 if bottleneck else net.dense2[source].conv1
        handle = last.register_forward_hook(lambda _, __, out: out + 1)
        net(x)
        handle.remove()
        mine = slice(first + 4 * source, first + 4 * source + 4)
        for reader in range(n):
            changed = (seen[reader] - before[reader]).abs().amax((0, 2, 3)) > 0
            assert changed[mine].all() if reader > source else not changed.any()
            assert not changed[:mine.start].any()  # and what was there before stays as it was


def test_dense_connectivity_of_the_efficient_block():
    """Hooks would select the textbook layers: here each layer's weights are moved instead."""
    net = DenseNet(growthRate=4, depth=28).train()
    x = torch.randn(2, 3, 16, 16)
    for source in range(len(net.dense1)):
        net.zero_grad()
        net(x).square().sum().backward()
        assert net.dense1.last_path == "efficient"
        for reader in range(source + 1, len(net.dense1)):
            mine = slice(8 + 4 * source, 12 + 4 * source)
            assert (net.dense1[reader].conv1.weight.grad[:, mine].abs().amax((0, 2, 3)) > 0).all()


def test_convolutions_start_with_he_normal_weights_and_norms_as_identity():
    torch.manual_seed(3)
    net = DenseNet(growthRate=24, depth=40)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            std = math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels))
            assert abs(m.weight.std().item() / std - 1) < 5 / math.sqrt(2 * m.weight.numel())
            assert abs(m.weight.mean().item()) < 5 * std / math.sqrt(m.weight.numel())
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all()
    assert (net.fc.bias == 0).all()


def test_dropout_stands_after_every_convolution_but_the_first(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: calls.append((tuple(x.shape), p, training)) or x)
    DenseNet(growthRate=4, depth=10, dropRate=0.2, efficient=False)(torch.randn(2, 3, 8, 8))
    assert calls == [((2, 16, 8, 8), 0.2, True), ((2, 4, 8, 8), 0.2, True), ((2, 6, 8, 8), 0.2, True),
                     ((2, 16, 4, 4), 0.2, True), ((2, 4, 4, 4), 0.2, True), ((2, 5, 4, 4), 0.2, True),
                     ((2, 16, 2, 2), 0.2, True), ((2, 4, 2, 2), 0.2, True)]
    calls.clear()
    DenseNet(growthRate=4, depth=10, efficient=False)(torch.randn(2, 3, 8, 8))
    assert not calls


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(depth=101), "depth is 101; valid with bottleneck is 6n + 4, nearest 100 and 106"),
    (dict(depth=41, bottleneck=False), "depth is 41; valid without bottleneck is 3n + 4, nearest 40 and 43"),
    (dict(depth=4), "nearest 10"),
    (dict(depth=-3), "depth is -3; valid are whole numbers from 1"),
    (dict(depth=22.0), "depth is 22.0; valid are whole numbers"),
    (dict(reduction=0), "reduction is 0; valid is above 0 and at most 1"),
    (dict(reduction=1.5), "reduction is 1.5"),
    (dict(reduction=float("nan")), "reduction is nan"),
    (dict(growthRate=1, depth=10, reduction=0.01), "leaves none of the 3 channels"),
    (dict(growthRate=0), "growthRate is 0"),
    (dict(nClasses=0), "nClasses is 0"),
    (dict(initChannels=0), "initChannels is 0"),
    (dict(inChannels=0), "inChannels is 0"),
    (dict(bnSize=0), "bnSize is 0; valid are whole numbers from 1"),
    (dict(nClasses=np.True_), "nClasses is True"), (dict(nClasses=np.float32(3)), "nClasses is 3.0"),
    (dict(blockConfig=np.array([2, 0])), "blockConfig is [2, 0]"), (dict(blockConfig=np.array(5)), "blockConfig is 5"),
    (dict(depth=torch.tensor(101)), "depth is 101; valid"), (dict(dropRate=np.float64(1)), "dropRate is 1.0"),
    (dict(dropRate=1), "dropRate is 1; valid is from 0 to below 1"),
    (dict(dropRate=-0.1), "dropRate is -0.1"),
    (dict(efficient="min"), "efficient is 'min'; valid are True, False and 'max'"),
])
def test_impossible_geometry_is_refused_with_the_valid_values(arguments, message):
    with pytest.raises(ValueError) as error:
        DenseNet(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("arguments", [
    dict(nClasses=np.array([3, 6]).max() + 1, growthRate=np.uint8(4), blockConfig=np.array([1, 2])),
    dict(nClasses=torch.tensor([3, 6]).max() + 1, growthRate=torch.tensor(4), blockConfig=torch.tensor([1, 2])),
    dict(nClasses=np.array(7), growthRate=4, blockConfig=(np.int16(1), 2), initChannels=np.int64(8), bnSize=np.int8(4)),
    dict(nClasses=7, growthRate=4, blockConfig=[1, 2], reduction=np.float32(0.5), dropRate=np.float64(0)),
    dict(nClasses=7, growthRate=4, blockConfig=[1, 2], reduction=Fraction(1, 2), smallInputs=np.True_),
])
def test_numbers_of_any_library_are_kept_as_python_s(arguments):
    net = DenseNet(**arguments)
    expected = dict(nClasses=7, growthRate=4, blockConfig=[1, 2], reduction=0.5, dropRate=0, smallInputs=True)
    for name, value in net.arguments.items():
        assert name not in expected or value == expected[name]
        assert {type(v) for v in (value if isinstance(value, list) else [value])} <= {int, float, bool, type(None)}
    assert type(net.conv1.out_channels) is type(net.dense2[1].conv1.out_channels) is type(net.fc.out_features) is int
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(("shape", "message"), [
    ((2, 1, 32, 32), "(N, 3, H, W)"), ((3, 32, 32), "(N, 3, H, W)"), ((2, 3, 3, 32), "3x32, too small")])
def test_impossible_input_is_refused(shape, message):
    with pytest.raises(ValueError) as error:
        DenseNet(growthRate=4, depth=10)(torch.randn(shape))
    assert message in str(error.value)


def test_a_network_for_grayscale_with_any_width_of_its_first_convolution():
    net = DenseNet(growthRate=4, depth=10, inChannels=1, initChannels=5)
    assert net.conv1.weight.shape == (5, 1, 3, 3)
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)


# --- in other people's code -------------------------------------------------------------------------------------

@pytest.fixture
def small():
    torch.manual_seed(0)
    return DenseNet(growthRate=4, depth=10)


def test_a_copy_and_a_pickled_state_dict_compute_the_same(small):
    x = torch.randn(2, 3, 16, 16)
    twin = copy.deepcopy(small)
    other = DenseNet(growthRate=4, depth=10)
    other.load_state_dict(pickle.loads(pickle.dumps(small.state_dict())))
    out = small(x)
    assert (twin(x) == out).all() and (other(x) == out).all()
    assert all((a == b).all() for a, b in zip(small.buffers(), twin.buffers(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_takes_the_network_as_one_graph(small, training):
    small.train(training)
    reference, x = copy.deepcopy(small), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(small, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), reference(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    if training:
        out.sum().backward()
        for a, b in zip(small.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_export_with_dynamic_batch(small):
    x = torch.randn(2, 3, 32, 32)
    program = torch.export.export(small.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    y = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(y), small(y), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_export_to_onnx(small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[test]' brings it")
    pytest.importorskip("onnxscript")
    x = torch.randn(2, 3, 32, 32)
    path = tmp_path / "small.onnx"
    torch.onnx.export(small.eval(), (x,), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    out, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), small(x).detach(), rtol=1e-4, atol=1e-5)


def test_autocast_channels_last_and_double(small):
    x = torch.randn(4, 3, 16, 16)
    expected = copy.deepcopy(small).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = copy.deepcopy(small)(x)
    assert half.dtype in (torch.bfloat16, torch.float32)
    torch.testing.assert_close(half.double(), expected, rtol=0.1, atol=0.1)
    last = copy.deepcopy(small).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)).double(), expected, rtol=1e-4, atol=1e-4)


# --- with parts that are not ours -------------------------------------------------------------------------------

class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["conv1", "dense1", "dense3", "trans1", "bn1", "fc", "dense2.0", "trans2.conv1"])
@pytest.mark.parametrize("wrap", [Wrapper, compiled, nn.DataParallel, nn.Sequential])
def test_a_wrapped_part_computes_what_it_did(wrap, name, training, small):
    reference, x = copy.deepcopy(small).train(training), torch.randn(2, 3, 16, 16)
    parent, _, child = name.rpartition(".")
    parent = small.get_submodule(parent)
    setattr(parent, child, wrap(getattr(parent, child)))
    small.train(training)
    out, expected = small(x), reference(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    textbook = {"trans1": "dense1", "trans2.conv1": "dense2", "bn1": "dense3"}.get(name, name.partition(".")[0])
    for block in ("dense1", "dense2", "dense3"):
        if block != name:
            path = "textbook" if block == textbook or not training else "efficient"
            assert getattr(small, block).last_path == path
    if training:
        for a, b in zip(small.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_block_compiled_in_place_runs_compiled(small):
    expected, x = copy.deepcopy(small), torch.randn(2, 3, 16, 16)
    graphs = []
    torch.compiler.reset()
    small.dense1.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(small(x), expected(x), rtol=1e-4, atol=1e-5)
    assert graphs and small.dense2.last_path == "efficient"


def test_a_transition_s_own_convolution_is_not_moved_behind_the_pooling(small):
    """As a 1x1 convolution is: with a neighbourhood, pooling first would be another function."""
    small.trans1.conv1 = nn.Conv2d(small.trans1.conv1.in_channels, small.trans1.conv1.out_channels, 3, padding=1)
    textbook, x = copy.deepcopy(small), torch.randn(2, 3, 16, 16)
    textbook.efficient = False
    torch.testing.assert_close(small(x), textbook(x), rtol=1e-4, atol=1e-5)
    assert small.dense1.last_path == "textbook" and small.dense2.last_path == "efficient"


@pytest.mark.parametrize("training", [True, False])
def test_other_stems_and_transitions_take_what_they_take(training, small):
    small.conv1 = nn.Sequential(nn.Conv2d(1, 3, 1), small.conv1)
    small.trans1 = nn.Sequential(nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1))  # without pooling
    small.trans2 = nn.BatchNorm2d(10)
    small.dense3 = nn.Conv2d(10, 9, 1)
    small.train(training)
    assert small(torch.randn(8, 1, 2, 2)).shape == (8, 10)
    net = DenseNet(4, blockConfig=(1, 1, 1), smallInputs=False).train(training)
    net.conv1 = nn.Conv2d(1, 8, 3, padding=1)  # without stride: half the size is enough
    assert net(torch.randn(8, 1, 7, 7)).shape == (8, 10)
    with pytest.raises(ValueError, match=r"valid is \(N, 1, H, W\)"):
        net(torch.randn(8, 3, 7, 7))
    with pytest.raises(ValueError, match="valid is 7x7 or more"):
        net(torch.randn(8, 1, 7, 6))


# --- in other people's tools ------------------------------------------------------------------------------------

@pytest.mark.parametrize("smallInputs", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_traces_and_feature_extractors(training, smallInputs):
    net = DenseNet(4, blockConfig=(1, 2), dropRate=0.0, smallInputs=smallInputs).train(training)
    x = torch.randn(2, 3, 32, 32)
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    nodes = {"dense1": "first", "trans1": "half", "bn1": "last", "fc": "logits"}
    extractor = create_feature_extractor(copy.deepcopy(net), nodes)
    expected = net(x)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    found = extractor.train(training)(x)
    side = 32 if smallInputs else 8
    assert [tuple(found[name].shape[1:]) for name in ("first", "half", "last")] == \
        [(12, side, side), (6, side // 2, side // 2), (14, side // 2, side // 2)]
    torch.testing.assert_close(F.log_softmax(found["logits"], 1), expected, rtol=1e-4, atol=1e-5)
    found["logits"].sum().backward()
    assert net(x).requires_grad and net.dense1.last_path == ("efficient" if training else "textbook")


def test_batched_gradients_are_refused_or_right():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    net = DenseNet(growthRate=2, depth=10, nClasses=2)
    out, many = net(x), torch.eye(4).view(4, 2, 2)
    for batched in (lambda: torch.autograd.grad(out, x, many, is_grads_batched=True, retain_graph=True),
                    lambda: torch.autograd.functional.jacobian(net, x.detach(), vectorize=True),
                    lambda: torch.func.vmap(lambda v: torch.autograd.grad(out, x, v, retain_graph=True))(many)):
        with pytest.raises(RuntimeError, match="build the network with efficient=False"):
            batched()
    one_by_one = torch.stack([torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in many])
    net.efficient = False
    together, = torch.autograd.grad(net(x), x, many, is_grads_batched=True)
    torch.testing.assert_close(together, one_by_one, rtol=1e-3, atol=1e-5)
