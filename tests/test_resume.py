"""Nothing is lost: a run that is stopped anywhere and started again ends in the very bytes of the uninterrupted one."""

import fcntl
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from common import SMALL, contents, cut_sample, differences, stopped_at

import runs
import train

ROOT = Path(train.__file__).resolve().parent
EPOCHS = 4  # of three steps each
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flags(images):
    return ["--data", images, *SMALL, "--nEpochs", str(EPOCHS)]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The uninterrupted run; not to be written to."""
    save = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags, "--save", str(save)]) == 0
    return save


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture
def half(flags, tmp_path):
    """A run that SIGTERM stopped in the second step of epoch 3."""
    assert stopped_at("train_step", 8, [*flags, "--save", str(tmp_path / "run")]) == 143
    return tmp_path / "run"


def resume(run, *flags):
    return train.main(["--resume", "--save", str(run), "--no-plot", *flags])


def without_lock(directory):
    return {name: content for name, content in contents(directory).items() if name != ".lock"}


def one_line(text, start="train.py: error: "):
    assert text.startswith(start) and text.count("\n") == 1, text
    return text


def refused(capfd, run, *flags, status=2):
    """The one line with which it is refused, having changed nothing"""
    before = without_lock(run)
    capfd.readouterr()
    assert train.main(["--save", str(run), "--no-plot", *flags]) == status
    assert without_lock(run) == before
    out, err = capfd.readouterr()
    assert out == ""
    return one_line(err)


def edit(checkpoint, **changes):
    torch.save(torch.load(checkpoint, weights_only=True) | changes, checkpoint)


# --- stopped and resumed ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("function, call, kept", [
    ("train_step", 1, 0), ("train_step", 3, 0), ("evaluate", 1, 0), ("train_step", 5, 1), ("train_step", 10, 3),
    ("evaluate", 4, 3), ("train_epoch", 2, 1)])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_and_writes_nothing(
        flags, whole, tmp_path, capfd, function, call, kept, number, status):
    save = tmp_path / "run"
    assert stopped_at(function, call, [*flags, "--save", str(save)], number) == status
    err = capfd.readouterr().err
    one_line(err, f"train.py: stopped by {number.name}; ./train.py --save {save} --resume continues")
    assert (save / "latest.pth").exists() == bool(kept)
    assert not kept or torch.load(save / "latest.pth", weights_only=True)["epoch"] == kept
    assert not [name for name in contents(save) if runs.is_temporary(name)]
    assert train.main([*flags, "--save", str(save), "--resume"]) == 0  # the same command
    assert differences(whole, save) == []


@pytest.mark.parametrize("function, call, epoch", [("fsync", 2, 1), ("fsync", 3, 1), ("link", 1, 2), ("replace", 2, 1)])
def test_a_signal_during_a_save_lets_it_finish(flags, whole, tmp_path, function, call, epoch):
    save = tmp_path / "run"
    argv = [*flags, "--save", str(save)]
    call += {"fsync": 2}.get(function, 0)  # those of run.json come before
    assert stopped_at(function, call, argv, module=runs.os) == 143
    assert torch.load(save / "latest.pth", weights_only=True)["epoch"] == epoch
    assert train.main([*argv, "--resume"]) == 0 and differences(whole, save) == []


@pytest.mark.parametrize("module, function", [
    (train.data, "load"), (train.data, "mean_and_std"), (train.runs, "pick_device")])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_training_leaves_nothing(flags, tmp_path, capfd, module, function, number, status):
    argv = [*flags, "--save", str(tmp_path / "run")]
    assert stopped_at(function, 1, argv, number, module=module) == status
    assert capfd.readouterr().err == f"train.py: stopped by {number.name}\n" and not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was


def test_signals_stop_the_imports_and_a_second_one_stops_at_once(flags, tmp_path):
    """The script itself: no traceback while it imports torch; killed in the step by the second signal."""
    argv = [*flags, "--save", str(tmp_path / "run")]
    slow_step = ("import os, signal, sys, time, train\n"
                 "def step(*_):\n"
                 "    for s in (signal.SIGINT, signal.SIGTERM): os.kill(os.getpid(), s); print('SENT', flush=True)\n"
                 "    time.sleep(60)\n"
                 "train.train_step = step\n"
                 "sys.exit(train.main(sys.argv[1:]))\n")
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    importing = subprocess.Popen([sys.executable, "train.py", *argv[:-1], str(tmp_path / "none")], **options)
    stepping = subprocess.Popen([sys.executable, "-c", slow_step, *argv], **options)
    try:
        importing.wait(timeout=1)  # it takes longer
    except subprocess.TimeoutExpired:
        importing.send_signal(signal.SIGINT)
    assert importing.communicate(timeout=60) == (b"", b"") and importing.returncode == -signal.SIGINT  # 130 in a shell
    out, err = stepping.communicate(timeout=60)
    assert stepping.returncode == -signal.SIGTERM and out.count(b"SENT") == 1 and err == b""


def test_a_signal_that_is_ignored_stays_so(flags, tmp_path):
    """nohup, and a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert stopped_at("train_step", 1, [*flags, "--save", str(tmp_path / "run")], signal.SIGINT) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("more", [
    ["--opt", "adam", "--dropRate", "0.2"], ["--opt", "rmsprop", "--no-augment"],
    ["--no-nesterov", "--no-bottleneck", "--efficient", "max", "--dropRate", "0.1"], ["--efficient", "no"],
], ids=" ".join)
def test_every_optimiser_and_path_resumes_exactly(flags, tmp_path, more):
    argv = [*flags, *more, "--save"]
    assert train.main([*argv, str(tmp_path / "whole")]) == 0
    for step in (5, 4):  # in epoch 2, and in the third after that
        assert stopped_at("train_step", step, [*argv, str(tmp_path / "run"), "--resume"]) == 143
    assert train.main([*argv, str(tmp_path / "run"), "--resume"]) == 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_the_comparison_can_fail(whole, run):
    assert differences(whole, run) == []
    checkpoint = torch.load(run / "latest.pth", weights_only=True)
    checkpoint["optimizer"]["state"][0]["momentum_buffer"][0, 0, 0, 0] += 1e-7
    torch.save(checkpoint, run / "latest.pth")
    (run / "test.csv").write_bytes((run / "test.csv").read_bytes()[:-1])
    assert differences(whole, run) == ["test.csv", "latest.pth/optimizer/state/0/momentum_buffer"]


