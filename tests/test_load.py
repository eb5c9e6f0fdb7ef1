"""Loading: checkpoints of train.py, damaged files, files of others, and weights under the names of three projects."""

import io
import re

import numpy as np
import pytest
import torch
import torchvision

import densenet
from densenet import DenseNet, ForeignFile

SMALL = dict(growthRate=8, blockConfig=(2, 3, 1, 2), smallInputs=False, nClasses=7)


@pytest.fixture
def net() -> DenseNet:
    torch.manual_seed(0)
    net = DenseNet(**SMALL)
    net(torch.randn(4, 3, 64, 64))  # running statistics other than the initial ones
    return net.eval()


def checkpoint(net: DenseNet, **changes) -> dict:
    return {"format": 1, "arguments": dict(net.arguments), "model": dict(net.state_dict()), "epoch": 1,
            "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "classes": list("abcdefg")} | changes


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# --- files ------------------------------------------------------------------------------------------------------

def test_load_rebuilds_the_network_from_a_path_or_an_open_file(net, tmp_path):
    path, x = tmp_path / "latest.pth", torch.randn(1, 3, 64, 64)
    path.write_bytes(saved(checkpoint(net)))
    with open(path, "rb") as file:
        for source in (path, str(path), file, io.BytesIO(path.read_bytes())):
            loaded = densenet.load(source)
            assert loaded(x).equal(net(x)) and not loaded.training and loaded.classes == list("abcdefg")
        assert not file.closed
    assert loaded.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3]) and loaded.std.shape == (3, 1, 1)
    assert loaded.state_dict().keys() == net.state_dict().keys() and all(p.requires_grad for p in loaded.parameters())


def test_a_network_made_with_numpys_numbers_can_be_saved_and_loaded():
    net = DenseNet(np.int64(4), blockConfig=np.array([1, 2]), reduction=np.float32(0.5), nClasses=np.uint8(7),
                   smallInputs=np.True_)
    assert densenet.load(io.BytesIO(saved(checkpoint(net)))).arguments == net.arguments


def test_a_checkpoint_in_half_precision_loads_in_float32(net):
    loaded = densenet.load(io.BytesIO(saved(checkpoint(net.half()))))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_a_flipped_bit_anywhere_is_damage_or_changes_nothing():
    """Damage is a plain ValueError: a ForeignFile would be another program's."""
    content, values, refused = saved({"format": 1, "x": torch.arange(50.0)}), torch.arange(50.0), 0
    for at in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        try:
            assert densenet.read_checkpoint(io.BytesIO(damaged))["x"].equal(values), at
        except ValueError as error:
            assert type(error) is ValueError and "is damaged" in str(error), at
            refused += 1
    assert refused > 200  # torch's padding and what only other readers look at may change


@pytest.mark.parametrize("share", [0, 0.001, 0.5])
def test_a_truncated_file_is_damaged(share, net, tmp_path):
    content = saved(checkpoint(net))
    (tmp_path / "latest.pth").write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match=r"latest\.pth is damaged, or was not written by torch\.save"):
        densenet.load(tmp_path / "latest.pth")


def test_a_pickled_network_is_refused_and_its_code_not_run(net, tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("this ran",)

    for content in (net, {"format": 1, "model": Code()}):
        torch.save(content, tmp_path / "latest.pth")
        with pytest.raises(ForeignFile, match=r"could run code; save its state_dict\(\) instead"):
            densenet.read_file(tmp_path / "latest.pth")


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(ForeignFile, match="is not a regular file"):
            densenet.load(path)
    with pytest.raises(FileNotFoundError):
        densenet.load(tmp_path / "nothing.pth")


@pytest.mark.parametrize(("content", "found"), [({"format": 2}, "2"), ({"a": 1}, "None"), ([1, 2], "list")])
def test_a_file_of_another_program_is_refused(content, found):
    with pytest.raises(ForeignFile, match=f"not a checkpoint of this train.py: its format is {found}; valid is 1"):
        densenet.read_checkpoint(io.BytesIO(saved(content)))


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["arguments"].update(growthRate=10**6), "size mismatch"),  # without taking that memory
    (lambda c: c["arguments"].update(blockConfig=[10**6] * 3), "it declares 3000000 layers in"),
    (lambda c: c["arguments"].update(blockConfig=None, depth=10**6), "it declares 1000000 layers in"),
    (lambda c: c["model"].update({"fc.weight": torch.zeros(1).expand(7, 30)}), "layers in"),
    (lambda c: c["arguments"].update(growth=4), "unexpected keyword argument 'growth'"),
    (lambda c: c.update(arguments=[1]), "list indices"), (lambda c: c.pop("classes"), "'classes'"),
    (lambda c: c.update(classes=["a"]), "it has 1 classes for 7 outputs"),
    (lambda c: c.update(std=[1.0]), "invalid for input of size 1")])
