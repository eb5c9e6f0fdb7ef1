"""train.py: what a run does and says, and the files that it leaves."""

import json
import math
import re
import shlex
import shutil
import stat
import sys
from unittest.mock import Mock
from urllib.error import URLError

import pandas
import pytest
import torch
import torch.nn.functional as F
import torchvision
from common import (
    EPOCHS,
    ROOT,
    SAMPLE,
    SMALL,
    checkpoint,
    contents,
    differences,
    edit_checkpoint,
    one_line,
    refused,
    resume,
    rows,
    run_script,
    stopped_at,
)
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import densenet
import lib.run
import train
from lib import data
from lib.batches import Batches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The first of the sample's cats, dogs and ships as files of mixed sizes: 12 to train on, 6 to test."""
    root = tmp_path_factory.mktemp("data") / "pets and ships"
    for part, images, n in zip(("train", "test"), data.load("cifar10", SAMPLE), (4, 2), strict=True):
        for name in ("cat", "dog", "ship"):
            (root / part / name).mkdir(parents=True)
            for i, pixels in enumerate(images.pixels[images.labels == images.classes.index(name)][:n]):
                picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((30 + 9 * i, 40))
                picture.save(root / part / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture
def on_pictures(pictures):
    return ["--dataset", "folder", "--data", str(pictures), *SMALL, "--batchSz", "6", "--nEpochs", "1"]


# --- schedule ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, first_tenth, first_hundredth", [
    (1, None, None), (2, 2, None), (3, 3, None), (50, 26, 39), (300, 151, 226)])
def test_the_step_schedule_drops_at_half_and_three_quarters_of_the_epochs(n, first_tenth, first_hundredth):
    rates = [train.learning_rate("step", 0.1, epoch, n) for epoch in range(1, n + 1)]
    first = {rate: epoch for epoch, rate in reversed([*enumerate(rates, 1)])}
    assert first[0.1] == 1 and first.get(0.1 / 10) == first_tenth and first.get(0.1 / 100) == first_hundredth
    assert rates == sorted(rates, reverse=True) and {*rates} <= {0.1, 0.1 / 10, 0.1 / 100}
    assert train.learning_rate("step", 0.1, 2 * n, n) == rates[-1]  # added epochs keep the last rate


def test_the_cosine_schedule_is_half_a_cosine_and_the_constant_one_constant():
    rates = [train.learning_rate("cosine", 0.2, epoch, 4) for epoch in (1, 2, 3, 4, 9)]
    last = 0.1 * (1 - math.sqrt(0.5))
    assert rates == pytest.approx([0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, last, last])
    assert {train.learning_rate("constant", 0.2, epoch, 4) for epoch in range(1, 9)} == {0.2}


def test_the_optimizer_steps_with_the_schedules_rates_which_are_printed_with_the_mean_loss(images, tmp_path, capsys):
    used, argv = [], ["--data", images, *SMALL, "--no-graph", "--nEpochs", "4", "--save", str(tmp_path)]
    with register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])):
        assert train.main(argv) == 0
    assert used == [0.1] * 6 + [0.1 / 10] * 3 + [0.1 / 100] * 3
    epochs = capsys.readouterr().out.splitlines()[1:5]
    assert [line.split()[3] for line in epochs] == ["0.1", "0.1", "0.01", "0.001"]
    (_, *a), (_, *b), (_, *c) = rows(tmp_path / "train.csv")[-3:]
    loss, error = ((32 * x + 32 * y + 16 * z) / 80 for x, y, z in zip(a, b, c, strict=True))  # over images, not steps
    assert f"train loss {loss:.4f} error {error:.2f}%" in epochs[-1]


# --- flags ------------------------------------------------------------------------------------------------------

