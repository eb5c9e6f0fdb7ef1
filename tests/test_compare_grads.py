"""compare_grads.py: implementations that agree pass; each fault is found and its place named."""

import re

import matplotlib.image
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from common import SAMPLE, one_line, refused
from faults import misordered, plant, replace_function, scaled, scaled_in_block, updated_twice, without_mean
from PIL import Image

import compare_grads
import densenet
from densenet import DenseNet

SMALL = ["--depth", "16", "--growthRate", "4", "--batchSz", "4"]  # two layers a block
UNEQUAL = ["--depth", "22", "--growthRate", "4", "--batchSz", "4"]  # dense2.1 alone reads 14 channels
PLAIN = ["--against", "plain"]


def run(capsys, *args, network=SMALL):
    """-> exit status, lines of stdout"""
    status = compare_grads.main([*network, *args])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out.splitlines()


def first_difference(capsys, *args, network=UNEQUAL):
    status, lines = run(capsys, *args, network=network)
    assert status == 1 and any(line.endswith("DIFFERS") for line in lines)
    found = re.fullmatch(r"first difference: (.*): (\S+), limit (\S+)", lines[-1])
    assert float(found[2]) > 100 * float(found[3])
    return found[1]


@pytest.mark.parametrize("args, tensors", [  # a block makes no output of the batch norm after it
    ([], "119 tensors agree, 119 of them bit for bit"), (["--efficient", "max"], "117"),
    (PLAIN, "117"), ([*PLAIN, "--no-bottleneck", "--depth", "10"], "81")])
def test_implementations_agree(args, tensors, capsys):
    status, lines = run(capsys, *args)
    assert status == 0 and lines[-1].startswith(f"all {tensors}")
    assert [line.split()[0] for line in lines[2:-1]] == [
        "images", "conv1", "dense1.0", "dense1.1", "trans1", "dense2.0", "dense2.1", "trans2", "dense3.0", "dense3.1",
        "bn1", "features", "fc", "loss"]


@pytest.mark.parametrize("against", ["cuda", "cudnn-off"])
def test_a_gpu_agrees_or_is_skipped(against, capsys):
    status, lines = run(capsys, "--against", against)
    assert status == 0
    if not torch.cuda.is_available():
        assert lines == [f"skipped {against}: this machine has no GPU that PyTorch can use"]


def test_csv_and_figure_hold_every_tensor_in_order_of_computation(tmp_path, capsys):
    table, figure = tmp_path / "rows.csv", tmp_path / "depth.png"
    status, _ = run(capsys, *PLAIN, "--csv", str(table), "--plot", str(figure))
    rows = pd.read_csv(table)
    names = {kind: group["name"].tolist() for kind, group in rows.groupby("kind")}
    layers = ["conv1", "dense1.0", "dense1.1", "trans1", "dense2.0", "dense2.1", "trans2", "dense3.0", "dense3.1"]
    assert status == 0 and names["state"] == [*layers, "features", "fc", "output", "loss"]
    assert names["gradient"] == ["fc", "features", *reversed(layers), "images"]
    net = DenseNet(4, 16)
    assert sorted(names["statistic"]) == sorted(name for name, _ in net.named_buffers())
    assert sorted(names["parameter"]) == sorted(name for name, _ in net.named_parameters())
    assert names["parameter"][0].startswith("fc") and names["parameter"][-1] == "conv1.weight"
    assert rows.share.between(0, 1).all() and (rows.difference <= rows.limit).all() and rows.difference64.max() < 1e-12
    image = matplotlib.image.imread(figure)[..., :3]
    assert image.shape == (630, 1800, 3) and 0.02 < (image < 0.9).any(2).mean() < 0.3


IN_DENSE_2_1 = {misordered: "statistic dense2.1.bn1.running_mean", scaled: "gradient of dense2.1.conv1.weight",
                without_mean: "gradient of the output of dense2.0",
                updated_twice: "statistic dense2.1.bn1.running_mean"}


@pytest.mark.parametrize("against", ["torchvision", "plain"])
@pytest.mark.parametrize("fault", IN_DENSE_2_1)
def test_a_fault_in_one_layer_is_found_there(fault, against, capsys, monkeypatch):
    plant(monkeypatch, fault, n=14)
    assert first_difference(capsys, "--against", against) == IN_DENSE_2_1[fault]


@pytest.mark.parametrize("against", ["torchvision", "plain"])
@pytest.mark.parametrize("name, wrong, place", [
    ("relu", F.leaky_relu, "statistic dense1.0.bn2.running_mean"), ("avg_pool2d", F.max_pool2d, "output of trans1")])