def test_a_checkpoint_that_contradicts_itself_is_refused_in_one_line(change, message, net, tmp_path):
    content = checkpoint(net)
    change(content)
    torch.save(content, tmp_path / "latest.pth")
    with pytest.raises(ValueError) as error:
        densenet.load(tmp_path / "latest.pth")
    assert str(error.value).startswith(f"{tmp_path}/latest.pth is not a checkpoint of this train.py (")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


# --- weights under other names ----------------------------------------------------------------------------------

def torchvisions(net: DenseNet) -> dict[str, torch.Tensor]:
    """By torchvision's own network, which must take them."""
    theirs = torchvision.models.DenseNet(8, (2, 3, 1, 2), 16, num_classes=7)
    theirs.load_state_dict(net.torchvision_state_dict())
    return theirs.state_dict()


def old_torchvisions(net: DenseNet) -> dict[str, torch.Tensor]:
    """As in the published files: norm.1 for norm1, and no num_batches_tracked."""
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value
           for name, value in torchvisions(net).items() if "num_batches" not in name}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    return old


def veits(net: DenseNet) -> dict[str, torch.Tensor]:
    """As andreasveit/densenet-pytorch names them."""
    return {re.sub(r"^dense(\d)\.", r"block\1.layer.", name): value for name, value in net.state_dict().items()}


def prefixed(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


@pytest.mark.parametrize("wrap", [
    lambda w: prefixed("_orig_mod.", w), lambda w: {"model": w},
    lambda w: {"state_dict": prefixed("module.", w), "epoch": 3, "optimizer": {}}])
@pytest.mark.parametrize("naming", [DenseNet.state_dict, torchvisions, old_torchvisions, veits])
def test_weights_load_under_each_naming(naming, wrap, net):
    torch.manual_seed(1)
    other, x = DenseNet(**SMALL).eval(), torch.randn(2, 3, 64, 64)
    assert not other(x).equal(net(x))
    other.load_weights(wrap(naming(net)))
    assert other(x).equal(net(x))


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("features.norm0.bias"), "the weights have no bn0.bias: they are another network's"),
    (lambda w: w.update(b=torch.ones(1), a=torch.ones(1)), "the weights have a, which this network does not have"),
    (lambda w: w.update({"features.conv0.weight": torch.ones(16, 1, 7, 7)}),
     "conv1.weight has shape (16, 1, 7, 7); valid is (16, 3, 7, 7)"),
    (lambda w: w.update({"classifier.weight": torch.ones(3, 30)}),
     "fc.weight has shape (3, 30); valid is (7, 30); classifier=False keeps this network's own")])
def test_another_networks_weights_are_refused_and_change_nothing(change, message, net):
    weights = dict(torchvisions(net))
    change(weights)
    other = DenseNet(**SMALL)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError) as error:
        other.load_weights(weights)
    assert str(error.value) == message
    assert all(value.equal(before[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("wrong", [None, {"features.conv0.weight": "x"}])
def test_what_is_no_state_dict_is_refused(wrong, net):
    with pytest.raises(ValueError, match="valid is a dict of names and tensors"):
        net.load_weights(wrong)


def test_any_classifier_or_none_can_be_left_aside(net):
    weights = torchvisions(net)
    trunk = {name: value for name, value in weights.items() if "classifier" not in name}
    deeper = trunk | {f"classifier.0.{part}": weights[f"classifier.{part}"] for part in ("weight", "bias")}
    for theirs in (weights, trunk, deeper):
        other = DenseNet(**SMALL | {"nClasses": 2})
        before = other.fc.weight.clone()
        other.load_weights(theirs, classifier=False)
        assert other.fc.weight.equal(before) and other.conv1.weight.equal(net.conv1.weight)