def test_killed_at_any_moment():
    """The short form of tests/benchmarks/kill.py."""
    command = [sys.executable, ROOT / "tests/benchmarks/kill.py", "--n", "1", "--kills", "3", "--images", "80",
               "--threads", "1", "--nEpochs", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "1 of 1 identical" in done.stdout, done.stdout + done.stderr


def test_csvs_are_cut_back_to_the_checkpoint(half, whole, flags):
    assert len((half / "train.csv").read_text().splitlines()) == 1 + 6 + 1  # two epochs, one step
    for name in ("train.csv", "test.csv"):
        with open(half / name, "ab") as file:
            file.write(b"2.5,1.0,50\n3,torn")
    assert resume(half) == 0 and differences(whole, half) == []
    text = (half / "train.csv").read_text()
    epochs = [line.split(",")[0] for line in text.splitlines()[1:]]
    assert text.count("epoch") == 1 and len(epochs) == len(set(epochs)) == 3 * EPOCHS
    assert list(map(float, epochs)) == sorted(map(float, epochs))


def test_a_run_without_checkpoint_starts_with_its_flags(images, tmp_path):
    argv = ["--data", images, *SMALL, "--nEpochs", "2", "--lr", "0.05", "--weightDecay", "0", "--seed", "0", "--save"]
    assert train.main([*argv, str(tmp_path / "whole")]) == 0
    assert stopped_at("train_step", 2, [*argv, str(tmp_path / "run")]) == 143
    assert resume(tmp_path / "run") == 0 and differences(tmp_path / "whole", tmp_path / "run") == []
    for name in ("latest.pth", "previous.pth", "run.json"):  # killed even before that was there
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run/train.csv").write_bytes(b"epoch,lo")
    (tmp_path / "run/test.csv").unlink()
    assert train.main([*argv, str(tmp_path / "run"), "--resume"]) == 0
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"flags": {}}', b"\xff"])
def test_a_damaged_run_json_is_made_again(half, whole, content):
    (half / "run.json").write_bytes(content)
    assert resume(half) == 0 and differences(whole, half) == []


