"""A run's directory: what is a run, in which order its files are written, damaged files, full disks."""

import errno
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import torch
from common import (
    SMALL,
    checkpoint,
    contents,
    differences,
    edit_checkpoint,
    full_disk,
    one_line,
    resume,
    run_refused,
    slow,
    stopped_at,
)

import train
from lib import data

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ([], ["--resume"], ["--overwrite"])


# --- what is a run ----------------------------------------------------------------------------------------------

def test_a_run_is_neither_continued_nor_replaced_without_a_flag(interrupted, flags, capsys):
    said = run_refused(capsys, interrupted, *flags)
    assert "--resume" in said and "--overwrite" in said


def test_overwrite_replaces_a_run_and_leaves_nothing_of_it(validated, images, whole, flags, tmp_path):
    run = shutil.copytree(validated, tmp_path / "run")
    for name in (".latest.pth.tmp", ".run.json.tmp"):  # of processes that were killed
        (run / name).write_text("half")
    (run / "loss.png").write_text("a figure")
    assert train.main([*flags, "--save", str(run), "--overwrite"]) == 0
    assert differences(whole, run) == [] and contents(run).keys() == contents(whole).keys()


@pytest.mark.parametrize("name", ["latest.pth", "best.pth", "loss.png", "test.csv", "run.json"])
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_a_file_of_a_runs_name_that_is_no_runs_is_never_replaced(tmp_path, flags, capsys, name, mode):
    (tmp_path / name).write_text("id,label\n1,2\n")
    said = run_refused(capsys, tmp_path, *flags, *mode)
    assert name in said and "move it" in said