def test_a_wrong_function_is_found(name, wrong, place, against, capsys, monkeypatch):
    replace_function(monkeypatch, name, wrong)
    assert first_difference(capsys, "--against", against) == place


@pytest.mark.parametrize("efficient", ["yes", "max"])
@pytest.mark.parametrize("which, place", [("input", "gradient of the output of trans2"),
                                          ("weight", "gradient of dense3.2.conv2.weight")])
def test_a_wrong_gradient_of_the_efficient_block_is_found(which, place, efficient, capsys, monkeypatch):
    scaled_in_block(monkeypatch, which)
    assert first_difference(capsys, *PLAIN, "--efficient", efficient) == place


def test_a_statistic_that_the_efficient_block_updates_twice_is_found(capsys, monkeypatch):
    features = DenseNet.features

    def twice(self, x):
        out = features(self, x)
        if self.efficient:
            self.dense2[1].bn1.running_var *= 1.9  # as a second update from zero does
        return out

    monkeypatch.setattr(DenseNet, "features", twice)
    assert first_difference(capsys, *PLAIN) == "statistic dense2.1.bn1.running_var"


def test_it_fails_if_the_textbook_runs_instead_of_the_efficient_block(capsys, monkeypatch):
    monkeypatch.setattr(densenet, "block_is_exact", lambda net, x: False)
    assert compare_grads.main([*SMALL, *PLAIN]) == 1
    assert one_line(capsys.readouterr().err, "compare_grads.py: error: ").endswith("so the check says nothing\n")


def save_checkpoint(file, net, names, **flags):
    flags = {"dataset": "cifar10", "data": "no/such/directory", "classes": None, "imageSize": None} | flags
    torch.save({"format": 1, "arguments": net.arguments, "model": net.state_dict(), "mean": [0.4] * 3,
                "std": [0.2] * 3, "classes": names, "flags": flags}, file)


def test_a_checkpoint_brings_its_network_pictures_classes_and_normalisation(tmp_path, capsys):
    for name in ("train/a", "train/b", "train/c", "test/a", "test/b", "test/c"):
        (tmp_path / name).mkdir(parents=True)
        Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / name / "picture.png")
    saved = DenseNet(4, blockConfig=(1, 1), nClasses=2, dropRate=0.2, smallInputs=False)
    save_checkpoint(tmp_path / "latest.pth", saved, ["c", "a"], dataset="folder", data=str(tmp_path), imageSize=48,
                    classes=["c", "a"])
    flags = ["--checkpoint", str(tmp_path / "latest.pth"), "--efficient", "yes"]
    net, images, labels = compare_grads.load(compare_grads.parse_args(flags))
    assert net.arguments == saved.arguments | {"dropRate": 0.0}
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in net.state_dict().items())
    levels = (images * 0.2 + 0.4) * 255
    assert (levels - levels.round()).abs().max() < 1e-3 and levels.min() > -1e-3 and levels.max() < 255.001
    assert images.shape == (2, 3, 48, 48) and sorted(labels.tolist()) == [0, 1]
    status, lines = run(capsys, *flags, network=[])
    assert status == 0 and lines[0].startswith("DenseNet-BC, blocks of 1, 1 layers, k=4: ")


def test_a_data_set_of_other_classes_is_refused(tmp_path, capsys):
    save_checkpoint(tmp_path / "latest.pth", DenseNet(4, 10, nClasses=3), ["a", "b", "c"])
    flags = ["--checkpoint", tmp_path / "latest.pth", "--data", SAMPLE]
    assert "other classes" in refused(compare_grads.main, capsys, *flags)


@pytest.mark.parametrize("args, named", [
    (["--depth", "23"], "nearest 22 and 28"), ([*PLAIN, "--efficient", "no"], "valid are yes, max"),
    (["--no-bottleneck"], "valid for this network are --against plain"), (["--reduction", "0.4"], "reduction 0.5"),
    (["--data", "d"], "--checkpoint FILE"), (["--checkpoint", __file__, "--depth", "22"], "--depth contradicts"),
    (["--checkpoint", "/no/such/latest.pth"], "no such file"), (["--checkpoint", __file__], "test_compare_grads.py"),
    (["--plot", "figure.pdf"], "ends in .png"), (["--csv", "no/such/dir/rows.csv"], "existing, writable directory")])
def test_bad_input_is_refused_in_one_line(args, named, capsys):
    assert named in refused(compare_grads.main, capsys, *args)
