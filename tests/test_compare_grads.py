"""compare_grads.py: implementations that agree pass; each fault is found and its place named."""

import re
from functools import partial

import common
import matplotlib.image
import pandas as pd
import pytest
import torch
import torch.nn as nn
from common import SAMPLE, full_disk, one_line
from faults import leaky_relu, max_pooling, misordered, plant, scaled, scaled_in_block, updated_twice, without_mean
from PIL import Image

import compare_grads
from densenet import DenseNet

SMALL = ["--depth", "16", "--growthRate", "4", "--batchSz", "4"]  # two layers a block
UNEQUAL = ["--depth", "22", "--growthRate", "4", "--batchSz", "4"]  # dense2.1 alone reads 14 channels
PLAIN = ["--against", "plain"]
refused = partial(common.refused, compare_grads.main)


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


# --- agreement --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, tensors", [  # a block makes no output of the batch norm after it
    ([], "119 tensors agree, 119 of them bit for bit"),
    (["--efficient", "yes"], "117"), (["--efficient", "max"], "117"),
    (PLAIN, "117"), ([*PLAIN, "--efficient", "max"], "117"), ([*PLAIN, "--no-bottleneck", "--depth", "10"], "81")])
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


def test_every_parameter_statistic_and_state_is_compared_in_order_of_computation():
    net = DenseNet(4, 16)
    found = list(compare_grads.keys(net))
    assert len(found) == len(set(found)) == 119
    names = {kind: [name for _, k, name in found if k == kind]
             for kind in ("state", "statistic", "gradient", "parameter")}
    assert sorted(names["parameter"]) == sorted(name for name, _ in net.named_parameters())
    assert sorted(names["statistic"]) == sorted(name for name, _ in net.named_buffers())
    assert names["state"] == ["conv1", "dense1.0", "dense1.1", "trans1", "dense2.0", "dense2.1", "trans2", "dense3.0",
                              "dense3.1", "bn1", "features", "fc", "output", "loss"]
    assert names["gradient"] == ["images", *names["state"][:-2]][::-1]
    assert names["parameter"][0].startswith("fc") and names["parameter"][-1] == "conv1.weight"


# --- faults -----------------------------------------------------------------------------------------------------

IN_DENSE_2_1 = {misordered: "statistic dense2.1.bn1.running_mean", scaled: "gradient of dense2.1.conv1.weight",
                without_mean: "gradient of the output of dense2.0",
                updated_twice: "statistic dense2.1.bn1.running_mean"}


@pytest.mark.parametrize("against", ["torchvision", "plain"])
@pytest.mark.parametrize("fault", IN_DENSE_2_1)
def test_a_fault_in_one_layer_is_found_there(fault, against, capsys, monkeypatch):
    plant(monkeypatch, fault, n=14)
    assert first_difference(capsys, "--against", against) == IN_DENSE_2_1[fault]


@pytest.mark.parametrize("fault, place", [
    (leaky_relu, "statistic dense1.0.bn2.running_mean"), (max_pooling, "output of trans1")])
@pytest.mark.parametrize("against", ["torchvision", "plain"])
def test_a_wrong_function_is_found(fault, place, against, capsys, monkeypatch):
    fault(monkeypatch)
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
        if self.efficient:  # from zero, a second update multiplies by 2 - momentum
            norm = self.dense2[1].bn1
            norm.running_var *= 2 - norm.momentum
        return out

    monkeypatch.setattr(DenseNet, "features", twice)
    assert first_difference(capsys, *PLAIN) == "statistic dense2.1.bn1.running_var"


def test_it_fails_if_the_textbook_runs_instead_of_the_efficient_block(capsys):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)  # the block has no modules to hook
    try:
        assert compare_grads.main([*SMALL, *PLAIN]) == 1
    finally:
        handle.remove()
    assert one_line(capsys.readouterr().err, "compare_grads.py: error: ").endswith("so the check says nothing\n")


# --- files ------------------------------------------------------------------------------------------------------

def save_checkpoint(file, net, names, **flags):
    flags = {"dataset": "cifar10", "data": "no/such/directory", "classes": None, "imageSize": None} | flags
    channels = net.arguments["inChannels"]
    torch.save({"format": 1, "arguments": net.arguments, "model": net.state_dict(), "mean": [0.4] * channels,
                "std": [0.2] * channels, "classes": names, "flags": flags}, file)


