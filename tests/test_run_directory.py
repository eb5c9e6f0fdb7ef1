"""A run's directory: damaged and foreign files, other files in it, the lock, full disks, losses that are not finite."""

import contextlib
import errno
import fcntl
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas
import pytest
import torch
from common import (
    EPOCHS,
    SMALL,
    contents,
    differences,
    edit_checkpoint,
    flip,
    full_disk,
    one_line,
    resume,
    run_refused,
    slow,
    stopped_at,
    without_lock,
)

import train
from lib import sets

pytestmark = pytest.mark.usefixtures("one_thread")


# --- damaged and foreign checkpoints ----------------------------------------------------------------------------

def position_in_a_tensor(path):
    """-> the position of a byte in the largest record, whose damage torch.load itself does not notice"""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    return largest.header_offset + 200


@pytest.mark.parametrize("damage", [
    slow(lambda p: os.truncate(p, 0)), slow(lambda p: os.truncate(p, 100)),
    slow(lambda p: os.truncate(p, p.stat().st_size // 2)), slow(lambda p: os.truncate(p, p.stat().st_size - 1)),
    lambda p: flip(p, position_in_a_tensor(p)), slow(lambda p: flip(p, 32)),
    slow(lambda p: p.write_bytes(b"\0" * p.stat().st_size)), lambda p: p.unlink()],
    ids=["empty", "100 bytes", "half", "last byte", "bit in a tensor", "bit in a header", "zeros", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(interrupted, whole, capfd, damage):
    previous = (interrupted / "previous.pth").read_bytes()
    damage(interrupted / "latest.pth")
    capfd.readouterr()
    assert stopped_at("train_step", 4, ["--resume", "--save", str(interrupted), "--no-plot"]) == 143
    err = capfd.readouterr().err
    assert f"warning: {interrupted}/latest.pth is " in err and "continuing from previous.pth, epoch 1" in err
    assert (interrupted / "previous.pth").read_bytes() == previous  # not replaced by the damaged checkpoint
    assert resume(interrupted) == 0 and differences(whole, interrupted) == []


def test_two_damaged_checkpoints_are_refused(interrupted, capfd):
    for name in ("latest.pth", "previous.pth"):
        os.truncate(interrupted / name, 1000)
    assert "--overwrite" in run_refused(capfd, interrupted, "--resume")


class Payload:
    """Makes the directory ``path`` when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("content, said", [
    ("a pickled network", "holds other objects"), ({"format": 2}, "format is 2; valid is 1"), ([1], "format is list"),
    ({"format": 1}, "parts of it are missing"), ({"format": 1, "flags": 3}, "parts of it are missing")])
def test_a_foreign_checkpoint_is_refused_and_runs_no_code(interrupted, capfd, tmp_path, content, said):
    if isinstance(content, str):
        content = Payload(str(tmp_path / "executed"))
    torch.save(content, interrupted / "latest.pth")
    assert said in run_refused(capfd, interrupted, "--resume")  # though previous.pth is sound
    assert not (tmp_path / "executed").exists()
    if not said.startswith("parts"):
        assert train.main(["--evaluate", str(interrupted / "latest.pth")]) == 2
        assert said in one_line(capfd.readouterr().err)


def test_the_ancestors_run_is_refused_and_runs_no_code(tmp_path, capfd):
    """It has CSVs without header and a pickled module, from before torch's zip format."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "train.csv").write_text("0.0,2.3,90.0\n0.5,2.2,88.0\n")
    (run / "test.csv").write_text("1,2.2,85.0\n2,2.1,80.0\n3,2.0,79.0\n")
    assert "no checkpoint left" in run_refused(capfd, run, "--resume")  # the CSVs are not cut
    torch.save(Payload(str(tmp_path / "executed")), run / "latest.pth", _use_new_zipfile_serialization=False)
    assert "latest.pth" in run_refused(capfd, run, "--resume")
    (run / "latest.pth").write_bytes(pickle.dumps(Payload(str(tmp_path / "executed"))))
    assert "latest.pth" in run_refused(capfd, run, "--resume") and not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_another_runs_checkpoint_is_refused(interrupted, images, tmp_path, capfd):
    argv = ["--data", images, *SMALL, "--nEpochs", "4", "--growthRate", "5", "--save", str(tmp_path / "other")]
    assert train.main(argv) == 0
    shutil.copy(tmp_path / "other/latest.pth", interrupted / "latest.pth")
    said = run_refused(capfd, interrupted, "--resume")
    assert "train.csv" in said and ("rows are lost" in said or "was changed" in said)
    flags = torch.load(interrupted / "latest.pth", weights_only=True)["flags"]
    edit_checkpoint(interrupted / "latest.pth", flags=flags | {"growthRate": 4}, epoch=3, csvLengths={})
    assert "does not fit its own flags" in run_refused(capfd, interrupted, "--resume")


@pytest.mark.parametrize("change, said", [
    ({"newFlag": 3}, "newFlag is unknown"), ({"depth": "deep"}, "--depth is 'deep'"), ({"depth": [10]}, "--depth is"),
    ({"no_augment": 1}, "--no-augment is '1'"), ({"classes": "cat"}, "--classes is 'cat'"),
    ({"lr": float("nan")}, "--lr is 'nan'"), ({"opt": "sgd\x1b[2J"}, r"--opt is 'sgd\x1b[2J'"),
    ({"data": None}, "--data is 'None'")])
def test_saved_flags_that_the_command_line_would_refuse_are_refused(interrupted, capfd, change, said):
    flags = torch.load(interrupted / "latest.pth", weights_only=True)["flags"]
    edit_checkpoint(interrupted / "latest.pth", flags=flags | change)
    assert said in run_refused(capfd, interrupted, "--resume")
    assert train.main(["--evaluate", str(interrupted / "latest.pth")]) == 2
    assert said in one_line(capfd.readouterr().err)


@pytest.mark.parametrize("change", [
    {"csvLengths": {"/etc/hostname": 1}}, {"csvLengths": {"../x.csv": 1}}, {"csvLengths": {"train.csv": -1}},
    {"csvLengths": {"train.csv": "9"}}, {"epoch": -1}, {"best": {"epoch": 1}}, {"best": {"error": 1.0, "epoch": "1"}},
    {"mean": ["red"] * 3}, {"path": "/bin/sh"}, {"test": {}}], ids=str)
def test_a_strangers_checkpoint_with_parts_of_a_wrong_kind_is_refused(interrupted, capfd, change):
    edit_checkpoint(interrupted / "latest.pth", **change)
    assert "parts of it are missing or of a wrong kind" in run_refused(capfd, interrupted, "--resume")


def test_lost_rows_and_lost_checkpoints_are_refused(interrupted, capfd):
    whole_csv = (interrupted / "train.csv").read_bytes()
    (interrupted / "train.csv").write_bytes(whole_csv[:40])
    assert "train.csv has 40 bytes" in run_refused(capfd, interrupted, "--resume")
    (interrupted / "train.csv").unlink()
    assert "train.csv has 0 bytes" in run_refused(capfd, interrupted, "--resume")
    (interrupted / "train.csv").write_bytes(whole_csv)
    for name in ("latest.pth", "previous.pth"):
        (interrupted / name).unlink()
    assert "no checkpoint left" in run_refused(capfd, interrupted, "--resume")


@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
@pytest.mark.parametrize("older", [False, True])
def test_a_csv_that_was_saved_again_is_refused(interrupted, capfd, name, older):
    """pandas writes "1" as "1.0": the old length would cut a row in the middle."""
    if older:
        edit_checkpoint(interrupted / "latest.pth", csvDigests=None)
    pandas.read_csv(interrupted / name).astype(float).to_csv(interrupted / name, index=False)
    said = run_refused(capfd, interrupted, "--resume")
    assert f"{interrupted / name} was changed" in said and "--overwrite" in said


# --- the directory ----------------------------------------------------------------------------------------------

def test_an_existing_run_is_neither_continued_nor_replaced_without_a_flag(interrupted, flags, capfd):
    said = run_refused(capfd, interrupted, *flags)
    assert "--resume" in said and "--overwrite" in said


def test_overwrite_replaces_a_run(interrupted, images, whole, flags, tmp_path):
    (interrupted / ".loss.png.1f2e.tmp").write_text("plot.py was killed")
    (interrupted / ".latest.pth.02f1.tmp").write_text("train.py was killed")
    assert train.main([*flags, "--save", str(interrupted), "--overwrite"]) == 0
    assert differences(whole, interrupted) == []
    assert train.main(["--data", images, *SMALL, "--nEpochs", "1", "--save", str(interrupted), "--overwrite"]) == 0
    assert set(contents(interrupted)) == {".lock", "latest.pth", "previous.pth", "run.json", "test.csv", "train.csv"}
    assert torch.load(interrupted / "previous.pth", weights_only=True)["epoch"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", [slow([]), ["--resume"], slow(["--overwrite"])])
def test_files_of_other_programs_are_ignored_and_kept(tmp_path, flags, whole, mode):
    """As of a file manager, a scheduler, `tee log.txt`."""
    run = tmp_path / "run"
    run.mkdir()
    others = {".DS_Store": b"\0", "log.txt": b"mine", "slurm-1.out": b"", "best.tmp": b""}
    for name, content in others.items():
        (run / name).write_bytes(content)
    (run / "figures").mkdir()
    assert train.main([*flags, "--save", str(run), *mode]) == 0
    assert differences(whole, run) == []
    assert train.main([*flags, "--save", str(run), "--overwrite"]) == 0
    assert all((run / name).read_bytes() == content for name, content in others.items())
    assert (run / "figures").is_dir()


@pytest.mark.parametrize("make", [
    lambda d: (d / "loss.png").mkdir(), lambda d: (d / "test.csv").write_text("id,label\n"),
    lambda d: torch.save({"mine": 1}, d / "best.pth"), lambda d: torch.save({"mine": 1}, d / "previous.pth")],
    ids=["folder", "table", "weights", "previous weights"])
@pytest.mark.parametrize("mode", ["--resume", "--overwrite"])
def test_a_foreign_file_with_a_runs_name_is_never_replaced(interrupted, flags, capfd, make, mode):
    (interrupted / "test.csv").unlink()
    make(interrupted)
    assert "move it" in run_refused(capfd, interrupted, *flags, mode)


@pytest.mark.parametrize("name", ["loss.png", "latest.pth", "test.csv", "run.json"])
@pytest.mark.parametrize("mode", [[], ["--resume"], ["--overwrite"]])
def test_a_directory_with_a_foreign_file_of_a_runs_name_is_refused(tmp_path, flags, capfd, name, mode):
    if name == "latest.pth":
        torch.save([1], tmp_path / name)
    else:
        (tmp_path / name).write_text("id,label\n1,2\n")
    assert "move it" in run_refused(capfd, tmp_path, *flags, *mode)


@pytest.mark.parametrize("name", [".lock", "train.csv", "latest.pth", "run.json", "loss.png"])
@pytest.mark.parametrize("mode", ["--resume", "--overwrite"])
def test_a_link_is_never_followed(interrupted, flags, capfd, tmp_path, name, mode):
    (tmp_path / "thesis.tex").write_text("mine")
    (interrupted / name).unlink(missing_ok=True)
    (interrupted / name).symlink_to(tmp_path / "thesis.tex")
    assert train.main([*flags, "--save", str(interrupted), mode]) == 2
    assert f"{interrupted / name} is a symbolic link" in capfd.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_run_starts_in_a_directory_with_remains_of_a_killed_start(tmp_path, flags, whole):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / ".run.json.12ab.tmp").write_text("{")
    assert train.main([*flags, "--save", str(tmp_path)]) == 0
    assert differences(whole, tmp_path) == [] and ".run.json.12ab.tmp" not in contents(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("owner, function, call", [
    (Path, "unlink", 1), (os, "replace", 1), *(slow(Path, "unlink", call) for call in range(2, 7)),
    *(slow(os, "replace", call) for call in (2, 3))])
def test_an_overwrite_that_is_killed_leaves_a_run(interrupted, whole, flags, owner, function, call, monkeypatch):
    original, calls = getattr(owner, function), []

    class Killed(BaseException):
        pass

    def killed(*args, **more):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, killed)
        with contextlib.suppress(Killed):
            train.main([*flags, "--save", str(interrupted), "--overwrite"])
    assert train.main([*flags, "--save", str(interrupted), "--resume"]) == 0
    assert differences(whole, interrupted) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--resume", "--overwrite"])
def test_a_directory_in_use_is_refused_to_a_second_process(interrupted, flags, capfd, mode):
    with open(interrupted / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("4242\n")
        other.flush()
        assert "is in use by process 4242" in run_refused(capfd, interrupted, *flags, mode)
    assert train.main([*flags, "--save", str(interrupted), mode]) == 0


def test_the_lock_holds_the_pid_and_ends_with_the_run(flags, interrupted, capfd, monkeypatch):
    locks = []

    def start_a_second_training(*args, **kwargs):
        if not locks:
            locks.append((interrupted / ".lock").read_text())
            assert train.main([*flags, "--save", str(interrupted), "--resume"]) == 2
        return train_step(*args, **kwargs)

    train_step = train.train_step
    monkeypatch.setattr(train, "train_step", start_a_second_training)
    assert resume(interrupted) == 0 and locks == [f"{os.getpid()}\n"]
    assert f"is in use by process {os.getpid()}" in capfd.readouterr().err
    assert resume(interrupted) == 0


def test_a_run_that_another_process_began_during_the_loading_is_kept(flags, whole, tmp_path, capfd, monkeypatch):
    def load_while_a_run_begins(*args, **more):
        shutil.copytree(whole, tmp_path / "run")
        return load(*args, **more)

    load = sets.data.load
    monkeypatch.setattr(sets.data, "load", load_while_a_run_begins)
    assert train.main([*flags, "--save", str(tmp_path / "run"), "--resume"]) == 2
    assert "holds a run" in one_line(capfd.readouterr().err) and differences(whole, tmp_path / "run") == []


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_written_after_the_directory_was_moved(flags, tmp_path, capfd, monkeypatch, replaced):
    run, evaluate = tmp_path / "run", train.evaluate

    def move_and_evaluate(*args):
        if not (tmp_path / "old").exists():
            run.rename(tmp_path / "old")
            if replaced:
                shutil.copytree(tmp_path / "old", run)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", move_and_evaluate)
    assert train.main([*flags, "--save", str(run)]) == 1
    assert "may have been moved or replaced" in one_line(capfd.readouterr().err)
    assert not replaced or torch.load(run / "latest.pth", weights_only=True)["epoch"] == 0
    assert replaced or not run.exists()


@pytest.mark.parametrize("code", ["ENOSYS", slow("ENOLCK"), slow("EOPNOTSUPP"), slow("EINVAL")])
def test_a_file_system_without_locks_or_fsync_of_directories_is_supported(
        flags, whole, tmp_path, capfd, monkeypatch, code):
    """Lustre, NFS, CIFS, shared folders."""
    fsync = os.fsync

    def unsupported(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(os, "fsync", lambda handle: unsupported() if os.path.isdir(f"/proc/self/fd/{handle}") else
                        fsync(handle))
    assert train.main([*flags, "--save", str(tmp_path / "run")]) == 0
    assert "do not start a second process" in one_line(capfd.readouterr().err, "train.py: warning: ")
    assert differences(whole, tmp_path / "run") == []


@pytest.mark.slow
def test_damage_to_the_newest_checkpoint_leaves_the_best_one(flags, tmp_path, capfd):
    """Even if the newest epoch is the best: latest.pth and best.pth are not links to one file."""
    argv = [*flags, "--valSize", "20", "--lr", "0.001", "--save"]
    run = tmp_path / "run"
    assert train.main([*argv, str(tmp_path / "whole")]) == 0
    assert stopped_at("train_step", 5, [*argv, str(run)]) == 143  # after epoch 2, of two steps each
    best = torch.load(run / "best.pth", weights_only=True)["epoch"]
    with open(run / "latest.pth", "r+b") as file:
        file.write(b"damaged")
    assert resume(run) == 0
    assert f"continuing from {'best' if best == 2 else 'previous'}.pth" in capfd.readouterr().err
    assert differences(tmp_path / "whole", run) == []


# --- full disks and losses that are not finite ------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("limit", [slow(100), slow(10_000), 40_000])
def test_a_disk_that_is_full_from_the_start_is_one_line_and_resume_continues(flags, whole, tmp_path, capsys, limit):
    argv = [*flags, "--save", str(tmp_path / "run")]
    with full_disk(limit):
        status = train.main(argv)
    said = one_line(capsys.readouterr().err)
    assert status == 1 and f"{tmp_path}/run/latest.pth: File too large; " in said and "--resume continues" in said
    assert not [name for name in contents(tmp_path / "run") if "tmp" in name]
    assert train.main([*argv, "--resume"]) == 0 and differences(whole, tmp_path / "run") == []


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_middle_of_a_row_is_one_line_and_resume_continues(images, tmp_path, capfd):
    argv = ["--data", images, "--depth", "10", "--growthRate", "4", "--batchSz", "1", "--nEpochs", "2", "--no-plot"]
    assert train.main([*argv, "--save", str(tmp_path / "whole")]) == 0
    save = tmp_path / "run"
    assert stopped_at("train_epoch", 2, [*argv, "--save", str(save)]) == 143
    latest = (save / "latest.pth").read_bytes()
    limit = max((save / "train.csv").stat().st_size, (save / "run.json").stat().st_size) + 105
    with full_disk(limit):
        assert train.main([*argv, "--save", str(save), "--resume"]) == 1
    assert f"{save}/train.csv: File too large" in capfd.readouterr().err
    assert (save / "train.csv").stat().st_size == limit and not (save / "train.csv").read_bytes().endswith(b"\n")
    assert (save / "latest.pth").read_bytes() == latest
    assert train.main([*argv, "--save", str(save), "--resume"]) == 0 and differences(tmp_path / "whole", save) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_later_leaves_the_last_checkpoint(interrupted, whole, capfd):
    before = without_lock(interrupted)
    with full_disk(40_000):
        assert resume(interrupted) == 1
    said = one_line(capfd.readouterr().err)
    assert f"{interrupted}/latest.pth: File too large; ./train.py --save {interrupted} --resume continues" in said
    after = without_lock(interrupted)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in ("latest.pth", "previous.pth"))
    assert resume(interrupted) == 0 and differences(whole, interrupted) == []


@pytest.mark.slow
def test_a_full_file_system_keeps_the_last_checkpoint(flags, whole, tmp_path, capfd):
    """A tmpfs with room for some checkpoints of 50 kB, but not for the next one, which is written beside them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        argv = [*flags, "--save", str(disk / "run")]
        assert train.main(argv) == 1
        assert ".pth: No space left on device; " in one_line(capfd.readouterr().err)
        epoch = torch.load(disk / "run/latest.pth", weights_only=True)["epoch"]
        assert 1 <= epoch < EPOCHS and "previous.pth" in contents(disk / "run")
        assert train.main([*argv, "--resume"]) == 1  # still full
        assert torch.load(disk / "run/latest.pth", weights_only=True)["epoch"] == epoch
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert train.main([*argv, "--resume"]) == 0
        assert differences(whole, disk / "run") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("value", ["nan", slow("inf"), slow("-inf")])
@pytest.mark.parametrize("step, epoch, iteration", [slow(2, 1, 2), (8, 3, 2), slow(9, 3, 3)])
def test_a_loss_that_is_not_finite_stops_before_anything_is_replaced(
        flags, whole, tmp_path, capfd, monkeypatch, value, step, epoch, iteration):
    save, calls = tmp_path / "run", []

    def diverge(*args):
        calls.append(1)
        result = train_step(*args)
        return result * float(value) if len(calls) == step else result

    train_step = train.train_step
    monkeypatch.setattr(train, "train_step", diverge)
    assert train.main([*flags, "--save", str(save)]) == 1
    said = one_line(capfd.readouterr().err)
    assert f"the loss is {value} in epoch {epoch}, iteration {iteration}; " in said and len(calls) == step
    assert ("latest.pth holds epoch 2" if epoch > 1 else "no epoch was finished yet") in said
    assert torch.load(save / "latest.pth", weights_only=True)["epoch"] == epoch - 1
    assert len((save / "train.csv").read_text().splitlines()) == step  # the header, and the rows of the steps before
    monkeypatch.setattr(train, "train_step", train_step)
    assert resume(save) == 0 and differences(whole, save) == []


def test_a_test_loss_that_is_not_finite_stops_too(flags, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: (float("nan"), 90.0, None))
    assert train.main([*flags, "--save", str(tmp_path / "run")]) == 1
    assert "the test loss is nan after epoch 1; no epoch was finished yet" in one_line(capfd.readouterr().err)
    assert (tmp_path / "run/test.csv").read_text() == "epoch,loss,error\n"
    assert torch.load(tmp_path / "run/latest.pth", weights_only=True)["epoch"] == 0


def test_a_training_that_diverges_stops_and_says_so(images, tmp_path, capfd):
    argv = ["--data", images, *SMALL, "--lr", "1e6", "--nEpochs", "30", "--save", str(tmp_path / "run")]
    assert train.main(argv) == 1
    assert "lower --lr" in one_line(capfd.readouterr().err)
