"""compare_grads.py: implementations that agree pass; on each path, each fault is caught and located."""

import csv
import os
import re
import sys
import urllib.error
import urllib.request
from functools import partial

import common
import matplotlib.image
import pytest
import torch
import torch.nn as nn
import torchvision
from common import contents, cut_sample, full_disk, run_script

import compare_grads
import densenet
import train
from densenet import DenseNet
from lib import recording
from lib.faults import FAULTS
from lib.figures import COLOURS

SMALL = ["--depth", "16", "--growthRate", "4", "--batchSz", "4"]  # two layers a block: faults go into dense2.1
PLAIN = ["--against", "plain"]


def label(value):
    """A test's name from its flags."""
    if isinstance(value, list):
        return " ".join(value) or "default"
    return str(value)


def run(capsys, *args, network=SMALL):
    """-> exit status, lines of stdout"""
    status = compare_grads.main([*network, *args])
    out, err = capsys.readouterr()
    assert err == ""
    return status, out.splitlines()


refused = partial(common.refused, compare_grads.main)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """train.py's checkpoint of a network with dropout and six channels after the first convolution."""
    folder = tmp_path_factory.mktemp("trained")
    assert train.main(["--data", cut_sample(folder / "images"), "--depth", "16", "--growthRate", "4", "--batchSz", "20",
                       "--nEpochs", "1", "--initChannels", "6", "--dropRate", "0.2", "--no-plot", "--no-cuda",
                       "--save", str(folder / "run")]) == 0
    return folder / "run" / "latest.pth"


# --- agreement --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, tensors", [
    ([], 119), (["--efficient", "yes"], 107), (["--efficient", "max"], 107), (PLAIN, 107),
    ([*PLAIN, "--efficient", "max"], 107), (["--against", "float64"], 119), (["--against", "channels_last"], 119),
    (["--against", "channels_last", "--efficient", "yes"], 107), (["--against", "bf16"], 119),
    (["--against", "bf16", "--efficient", "yes"], 107)], ids=label)
def test_implementations_agree(args, tensors, capsys):
    status, lines = run(capsys, *args)
    assert status == 0
    assert re.match(rf"all {tensors} tensors agree, \d+ of them bit for bit; nearest to its limit is ", lines[-1])
    assert not any("DIFFERS" in line for line in lines)
    layers = [line.split()[0] for line in lines[3:-1]]
    order = ["images", "conv1", "dense1.0", "dense1.1", "trans1", "dense2.0", "dense2.1", "trans2", "dense3.0",
             "dense3.1", "bn1", "features", "fc", "loss"]
    assert layers == (order if tensors == 119 else [layer for layer in order if layer != "features"])


@pytest.mark.parametrize("args", [PLAIN, [*PLAIN, "--efficient", "max"], ["--against", "channels_last"]], ids=label)
def test_networks_without_bottleneck_agree(args, capsys):
    status, lines = run(capsys, "--no-bottleneck", *args)
    assert status == 0 and lines[-1].startswith("all ")


@pytest.mark.slow
def test_networks_of_other_blocks_agree(trained, tmp_path, capsys, sample):
    """Blocks of 1, 2, 1 and 2 layers, which only a checkpoint can ask for."""
    torch.manual_seed(0)
    net = DenseNet(4, blockConfig=(1, 2, 1, 2))
    checkpoint = torch.load(trained, weights_only=True)
    torch.save(checkpoint | {"arguments": net.arguments, "model": net.state_dict()}, tmp_path / "four.pth")
    given = ["--checkpoint", str(tmp_path / "four.pth"), "--data", sample]
    for args in ([], PLAIN):
        status, lines = run(capsys, *given, *args, network=[])
        assert status == 0 and lines[-1].startswith("all ")
        assert [line.split()[0] for line in lines if line.startswith("trans")] == ["trans1", "trans2", "trans3"]
    status, lines = run(capsys, *given, "--inject", "grad-scale", network=[])
    assert status == 1 and lines[-1].startswith("first difference: gradient of dense3.0.conv1.weight: ")