def test_a_finished_run_prints_its_last_line_and_stays(run, capfd):
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir() if p.name != ".lock"}
    assert resume(run, "--data", "nowhere") == 0  # needs no images
    out, err = capfd.readouterr()
    assert out.startswith("final test error ") and out.count("\n") == 1 and str(run) in out and err == ""
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir() if p.name != ".lock"} == before


# --- what may change, and what may not --------------------------------------------------------------------------

@pytest.mark.parametrize("contradiction, of_run", [
    ("--depth=16", "--depth=10"), ("--growthRate=5", "--growthRate=4"), ("--batchSz=16", "--batchSz=32"),
    ("--lr=0.2", "--lr=0.1"), ("--opt=adam", "--opt=sgd"), ("--weightDecay=0", "--weightDecay=0.0001"),
    ("--seed=2", "--seed=1"), ("--dropRate=0.1", "--dropRate=0.0"), ("--reduction=1", "--reduction=0.5"),
    ("--initChannels=9", "not set"), ("--no-bottleneck", "not set"), ("--no-augment", "not set"),
    ("--no-nesterov", "not set"), ("--efficient=no", "--efficient=yes"), ("--deterministic", "not set"),
    ("--nEpochs=3", "valid are 4 or more")])
def test_a_flag_that_contradicts_the_run_is_refused_by_name(half, capfd, contradiction, of_run):
    said = refused(capfd, half, "--resume", contradiction)
    assert contradiction.partition("=")[0] in said and of_run in said and str(half) in said


def test_every_flag_is_either_refused_or_known_to_change():
    names = set(vars(train.parse_args([])[0]))
    assert set(runs.MAY_CHANGE) == {"device", "no_cuda", "data", "save", "no_plot", "resume", "overwrite", "evaluate"}
    assert names > set(runs.MAY_CHANGE)


def test_data_device_and_directory_may_change(half, whole, images, tmp_path):
    moved = shutil.move(half, tmp_path / "moved")
    shutil.copytree(images, tmp_path / "copy")
    argv = ["--data", str(tmp_path / "copy"), "--device", "cpu"]
    assert resume(moved, *argv) == 0
    assert {name.partition("/")[2] for name in differences(whole, moved)} == {"flags/data", "flags/device"}
    assert json.loads((moved / "run.json").read_text())["flags"]["device"] == "cpu"


def test_flags_of_the_run_hold_where_none_are_given(flags, tmp_path):
    assert stopped_at("train_step", 4, [*flags, "--device", "cpu", "--save", str(tmp_path / "run")]) == 143
    assert resume(tmp_path / "run", "--no-cuda") == 0
    about = json.loads((tmp_path / "run/run.json").read_text())["flags"]
    assert (about["device"], about["no_cuda"]) == (None, True)  # one replaces the other


def test_more_epochs_keep_the_drops_and_go_on_at_the_last_rate(run, whole, capfd):
    before = (whole / "train.csv").read_bytes()
    assert stopped_at("train_step", 4, ["--resume", "--save", str(run), "--nEpochs", "7", "--no-plot"]) == 143
    assert json.loads((run / "run.json").read_text())["flags"]["nEpochs"] == 7
    assert resume(run) == 0  # run.json knows of the seven
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["5/7", "6/7", "7/7"]
    assert [line.split()[3] for line in lines] == ["0.001"] * 3
    checkpoint = torch.load(run / "latest.pth", weights_only=True)
    assert (checkpoint["flags"]["nEpochs"], checkpoint["scheduleEpochs"], checkpoint["epoch"]) == (7, 4, 7)
    assert (run / "train.csv").read_bytes().startswith(before) and before


def test_other_images_are_refused(half, capfd, tmp_path):
    for train_images, test_images in ((79, 40), (80, 39)):
        other = cut_sample(tmp_path / f"{train_images}", train_images, test_images)
        assert "holds other images" in refused(capfd, half, "--resume", "--data", other)
    other = Path(cut_sample(tmp_path / "other"))
    content = bytearray((other / "data_batch_1.bin").read_bytes())
    content[5] ^= 1
    (other / "data_batch_1.bin").write_bytes(content)
    assert "holds other images" in refused(capfd, half, "--resume", "--data", str(other))


