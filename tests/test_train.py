"""train.py: flags, schedule, and whole runs with the files they leave. Interrupted runs are in test_resume.py."""

import json
import math
import os
import random
import shlex
import shutil
import stat
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import ROOT, SAMPLE, SMALL, contents, differences, edit_checkpoint, one_line, rows, run_script, slow
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import densenet
import train
from lib import data, memory, sets
from lib.distributed import World

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--dataset", "--data", "--growthRate", "--depth", "--reduction", "--dropRate", "--initChannels", "--batchSz",
         "--nEpochs", "--opt", "--lr", "--weightDecay", "--seed", "--save", "--device", "--evaluate", "--efficient",
         "--classes", "--valSize", "--imageSize", "--arch", "--precision", "--border"]
SWITCHES = ["--no-augment", "--no-bottleneck", "--no-nesterov", "--no-cuda", "--resume", "--overwrite", "--no-plot",
            "--extra", "--pretrained", "--syncBN", "--no-graph"]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The directory of a run of three epochs of three steps. Tests must not write to it."""
    save = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main(["--data", images, *SMALL, "--nEpochs", "3", "--save", str(save)]) == 0
    return save


# --- schedule ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, first_tenth, first_hundredth", [
    (1, None, None), (2, 2, None), (3, 3, None), (10, 6, 9), (50, 26, 39), (90, 46, 69), (300, 151, 226)])
def test_the_rate_drops_at_half_and_three_quarters_of_the_epochs(n, first_tenth, first_hundredth):
    rates = [train.learning_rate("sgd", 0.1, epoch, n) for epoch in range(1, n + 1)]
    first = {rate: epoch for epoch, rate in reversed(list(enumerate(rates, 1)))}
    assert first[0.1] == 1 and first.get(0.1 / 10) == first_tenth and first.get(0.1 / 100) == first_hundredth
    assert rates == sorted(rates, reverse=True) and set(rates) <= {0.1, 0.1 / 10, 0.1 / 100}


def test_the_rate_drops_exactly_where_the_share_of_epochs_is_reached():
    for n in [*range(1, 130), 300, 333, 10**6 - 1, 10**6]:
        for epoch in {1, n} | {n * i // 4 + j for i in (1, 2, 3) for j in (-1, 0, 1, 2)}:
            done = Fraction(epoch - 1, n)
            want = 0.1 if done < Fraction(1, 2) else 0.1 / 10 if done < Fraction(3, 4) else 0.1 / 100
            assert train.learning_rate("sgd", 0.1, epoch, n) == want, (n, epoch)


def test_the_other_optimisers_keep_their_rate():
    assert {train.learning_rate(opt, 0.5, e, 10) for opt in ("adam", "rmsprop") for e in range(1, 11)} == {0.5}


def test_the_optimizer_steps_with_the_dropped_rates_and_they_are_printed(images, tmp_path, capsys):
    used = []
    flags = [*SMALL, "--no-graph", "--nEpochs", "4"]  # replaying a graph calls no hook
    with register_optimizer_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"])):
        assert train.main(["--data", images, *flags, "--save", str(tmp_path / "r")]) == 0
    assert used == [0.1] * 6 + [0.1 / 10] * 3 + [0.1 / 100] * 3
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[1:5]] == ["0.1", "0.1", "0.01", "0.001"]


# --- flags ------------------------------------------------------------------------------------------------------

def test_the_default_flags_are_the_papers_recipe():
    args, given = train.parse_args([])
    assert not given
    assert (args.depth, args.growthRate, args.reduction, args.no_bottleneck, args.dropRate) == (100, 12, 0.5, False, 0)
    assert (args.batchSz, args.nEpochs, args.opt, args.lr, args.weightDecay) == (64, 300, "sgd", 0.1, 1e-4)
    assert not args.no_augment and not args.no_nesterov and args.save == "work/cifar10.base" and args.data == "data"


@pytest.mark.parametrize("opt, kind, expected", [
    ("sgd", torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, dampening=0)),
    ("adam", torch.optim.Adam, dict(lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.999))),
    ("rmsprop", torch.optim.RMSprop, dict(lr=1e-2, weight_decay=1e-4, momentum=0))])
def test_each_optimizer_has_the_papers_settings(opt, kind, expected):
    args, _ = train.parse_args([*SMALL, "--opt", opt])
    images = data.ImageSet(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ["a", "b"])
    chosen = sets.Sets(images, None, images, [0.5] * 3, [0.5] * 3, {})
    net, optimizer = train.make_net_and_optimizer(args, chosen, torch.device("cpu"), World(), {"path": "max"}, None)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind and expected.items() <= group.items()
    assert len(group["params"]) == len(list(net.parameters()))  # all have the same rate and weight decay
    assert net.fc.out_features == 2


BAD_FLAGS = [
    ("--depth 11", "depth is 11; valid with bottleneck is 6n + 4, nearest 10 and 16"),
    ("--depth 12 --no-bottleneck", "nearest 10 and 13"), ("--depth 4", "nearest 10"), ("--depth 0", "'0'; valid is"),
    ("--depth -6", "'-6'; valid is a whole number from 1 to 4096"), ("--depth ten", "'ten'; valid is"),
    ("--depth 1e9", "'1e9'"), ("--depth nan", "'nan'"), (f"--depth {'9' * 5000}", "valid is a whole number"),
    ("--growthRate 0", "--growthRate: '0'; valid is"), ("--growthRate 2.5", "'2.5'"), ("--initChannels 0", "'0'"),
    ("--growthRate 4096 --depth 1000", "GB of memory at least"), ("--initChannels 65536 --batchSz 80", "GB of memory"),
    ("--reduction 0", "'0'; valid is above 0 and at most 1"), ("--reduction nan", "nan"),
    ("--reduction 0.001", "reduction is 0.001, which leaves none of the 12 channels"), ("--reduction -1", "'-1'"),
    ("--dropRate 1", "'1'; valid is from 0 to below 1"), ("--dropRate nan", "'nan'"), ("--dropRate -0.1", "'-0.1'"),
    ("--batchSz 0", "'0'"), ("--batchSz x", "'x'"),
    ("--batchSz 81", "--batchSz 81 is more than the 80 training images"),
    ("--nEpochs 0", "'0'; valid is a whole number from 1 to 1000000"), ("--nEpochs inf", "'inf'"),
    ("--opt adagrad", "invalid choice: 'adagrad'"), ("--efficient perhaps", "invalid choice"),
    ("--dataset mnist", "mnist"),
    ("--lr 0", "'0'; valid is from 1e-12 to"), ("--lr nan", "'nan'"), ("--lr inf", "'inf'"), ("--lr -1", "'-1'"),
    ("--weightDecay -1", "'-1'; valid is from 0 to"), ("--weightDecay inf", "'inf'"), ("--seed -1", "'-1'"),
    ("--seed 4294967296", "valid is a whole number from 0 to 4294967295"), ("--seed", "expected one argument"),
    ("--device tpu", "--device 'tpu' does not exist here; valid are cpu"), ("--device cuda:99", "valid are cpu"),
    ("--device ''", "--device '' does not exist"), ("--no-cuda --device cuda", "--no-cuda contradicts --device cuda"),
    ("--data nowhere/x", "no CIFAR-10 in nowhere/x"), ("--data file", "--data file is not a directory"),
    ("--data ''", "valid is a path"), ("--save ''", "valid is a path"), ("--save 'a\nb'", "valid is a path"),
    ("--save 'a\udcff'", "valid is a path"), ("--save file", "--save file is not a directory"),
    ("--save file/run", "--save file/run: "), ("--save foreign", "test.csv is not a run's table"),
    ("--save foreign --overwrite", "test.csv"), ("--save foreign --resume", "test.csv"),
    ("--border white", "invalid choice: 'white'"),
    ("--border mean --no-augment", "--border mean: images that are not augmented have no border"),
    ("--dataset svhn --border black", "--border black: images that are not augmented"),
    ("--opt adam --no-nesterov", "--no-nesterov with --opt adam; valid only with sgd"),
    (f"--save {'x' * 300}", "name too long"),
    ("--save dangling", "--save dangling is not a directory"), ("--save /proc/none", "/proc"),
    ("--resume --overwrite", "give one of them"), ("--evaluate none.pth", "none.pth: No such file"),
    ("--evaluate file", "file is damaged, or not a checkpoint"), ("--evaluate other", "other: Is a directory"),
    ("--evaluate file --resume", "does not train"), ("--evaluate file --overwrite", "does not train"),
    ("--no-such-flag", "unrecognized arguments: --no-such-flag"), ("surplus", "unrecognized arguments: surplus"),
    ("--batchSz=--", "--batchSz: expected one argument"), ("--classes=--", "--classes: expected one argument"),
    ("--resum", "unrecognized arguments: --resum"), ("--no-plot=1", "ignored explicit argument"),
]


@pytest.fixture
def somewhere(tmp_path, monkeypatch, images):
    """A working directory with files that a run must not touch; downloads fail as without a network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/test.csv").write_text("id,label\n1,2\n")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "images").symlink_to(images)

    def no_network(self):
        raise OSError("no network")

    monkeypatch.setattr(data.CIFAR10, "download", no_network)
    return tmp_path