def test_the_default_flags_are_the_papers_recipe():
    args, given = train.parse_args([])
    assert not given and not args.no_augment and not args.no_nesterov
    assert (args.depth, args.growthRate, args.reduction, args.no_bottleneck, args.dropRate) == (100, 12, 0.5, False, 0)
    assert (args.batchSz, args.nEpochs, args.opt, args.lr, args.weightDecay) == (64, 300, "sgd", 0.1, 1e-4)
    assert (args.schedule, args.save, args.data) == ("step", "work/cifar10.base", "data")
    assert {train.parse_args(["--opt", opt])[0].schedule for opt in ("adam", "rmsprop")} == {"constant"}
    assert train.parse_args(["--arch", "densenet121", "--dataset", "folder"])[0].imageSize == 224
    of_svhn, _ = train.parse_args(["--dataset", "svhn"])
    assert of_svhn.nEpochs == 40 and of_svhn.no_augment  # digits must not be flipped


@pytest.mark.parametrize("line, said", [
    ("--depth 11 --data nowhere", "depth is 11; valid with bottleneck is 6n + 4, nearest 10 and 16"),
    ("--depth ten", "'ten'; valid is a whole number from 1"), ("--lr nan", "'nan'; valid is from 1e-12"),
    ("--reduction 0", "'0'; valid is above 0 and at most 1"), ("--dropRate 1", "'1'; valid is from 0 to below 1"),
    ("--reduction 0.001", "which leaves none of the 18 channels"), ("--seed 4294967296", "number from 0 to 4294967295"),
    ("--opt adagrad", "invalid choice: 'adagrad'"), ("--no-such-flag", "unrecognized arguments"),
    ("--resum", "unrecognized arguments: --resum"), ("--resume --overwrite", "give one of them"),
    ("--device tpu", "--device 'tpu' does not exist here; valid are cpu"),
    ("--no-cuda --device cuda", "--no-cuda contradicts --device cuda"), ("--data nowhere", "no CIFAR10"),
    ("--border mean --no-augment", "--border mean: images that are not augmented have no border"),
    ("--dataset svhn --border black", "--border black: images that are not augmented"),
    ("--opt adam --no-nesterov", "--no-nesterov with --opt adam; valid only with sgd"),
    ("--predictions a.csv", "--predictions needs --evaluate"), ("--init none.pth", "--init none.pth: No such file"),
    ("--init reference.pth", "reference.pth: conv1.weight has shape (24, 3, 3, 3); valid is"),
    ("--pretrained", "--pretrained needs --arch densenet121|densenet161"),
    ("--arch densenet121 --init a.pth --pretrained", "and no --init"),
    ("--arch densenet121 --depth 40", "--depth=40 contradicts --arch densenet121; give one of them"),
    ("--imageSize 64", "--imageSize 64: --dataset cifar10 has its own size; valid with folder"),
    ("--extra", "--extra: --dataset cifar10 has no extra images; valid with svhn"),
    ("--no-cuda --syncBN", "--syncBN needs GPUs"), ("--no-cuda --precision tf32", "tf32 needs a GPU; valid on cpu are"),
    ("--valSize 80", "80 of 80 training images cannot be held out"), ("--classes cat cow", "class cow is unknown"),
    ("--valSize 40", "--batchSz 64 is more than the 40 training images")])
def test_wrong_flags_are_one_line_with_the_valid_ones_and_write_nothing(images, tmp_path, monkeypatch, capsys, line,
                                                                        said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference.pth").symlink_to(ROOT / "work/cifar10.reference/latest.pth")
    before = contents(tmp_path)
    monkeypatch.setattr(data.CIFAR10, "download", lambda self: (_ for _ in ()).throw(OSError("no network")))
    small = [] if "--arch" in line else ["--depth", "10", "--growthRate", "6"]
    assert said in refused(train.main, capsys, "--data", images, "--nEpochs", 1, *small, *shlex.split(line))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flags, said", [
    ([], "is a folder of pictures"), (["--dataset", "folder", "--imageSize", "2"], "too small for the network")])