def test_weights_classes_and_normalisation_are_the_checkpoints(tmp_path):
    torch.manual_seed(0)
    saved = DenseNet(4, 16, dropRate=0.2, nClasses=2)
    save_checkpoint(tmp_path / "latest.pth", saved, ["ship", "cat"], classes=["ship", "cat"])
    args = compare_grads.parse_args(["--checkpoint", str(tmp_path / "latest.pth"), "--data", str(SAMPLE)])
    net, images, labels = compare_grads.load(args)
    assert net.arguments == saved.arguments | {"dropRate": 0.0}
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in net.state_dict().items())
    levels = (images * 0.2 + 0.4) * 255
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32
    assert (levels - levels.round()).abs().max() < 1e-3 and levels.min() > -1e-3 and levels.max() < 255.001
    assert set(labels.tolist()) == {0, 1}


@pytest.mark.parametrize("smallInputs, args", [(True, PLAIN), (False, [])])
def test_a_run_on_pictures_brings_its_own_data(smallInputs, args, tmp_path, capsys):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(4):
            Image.effect_noise((40, 40), 20 + 20 * i).convert("RGB").save(tmp_path / name / f"{i}.png")
    net = DenseNet(4, blockConfig=(1, 1), nClasses=2, smallInputs=smallInputs)
    save_checkpoint(tmp_path / "latest.pth", net, ["a", "b"], dataset="folder", data=str(tmp_path), imageSize=48)
    status, lines = run(capsys, "--checkpoint", str(tmp_path / "latest.pth"), *args, network=[])
    assert status == 0 and lines[0].startswith("DenseNet-BC, blocks of 1, 1 layers, k=4: ")


def test_a_data_set_of_other_classes_is_refused(tmp_path, capsys):
    save_checkpoint(tmp_path / "latest.pth", DenseNet(4, 10, nClasses=3), ["a", "b", "c"])
    assert "other classes" in refused(capsys, "--checkpoint", tmp_path / "latest.pth", "--data", SAMPLE)


def test_csv_and_figure_hold_every_tensor(tmp_path, capsys):
    table, figure = tmp_path / "rows.csv", tmp_path / "depth.png"
    status, _ = run(capsys, *PLAIN, "--csv", str(table), "--plot", str(figure))
    rows = pd.read_csv(table)
    assert status == 0 and len(rows) == 117
    assert rows[["layer", "kind", "name"]].values[:2].tolist() == [
        ["conv1", "state", "conv1"], ["dense1.0", "statistic", "dense1.0.bn1.running_mean"]]
    assert rows.share.between(0, 1).all() and (rows.difference <= rows.limit).all() and rows.difference64.max() < 1e-12
    image = matplotlib.image.imread(figure)[..., :3]
    assert image.shape == (630, 1800, 3) and 0.02 < (image < 0.9).any(2).mean() < 0.3


def test_a_file_that_cannot_be_written_ends_in_one_line(tmp_path, capsys):
    with full_disk():
        assert compare_grads.main([*SMALL, "--csv", str(tmp_path / "rows.csv")]) == 1
    assert "File too large" in one_line(capsys.readouterr().err, "compare_grads.py: error: ")


@pytest.mark.parametrize("args, named", [
    (["--against", "lua"], "'torchvision', 'plain', 'cuda', 'cudnn-off'"), (["--inject", "fault"], "--inject"),
    (["--depth", "23"], "nearest 22 and 28"), (["--batchSz", "1"], "whole number from 2 to 1024"),
    (["--efficient", "perhaps"], "'perhaps'"), ([*PLAIN, "--efficient", "no"], "valid are yes, max"),
    (["--no-bottleneck"], "valid for this network are --against plain"), (["--reduction", "0.4"], "reduction 0.5"),
    (["--data", "d"], "--checkpoint FILE"), (["--checkpoint", __file__, "--depth", "22"], "--depth contradicts"),
    (["--checkpoint", "/no/such/latest.pth"], "no such file"), (["--checkpoint", __file__], "test_compare_grads.py"),
    (["--plot", "figure.pdf"], "ends in .png"), (["--csv", "no/such/dir/rows.csv"], "existing, writable directory"),
    (["--csv", "."], "ends in .csv")])
def test_bad_input_is_refused_in_one_line(args, named, capsys):
    assert named in refused(capsys, *args)