@pytest.mark.slow
def test_torch_compile_agrees_or_is_skipped(capsys, monkeypatch):
    """The traced graphs run without the C++ compiler, which would take too long for a test."""
    compiled, traced = [], partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or traced(model))
    monkeypatch.setenv("CXX", sys.executable)  # any program that exists
    network = ["--depth", "10", "--growthRate", "4", "--batchSz", "2"]
    status, lines = run(capsys, "--against", "compile", network=network)
    assert status == 0 and lines[-1].startswith("all 59 tensors agree") and len(compiled) == 1
    status, lines = run(capsys, "--against", "compile", "--inject", "cat-grad", network=network)
    assert status == 1 and lines[-1].startswith("first difference: gradient of trans1.conv1.weight: ")
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert run(capsys, "--against", "compile") == (
        0, ["skipped compile: there is no C++ compiler /no/such/compiler"])


@pytest.mark.parametrize("against", ["cuda", "cudnn-off"])
def test_a_gpu_agrees_or_is_skipped(against, capsys):
    status, lines = run(capsys, "--against", against)
    assert status == 0
    if not torch.cuda.is_available():
        assert lines == [f"skipped {against}: this machine has no GPU that PyTorch can use"]


def test_every_parameter_statistic_and_state_is_compared():
    net = DenseNet(4, 16)
    keys = list(compare_grads.keys(net))
    assert len(keys) == len(set(keys)) == 119
    names = {kind: [key.name for key in keys if key.kind == kind]
             for kind in ("state", "statistic", "gradient", "parameter")}
    assert sorted(names["parameter"]) == sorted(name for name, _ in net.named_parameters())
    assert sorted(names["statistic"]) == sorted(name for name, _ in net.named_buffers())
    assert names["state"] == ["conv1", "dense1.0", "dense1.1", "trans1", "dense2.0", "dense2.1", "trans2", "dense3.0",
                              "dense3.1", "bn1", "features", "fc", "output", "loss"]
    assert names["gradient"] == ["images", *names["state"][:-2]][::-1]  # the backward pass starts at the loss
    assert names["parameter"][0].startswith("fc") and names["parameter"][-1] == "conv1.weight"


def test_names_map_onto_torchvision_one_to_one():
    net = DenseNet(4, 22)
    theirs = recording.torchvision_net(net).state_dict()
    mapped = {densenet.torchvision_name(name): name for name in net.state_dict()}
    assert len(mapped) == len(net.state_dict()) and mapped.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(value, net.state_dict()[mapped[name]])


@pytest.mark.parametrize("path", ["efficient", "max"])
def test_states_inside_a_block_are_rebuilt_from_its_saved_tensors(path):
    """One block has as many channels (16) as its bottlenecks, so that their tensors have the same shape."""
    torch.manual_seed(0)
    net = DenseNet(4, 16, efficient=False)
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    textbook, efficient = (recording.record(recording.Side("", path=side, dtype=torch.float64), net, images,
                                            labels, None) for side in ("textbook", path))
    states = ["conv1", "dense1.0", "dense1.1", "trans1", "dense2.0", "dense2.1", "trans2", "dense3.0", "dense3.1"]
    assert net.trans1.bn1.num_features == 16 == net.dense1[0].bn2.num_features
    for name in states:
        torch.testing.assert_close(efficient["state", name], textbook["state", name], rtol=0, atol=1e-12)
    for name in ("conv1", "trans1", "trans2", "images"):
        torch.testing.assert_close(efficient["gradient", name], textbook["gradient", name], rtol=1e-10, atol=1e-14)


# --- faults -----------------------------------------------------------------------------------------------------

TEXTBOOK = {
    "cat-order": "statistic dense2.1.bn1.running_mean", "cat-grad": "gradient of the output of dense2.0",
    "grad-scale": "gradient of dense2.1.conv1.weight", "bn-no-mean": "gradient of dense2.1.conv1.weight",
    "stats-twice": "statistic dense2.1.bn2.running_mean"}
EFFICIENT = {
    "cat-order": "statistic dense2.1.bn2.running_mean", "cat-grad": "gradient of dense2.0.conv2.weight",
    "grad-scale": "gradient of dense2.1.conv1.weight", "bn-no-mean": "gradient of dense3.1.conv2.weight",
    "stats-twice": "statistic dense2.1.bn1.running_mean"}