def test_pictures_without_dataset_folder_or_of_too_few_pixels_are_refused_and_nothing_is_written(
        pictures, tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(data.CIFAR10, "download", lambda self: pytest.fail("a download"))
    before = contents(pictures)
    argv = [*flags, "--data", pictures, *SMALL, "--batchSz", "6", "--save", tmp_path / "run"]
    line = refused(train.main, capsys, *argv)
    assert said in line and (flags or "--dataset folder" in line)
    assert contents(pictures) == before and not (tmp_path / "run").exists()


# --- whole runs -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_script_trains_on_the_sample_and_writes_its_files(tmp_path):
    done = run_script("train.py", "--data", SAMPLE, "--depth", 10, "--growthRate", 8, "--nEpochs", 2, "--save", "r/é",
                      cwd=tmp_path, MPLBACKEND="module://nowhere", PYTHONIOENCODING="ascii")  # which do not matter
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar in a pipe
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    run = tmp_path / "r/é"
    assert sorted(contents(run)) == ["error.png", "latest.pth", "loss-error.png", "loss.png", "previous.pth",
                                     "run.json", "test.csv", "train.csv"]
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o044 == 0o044 for p in run.iterdir())  # all may read
    train_rows, test_rows = rows(run / "train.csv"), rows(run / "test.csv")
    assert [row[0] for row in train_rows] == pytest.approx([i / 16 for i in range(32)])  # 1,000 images in steps of 64
    assert [row[0] for row in test_rows] == [1, 2] and all(0 <= row[2] <= 100 for row in train_rows + test_rows)
    assert train_rows[0][1] == pytest.approx(math.log(10), abs=0.5) and test_rows[-1][2] < 88

    first, *_, last = lines = done.stdout.splitlines()
    assert len(lines) == 4 and first.startswith(r"r/\xe9: L=10 k=8, ") and "1,000 training and 200 test images" in first
    final, best = test_rows[-1][2], min(row[2] for row in test_rows)
    assert f"final test error {final:.2f}%, best {best:.2f}%" in last and r"r/\xe9" in last
    about, saved = json.loads((run / "run.json").read_text()), checkpoint(run)
    assert about == {name: saved[name] for name in about} and about["flags"]["lr"] == 0.1
    assert about["environment"]["torch"] == torch.__version__
    assert about["parameters"] == sum(p.numel() for p in densenet.load(run / "latest.pth").parameters())


def test_a_checkpoint_holds_what_lib_run_lists(whole):
    saved = checkpoint(whole)  # a plain torch.load with weights_only=True
    listed = "\n".join(re.findall(r"^    .*", lib.run.__doc__, re.MULTILINE))
    first = ", ".join(re.findall(r"^    (\w+(?:, \w+)*)  ", listed, re.MULTILINE)).split(", ")
    assert {*first} <= saved.keys() and all(re.search(rf"\b{name}\b", listed) for name in saved)


def test_a_seed_gives_the_same_run_and_another_a_different_one(images, tmp_path):
    argv = ["--data", images, *SMALL, "--nEpochs", "1", "--dropRate", "0.2", "--save"]
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        torch.rand(ord(name))  # earlier draws must not matter
        assert train.main([*argv, str(tmp_path / name), "--seed", seed]) == 0
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert "train.csv" in differences(tmp_path / "a", tmp_path / "c")


def test_images_are_augmented_unless_told_otherwise_and_normalised_by_the_training_images(images, tmp_path,
                                                                                          monkeypatch):
    originals = data.load("cifar10", images)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in originals.mean_and_std())

    def images_of_an_epoch(*flags):
        batches = []
        monkeypatch.setattr(train, "train_step", lambda *args: batches.append(args[3]) or torch.ones(2))
        argv = ["--data", images, *SMALL, "--nEpochs", "1", *flags, "--save", str(tmp_path / "-".join(["r", *flags]))]
        assert train.main(argv) == 0
        return {tuple((x * std + mean).mul(255).round().int().flatten().tolist()) for x in torch.cat(batches)}

    plain, augmented = images_of_an_epoch("--no-augment"), images_of_an_epoch()
    assert plain == {tuple(x.flatten().tolist()) for x in originals.pixels}
    assert len(augmented) == 80 and len(plain & augmented) < 8
    assert len(augmented & images_of_an_epoch("--border", "mean")) < 16
    assert (checkpoint(tmp_path / "r")["mean"], checkpoint(tmp_path / "r")["std"]) == originals.mean_and_std()


