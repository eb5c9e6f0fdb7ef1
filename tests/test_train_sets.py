"""Runs with other data sets, networks, classes and a validation set, from the command line to their files."""

import functools
import hashlib
import json
import random
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from common import SAMPLE, SMALL, differences, refused, rows, slow, stopped_at
from PIL import Image

import densenet
import plot
import train
from lib import data, network, run_directory
from lib.batches import Batches

ONE_EPOCH = [*SMALL, "--nEpochs", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The sample's cats, dogs and ships as files of mixed sizes and formats; every fifth one is grayscale."""
    root, draw = tmp_path_factory.mktemp("data") / "pets and ships", random.Random(0)
    for name, images in zip(("train", "val"), data.load("cifar10", str(SAMPLE)), strict=True):
        for i, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            class_folder = root / name / images.classes[label]
            if class_folder.name in ("cat", "dog", "ship"):
                class_folder.mkdir(parents=True, exist_ok=True)
                photograph = Image.fromarray(image.permute(1, 2, 0).numpy())
                photograph = photograph.resize((draw.randint(20, 90), draw.randint(20, 90)))
                photograph = photograph.convert("L" if i % 5 == 0 else "RGB")
                photograph.save(class_folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


# --- data sets --------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_run_on_a_folder_of_images_of_mixed_sizes(folder, tmp_path, capsys):
    save = tmp_path / "run"
    argv = ["--dataset", "folder", "--data", str(folder), "--imageSize", "24", *ONE_EPOCH]
    assert train.main([*argv, "--save", str(save)]) == 0
    about = json.loads((save / "run.json").read_text())
    assert about["classes"] == ["cat", "dog", "ship"] and about["trainImages"] == 300 and about["testImages"] == 60
    assert about["arguments"]["nClasses"] == 3 and about["arguments"]["inChannels"] == 3
    capsys.readouterr()
    assert train.main(["--evaluate", str(save / "latest.pth")]) == 0  # the checkpoint's flags say on which images
    assert f"{rows(save / 'test.csv')[0][2]:.2f}% of 60 images" in capsys.readouterr().out


@pytest.mark.slow
def test_a_grayscale_folder_makes_a_network_of_one_channel(folder, tmp_path):
    gray = tmp_path / "gray"
    for path in folder.rglob("*.*"):
        target = gray / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("L").save(target)
    save = tmp_path / "run"
    assert train.main(["--dataset", "folder", "--data", str(gray), *ONE_EPOCH, "--save", str(save)]) == 0
    about = json.loads((save / "run.json").read_text())
    assert about["arguments"]["inChannels"] == 1 and len(about["mean"]) == 1
    assert densenet.load(save / "latest.pth")(torch.rand(1, 1, 32, 32)).shape == (1, 3)


def test_a_broken_image_is_named(folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    bad = sorted((broken / "train/dog").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:60])
    err = refused(train.main, capsys, "--dataset", "folder", "--data", broken, *ONE_EPOCH,
                  "--save", tmp_path / "run")
    assert str(bad) in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_cifar100_trains_a_network_of_its_100_fine_classes(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, n in (("train.bin", 200), ("test.bin", 100)):
        records = draw.integers(0, 256, (n, 3074), dtype=np.uint8)
        records[:, 0], records[:, 1] = draw.integers(0, 20, n), np.arange(n) % 100
        records.tofile(folder / name)
    (folder / "fine_label_names.txt").write_text("".join(f"class{i}\n" for i in range(100)))
    save = tmp_path / "run"
    assert train.main(["--dataset", "cifar100", "--data", str(tmp_path), *ONE_EPOCH, "--save", str(save)]) == 0
    about = json.loads((save / "run.json").read_text())
    assert len(about["classes"]) == about["arguments"]["nClasses"] == 100


def test_svhn_is_never_augmented_and_takes_40_epochs(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    draw = np.random.default_rng(0)
    for name, n in (("train", 60), ("test", 20), ("extra", 40)):
        labels = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]  # 10 stands for the digit 0
        io.savemat(tmp_path / f"{name}_32x32.mat",
                   {"X": draw.integers(0, 256, (32, 32, 3, n), dtype=np.uint8), "y": labels})
    monkeypatch.setattr(Batches, "augmented", lambda *_: pytest.fail("digits were flipped"))
    args, _ = train.parse_args(["--dataset", "svhn"])
    assert args.nEpochs == 40 and args.no_augment
    argv = ["--dataset", "svhn", "--extra", "--data", str(tmp_path), *ONE_EPOCH]
    assert train.main([*argv, "--save", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["trainImages"] == 100


@pytest.mark.slow
def test_a_run_on_two_classes_trains_and_tests_on_these_only(sample, tmp_path, capsys):
    argv = ["--data", sample, *SMALL, "--nEpochs", "2", "--save", str(tmp_path / "run")]
    assert train.main([*argv, "--classes", "dog", "cat"]) == 0
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["classes"] == ["dog", "cat"] and (about["trainImages"], about["testImages"]) == (200, 40)
    for _, _, error in rows(tmp_path / "run/test.csv"):
        assert error * 40 / 100 == pytest.approx(round(error * 40 / 100))
    capsys.readouterr()
    assert "--classes dog cat" in refused(train.main, capsys, *argv, "--resume", "--classes", "cat", "dog")
    assert train.main(["--evaluate", str(tmp_path / "run/latest.pth")]) == 0
    assert "of 40 images" in capsys.readouterr().out
    assert "cow" in refused(train.main, capsys, "--data", sample, "--classes", "cat", "cow", "--save", tmp_path / "new")


# --- validation -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def flags():
    return ["--data", str(SAMPLE), *SMALL, "--classes", "cat", "dog", "--valSize", "50", "--nEpochs", "4"]


@pytest.fixture(scope="module")
def validated(flags, tmp_path_factory):
    """The directory of a run that was never interrupted. Tests must not write to it."""
    save = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags, "--save", str(save)]) == 0
    return save


def test_validation_chooses_the_epoch_and_the_test_set_is_used_once(flags, tmp_path, monkeypatch):
    used = []

    def recorded(name, original):
        def record(batches, *args):
            used.append((name, batches.n))
            return original(batches, *args)
        return record

    for name in ("plain", "augmented"):
        monkeypatch.setattr(Batches, name, recorded(name, getattr(Batches, name)))
    save = tmp_path / "run"
    assert train.main([*flags, "--save", str(save)]) == 0
    assert used == [("augmented", 150), ("plain", 50)] * 4 + [("plain", 40)]
    validation, tested = rows(save / "val.csv"), rows(save / "test.csv")
    best = min(validation, key=lambda row: row[2])
    assert [row[0] for row in validation] == [1, 2, 3, 4] and len(tested) == 1
    checkpoint = densenet.read_checkpoint(save / "best.pth")
    assert checkpoint["epoch"] == tested[0][0] == best[0]
    assert checkpoint["val"]["error"] == pytest.approx(best[2])
    net = densenet.load(save / "best.pth")
    images, labels, _ = data.select_classes(data.load("cifar10", str(SAMPLE))[1], ["cat", "dog"])
    wrong = (net((images / 255 - net.mean) / net.std).argmax(1) != labels).float().mean() * 100
    assert tested[0][2] == pytest.approx(wrong.item())


@pytest.mark.slow
@pytest.mark.parametrize(("function", "call", "module"), [
    slow("train_epoch", 3, train), slow("evaluate", 4, train), ("evaluate", 5, train),
    slow("copy_file", 1, run_directory), ("copy_file", 3, run_directory), slow("copy_file", 4, run_directory)])
def test_a_stopped_run_with_validation_ends_the_same(flags, validated, tmp_path, function, call, module):
    save = tmp_path / "run"
    assert stopped_at(function, call, [*flags, "--save", str(save)], module=module) == 143
    assert train.main(["--resume", "--save", str(save), "--no-plot"]) == 0
    assert differences(validated, save) == []


@pytest.mark.slow
def test_best_is_made_again_if_the_run_was_stopped_before_it(flags, validated, tmp_path):
    save = tmp_path / "run"
    assert stopped_at("copy_file", 2, [*flags, "--save", str(save)], module=run_directory) == 143  # after previous.pth
    assert (save / "latest.pth").exists() and not (save / "best.pth").exists()
    assert train.main(["--resume", "--save", str(save), "--no-plot"]) == 0
    assert differences(validated, save) == []


@pytest.mark.slow
def test_a_lost_or_foreign_best_is_named_before_anything_is_trained(validated, tmp_path, capsys):
    save = shutil.copytree(validated, tmp_path / "run")
    best = densenet.read_checkpoint(save / "best.pth")["epoch"]
    assert best < 4  # best.pth of the last epoch would be made again
    path = save / "best.pth"
    for change, message in ((path.unlink, f"is missing, the checkpoint of epoch {best}; put it back"),
                            (lambda: torch.save({"format": 1, "epoch": 99}, path), "of epoch 99, the best was")):
        change()
        assert message in refused(train.main, capsys, "--resume", "--nEpochs", "5", "--save", save, "--no-plot")
        assert [row[0] for row in rows(save / "val.csv")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_finished_run_with_validation_takes_more_epochs(validated, tmp_path):
    save = shutil.copytree(validated, tmp_path / "run")
    assert train.main(["--resume", "--nEpochs", "5", "--save", str(save), "--no-plot"]) == 0
    assert [row[0] for row in rows(save / "val.csv")] == [1, 2, 3, 4, 5]
    assert len(rows(save / "test.csv")) == 1  # of the new end only
    epochs = [densenet.read_checkpoint(save / name)["epoch"] for name in ("latest.pth", "previous.pth")]
    assert epochs == [5, 4]


@pytest.mark.slow
def test_the_figures_of_a_finished_run_show_its_last_rows(flags, tmp_path):
    save = tmp_path / "run"
    assert train.main([*[flag for flag in flags if flag != "--no-plot"], "--save", str(save)]) == 0
    drawn = (save / "loss.png").read_bytes()
    assert plot.main([str(save)]) == 0
    assert (save / "loss.png").read_bytes() == drawn


# --- networks ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_an_imagenet_network_trains_on_a_folder(folder, tmp_path):
    save = tmp_path / "run"
    assert train.main(["--dataset", "folder", "--data", str(folder), "--arch", "densenet121", "--imageSize", "32",
                       "--nEpochs", "1", "--batchSz", "60", "--no-plot", "--save", str(save)]) == 0
    net = densenet.load(save / "latest.pth")
    assert net.fc.out_features == 3 and len(net.dense3) == 24
    assert train.parse_args(["--arch", "densenet121", "--dataset", "folder"])[0].imageSize == 224


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub, and no network."""
    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub"
    torch.hub.set_dir(before)


@pytest.mark.slow
def test_pretrained_weights_that_cannot_be_downloaded_are_one_line(folder, hub, tmp_path, capfd):
    argv = ["--dataset", "folder", "--data", folder, "--arch", "densenet121", "--pretrained", "--imageSize", "32"]
    err = refused(train.main, capfd, *argv, "--save", tmp_path / "run")
    assert "no route to host" in err and "there is no" in err and "densenet121-a639ec97.pth" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("content", [
    slow(b""), b"garbage", slow(b"PK\x03\x04 cut"), slow(None)])
def test_a_damaged_file_of_pretrained_weights_is_named(folder, hub, tmp_path, capfd, content):
    file = hub / "checkpoints/densenet121-a639ec97.pth"
    file.parent.mkdir(parents=True)
    torch.save(torch.nn.Linear(1, 1), file) if content is None else file.write_bytes(content)
    argv = ["--dataset", "folder", "--data", folder, "--arch", "densenet121", "--pretrained", "--imageSize", "32"]
    assert f"{file} is damaged" in refused(train.main, capfd, *argv, "--save", tmp_path / "run")


@pytest.mark.slow
def test_pretrained_weights_are_where_the_training_begins(folder, hub, tmp_path, monkeypatch):
    theirs = torchvision.models.densenet121()
    (hub / "checkpoints").mkdir(parents=True)
    file, seen = hub / "checkpoints/densenet121.pth", []
    torch.save(theirs.state_dict(), file)
    named = file.rename(file.with_stem(f"densenet121-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"))

    class Weights:
        class DEFAULT:
            url = f"https://example.org/{named.name}"
            get_state_dict = functools.partial(torch.hub.load_state_dict_from_url, url)

    monkeypatch.setattr(network.torchvision.models, "get_model_weights", lambda arch: Weights)

    def step(net, *_):
        seen.append({name: value.clone() for name, value in net.state_dict().items()})
        return torch.ones(2)

    monkeypatch.setattr(train, "train_step", step)
    argv = ["--dataset", "folder", "--data", str(folder), "--arch", "densenet121", "--pretrained", "--imageSize", "32",
            "--batchSz", "300", "--nEpochs", "1", "--no-plot", "--save", str(tmp_path / "run")]
    assert train.main(argv) == 0
    taken, given = seen[0], theirs.state_dict()
    for name, value in taken.items():
        if name.startswith("fc."):
            assert value.shape[0] == 3
        else:
            assert value.equal(given[densenet.torchvision_name(name)]), name
    about = json.loads((tmp_path / "run/run.json").read_text())
    assert about["mean"] == [0.485, 0.456, 0.406]  # these weights were trained with it
    shutil.rmtree(hub)
    assert train.main(["--resume", "--nEpochs", "2", "--no-plot", "--save", str(tmp_path / "run")]) == 0


# --- refusals ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("argv", "message"), [
    ("--pretrained", "--pretrained needs --arch; valid are densenet121, densenet161"),
    ("--arch densenet121 --depth 40", "--depth=40 contradicts --arch densenet121"),
    ("--arch densenet121 --no-bottleneck", "--no-bottleneck contradicts"),
    ("--arch densenet120", "invalid choice: 'densenet120'"),
    ("--imageSize 64", "--imageSize 64: --dataset cifar10 has its own size"),
    ("--extra", "--extra: --dataset cifar10 has no extra images"),
    ("--dataset mnist", "invalid choice: 'mnist'"),
    ("--valSize 1001", "1001"), ("--valSize 1000", "1000"), ("--valSize -1", "'-1'"), ("--valSize 5.5", "'5.5'"),
    ("--valSize 940 --batchSz 64", "--batchSz 64 is more than the 60 training images"),
    ("--classes cat", "cat"), ("--classes cat cat", "cat"), ("--classes", "--classes"),
    ("--precision tf32 --no-cuda", "--precision tf32 needs a GPU; valid on cpu are fp32, bf16"),
    ("--precision fp16", "invalid choice: 'fp16'"),
])
def test_bad_flags_are_refused_in_one_line(sample, tmp_path, capsys, argv, message):
    assert message in refused(train.main, capsys, "--data", sample, *argv.split(), "--save", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "message"), [
    (["--imageSize", "2"], "--imageSize 2: input is 2x2, too small"),
    (["--imageSize", "16", "--arch", "densenet121"], "--imageSize 16: input is 16x16, too small"),
    (["--imageSize", "4", "--batchSz", "23"], "the smallest batch gives a process one image with a 1x1"),
])
def test_images_too_small_for_the_network_are_refused(folder, tmp_path, capsys, flags, message):
    argv = ["--dataset", "folder", "--data", folder, "--save", tmp_path / "run", *flags]
    assert message in refused(train.main, capsys, *(argv if "--arch" in flags else [*argv, *SMALL[:4]]))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_that_a_run_no_longer_finds_are_not_downloaded_again(sample, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(sample).parent)
    assert train.main(["--data", Path(sample).name, *ONE_EPOCH, "--save", str(tmp_path / "run")]) == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "download", lambda *_: pytest.fail("a download"))
    capsys.readouterr()
    for argv in (["--resume", "--nEpochs", "2", "--save", "run"], ["--evaluate", "run/latest.pth"]):
        assert "--data cifar10-sample is not to be found from here" in refused(train.main, capsys, *argv)
    assert train.main(["--evaluate", "run/latest.pth", "--data", sample]) == 0