@pytest.mark.parametrize("line, said", BAD_FLAGS, ids=[line[:40] for line, _ in BAD_FLAGS])
def test_bad_flags_are_refused_in_one_line_and_nothing_is_written(somewhere, capfd, line, said):
    before = contents(somewhere), sorted(somewhere.rglob("*"))
    small = [flag for flag in SMALL if flag != "--no-cuda" or "--device" not in line]  # the two contradict
    assert train.main(["--data", "images", *small, *shlex.split(line)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and said.lower() in one_line(err).lower() and len(err) < 400
    assert (contents(somewhere), sorted(somewhere.rglob("*"))) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directories_without_permission_are_named_in_one_line(somewhere, capfd):
    for name, mode in (("closed", 0o500), ("unreadable", 0o000)):
        (somewhere / name).mkdir()
        (somewhere / name).chmod(mode)
        for flags in (["--save", f"{name}/run"], ["--save", name], ["--data", name, "--save", "r"] * (mode == 0)):
            assert train.main(["--data", "images", *SMALL, *flags]) == 2 or not flags
            assert name in one_line(capfd.readouterr().err)
        (somewhere / name).chmod(0o700)


def test_bad_geometry_is_refused_before_a_download(somewhere, capfd, monkeypatch):
    monkeypatch.setattr(data, "load", lambda *_: pytest.fail("read the data"))
    assert train.main(["--depth", "11"]) == 2
    assert "depth is 11" in one_line(capfd.readouterr().err)


def test_help_names_every_flag_with_its_default(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in FLAGS + SWITCHES) and "default: 300" in text


def random_line(draw):
    """-> a random command line: sensible values, nonsense, missing values, flags that contradict each other"""
    sensible = {"--data": ["images", "images", "file", "nowhere"], "--growthRate": ["1", "4"], "--depth": ["10", "7"],
                "--reduction": ["0.5", "1"], "--dropRate": ["0", "0.2"], "--initChannels": ["1", "8"],
                "--batchSz": ["64", "79", "80"], "--nEpochs": ["1", "4"], "--opt": ["sgd", "adam", "rmsprop"],
                "--lr": ["0.1", "1e6", "1e5", "1e-12"], "--weightDecay": ["0", "1e6"], "--seed": ["0", "4294967295"],
                "--save": ["run", "run", "run/deeper", "other", "file", "new", ".", "images", "foreign"],
                "--device": ["cpu", "cuda:7"], "--evaluate": ["run/latest.pth", "file", "other"],
                "--dataset": ["cifar10", "cifar10", "folder"], "--efficient": ["auto", "yes", "no", "max"],
                "--border": ["black", "mean"],
                "--classes": ["cat", "dog"], "--valSize": ["0", "10", "79"], "--imageSize": ["32"],
                "--arch": ["densenet121"], "--precision": ["fp32", "tf32", "bf16"]}
    nonsense = ["", "-1", "0", "nan", "inf", "-inf", "1e400", "9" * 30, "x", "0x10", "é", "--", "\n", "\udcff", "\0",
                "a b", "../" * 300, "None", "[]", "%s", "-"]
    line = []
    for name in draw.sample(FLAGS, draw.choice([0, 0, 1, 1, 1, 2, 3])):
        value = draw.choice(sensible[name] * 3 + nonsense)
        line += draw.choice([[name, value], [name, value], [f"{name}={value}"], [name]])
        line += ["frog", "ship"][:draw.choice([0, 1, 2])] if name == "--classes" else []
    line += draw.sample(SWITCHES, draw.choice([0, 0, 0, 1, 2])) + ["--bogus", "stray"][:draw.choice([0] * 20 + [1, 2])]
    if draw.random() < 0.1:
        draw.shuffle(line)
    save = draw.choice(["run", f"new/{draw.random()}"])
    return ["--data", "images", *SMALL, "--nEpochs", "4" if save == "run" else "1", "--save", save, *line]


def files_to_keep(somewhere, images):
    """-> names and contents of the files that no command line may change; it may add files of runs"""
    files = contents(somewhere) | {f"images/{name}": content for name, content in contents(Path(images)).items()}
    new = ("run/", "new/", "other/.", "other/l", "other/p", "other/r", "other/t")  # a run may begin in "other", too
    return {(name, content) for name, content in files.items() if not name.startswith(new)}


def set_up_for_fuzzing(somewhere, images, finished):
    (somewhere / "run").mkdir()
    for name, content in contents(finished).items():
        (somewhere / "run" / name).write_bytes(content)
    (somewhere / "foreign/train.csv").write_text("id,label\n1,2\n")
    (somewhere / "foreign/latest.pth").write_bytes(b"mine")
    return files_to_keep(somewhere, images)


@pytest.mark.slow
def test_no_command_line_gives_a_traceback_or_loses_a_file(somewhere, images, finished, capfd, monkeypatch):
    """The exit status is 0, or 1 (diverged) or 2 (refused) with one line on stderr."""
    before = set_up_for_fuzzing(somewhere, images, finished)
    draw, statuses = random.Random(3), []
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 10**5)  # a machine of 10 GB
    for _ in range(200):
        line, files = random_line(draw), set(contents(somewhere / "run"))
        status = train.main(line)  # any exception fails the test
        err = capfd.readouterr().err
        assert "Traceback" not in err, (line, err)
        assert status == 0 or (status in (1, 2) and one_line(err)), (line, status, err)
        statuses.append(status)
        assert files_to_keep(somewhere, images) >= before, line
        assert "--overwrite" in line or files <= set(contents(somewhere / "run")), line
    assert statuses.count(0) > 20 and 1 in statuses and statuses.count(2) > 50


@pytest.mark.slow
def test_random_command_lines_in_their_own_processes(somewhere, images, finished):
    before = set_up_for_fuzzing(somewhere, images, finished)
    draw = random.Random(1)
    lines = [line for line in (random_line(draw) for _ in range(100)) if "\0" not in "".join(line)][:2]
    running = [subprocess.Popen([sys.executable, ROOT / "train.py", *line], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=ONE_THREAD) for line in lines]
    for line, process in zip(lines, running, strict=True):
        _, err = process.communicate(timeout=120)
        assert process.returncode in (0, 1, 2) and b"Traceback" not in err, (line, err)
        assert process.returncode == 0 or one_line(err.decode()), line
    assert files_to_keep(somewhere, images) >= before


# --- whole runs -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_script_trains_on_the_sample_and_writes_its_files(tmp_path):
    done = run_script("train.py", "--data", SAMPLE, "--depth", 10, "--growthRate", 8, "--nEpochs", 2, "--save", "r/s",
                      cwd=tmp_path, MPLBACKEND="module://nowhere")  # which the figures do without
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar in a pipe
    run = tmp_path / "r/s"
    assert sorted(contents(run)) == [".lock", "error.png", "latest.pth", "loss-error.png", "loss.png", "previous.pth",
                                     "run.json", "test.csv", "train.csv"]
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o044 == 0o044 for p in run.iterdir())  # all may read

    train_rows, test_rows = rows(run / "train.csv"), rows(run / "test.csv")
    assert [row[0] for row in train_rows] == pytest.approx([i / 16 for i in range(32)])  # 1,000 images in steps of 64
    assert [row[0] for row in test_rows] == [1, 2] and all(0 <= row[2] <= 100 for row in train_rows + test_rows)
    assert train_rows[0][1] == pytest.approx(math.log(10), abs=0.5) and test_rows[-1][2] < 88

    about = json.loads((run / "run.json").read_text())
    assert about["flags"]["depth"] == 10 and about["flags"]["lr"] == 0.1 and about["flags"]["save"] == "r/s"
    assert about["environment"]["torch"] == torch.__version__ and about["environment"]["device"].startswith("cpu")
    net = densenet.load(run / "latest.pth")
    assert about["parameters"] == sum(p.numel() for p in net.parameters())
    assert about["mean"] == pytest.approx(net.mean.flatten().tolist()) and about["classes"] == net.classes

    final, best = test_rows[-1][2], min(row[2] for row in test_rows)
    last_line = done.stdout.splitlines()[-1]
    assert f"final test error {final:.2f}%, best {best:.2f}%" in last_line and "r/s" in last_line
    assert len(done.stdout.splitlines()) == 4  # the network, a line per epoch, the result
    for name in ("loss.png", "error.png", "loss-error.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_test_csv_and_evaluate_agree_with_the_saved_network(finished, images, capsys):
    net = densenet.load(finished / "latest.pth")
    _, test = data.load("cifar10", images)
    output = net((test.images / 255 - net.mean) / net.std)
    loss, error = F.nll_loss(output, test.labels).item(), (output.argmax(1) != test.labels).double().mean().item() * 100
    assert rows(finished / "test.csv")[-1] == pytest.approx((3, loss, error), rel=1e-5)
    assert train.main(["--evaluate", str(finished / "latest.pth"), "--data", images]) == 0
    first, *classes = capsys.readouterr().out.splitlines()
    assert f"test loss {loss:.4f}, error {error:.2f}% of 40 images" in first
    wrong = output.argmax(1) != test.labels
    assert [line.strip() for line in classes] == [
        f"{name}: {100 * wrong[test.labels == i].double().mean().item():.2f}%" for i, name in enumerate(test.classes)]


def test_evaluation_reads_the_test_images_alone(finished, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/data_batch_1.bin").write_bytes(b"damaged")
    assert train.main(["--evaluate", str(finished / "latest.pth"), "--data", str(tmp_path / "images")]) == 0


def test_evaluation_downloads_nothing_to_a_directory_that_was_not_given(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.CIFAR10, "download", lambda self: pytest.fail("a download"))
    (tmp_path / "empty").mkdir()
    checkpoint = shutil.copy(finished / "latest.pth", tmp_path / "latest.pth")
    flags = torch.load(checkpoint, weights_only=True)["flags"]
    edit_checkpoint(checkpoint, flags=flags | {"data": str(tmp_path / "empty")})
    assert train.main(["--evaluate", str(checkpoint)]) == 2
    assert "no CIFAR-10 in" in one_line(capsys.readouterr().err)


def test_evaluation_escapes_control_characters_in_class_names(finished, images, tmp_path, capsys):
    checkpoint = shutil.copy(finished / "latest.pth", tmp_path / "latest.pth")
    edit_checkpoint(checkpoint, classes=["\x1b[2J", *"bcdefghij"])
    assert train.main(["--evaluate", str(checkpoint), "--data", images]) == 2
    err = one_line(capsys.readouterr().err)
    assert "\x1b" not in err and r"\x1b[2J" in err


def test_colour_images_for_a_grayscale_network_are_one_line(finished, tmp_path, capsys):
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "gray" / part / name).mkdir(parents=True)
            Image.new("L", (32, 32)).save(tmp_path / "gray" / part / name / "1.png")
    flags = ["--dataset", "folder", "--data", str(tmp_path / "gray")]
    assert train.main([*flags, *SMALL, "--batchSz", "2", "--nEpochs", "1", "--save", str(tmp_path / "run")]) == 0
    colour = tmp_path / "colour"
    shutil.copytree(tmp_path / "gray", colour)
    Image.new("RGB", (32, 32), "red").save(colour / "test/a/1.png")
    assert train.main(["--evaluate", str(tmp_path / "run/latest.pth"), "--data", str(colour)]) == 2
    assert "the images have 3 channels, the network takes 1" in one_line(capsys.readouterr().err)
    assert train.main(["--evaluate", str(tmp_path / "run/latest.pth")]) == 0


def test_every_step_has_a_row_even_the_smaller_last_one(finished):
    """80 images are steps of 32, 32 and 16."""
    assert [row[0] for row in rows(finished / "train.csv")] == pytest.approx([i / 3 for i in range(9)])
    checkpoint = torch.load(finished / "latest.pth", weights_only=True)
    assert checkpoint["model"]["bn1.num_batches_tracked"] == 9  # +1 in each step
    assert checkpoint["epoch"] == 3 and checkpoint["format"] == 1
    assert checkpoint["csvLengths"] == {name: (finished / name).stat().st_size for name in ("train.csv", "test.csv")}


@pytest.mark.slow
def test_printed_training_loss_is_the_mean_over_images(images, tmp_path, capsys):
    flags = ["--data", images, *SMALL, "--nEpochs", "1", "--save", str(tmp_path / "r")]
    assert train.main(flags) == 0
    losses, errors = ([row[i] for row in rows(tmp_path / "r/train.csv")] for i in (1, 2))
    loss, error = ((32 * v[0] + 32 * v[1] + 16 * v[2]) / 80 for v in (losses, errors))
    assert f"train loss {loss:.4f} error {error:.2f}%" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    [], slow(["--no-augment", "--dropRate", "0.2"]), slow(["--no-bottleneck", "--opt", "adam"])], ids=" ".join)