def test_thread_count_is_restored_and_other_differences_are_named(flags, whole, half, capfd):
    torch.set_num_threads(2)
    try:
        assert stopped_at("train_step", 2, ["--resume", "--save", str(half), "--no-plot"]) == 143
        assert torch.get_num_threads() == 1 and "warning" not in capfd.readouterr().err
        environment = torch.load(half / "latest.pth", weights_only=True)["environment"]
        assert {"device", "threads", "precision", "torch", "numpy", "cpuCapability"} <= environment.keys()
        about = json.loads((half / "run.json").read_text())
        about["environment"] |= {"torch": "1.0", "device": "abacus"}
        (half / "run.json").write_text(json.dumps(about))
        assert resume(half) == 0
    finally:
        torch.set_num_threads(1)
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(line.startswith("train.py: warning: ") for line in warnings)
    assert "the run had abacus" in warnings[0] and f"torch is {torch.__version__}, the run had 1.0" in warnings[1]


# --- damaged and foreign checkpoints ----------------------------------------------------------------------------

def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def inside_of_a_tensor(path):
    """A byte of the largest record: torch.load alone would take it without a word"""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    return largest.header_offset + 200


@pytest.mark.parametrize("damage", [
    lambda p: os.truncate(p, 0), lambda p: os.truncate(p, 100), lambda p: os.truncate(p, p.stat().st_size // 2),
    lambda p: os.truncate(p, p.stat().st_size - 1), lambda p: flip(p, inside_of_a_tensor(p)), lambda p: flip(p, 32),
    lambda p: p.write_bytes(b"\0" * p.stat().st_size), lambda p: p.unlink()],
    ids=["empty", "100 bytes", "half", "last byte", "bit in a tensor", "bit in a header", "zeros", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(half, whole, capfd, damage):
    previous = (half / "previous.pth").read_bytes()
    damage(half / "latest.pth")
    capfd.readouterr()
    assert stopped_at("train_step", 4, ["--resume", "--save", str(half), "--no-plot"]) == 143
    err = capfd.readouterr().err
    assert f"warning: {half}/latest.pth is " in err and "continuing from previous.pth, epoch 1" in err
    assert (half / "previous.pth").read_bytes() == previous  # the damaged one has not taken its place
    assert resume(half) == 0 and differences(whole, half) == []


def test_two_damaged_checkpoints_are_refused(half, capfd):
    for name in ("latest.pth", "previous.pth"):
        os.truncate(half / name, 1000)
    assert "--overwrite" in refused(capfd, half, "--resume")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content, said", [
    ("a pickled network", "holds other objects"), ({"format": 2}, "format is 2; valid is 1"), ([1], "format is list"),
    ({"format": 1}, "parts of it are missing"), ({"format": 1, "flags": 3}, "parts of it are missing")])
def test_a_foreign_checkpoint_is_refused_and_runs_no_code(half, capfd, tmp_path, content, said):
    if isinstance(content, str):
        content = Payload(str(tmp_path / "executed"))
    torch.save(content, half / "latest.pth")
    assert said in refused(capfd, half, "--resume")  # though previous.pth is sound
    assert not (tmp_path / "executed").exists()
    if not said.startswith("parts"):
        assert train.main(["--evaluate", str(half / "latest.pth")]) == 2
        assert said in one_line(capfd.readouterr().err)


def test_the_ancestors_run_is_refused_and_runs_no_code(tmp_path, capfd):
    """Headerless CSVs and, from before torch's zip format, a pickled module."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.csv").write_text("0.0,2.3,90.0\n0.5,2.2,88.0\n")
    (run / "test.csv").write_text("1,2.2,85.0\n2,2.1,80.0\n3,2.0,79.0\n")
    assert "no checkpoint left" in refused(capfd, run, "--resume")  # its CSVs are not cut
    torch.save(Payload(str(tmp_path / "executed")), run / "latest.pth", _use_new_zipfile_serialization=False)
    assert "latest.pth" in refused(capfd, run, "--resume")
    (run / "latest.pth").write_bytes(pickle.dumps(Payload(str(tmp_path / "executed"))))
    assert "latest.pth" in refused(capfd, run, "--resume") and not (tmp_path / "executed").exists()


def test_another_runs_checkpoint_is_refused(half, images, tmp_path, capfd):
    argv = ["--data", images, *SMALL, "--nEpochs", "4", "--growthRate", "5", "--save", str(tmp_path / "other")]
    assert train.main(argv) == 0
    shutil.copy(tmp_path / "other/latest.pth", half / "latest.pth")
    for name in ("train.csv", "test.csv"):  # even where the lengths would fit
        shutil.copy(tmp_path / "other" / name, half / name)
    assert "another run's: growthRate is 5 there, and 4 in run.json" in refused(capfd, half, "--resume")
    checkpoint = torch.load(half / "latest.pth", weights_only=True)
    edit(half / "latest.pth", flags=checkpoint["flags"] | {"growthRate": 4}, epoch=3)
    assert "does not fit its own flags" in refused(capfd, half, "--resume")


def test_flags_that_this_version_does_not_know_are_refused(half, capfd):
    about = json.loads((half / "run.json").read_text())
    about["flags"] |= {"newFlag": 3}
    (half / "run.json").write_text(json.dumps(about))
    assert "newFlag=3" in refused(capfd, half, "--resume")
    about["flags"] = about["flags"] | {"depth": "deep"}
    del about["flags"]["newFlag"]
    (half / "run.json").write_text(json.dumps(about))
    assert "'deep'; valid is" in refused(capfd, half, "--resume")


def test_lost_rows_and_lost_checkpoints_are_refused(half, capfd):
    whole_csv = (half / "train.csv").read_bytes()
    (half / "train.csv").write_bytes(whole_csv[:40])
    assert "train.csv has 40 bytes" in refused(capfd, half, "--resume")
    (half / "train.csv").unlink()
    assert "train.csv has 0 bytes" in refused(capfd, half, "--resume")
    (half / "train.csv").write_bytes(whole_csv)
    for name in ("latest.pth", "previous.pth"):
        (half / name).unlink()
    assert "no checkpoint left" in refused(capfd, half, "--resume")


def test_weights_only_everywhere():
    for path in ROOT.glob("*.py"):
        for line in path.read_text().splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, path


# --- the directory ----------------------------------------------------------------------------------------------

def test_an_existing_run_is_neither_continued_nor_replaced_unasked(half, flags, capfd):
    said = refused(capfd, half, *flags)
    assert "--resume" in said and "--overwrite" in said


def test_overwrite_replaces_a_run(half, images, whole, flags, tmp_path):
    (half / ".loss.png.1f2e.tmp").write_text("plot.py was killed")
    (half / ".latest.pth.tmp").write_text("train.py was killed")
    assert train.main([*flags, "--save", str(half), "--overwrite"]) == 0
    assert differences(whole, half) == []
    assert train.main(["--data", images, *SMALL, "--nEpochs", "1", "--save", str(half), "--overwrite"]) == 0
    assert set(contents(half)) == {".lock", "latest.pth", "run.json", "test.csv", "train.csv"}


@pytest.mark.parametrize("make", [
    lambda d: (d / "notes.txt").write_text("mine"), lambda d: (d / "figures").mkdir(),
    lambda d: (d / "best.tmp").write_text(""), lambda d: (d / "loss.png").mkdir(),
    lambda d: (d / "test.csv").write_text("id,label\n")], ids=["file", "folder", "tmp", "folder of a name", "table"])
def test_overwrite_is_refused_where_other_files_are(half, flags, capfd, make):
    make(half)
    assert "not a run's" in refused(capfd, half, *flags, "--overwrite")


@pytest.mark.parametrize("files", [["latest.pth"], ["loss.png"], ["train.csv", "test.csv"], ["run.txt"]])
@pytest.mark.parametrize("mode", [[], ["--resume"], ["--overwrite"]])
def test_a_directory_that_is_no_run_is_refused(tmp_path, flags, capfd, files, mode):
    for name in files:
        (tmp_path / name).write_text("id,label\n1,2\n")
    assert "is no run but holds other files" in refused(capfd, tmp_path, *flags, *mode)


def test_empty_directory_and_remains_of_a_start_are_no_obstacle(tmp_path, flags, whole):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / ".run.json.tmp").write_text("{")
    assert train.main([*flags, "--save", str(tmp_path)]) == 0
    assert differences(whole, tmp_path) == [] and ".run.json.tmp" not in contents(tmp_path)


@pytest.mark.parametrize("calls", range(1, 7))
def test_an_overwrite_that_is_killed_leaves_a_run_or_none(half, whole, flags, calls, monkeypatch, capfd):
    unlink, count = Path.unlink, []

    class Killed(BaseException):
        pass

    def killed(path, missing_ok=False):
        count.append(path)
        if len(count) == calls:
            raise Killed
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            train.main([*flags, "--save", str(half), "--overwrite"])
    if train.main([*flags, "--save", str(half), "--resume"]) != 0:  # then the same command must be repeated
        assert "start again with --overwrite" in capfd.readouterr().err and not (half / "latest.pth").exists()
        assert train.main([*flags, "--save", str(half), "--overwrite"]) == 0
    assert differences(whole, half) == []


@pytest.mark.parametrize("mode", ["--resume", "--overwrite"])
def test_one_directory_one_process(half, flags, capfd, mode):
    with open(half / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("4242\n")
        other.flush()
        assert "is in use by process 4242" in refused(capfd, half, *flags, mode)
    assert train.main([*flags, "--save", str(half), mode]) == 0


def test_the_lock_tells_the_pid_and_ends_with_the_run(flags, half, capfd, monkeypatch):
    seen = []

    def second(*args, **kwargs):
        if not seen:
            seen.append((half / ".lock").read_text())
            assert train.main([*flags, "--save", str(half), "--resume"]) == 2
        return step(*args, **kwargs)

    step = train.train_step
    monkeypatch.setattr(train, "train_step", second)
    assert resume(half) == 0 and seen == [f"{os.getpid()}\n"]
    assert f"is in use by process {os.getpid()}" in capfd.readouterr().err
    assert resume(half) == 0


def test_a_run_that_another_process_began_in_the_meantime_stays(flags, whole, tmp_path, capfd, monkeypatch):
    def slow_load(*args, **more):
        shutil.copytree(whole, tmp_path / "run")
        return load(*args, **more)

    load = train.data.load
    monkeypatch.setattr(train.data, "load", slow_load)
    assert train.main([*flags, "--save", str(tmp_path / "run"), "--resume"]) == 2
    assert "holds a run" in one_line(capfd.readouterr().err) and differences(whole, tmp_path / "run") == []


# --- full disks and numbers that are none -----------------------------------------------------------------------

class FileSizeLimit:
    """Files cannot grow beyond so many bytes: errno 27, as on a disk that is full, in the middle of a write."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("limit, file", [(30_000, "latest.pth"), (100, "run.json"), (1000, "run.json")])
def test_a_limit_from_the_start(flags, whole, tmp_path, capsys, limit, file):
    argv = [*flags, "--save", str(tmp_path / "run")]
    with FileSizeLimit(limit):
        status = train.main(argv)
    said = one_line(capsys.readouterr().err)
    assert status == 1 and f"{tmp_path}/run/{file}: File too large; " in said and "--resume continues" in said
    assert not [name for name in contents(tmp_path / "run") if "tmp" in name]
    assert train.main([*argv, "--resume"]) == 0 and differences(whole, tmp_path / "run") == []


def test_a_disk_that_is_full_in_the_middle_of_a_row(images, tmp_path, capfd):
    argv = ["--data", images, "--depth", "10", "--growthRate", "4", "--batchSz", "1", "--nEpochs", "2", "--no-plot"]
    assert train.main([*argv, "--save", str(tmp_path / "whole")]) == 0
    save = tmp_path / "run"
    assert stopped_at("train_epoch", 2, [*argv, "--save", str(save)]) == 143
    latest = (save / "latest.pth").read_bytes()
    limit = max((save / "train.csv").stat().st_size, (save / "run.json").stat().st_size) + 105
    with FileSizeLimit(limit):
        assert train.main([*argv, "--save", str(save), "--resume"]) == 1
    assert f"{save}/train.csv: File too large" in capfd.readouterr().err
    assert (save / "train.csv").stat().st_size == limit and not (save / "train.csv").read_bytes().endswith(b"\n")
    assert (save / "latest.pth").read_bytes() == latest
    assert train.main([*argv, "--save", str(save), "--resume"]) == 0 and differences(tmp_path / "whole", save) == []


def test_a_limit_that_comes_later_leaves_the_last_checkpoint(half, whole, capfd):
    before = without_lock(half)
    with FileSizeLimit(40_000):
        assert resume(half) == 1
    assert f"{half}/latest.pth: File too large; ./train.py --save {half} --resume continues" in capfd.readouterr().err
    after = without_lock(half)
    assert {name: after[name] for name in ("latest.pth", "previous.pth")} == {
        name: before[name] for name in ("latest.pth", "previous.pth")} and after.keys() == before.keys()
    assert resume(half) == 0 and differences(whole, half) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", ["latest.pth", "run.json"])
def test_a_write_that_the_device_has_no_room_for(half, whole, capfd, monkeypatch, name):
    """errno 28"""
    (half / "run.json").unlink()
    before = without_lock(half)
    monkeypatch.setattr(runs, "temporary_for", lambda path: full if path.name == name else path.with_name(".x.tmp"))
    full = half / f".{name}.tmp"
    begin = runs.Run.begin

    def begin_with_link(*args):
        if name == "run.json":
            full.symlink_to("/dev/full")
        begin(*args)
        if name == "latest.pth":
            full.symlink_to("/dev/full")

    monkeypatch.setattr(runs.Run, "begin", begin_with_link)
    monkeypatch.setattr(runs, "is_temporary", lambda _: False)
    assert resume(half) == 1
    assert f"{half}/{name}: No space left on device; " in one_line(capfd.readouterr().err)
    assert all((half / name).read_bytes() == before[name] for name in ("latest.pth", "previous.pth"))
    monkeypatch.undo()
    assert resume(half) == 0 and differences(whole, half) == []


def test_a_small_file_system(flags, whole, tmp_path, capfd):
    """A real one of 120 kB: room for two checkpoints of 50 kB, and not for the third that is written beside them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "none", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        argv = [*flags, "--save", str(disk / "run")]
        assert train.main(argv) == 1
        assert f"{disk}/run/latest.pth: No space left on device; " in one_line(capfd.readouterr().err)
        epoch = torch.load(disk / "run/latest.pth", weights_only=True)["epoch"]
        assert epoch == 2 and "previous.pth" in contents(disk / "run")
        assert train.main([*argv, "--resume"]) == 1  # still full, nothing worse
        assert torch.load(disk / "run/latest.pth", weights_only=True)["epoch"] == epoch
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert train.main([*argv, "--resume"]) == 0
        assert differences(whole, disk / "run") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("step, epoch, iteration", [(2, 1, 2), (8, 3, 2), (9, 3, 3)])
def test_a_loss_that_is_not_finite_stops_before_anything_is_replaced(
        flags, whole, tmp_path, capfd, monkeypatch, value, step, epoch, iteration):
    save, calls = tmp_path / "run", []

    def broken(*args):
        calls.append(1)
        result = train_step(*args)
        return result * float(value) if len(calls) == step else result

    train_step = train.train_step
    monkeypatch.setattr(train, "train_step", broken)
    assert train.main([*flags, "--save", str(save)]) == 1
    said = one_line(capfd.readouterr().err)
    assert f"the loss is {value} in epoch {epoch}, iteration {iteration}; " in said and len(calls) == step
    assert ("latest.pth is that of epoch 2" if epoch > 1 else "nothing was saved yet") in said
    assert (save / "latest.pth").exists() == (epoch > 1)
    assert len((save / "train.csv").read_text().splitlines()) == step  # the header, and the rows before
    monkeypatch.setattr(train, "train_step", train_step)
    assert resume(save) == 0 and differences(whole, save) == []


def test_a_test_loss_that_is_not_finite_stops_too(flags, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: [float("nan"), 90.0])
    assert train.main([*flags, "--save", str(tmp_path / "run")]) == 1
    assert "the test loss is nan after epoch 1; nothing was saved yet" in one_line(capfd.readouterr().err)
    assert (tmp_path / "run/test.csv").read_text() == "epoch,loss,error\n"
    assert not (tmp_path / "run/latest.pth").exists()


def test_a_rate_that_is_too_high_stops_by_itself(images, tmp_path, capfd):
    argv = ["--data", images, *SMALL, "--lr", "1e6", "--nEpochs", "30", "--save", str(tmp_path / "run")]
    assert train.main(argv) == 1
    assert "lower --lr" in one_line(capfd.readouterr().err)
