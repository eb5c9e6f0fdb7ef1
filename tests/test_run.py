"""A run's directory: what is a run, in which order its files are written, damaged files, full disks."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

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
    refused,
    resume,
    run_refused,
    slow,
    stopped_at,
)

import train

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ([], ["--resume"], ["--overwrite"])


# --- what is a run ----------------------------------------------------------------------------------------------

def test_a_run_is_neither_continued_nor_replaced_without_a_flag(interrupted, flags, capsys):
    said = run_refused(capsys, interrupted, *flags)
    assert "--resume" in said and "--overwrite" in said


@pytest.mark.parametrize("name", ["latest.pth", "loss.png", "run.json"])
def test_a_file_of_a_runs_name_that_is_no_runs_is_never_replaced(tmp_path, flags, capsys, name):
    (tmp_path / name).write_text("id,label\n1,2\n")
    for mode in MODES:
        said = run_refused(capsys, tmp_path, *flags, *mode)
        assert name in said and "move it" in said


def test_another_programs_checkpoint_in_a_run_is_never_replaced(run, flags, capsys):
    torch.save({"format": 2}, run / "latest.pth")
    for mode in MODES:
        assert "its format is 2; valid is 1" in run_refused(capsys, run, *flags, *mode)


@pytest.mark.parametrize("changes", [
    {"csvLengths": None}, {"model": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"flags": ["x"]}], ids=str)
def test_a_checkpoint_that_makes_no_sense_is_one_line_that_names_the_run(interrupted, capsys, changes):
    edit_checkpoint(interrupted / "latest.pth", **changes)
    assert str(interrupted) in run_refused(capsys, interrupted, "--resume")


def test_a_directory_whose_checkpoints_are_lost_is_a_run_by_its_run_json(interrupted, flags, whole, capsys):
    os.truncate(interrupted / "latest.pth", 1000)
    (interrupted / "previous.pth").unlink()
    said = run_refused(capsys, interrupted, "--resume")
    assert f"{interrupted}/latest.pth is damaged, and neither previous.pth nor best.pth can be used" in said
    assert train.main([*flags, "--save", str(interrupted), "--overwrite"]) == 0
    assert differences(whole, interrupted) == []


def test_files_of_other_programs_are_never_touched(tmp_path, short, short_whole):
    """As of a file manager, a scheduler, `tee log.txt`."""
    others = {".DS_Store": b"\0", "log.txt": b"mine", "slurm-1.out": b"", "best.tmp": b"", "figures/a.png": b"a"}
    (tmp_path / "figures").mkdir()
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    for mode in ("--resume", "--overwrite"):
        assert train.main([*short, "--save", str(tmp_path), mode]) == 0
        assert differences(short_whole, tmp_path) == []
        assert contents(tmp_path).items() >= others.items()


# --- the lock ---------------------------------------------------------------------------------------------------

def test_a_directory_in_use_is_refused(flags, interrupted, whole, capsys, monkeypatch):
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


def test_a_directory_that_cannot_be_made_is_one_line(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("not a directory")
    save = tmp_path / "file/run"
    assert f"--save {save}: Not a directory" in refused(train.main, capsys, *flags, "--save", save)


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
    (save / ".best.pth.tmp").write_text("half")  # of a process that was killed
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
def test_an_overwrite_leaves_the_old_run_whole_or_the_new_one_to_resume_and_at_its_end_nothing_of_the_old_one(
        short, short_whole, validated, tmp_path, n, error):
    operations = OPERATIONS if error is Killed else OPERATIONS[:2]  # a full disk lets one remove files
    for i in n if isinstance(n, range) else [n]:
        save = shutil.copytree(validated, tmp_path / str(i))
        argv = [*short, "--save", str(save)]
        if dead_from(i, [*argv, "--overwrite"], error, operations) == 0:
            assert i > 20
            break
        is_old = checkpoint(save)["valImages"] > 0
        assert not is_old or contents(save).items() >= contents(validated).items()
        assert train.main([*argv, "--overwrite" if is_old else "--resume"]) == 0
        assert differences(short_whole, save) == [] and contents(save).keys() == contents(short_whole).keys()


@pytest.mark.parametrize("share", [0.002, 0.9])  # in the first save, in a later one
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


def test_a_row_that_a_full_disk_takes_in_part_ends_the_run_and_is_cut(interrupted, whole, capsys):
    """For this train.csv is made the largest file, by bytes that the checkpoint counts as rows."""
    rows, saved = (whole / "train.csv").read_bytes(), checkpoint(interrupted)
    new, large = rows[saved["csvLengths"]["train.csv"]:], 10 * (interrupted / "latest.pth").stat().st_size
    os.truncate(interrupted / "train.csv", large)
    edit_checkpoint(interrupted / "latest.pth", csvLengths=saved["csvLengths"] | {"train.csv": large}, csvDigests=None)
    with full_disk(large + len(new) - 1):
        assert resume(interrupted) == 1
    assert "train.csv: File too large; " in one_line(capsys.readouterr().err)
    assert checkpoint(interrupted)["epoch"] == 2
    assert resume(interrupted) == 0 and (interrupted / "train.csv").read_bytes()[large:] == new


# --- damage -----------------------------------------------------------------------------------------------------

def cut_csvs(run: Path) -> None:
    """As in a copy that was made while the run went on: the CSVs first, then the checkpoints."""
    for name, length in checkpoint(run, "previous.pth")["csvLengths"].items():
        os.truncate(run / name, length)


@pytest.mark.parametrize("damage, problem", [
    (lambda run: (run / "latest.pth").unlink(), "is missing"),
    (lambda run: os.truncate(run / "latest.pth", 1000), "is damaged"), (cut_csvs, "does not fit the CSVs")],
    ids=["gone", "damaged", "ahead of the CSVs"])
def test_a_checkpoint_that_cannot_be_used_falls_back_to_the_previous_one(interrupted, whole, capsys, damage, problem):
    damage(interrupted)
    assert stopped_at("train_step", 4, ["--resume", "--save", str(interrupted), "--no-plot"]) == 143
    said = one_line(capsys.readouterr().err, f"train.py: warning: {interrupted}/latest.pth {problem}")
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
    assert checkpoint(interrupted)["flags"]["save"] == str(interrupted)  # a copy, and not where the run began


@pytest.mark.parametrize("change", [
    lambda p: p.unlink(), lambda p: p.write_text(p.read_text().replace("2", "3"))], ids=["lost", "digits"])
def test_a_changed_csv_is_refused(interrupted, capsys, change):
    """Its old length would cut a row in the middle, or the rows would be others than those that were trained."""
    change(interrupted / "train.csv")
    said = run_refused(capsys, interrupted, "--resume")
    assert "does not fit the CSVs, which were changed or have lost rows" in said and "--overwrite" in said