def test_a_seed_gives_the_same_run_and_another_a_different_one(images, tmp_path, flags):
    flags = ["--data", images, *SMALL, "--nEpochs", "1", *flags, "--save"]
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        torch.manual_seed(len(name))
        torch.rand(ord(name))  # earlier draws must not matter
        assert train.main([*flags, str(tmp_path / name), "--seed", seed]) == 0
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert "train.csv" in differences(tmp_path / "a", tmp_path / "c")


def test_no_augment_shows_the_images_as_they_are(images, tmp_path, monkeypatch):
    originals = data.load("cifar10", images)[0].images
    mean, std = (torch.tensor(v)[:, None, None] for v in data.mean_and_std(originals))

    def images_of_an_epoch(*flags):
        batches = []

        def record(net, optimizer, precision, images, *_):
            batches.append(images)
            return torch.ones(2)

        monkeypatch.setattr(train, "train_step", record)
        save = str(tmp_path / "-".join(["run", *flags]))
        assert train.main(["--data", images, *SMALL, "--nEpochs", "1", *flags, "--save", save]) == 0
        return {tuple((x * std + mean).mul(255).round().int().flatten().tolist()) for x in torch.cat(batches)}

    plain, augmented = images_of_an_epoch("--no-augment"), images_of_an_epoch()
    assert plain == {tuple(x.flatten().tolist()) for x in originals}
    assert len(augmented) == 80 and len(plain & augmented) < 8