CASES = [(args, fault, place) for args, places in (
    ([], TEXTBOOK), (["--efficient", "yes"], EFFICIENT), (PLAIN, EFFICIENT),
    ([*PLAIN, "--efficient", "max"], EFFICIENT), (["--against", "float64"], TEXTBOOK),
    (["--against", "channels_last"], TEXTBOOK)) for fault, place in places.items()]


@pytest.mark.parametrize("args, fault, place", CASES, ids=label)
def test_every_fault_is_caught_and_located(args, fault, place, capsys):
    status, lines = run(capsys, *args, "--inject", fault)
    assert status == 1
    found = re.fullmatch(r"first difference: (.*): (\S+), limit (\S+)", lines[-1])
    assert found[1] == place and float(found[2]) > 100 * float(found[3])
    assert any(line.endswith("DIFFERS") for line in lines) and lines[0].endswith(f"injected: {fault}")


@pytest.mark.parametrize("fault, place", [
    ("cat-order", "output of dense2.2"), ("cat-grad", "gradient of dense2.1.conv1.weight"),
    ("grad-scale", "gradient of dense2.2.conv1.weight"), ("bn-no-mean", "gradient of dense3.3.conv1.weight"),
    ("stats-twice", "statistic dense2.2.bn1.running_mean")])
def test_faults_are_caught_without_bottleneck(fault, place, capsys):
    status, lines = run(capsys, "--no-bottleneck", *PLAIN, "--inject", fault)
    assert status == 1 and lines[-1].startswith(f"first difference: {place}: ")


def test_every_fault_of_inject_is_tested():
    assert FAULTS.keys() == TEXTBOOK.keys() == EFFICIENT.keys()


@pytest.mark.slow
def test_a_fault_is_gone_after_its_run(capsys):
    for fault in FAULTS:
        assert run(capsys, *PLAIN, "--inject", fault)[0] == 1
        assert run(capsys, *PLAIN)[0] == 0


