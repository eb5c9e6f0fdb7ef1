"""Networks with their own block sizes, and ImageNet's four by name: equality with torchvision's, weights both ways."""

import copy
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from common import slow
from torchvision.models.feature_extraction import create_feature_extractor

import densenet
from densenet import DenseNet

NETWORKS = {"densenet121": 7_978_856, "densenet169": 14_149_480, "densenet201": 20_013_928, "densenet161": 28_681_000}
PATHS = {False: "textbook", True: "efficient", "max": "max"}
SMALL = dict(growthRate=8, blockConfig=(2, 3, 1, 2), smallInputs=False, initChannels=16, nClasses=7)


def small_theirs(bnSize=4):
    return torchvision.models.DenseNet(8, (2, 3, 1, 2), 16, bnSize, num_classes=7)


def moved(net):
    """Norms as training leaves them, so that a norm in the wrong place shows."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor.add_(0.2 * torch.rand_like(tensor))
    return net


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_has_torchvisions_number_of_parameters(name):
    with torch.device("meta"):
        net = getattr(densenet, name)()
    assert sum(p.numel() for p in net.parameters()) == NETWORKS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", *map(slow, ("densenet161", "densenet169", "densenet201"))])
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


@pytest.mark.parametrize("bnSize", [4, 1, 3])
@pytest.mark.parametrize("efficient", PATHS)
def test_gradients_and_statistics_equal_torchvision(efficient, bnSize):
    torch.manual_seed(0)
    theirs = moved(small_theirs(bnSize)).double()
    ours = DenseNet(**SMALL, bnSize=bnSize, efficient=efficient).double()
    assert ours.arguments["bnSize"] == bnSize
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


def prefixed(prefix):
    return lambda state: {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("change", [
    prefixed("module."), prefixed("_orig_mod."), prefixed("module.densenet121."), prefixed("model._orig_mod.module."),
    lambda state: {"state_dict": prefixed("module.")(state), "epoch": 3, "optimizer": {"state": {}}},
    lambda state: {"model": state, "args": None},
])
def test_state_dicts_as_others_save_them_load(change):
    theirs = moved(small_theirs()).state_dict()
    net = DenseNet(**SMALL)
    net.load_torchvision(change(theirs))
    assert all(value.equal(theirs[name]) for name, value in net.torchvision_state_dict().items())
    del theirs["classifier.weight"], theirs["classifier.bias"]
    DenseNet(**SMALL).load_torchvision(change(theirs), classifier=False)
    with pytest.raises(ValueError, match=r"has no classifier\.weight"):
        DenseNet(**SMALL).load_torchvision(change(theirs))


def test_heads_of_another_structure_are_left_aside():
    """As CheXNet's, whose classifier is a Sequential."""
    theirs = prefixed("module.densenet121.")(moved(small_theirs()).state_dict())
    for part in ("weight", "bias"):
        theirs[f"module.densenet121.classifier.0.{part}"] = theirs.pop(f"module.densenet121.classifier.{part}")
    theirs["module.densenet121.fc.bias"] = torch.ones(3)
    net = DenseNet(**SMALL)
    net.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(net.fc.in_features, 2))
    before = net.fc[1].weight.clone()
    net.load_torchvision({"state_dict": theirs}, classifier=False)
    assert net.fc[1].weight.equal(before)
    assert net.conv1.weight.equal(theirs["module.densenet121.features.conv0.weight"])
    with pytest.raises(ValueError, match=r"has no classifier\.1\.weight"):
        net.load_torchvision(theirs)
    del theirs["module.densenet121.fc.bias"]
    net.fc = nn.Sequential(nn.Linear(net.fc[1].in_features, 7), nn.Identity())
    net.load_torchvision(theirs)
    assert net.fc[0].bias.equal(theirs["module.densenet121.classifier.0.bias"])


@pytest.mark.slow
def test_networks_with_compiled_and_added_parts_exchange_weights():
    theirs, net = moved(small_theirs()).state_dict(), DenseNet(**SMALL)
    net.dense1, net.fc = (torch.compile(part, backend="eager") for part in (net.dense1, net.fc))
    net.load_torchvision(theirs)
    assert all(value.equal(theirs[name]) for name, value in net.torchvision_state_dict().items())
    net.more = nn.Linear(1, 1)
    assert "more.weight" in net.torchvision_state_dict()
    with pytest.raises(ValueError, match=r"has no more\.weight, which more\.weight would take"):
        net.load_torchvision(theirs)


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("features.norm0.bias"), "no features.norm0.bias, which bn0.bias would take"),
    (lambda s: s.update(more=torch.ones(1)), "has more, which this network does not have"),
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