def test_images_are_normalised_by_the_training_images_alone(finished, images):
    checkpoint = torch.load(finished / "latest.pth", weights_only=True)
    assert (checkpoint["mean"], checkpoint["std"]) == data.mean_and_std(data.load("cifar10", images)[0].images)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["/bin/false", slow("/no/such/program")])
def test_figures_that_fail_are_one_warning_and_no_harm(images, finished, tmp_path, monkeypatch, capfd, program):
    monkeypatch.setattr(sys, "executable", program)
    flags = [flag for flag in SMALL if flag != "--no-plot"]
    assert train.main(["--data", images, *flags, "--nEpochs", "3", "--save", str(tmp_path / "r")]) == 0
    err = capfd.readouterr().err
    assert err.startswith("train.py: warning: no figures") and err.count("\n") == 1
    different = differences(finished, tmp_path / "r")
    assert {name.partition("/")[2] for name in different} == {"flags/no_plot"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_out_of_memory_is_one_line(images, tmp_path, monkeypatch, capfd, error):
    def train_step(*_):
        raise error

    monkeypatch.setattr(train, "train_step", train_step)
    assert train.main(["--data", images, *SMALL, "--save", str(tmp_path / "r")]) == 1
    assert "a new run with a smaller --batchSz, or with --efficient max" in one_line(capfd.readouterr().err)


def test_a_bug_keeps_its_traceback(images, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--data", images, *SMALL, "--save", str(tmp_path / "r")])


@pytest.mark.slow
def test_a_full_or_broken_standard_output_is_one_line_and_a_closed_one_is_none(images, tmp_path):
    """As the shell gives them to a script: /dev/full, a pipe that nobody reads, closed."""
    command = [sys.executable, str(ROOT / "train.py"), "--data", images, *SMALL, "--nEpochs", "1", "--save"]
    line = shlex.join(command)
    script = (f"{line} full >/dev/full; echo $?; ({line} pipe; echo $? >status) | true; cat status; "
              f"{line} closed >&- 2>&-; echo $?")
    done = subprocess.run(script, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env=ONE_THREAD)
    assert done.stdout.split() == ["1", "1", "0"], done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(";")[0] for line in lines] == ["train.py: error: standard output: No space left on device",
                                                     "train.py: error: standard output: Broken pipe"]
    assert len(rows(tmp_path / "closed/train.csv")) == 3