@pytest.mark.slow
def test_the_script_reports_a_fault_in_its_last_line_and_exit_status(tmp_path):
    done = run_script("compare_grads.py", *SMALL, "--inject", "grad-scale", "--plot", tmp_path / "depth.png",
                      MPLBACKEND="module://nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["depth.png"]
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("first difference: gradient of dense2.1.conv1.weight: 1.0e-02, ")


def test_running_statistics_that_are_never_updated_are_caught(capsys, monkeypatch):
    monkeypatch.setattr(densenet, "update_running_statistics", lambda norms, means, variances: None)
    status, lines = run(capsys, *PLAIN)
    assert status == 1  # the states are rebuilt from the running means, so that they differ first
    assert lines[-1].startswith("first difference: output of conv1: ")


def test_a_lost_gradient_is_caught(capsys, monkeypatch):
    original = densenet.EfficientBlock.backward

    def without_third(ctx, *douts):
        gradients = original(ctx, *douts)
        return *gradients[:2], None, *gradients[3:]

    monkeypatch.setattr(densenet.EfficientBlock, "backward", staticmethod(without_third))
    status, lines = run(capsys, *PLAIN)
    assert status == 1 and lines[-1].startswith("first difference: gradient of dense3.0.bn1.weight: 1.0e+00, ")


def test_a_biased_running_variance_is_caught(capsys, monkeypatch):
    update = densenet.update_running_statistics
    monkeypatch.setattr(densenet, "update_running_statistics", lambda norms, means, variances: update(
        norms, means, [var * 0.999 for var in variances]))
    status, lines = run(capsys, *PLAIN)
    assert status == 1 and lines[-1].startswith("first difference: statistic dense1.0.bn1.running_var: 1.0e-03, ")


def test_a_fault_that_our_network_has_in_float32_and_float64_is_caught(capsys, monkeypatch):
    """The yardstick is the reference's, not ours. Here the networks differ in batch norm's epsilon."""
    make = recording.torchvision_net

    def with_other_eps(net):
        theirs = make(net)
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-3
        return theirs

    monkeypatch.setattr(recording, "torchvision_net", with_other_eps)
    status, lines = run(capsys)
    assert status == 1 and lines[-1].startswith("first difference: statistic dense1.0.bn2.running_mean: ")


def test_it_fails_if_the_textbook_path_runs_instead_of_the_efficient_path(capsys, monkeypatch):
    monkeypatch.setattr(densenet, "can_be_efficient", lambda *_: False)
    assert compare_grads.main([*SMALL, *PLAIN]) == 1
    assert capsys.readouterr().err == ("compare_grads.py: error: dense1 took the textbook path instead of the "
                                       "efficient path, so the check says nothing\n")


# --- files ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_csv_and_figure_replace_older_files_and_hold_every_tensor(tmp_path, capsys):
    table, figure = tmp_path / "rows.csv", tmp_path / "depth.png"
    for path in (table, figure):
        path.write_bytes(b"an older file\n" * 100_000)
    status, lines = run(capsys, *PLAIN, "--csv", str(table), "--plot", str(figure))
    assert status == 0 and lines[-1].startswith("all 107 tensors agree")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth.png", "rows.csv"]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["kind"], row["name"]) for row in rows][:2] == [
        ("conv1", "state", "conv1"), ("dense1.0", "statistic", "dense1.0.bn1.running_mean")]
    assert len(rows) == 107 and all(0 <= float(row["share"]) < 1 for row in rows)
    assert all(float(row["difference"]) <= float(row["limit"]) and float(row["difference64"]) < 1e-12 for row in rows)
    image = matplotlib.image.imread(figure)[..., :3]
    assert image.shape == (630, 1800, 3)
    for colour in (COLOURS[0], COLOURS[2], COLOURS[5]):
        wanted = torch.tensor([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        assert ((torch.from_numpy(image.copy()) - wanted).abs().amax(2) < 0.02).sum() > 300


def test_a_file_that_cannot_be_written_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("old")
    with full_disk():
        assert compare_grads.main([*SMALL, "--csv", str(tmp_path / "rows.csv")]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"compare_grads.py: error: .*rows.csv: cannot be written \(File too large\)\n", err)
    assert contents(tmp_path) == {"rows.csv": b"old"}


def test_control_characters_in_an_environment_variable_are_escaped(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "/no/\x1b[31mcompiler")
    assert run(capsys, "--against", "compile") == (
        0, [r"skipped compile: there is no C++ compiler /no/\x1b[31mcompiler"])


@pytest.mark.slow
@pytest.mark.parametrize("args", [[], PLAIN], ids=["torchvision", "plain"])
def test_trained_weights_and_real_images_show_agreement_and_a_fault(args, trained, capsys, sample):
    given = ["--checkpoint", str(trained), "--data", sample, "--batchSz", "6"]
    status, lines = run(capsys, *args, *given, network=[])
    assert status == 0 and lines[0].startswith("DenseNet-BC L=16 k=4: ")
    status, lines = run(capsys, *args, *given, "--inject", "grad-scale", network=[])
    assert status == 1 and lines[-1].startswith("first difference: gradient of dense2.1.conv1.weight: 1.0e-02, ")


def test_weights_and_normalisation_are_taken_from_the_checkpoint(trained, sample):
    args = compare_grads.parse_args(["--checkpoint", str(trained), "--data", sample])
    net, images, labels = compare_grads.load(args)
    saved = torch.load(trained, weights_only=True)
    assert saved["arguments"]["dropRate"] == 0.2 and saved["arguments"]["initChannels"] == 6
    assert net.arguments == saved["arguments"] | {"dropRate": 0.0} and net.efficient is False
    for name, value in net.state_dict().items():
        assert torch.equal(value, saved["model"][name])
    mean, std = (torch.tensor(saved[name])[:, None, None] for name in ("mean", "std"))
    levels = (images * std + mean) * 255
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32
    assert (levels - levels.round()).abs().max() < 1e-3 and levels.min() >= -1e-3 and levels.max() <= 255.001
    assert labels.dtype == torch.int64 and labels.min() >= 0 and labels.max() <= 9


def test_real_images_for_random_weights_are_normalised_by_the_training_set(sample):
    _, images, _ = compare_grads.load(compare_grads.parse_args([*SMALL, "--data", sample, "--batchSz", "500"]))
    assert images.mean((0, 2, 3)).abs().max() < 0.1 and (images.std((0, 2, 3)) - 1).abs().max() < 0.1


# --- what is refused --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("args, named", [
    (["--against", "lua"], "'torchvision', 'plain'"), (["--inject", "bad-luck"], "'stats-twice'"),
    (["--depth", "23"], "depth is 23; valid with bottleneck is 6n + 4, nearest 22 and 28"),
    (["--batchSz", "1"], "whole number from 2 to 1024"), (["--efficient", "perhaps"], "'perhaps'"),
    (["--against", "plain", "--efficient", "no"], "valid are yes, max"),
    (["--against", "bf16", "--inject", "cat-grad"], "--inject cat-grad"),
    (["--no-bottleneck"], "valid for this network are plain"), (["--reduction", "0.4"], "always has bottlenecks"),
    (["--against", "float64", "--no-bottleneck"], "--against float64"),
    (["--checkpoint", "latest.pth"], "--data DIR"),
    (["--checkpoint", "x.pth", "--data", "d", "--depth", "22"], "--depth contradicts --checkpoint x.pth"),
    (["--checkpoint", "x.pth", "--data", "d", "--no-bottleneck"], "--no-bottleneck contradicts"),
    (["--checkpoint", "/no/such/latest.pth", "--data", "d"], "/no/such/latest.pth"),
    (["--plot", "figure.pdf"], "ends in .png"), (["--csv", "no/such/dir/rows.csv"], "existing, writable directory"),
    (["--csv", "."], "path of a file"), (["--csv", ""], "path of a file"), (["--csv", os.devnull], "path of a file"),
    (["--csv", "two\nlines.csv"], "path of a file"), (["--data", "\x1b[31mred"], "printable characters"),
    (["--checkpoint", "\x1b[31mred"], "printable characters")], ids=label)