def test_with_validation_the_test_set_is_used_once_with_the_best_epochs_weights(tmp_path, monkeypatch, capsys):
    used = []

    def recorded(name, original):
        return lambda batches, *args: used.append((name, batches.n)) or original(batches, *args)

    for name in ("plain", "augmented"):
        monkeypatch.setattr(Batches, name, recorded(name, getattr(Batches, name)))
    argv = ["--data", str(SAMPLE), *SMALL, "--batchSz", "50", "--classes", "dog", "cat", "--valSize", "50"]
    assert train.main([*argv, "--lr", "1", "--nEpochs", "3", "--save", str(tmp_path)]) == 0
    assert used == [("augmented", 150), ("plain", 50)] * 3 + [("plain", 40)]
    best = min(rows(tmp_path / "val.csv"), key=lambda row: row[2])
    [(epoch, _, error)] = rows(tmp_path / "test.csv")
    assert epoch == best[0] == checkpoint(tmp_path, "best.pth")["epoch"]
    net, [test] = densenet.load(tmp_path / "best.pth"), data.load("cifar10", SAMPLE, ["test"], classes=["dog", "cat"])
    wrong = net((test.pixels / 255 - net.mean) / net.std).argmax(1) != test.labels
    assert error == pytest.approx(100 * wrong.double().mean().item(), rel=1e-4)
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"test error {error:.2f}% with the weights of epoch {epoch:.0f}, the best in validation" in said
    assert train.main(["--evaluate", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/best.pth: test loss" in out and f"error {error:.2f}% of 40 images" in out


def test_figures_that_fail_are_one_warning_and_no_harm(flags, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert train.main([*[flag for flag in flags if flag != "--no-plot"], "--save", str(tmp_path)]) == 0
    assert "no figures, but the training is not affected" in one_line(capsys.readouterr().err, "train.py: warning: ")
    assert {name.partition("/")[2] for name in differences(whole, tmp_path)} == {"flags/no_plot"}


# --- failures ---------------------------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_replaced(flags, whole, tmp_path, capsys,
                                                                            monkeypatch):
    calls, train_step = [], train.train_step

    def diverge(*args):
        calls.append(1)
        return train_step(*args) * (math.nan if len(calls) == 8 else 1)

    monkeypatch.setattr(train, "train_step", diverge)
    assert train.main([*flags, "--save", str(tmp_path)]) == 1
    said = one_line(capsys.readouterr().err)
    assert "the loss of step 2 is nan in epoch 3; latest.pth holds epoch 2; start again with a lower --lr" in said
    assert checkpoint(tmp_path)["epoch"] == 2 and len(rows(tmp_path / "train.csv")) == 7
    assert resume(tmp_path) == 0 and differences(whole, tmp_path) == []


def test_a_test_loss_that_is_not_finite_ends_the_run_too(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: (math.nan, 90.0))
    assert train.main([*flags, "--save", str(tmp_path)]) == 1
    assert "the test loss is nan in epoch 1; no epoch was finished yet" in one_line(capsys.readouterr().err)
    assert rows(tmp_path / "test.csv") == [] and checkpoint(tmp_path)["epoch"] == 0


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")], ids=repr)
def test_out_of_memory_names_the_flags_that_need_less(flags, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(train, "train_step", lambda *_: (_ for _ in ()).throw(error))
    assert train.main([*flags, "--save", str(tmp_path)]) == 1
    said = one_line(capsys.readouterr().err)
    assert "out of memory; --efficient yes, --efficient max or a smaller --batchSz needs less" in said


def test_a_defect_keeps_its_traceback(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([*flags, "--save", str(tmp_path)])


# --- --evaluate and --predictions -------------------------------------------------------------------------------

def test_evaluate_prints_loss_error_and_each_classs_error_and_predictions_are_a_row_for_each_image(
        whole, images, tmp_path, capsys):
    net, [test] = densenet.load(whole / "latest.pth"), data.load("cifar10", images, ["test"])
    output = net((test.pixels / 255 - net.mean) / net.std)
    wrong = output.argmax(1) != test.labels
    loss, error = F.nll_loss(output, test.labels).item(), 100 * wrong.double().mean().item()
    assert rows(whole / "test.csv")[-1] == pytest.approx((EPOCHS, loss, error), rel=1e-5)
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/data_batch_1.bin").write_bytes(b"damaged")  # it reads the test images alone
    file, elsewhere = tmp_path / "predictions.csv", ["--data", str(tmp_path / "images"), "--precision", "fp32"]
    for argv in (["--evaluate", str(whole / "latest.pth"), *elsewhere, "--predictions", str(file)],
                 ["--evaluate", str(whole)]):  # with the run's --data
        capsys.readouterr()
        assert train.main(argv) == 0
        first, *of_classes = capsys.readouterr().out.splitlines()
        assert first == f"{whole}/latest.pth: test loss {loss:.4f}, error {error:.2f}% of 40 images (fp32)"
        assert of_classes[:10] == [
            f"  {c}: {100 * wrong[test.labels == i].double().mean():.2f}%" for i, c in enumerate(test.classes)]
    table = pandas.read_csv(file)
    assert [*table.columns] == ["image", "label", "prediction", "probability"] and [*table.image] == [*range(40)]
    assert [*table.label] == [test.classes[i] for i in test.labels]
    assert [*table.prediction] == [test.classes[i] for i in output.argmax(1)]
    assert [*table.probability] == pytest.approx(output.exp().amax(1).tolist(), rel=1e-4)


@pytest.mark.parametrize("line, said", [
    ("--resume", "--resume has no effect with --evaluate; valid are --predictions, --dataset, --data"),
    ("--data nowhere", "no CIFAR10"), ("--classes cat dog", "has the classes cat, dog, the checkpoint"),
    ("--evaluate gone.pth", "gone.pth: No such file"), ("--evaluate /", "/latest.pth: No such file"),
    ("--predictions {run}/test.csv", "valid is a new file that ends in .csv"),
    ("--predictions {run}/new.pth", "valid is a new file that ends in .csv")])
def test_evaluate_refuses_what_it_would_ignore_or_replace_and_what_does_not_fit(whole, capsys, monkeypatch, line, said):
    monkeypatch.setattr(data.CIFAR10, "download", lambda self: (_ for _ in ()).throw(OSError("no network")))
    before = contents(whole)
    assert said in refused(train.main, capsys, "--evaluate", whole, *line.format(run=whole).split())
    assert contents(whole) == before


@pytest.mark.parametrize("changes, said", [
    ({"flags": ["x"]}, "latest.pth has no flags"), ({"flags": {"mixup": 0.4}}, "--mixup=0.4"),
    ({"flags": {"data": "gone"}}, "--data gone is not to be found from here; give --data"),
    ({"classes": ["\x1b[2J", *"bcdefghij"]}, r"\x1b[2J")], ids=str)
def test_evaluate_names_a_checkpoint_that_makes_no_sense(run, capsys, changes, said):
    saved = checkpoint(run)
    changes = {name: saved[name] | value if isinstance(value, dict) else value for name, value in changes.items()}
    edit_checkpoint(run / "latest.pth", **changes)
    line = refused(train.main, capsys, "--evaluate", run)
    assert said in line and "\x1b" not in line


def test_gray_pictures_make_a_network_of_one_channel_and_predictions_name_them(pictures, on_pictures, tmp_path, capsys):
    for path in shutil.copytree(pictures, tmp_path / "gray").rglob("*.*"):
        Image.open(path).convert("L").save(path)
    run, file = tmp_path / "run", tmp_path / "predictions.csv"
    assert train.main([*on_pictures, "--data", str(tmp_path / "gray"), "--save", str(run)]) == 0
    assert train.main(["--evaluate", str(run), "--predictions", str(file)]) == 0
    names = [f"test/{name}/{i}" for name in ("cat", "dog", "ship") for i in ("0.jpg", "1.png")]
    assert [*pandas.read_csv(file).image] == names
    capsys.readouterr()
    said = refused(train.main, capsys, "--evaluate", run, "--data", pictures)
    assert "the images have 3 channels, the network takes 1" in said


# --- --init and --pretrained ------------------------------------------------------------------------------------

def test_init_starts_from_weights_as_the_literature_ships_them_with_the_datas_normalisation(whole, flags, images,
                                                                                            tmp_path):
    state = densenet.load(whole / "latest.pth").state_dict()
    names = {re.sub(r"^dense(\d+)\.", r"block\1.layer.", name): name for name in state if "num_batches" not in name}
    weights = {f"module.{theirs}": state[ours] for theirs, ours in names.items()}
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    argv = [*flags, "--classes", *reversed(data.CIFAR10_CLASSES), "--init", str(tmp_path / "weights.pth")]
    assert stopped_at("train_step", 1, [*argv, "--save", str(tmp_path / "run")]) == 143  # latest.pth: before any step
    saved = checkpoint(tmp_path / "run")
    assert all(saved["model"][name].equal(state[name]) for name in names.values())
    assert (saved["mean"], saved["std"]) == data.load("cifar10", images)[0].mean_and_std()


def test_init_from_a_checkpoint_brings_its_normalisation_and_a_classifier_that_does_not_fit_stays_new(
        whole, sample, tmp_path, capsys):
    argv = ["--data", sample, *SMALL, "--classes", "cat", "dog", "--nEpochs", "1", "--init", str(whole / "latest.pth")]
    assert stopped_at("train_step", 1, [*argv, "--save", str(tmp_path)]) == 143
    saved, before = checkpoint(tmp_path), checkpoint(whole)
    assert (saved["mean"], saved["std"]) == (before["mean"], before["std"])
    assert all(value.equal(before["model"][name]) for name, value in saved["model"].items() if "fc" not in name)
    assert "its classifier does not fit, and a new one is trained" in capsys.readouterr().out
    assert resume(tmp_path) == 0 and checkpoint(tmp_path)["mean"] == before["mean"]  # though --data has another


@pytest.mark.slow
def test_pretrained_starts_an_imagenet_network_from_torchvisions_weights_and_normalisation(on_pictures, tmp_path,
                                                                                           monkeypatch, capsys):
    theirs, run = torchvision.models.densenet121().state_dict(), tmp_path / "run"
    download = Mock(side_effect=URLError("no route to host"))
    weights = Mock(**{"DEFAULT.get_state_dict": download})
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda arch: weights)
    argv = [*(flag for flag in on_pictures if flag not in SMALL[:4]), "--imageSize", "32", "--save", str(run)]
    argv += ["--arch", "densenet121", "--pretrained"]
    said = refused(train.main, capsys, *argv)
    assert "--pretrained: the download failed" in said and "no route to host" in said and not run.exists()
    download.configure_mock(side_effect=None, return_value=theirs)
    assert stopped_at("train_step", 1, argv) == 143
    saved = checkpoint(run)
    assert saved["mean"] == [0.485, 0.456, 0.406] and saved["model"]["fc.weight"].shape[0] == 3
    assert all(value.equal(theirs[densenet.torchvision_name(name)]) for name, value in saved["model"].items()
               if not name.startswith("fc."))
    assert resume(run) == 0 and download.call_count == 2  # not downloaded again