def test_load_rebuilds_a_network_with_an_imagenet_stem(tmp_path):
    net = DenseNet(**SMALL)
    torch.save({"format": 1, "arguments": net.arguments, "model": net.state_dict(), "mean": [0.5] * 3,
                "std": [0.2] * 3, "classes": list("abcdefg")}, tmp_path / "latest.pth")
    loaded = densenet.load(tmp_path / "latest.pth")
    x = torch.randn(2, 3, 64, 64)
    assert loaded(x).equal(net.eval()(x))


# --- README's recipes for those who come from torchvision -------------------------------------------------------

@pytest.fixture
def net():
    torch.manual_seed(0)
    net = DenseNet(**SMALL)
    net.load_torchvision(moved(small_theirs()).state_dict())
    return net.eval()


@pytest.fixture
def theirs(net):
    theirs = small_theirs().eval()
    theirs.load_state_dict(net.torchvision_state_dict())
    return theirs


def test_readmes_recipe_for_spatial_maps(net, theirs):
    x = torch.randn(2, 3, 64, 64)
    trunk = create_feature_extractor(net, {"bn1": "maps"})
    maps = trunk(x)["maps"]
    torch.testing.assert_close(maps, theirs.features(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.relu(maps).mean((2, 3)), net.features(x), rtol=1e-4, atol=1e-5)
    net.fc = nn.Identity()  # the table's warning: what comes out is normalised over the features
    torch.testing.assert_close(net(x), F.relu(maps).mean((2, 3)).log_softmax(1), rtol=1e-4, atol=1e-5)


def test_readmes_recipe_for_grad_cam(net, theirs):
    image, label = torch.randn(1, 3, 64, 64), 3
    kept = []
    handle = net.bn1.register_forward_hook(lambda module, inputs, maps: kept.append(maps))
    logit = net.fc(net.features(image))[0, label]
    handle.remove()
    weights = torch.autograd.grad(logit, kept[0])[0].mean((2, 3), keepdim=True)
    cam = F.relu((weights * kept[0]).sum(1))  # (1, H / 32, W / 32)
    maps = theirs.features(image).detach().requires_grad_()
    theirs.classifier(F.relu(maps).mean((2, 3)))[0, label].backward()
    torch.testing.assert_close(cam, F.relu((maps.grad.mean((2, 3), keepdim=True) * maps).sum(1)), rtol=1e-3, atol=1e-5)
    assert cam.shape == (1, 2, 2) and cam.max() > 0


def test_readmes_recipe_for_a_new_head(net):
    net.requires_grad_(False)
    net.fc = nn.Linear(net.fc.in_features, 5)
    optimizer = torch.optim.SGD(net.fc.parameters(), lr=0.1)
    loss = F.nll_loss(net(torch.randn(2, 3, 64, 64)), torch.tensor([0, 4]))
    loss.backward()
    optimizer.step()
    assert net.conv1.weight.grad is None and net.fc.weight.grad.abs().max() > 0


def test_readmes_recipe_for_several_labels_at_once(net, theirs):
    x, labels = torch.randn(2, 3, 64, 64), torch.randint(2, (2, 7)).float()
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.full((7,), 3.0))
    loss = criterion(net.train().fc(net.features(x)), labels)
    loss.backward()
    torch.testing.assert_close(loss, criterion(theirs.train()(x), labels), rtol=1e-4, atol=1e-5)
    assert net.dense1.last_path == "efficient" and net.conv1.weight.grad.abs().max() > 0


def test_readmes_recipe_for_grayscale(theirs):
    weights = theirs.state_dict()
    weights["features.conv0.weight"] = weights["features.conv0.weight"].sum(1, keepdim=True)
    net = DenseNet(**SMALL | {"nClasses": 2}, inChannels=1).eval()
    net.load_torchvision(weights, classifier=False)
    gray = torch.randn(2, 1, 64, 64)
    maps = create_feature_extractor(net, {"bn1": "maps"})(gray)["maps"]
    torch.testing.assert_close(maps, theirs.features(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