def test_bad_input_is_refused_in_one_line(args, named, capsys):
    assert named in refused(capsys, *args)


def test_compile_with_an_efficient_path_is_refused(capsys):
    assert "valid is no" in refused(capsys, "--against", "compile", "--efficient", "yes")


def test_a_directory_without_permission_to_write_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert "writable directory" in refused(capsys, "--csv", tmp_path / "rows.csv")


def test_checkpoints_that_cannot_be_read_are_refused(trained, tmp_path, capsys, sample):
    whole = trained.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", b"PK\x03\x04 of a checkpoint, this is all", whole[:len(whole) // 2], flipped):
        (tmp_path / "damaged.pth").write_bytes(content)
        assert "damaged.pth is damaged" in refused(capsys, "--checkpoint", tmp_path / "damaged.pth", "--data", sample)
    line = refused(capsys, "--checkpoint", tmp_path, "--data", sample)
    assert line == f"compare_grads.py: error: {tmp_path}: Is a directory\n"


def test_data_sets_that_do_not_fit_or_are_missing_are_refused(trained, tmp_path, capsys, sample, monkeypatch):
    assert "--batchSz 1024 is more than the 1000" in refused(capsys, "--data", sample, "--batchSz", "1024")
    checkpoint = torch.load(trained, weights_only=True)
    for net in (DenseNet(4, 10, nClasses=3), DenseNet(4, 10, inChannels=1),
                DenseNet(4, blockConfig=[1], smallInputs=False)):
        other = {name: checkpoint[name][:net.arguments["inChannels"]] for name in ("mean", "std")}
        other |= {"arguments": net.arguments, "model": net.state_dict(),
                  "classes": checkpoint["classes"][:net.arguments["nClasses"]]}
        torch.save(checkpoint | other, tmp_path / "other.pth")
        assert "not for the images of" in refused(capsys, "--checkpoint", tmp_path / "other.pth", "--data", sample)

    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(capsys, "--data", tmp_path / "empty")


def test_help_explains_every_comparison_and_every_fault(capsys):
    with pytest.raises(SystemExit) as stop:
        compare_grads.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines also break at hyphens
    for name, meaning in {**compare_grads.AGAINST, **FAULTS}.items():
        assert f"{name} ({meaning})" in text


def test_the_reference_is_a_network_of_the_torchvision_package():
    assert isinstance(recording.torchvision_net(DenseNet(4, 10)), torchvision.models.DenseNet)


def test_torchvisions_network_takes_over_bnsize():
    net = DenseNet(growthRate=4, depth=16, bnSize=2, efficient=False).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), recording.torchvision_net(net).eval()(x).log_softmax(1))
