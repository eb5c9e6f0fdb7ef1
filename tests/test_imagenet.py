"""Networks with their own block sizes, and ImageNet's four by name: equality with torchvision's, weights both ways."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision

import densenet
from densenet import DenseNet

NETWORKS = {"densenet121": 7_978_856, "densenet169": 14_149_480, "densenet201": 20_013_928, "densenet161": 28_681_000}
PATHS = {False: "textbook", True: "efficient", "max": "max"}
SMALL = dict(growthRate=8, blockConfig=(2, 3, 1, 2), smallInputs=False, initChannels=16, nClasses=7)


def small_theirs():
    return torchvision.models.DenseNet(8, (2, 3, 1, 2), 16, num_classes=7)


def moved(net):
    """Norms as training leaves them, so that a norm in the wrong place shows."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand_like(tensor))
    return net


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_counts(name):
    with torch.device("meta"):
        net = getattr(densenet, name)()
    assert sum(p.numel() for p in net.parameters()) == NETWORKS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_equal_torchvision_in_float32(name):
    torch.manual_seed(0)
    theirs = moved(getattr(torchvision.models, name)())
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        evaluated = theirs.eval()(x).log_softmax(1)
        trained = copy.deepcopy(theirs).train()(x).log_softmax(1)
    for efficient, path in PATHS.items():
        net = getattr(densenet, name)(efficient=efficient)
        net.load_torchvision(theirs.state_dict())
        with torch.no_grad():
            assert (net.eval()(x) - evaluated).abs().max() < 1e-5
            assert (net.train()(x) - trained).abs().max() < 1e-5
        assert net.dense4.last_path == path


@pytest.mark.parametrize("efficient", PATHS)
def test_gradients_and_statistics_equal_torchvision(efficient):
    torch.manual_seed(0)
    theirs = moved(small_theirs()).double()
    ours = DenseNet(**SMALL, efficient=efficient).double()
    ours.load_torchvision(theirs.state_dict())
    x, labels = torch.randn(3, 3, 75, 64, dtype=torch.float64), torch.tensor([1, 5, 6])
    F.nll_loss(ours(x), labels).backward()
    F.cross_entropy(theirs(x), labels).backward()
    assert ours.dense1.last_path == ours.dense4.last_path == PATHS[efficient]
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[densenet.torchvision_name(name)].grad, rtol=1e-9, atol=1e-12)
    back = ours.torchvision_state_dict()
    assert list(back) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=1e-11, atol=1e-13)
    theirs.load_state_dict(back, strict=True)


def test_old_files_load():
    """Published weights have keys such as norm.1, and no num_batches_tracked."""
    theirs = moved(small_theirs())
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", key): value
           for key, value in theirs.state_dict().items() if "num_batches" not in key}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    net = DenseNet(**SMALL)
    net.load_torchvision(old)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), theirs.eval()(x).log_softmax(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [None, "densenet121.pth", small_theirs(), {"features.conv0.weight": "x"}, [1]])
def test_what_is_no_state_dict_is_refused(wrong):
    with pytest.raises(ValueError, match="valid is a dict of names and tensors"):
        DenseNet(**SMALL).load_torchvision(wrong)


def test_a_backbone_without_classifier_loads():
    theirs = {key: value for key, value in small_theirs().state_dict().items() if "classifier" not in key}
    DenseNet(**SMALL).load_torchvision(theirs, classifier=False)
    with pytest.raises(ValueError, match=r"has no classifier\.weight"):
        DenseNet(**SMALL).load_torchvision(theirs)


def test_another_classifier_is_left_alone():
    net = DenseNet(**SMALL | {"nClasses": 2})
    before = net.fc.weight.clone()
    theirs = moved(small_theirs())
    net.load_torchvision(theirs.state_dict(), classifier=False)
    assert net.fc.weight.equal(before)
    assert net.conv1.weight.equal(theirs.features.conv0.weight)


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("features.norm0.bias"), "no features.norm0.bias, which bn0.bias would take"),
    (lambda s: s.update(more=torch.ones(1)), "has more, which this network has not"),
    (lambda s: s.update({"classifier.weight": torch.ones(3, 59)}), "classifier.weight has shape (3, 59); valid for fc"),
])
def test_weights_of_another_network_are_refused_and_change_nothing(change, message):
    theirs = small_theirs().state_dict()
    change(theirs)
    net = DenseNet(**SMALL)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError) as error:
        net.load_torchvision(theirs)
    assert message in str(error.value)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_equal_blocks_are_what_depth_makes():
    nets = []
    for arguments in (dict(depth=22), dict(blockConfig=(3, 3, 3))):
        torch.manual_seed(0)
        nets.append(DenseNet(12, **arguments))
    states = [net.state_dict() for net in nets]
    assert list(states[0]) == list(states[1])
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


def test_any_number_of_blocks_and_the_smallest_input():
    for blocks, small, least in (((2,), True, 1), ((1, 2), True, 2), ((1, 1, 1, 1, 1), True, 16), ((1, 1), False, 5),
                                 ((2, 3, 1, 2), False, 29)):
        net = DenseNet(4, blockConfig=blocks, smallInputs=small, nClasses=3)
        assert net(torch.randn(8, 3, least, least)).shape == (8, 3)
        with pytest.raises(ValueError, match=f"valid is {least}x{least} or more"):
            net(torch.randn(8, 3, least, least - 1))


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(depth=22, blockConfig=(3, 3, 3)), "depth is 22 and blockConfig [3, 3, 3]; valid is one of them"),
    (dict(blockConfig=5), "blockConfig is 5; valid"), (dict(blockConfig=(True,)), "blockConfig is [True]"),
    (dict(growthRate=True), "growthRate is True"), (dict(reduction="0.5"), "reduction is '0.5'; valid are numbers"),
    (dict(bottleneck="no"), "bottleneck is 'no'; valid are True and False"), (dict(smallInputs=0), "smallInputs is 0"),
    (dict(blockConfig=()), "blockConfig is []; valid are whole numbers from 1, one for each block"),
    (dict(blockConfig=(6, 0)), "blockConfig is [6, 0]"),
    (dict(blockConfig=(6, 1.5)), "blockConfig is [6, 1.5]"),
])
def test_impossible_blocks_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        DenseNet(**arguments)
    assert message in str(error.value)


def test_load_rebuilds_it(tmp_path):
    net = DenseNet(**SMALL)
    torch.save({"format": 1, "arguments": net.arguments, "model": net.state_dict(), "mean": [0.5] * 3,
                "std": [0.2] * 3, "classes": list("abcdefg")}, tmp_path / "latest.pth")
    loaded = densenet.load(tmp_path / "latest.pth")
    x = torch.randn(2, 3, 64, 64)
    assert loaded(x).equal(net.eval()(x))