class Payload:
    """Makes the directory ``path`` when it is unpickled."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
@pytest.mark.parametrize("content, said", [
    ("a pickled network", "holds other objects"), ({"format": 2}, "format is 2; valid is 1"), ([1], "format is list")])
def test_another_programs_checkpoint_is_never_replaced_and_runs_no_code(run, flags, capsys, tmp_path, mode, content,
                                                                        said):
    if isinstance(content, str):
        content = Payload(str(tmp_path / "executed"))
    torch.save(content, run / "latest.pth")
    assert said in run_refused(capsys, run, *flags, *mode)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("changes", [
    {"csvLengths": None}, {"classes": None}, {"optimizer": None}, {"optimizer": {"state": {}, "param_groups": []}},
    {"flags": ["x"]}, {"flags": {"depth": "deep"}}, {"flags": {"nEpochs": "many"}}, {"flags": {"opt": 3}},
    {"flags": {"no_plot": 1}}, {"flags": {"newFlag": 3}}, {"flags": {"growthRate": 5}}],
    ids=str)
def test_a_checkpoint_that_makes_no_sense_is_one_line_that_names_the_run(interrupted, capsys, changes):
    if isinstance(changes.get("flags"), dict):
        changes = {"flags": checkpoint(interrupted)["flags"] | changes["flags"]}
    edit_checkpoint(interrupted / "latest.pth", **changes)
    assert str(interrupted) in run_refused(capsys, interrupted, "--resume")


def test_a_directory_whose_checkpoints_are_lost_is_a_run_by_its_run_json(interrupted, flags, whole, capsys):
    for name in ("latest.pth", "previous.pth"):
        (interrupted / name).unlink()
    said = run_refused(capsys, interrupted, "--resume")
    assert f"{interrupted}/latest.pth is missing" in said and "neither previous.pth nor best.pth" in said
    assert train.main([*flags, "--save", str(interrupted), "--overwrite"]) == 0
    assert differences(whole, interrupted) == []


def test_files_of_other_programs_are_never_touched(tmp_path, flags, whole):
    """As of a file manager, a scheduler, `tee log.txt`."""
    others = {".DS_Store": b"\0", "log.txt": b"mine", "slurm-1.out": b"", "best.tmp": b"", "figures/a.png": b"a"}
    (tmp_path / "figures").mkdir()
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    for mode in ("--resume", "--overwrite"):
        assert train.main([*flags, "--save", str(tmp_path), mode]) == 0
        assert differences(whole, tmp_path) == []
        assert contents(tmp_path).items() >= others.items()


def test_a_copy_of_the_directory_resumes_elsewhere(stopped, whole, tmp_path):
    for copy in (tmp_path / "a", tmp_path / "a/deeper"):
        shutil.copytree(stopped, copy)
        assert resume(copy) == 0 and differences(whole, copy) == []
        assert checkpoint(copy)["flags"]["save"] == str(copy)


# --- the lock ---------------------------------------------------------------------------------------------------

def test_a_directory_in_use_is_refused_and_the_lock_ends_with_its_process(flags, interrupted, whole, capsys,
                                                                          monkeypatch):
    """Even if the owner was killed: the file .lock stays, but locks nothing."""
    statuses, train_step = [], train.train_step

    def start_a_second_training(*args):
        if not statuses:
            statuses.extend(train.main([*flags, "--save", str(interrupted), mode])
                            for mode in ("--resume", "--overwrite"))
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", start_a_second_training)
    assert resume(interrupted) == 0 and statuses == [2, 2]
    assert capsys.readouterr().err.count(f"is in use by process {os.getpid()}") == 2
    assert differences(whole, interrupted) == []
    with open(interrupted / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_that_another_process_began_meanwhile_is_kept(flags, whole, tmp_path, capsys, monkeypatch):
    def load_while_a_run_begins(*args, **more):
        shutil.copytree(whole, tmp_path / "run")
        return load(*args, **more)

    load = data.load
    monkeypatch.setattr(data, "load", load_while_a_run_begins)
    assert train.main([*flags, "--save", str(tmp_path / "run"), "--resume"]) == 2
    assert "another process has begun a run there" in one_line(capsys.readouterr().err)
    assert differences(whole, tmp_path / "run") == []


@pytest.mark.parametrize("save", ["file", "file/run", "dangling", "x" * 300, "/proc/none"])
def test_a_directory_that_cannot_be_made_is_one_line(flags, tmp_path, monkeypatch, capsys, save):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a directory")
    (tmp_path / "dangling").symlink_to("nothing/there")
    assert f"--save {save}: " in run_refused(capsys, tmp_path / "unused", *flags, "--save", save)
    assert (tmp_path / "file").read_text() == "not a directory"


# --- the order of writing ---------------------------------------------------------------------------------------

OPERATIONS = ((os, "fsync"), (os, "replace"), (Path, "unlink"))


class Killed(BaseException):
    """The process is dead: no operation after this one changes a file."""


def dead_from(n: int, argv: list[str], error: Callable[[], BaseException] = Killed,
              operations=OPERATIONS) -> int | None:
    """Runs train.main(argv), in which the operation on files number ``n`` (from 1) and all later ones raise an error.
    -> the exit status; None if it was killed"""
    calls = []

    def mortal(original):
        def operation(*args, **more):
            calls.append(args)
            if len(calls) >= n:
                raise error()
            return original(*args, **more)
        return operation

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in operations:
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        try:
            return train.main(argv)
        except Killed:
            return None


@pytest.fixture(scope="module")
def short(images) -> list[str]:
    """Flags of a run of two epochs of one step each."""
    return ["--data", images, *SMALL, "--batchSz", "80", "--nEpochs", "2"]


@pytest.fixture(scope="module")
def short_whole(short, one_thread, tmp_path_factory):
    save = tmp_path_factory.mktemp("runs") / "short"
    assert train.main([*short, "--save", str(save)]) == 0
    return save


@pytest.fixture(scope="module")
def validated(short, one_thread, tmp_path_factory):
    """A finished run that has all files that a run can have. Tests must not write to it."""
    save = tmp_path_factory.mktemp("runs") / "validated"
    assert train.main([*short, "--valSize", "20", "--batchSz", "60", "--save", str(save)]) == 0
    (save / "loss.png").write_text("a figure")
    return save


@pytest.mark.parametrize("n", [1, 3, 20, 31, slow(range(1, 60))], ids=str)
def test_a_run_that_is_killed_at_any_operation_on_files_resumes_to_the_same_bytes(short, short_whole, tmp_path, n):
    for i in n if isinstance(n, range) else [n]:
        save = tmp_path / str(i)
        if dead_from(i, [*short, "--save", str(save)]) is not None:
            assert i > 30
            break
        assert train.main([*short, "--save", str(save), "--resume"]) == 0
        assert differences(short_whole, save) == [] and contents(save).keys() == contents(short_whole).keys()


@pytest.mark.parametrize("error", [Killed, lambda: OSError(errno.ENOSPC, "No space left on device")],
                         ids=["killed", "full"])
@pytest.mark.parametrize("n", [1, 2, 4, slow(range(1, 60))], ids=str)
def test_an_overwrite_that_ends_early_leaves_the_old_run_whole_or_the_new_one_to_resume(
        short, short_whole, validated, tmp_path, capsys, n, error):
    operations = OPERATIONS if error is Killed else OPERATIONS[:2]  # a full disk lets one remove files
    for i in n if isinstance(n, range) else [n]:
        save, finished = shutil.copytree(validated, tmp_path / str(i)), False
        argv = [*short, "--save", str(save)]
        capsys.readouterr()
        status = dead_from(i, [*argv, "--overwrite"], error, operations)
        if status == 0:
            assert i > 20
            break
        assert status in (1, None) and (status is None or one_line(capsys.readouterr().err))
        if checkpoint(save)["valImages"]:
            assert i < 4 and contents(save).items() >= contents(validated).items()
            finished = train.main([*argv, "--overwrite"]) == 0
        assert finished or train.main([*argv, "--resume"]) == 0
        assert differences(short_whole, save) == [] and contents(save).keys() == contents(short_whole).keys()


@pytest.mark.parametrize("share", [0.002, 0.9, *map(slow, (0.0005, 0.01, 0.1, 0.3, 0.5, 0.6, 0.8, 0.99))])
def test_a_disk_that_is_full_is_one_line_and_the_run_ends_the_same_when_it_is_not(flags, whole, tmp_path, capsys,
                                                                                  share):
    limit = int((whole / "latest.pth").stat().st_size * share)
    argv = [*flags, "--save", str(tmp_path / "run")]
    with full_disk(limit):
        assert train.main(argv) == 1
    said = one_line(capsys.readouterr().err)
    assert f"{tmp_path}/run/latest.pth: File too large; " in said and "--resume continues" in said
    assert not [name for name in contents(tmp_path / "run") if "tmp" in name]
    assert train.main([*argv, "--resume"]) == 0 and differences(whole, tmp_path / "run") == []


@pytest.mark.parametrize("more", [1, slow(60), slow(130), slow(200)])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(interrupted, whole, capsys, more):
    """Here in the middle of a row, as train.csv is made the largest file."""
    with open(interrupted / "train.csv", "ab") as table:
        table.write(b" " * 100_000)  # beyond the checkpoint's rows: cut
    size = checkpoint(interrupted)["csvLengths"]["train.csv"]
    latest = checkpoint(interrupted)
    with full_disk(size + more):
        assert resume(interrupted) == 1
    one_line(capsys.readouterr().err)
    assert checkpoint(interrupted)["epoch"] == latest["epoch"] == 2
    assert resume(interrupted) == 0 and differences(whole, interrupted) == []


# --- damage -----------------------------------------------------------------------------------------------------

def flip_a_bit_of_a_tensor(path: Path) -> None:
    """Damage that torch.load does not notice."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    flip_a_bit_of_a_tensor, lambda p: p.unlink(), slow(lambda p: os.truncate(p, 0)),
    slow(lambda p: os.truncate(p, p.stat().st_size // 2)), lambda p: os.truncate(p, p.stat().st_size - 1),
    slow(lambda p: p.write_bytes(b"\0" * p.stat().st_size))],
    ids=["bit", "gone", "empty", "half", "last byte", "zeros"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(interrupted, whole, capsys, damage):
    damage(interrupted / "latest.pth")
    assert stopped_at("train_step", 4, ["--resume", "--save", str(interrupted), "--no-plot"]) == 143
    said = one_line(capsys.readouterr().err, f"train.py: warning: {interrupted}/latest.pth is ")
    assert "continuing from the checkpoint of epoch 1" in said
    assert checkpoint(interrupted, "previous.pth")["epoch"] == 1  # not replaced by the damaged one
    assert resume(interrupted) == 0 and differences(whole, interrupted) == []


def test_of_previous_and_best_the_newer_one_is_continued(short, tmp_path, capsys):
    """Even if the newest epoch is the best: latest.pth and best.pth are not links to one file."""
    argv, save = [*short, "--valSize", "20", "--batchSz", "60", "--lr", "0.001"], tmp_path / "run"
    assert train.main([*argv, "--save", str(tmp_path / "whole")]) == 0
    assert stopped_at("evaluate", 3, [*argv, "--save", str(save)]) == 143  # before the final test
    newest = max(checkpoint(save, name)["epoch"] for name in ("previous.pth", "best.pth"))
    with open(save / "latest.pth", "r+b") as file:
        file.write(b"damaged")
    assert resume(save) == 0
    assert f"continuing from the checkpoint of epoch {newest}" in capsys.readouterr().err
    assert differences(tmp_path / "whole", save) == []


def test_two_damaged_checkpoints_are_refused(interrupted, capsys):
    for name in ("latest.pth", "previous.pth"):
        os.truncate(interrupted / name, 1000)
    assert "latest.pth is damaged, and neither previous.pth nor" in run_refused(capsys, interrupted, "--resume")


def test_a_lost_or_foreign_best_checkpoint_is_refused_before_anything_is_trained(validated, tmp_path, capsys):
    save = shutil.copytree(validated, tmp_path / "run")
    edit_checkpoint(save / "latest.pth", best={"epoch": 1, "error": 1.0})
    (save / "best.pth").unlink()
    assert "best.pth is not the checkpoint of epoch 1" in run_refused(capsys, save, "--resume", "--nEpochs", "3")
    torch.save({"format": 1, "epoch": 99}, save / "best.pth")
    assert "best.pth is not the checkpoint of epoch 1" in run_refused(capsys, save, "--resume", "--nEpochs", "3")


def test_rows_beyond_the_checkpoint_are_cut(interrupted, whole):
    assert (interrupted / "train.csv").read_text().count("\n") == 1 + 6 + 1  # two epochs, one step
    for name in ("train.csv", "test.csv"):
        with open(interrupted / name, "ab") as file:
            file.write(b"2.5,1.0,50\n3,torn")
    assert resume(interrupted) == 0 and differences(whole, interrupted) == []


def test_csvs_that_fit_only_the_previous_checkpoint_continue_from_it(interrupted, whole, capsys):
    """As in a copy that was made while the run went on: the CSVs first, then the checkpoints."""
    for name, length in checkpoint(interrupted, "previous.pth")["csvLengths"].items():
        os.truncate(interrupted / name, length)
    assert resume(interrupted) == 0
    said = capsys.readouterr().err
    assert "latest.pth does not fit the CSVs" in said and "continuing from the checkpoint of epoch 1" in said
    assert differences(whole, interrupted) == []


@pytest.mark.parametrize("change", [
    lambda p: pandas.read_csv(p).astype(float).to_csv(p, index=False), lambda p: p.unlink(),
    lambda p: p.write_text(p.read_text().replace("2", "3"))], ids=["by pandas", "lost", "digits"])
@pytest.mark.parametrize("name", ["train.csv", "test.csv"])
def test_a_changed_csv_is_refused(interrupted, capsys, name, change):
    """Its old length would cut a row in the middle, or the rows would be others than those that were trained."""
    change(interrupted / name)
    said = run_refused(capsys, interrupted, "--resume")
    assert "does not fit the CSVs, which were changed or have lost rows" in said and "--overwrite" in said


def test_a_damaged_run_json_is_made_again(interrupted, whole):
    (interrupted / "run.json").write_bytes(b"{")
    assert resume(interrupted) == 0 and differences(whole, interrupted) == []
    assert json.loads((interrupted / "run.json").read_text())["flags"] == checkpoint(interrupted)["flags"]
