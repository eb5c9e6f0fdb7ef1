"""A run's directory: lock, CSVs, run.json, checkpoints. Only rank 0 uses it.

The checkpoint latest.pth is all that ``--resume`` needs: flags, progress, weights, optimizer, and the length and
SHA-256 that each CSV had when it was saved. Each checkpoint replaces latest.pth as a whole, and the one before stays as
previous.pth: whenever the process is killed, the last one saved is valid. run.json is for people.
"""

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from densenet import ForeignFile, read_checkpoint
from lib.cli import warn
from lib.files import UNSUPPORTED, copy_file, filename_in_errors, replacing, sync_directory
from lib.layers import EFFICIENT_OF_PATH

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

CSVS = ("train.csv", "val.csv", "test.csv")
CSV_HEADER = b"epoch,loss,error\n"
LATEST, PREVIOUS = "latest.pth", "previous.pth"
BEST = "best.pth"  # of the epoch with the lowest validation error, if there is a validation set
FIGURES = ("loss.png", "error.png", "loss-error.png")
LOCK, RUN_JSON = ".lock", "run.json"
FILES = (RUN_JSON, LOCK, LATEST, PREVIOUS, BEST, *CSVS, *FIGURES)
# required entries and their types: of checkpoints and run.json, and of checkpoints only
ABOUT_RUN = {"flags": dict, "scheduleEpochs": int, "environment": dict, "mean": list, "std": list, "classes": list}
PROGRESS = {"epoch": int, "best": (dict, type(None)), "csvLengths": dict, "model": dict, "optimizer": dict}
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # open() then refuses a link, which could lead to any file of the user's


def is_finished(saved: dict[str, Any] | None, nEpochs: int) -> bool:
    """Whether the saved run is fully trained and tested, so that its images are not needed."""
    return saved is not None and saved.get("epoch", 0) >= nEpochs and bool(saved.get("test"))


class RunError(ValueError):
    """This run directory does not allow what the user asked for; the message is one line."""


class Run:
    """A context manager that unlocks at exit. Call ``open``, ``begin``, then ``add`` and ``save`` in each epoch."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.csvs: dict[str, BinaryIO] = {}
        self.digests: dict[str, Any] = {}  # for each CSV a hashlib object, updated with all its bytes
        self.lock_handle: int | None = None
        self.current = LATEST  # the checkpoint last read or written, and its epoch
        self.current_epoch: int | None = None
        self.begun = False  # whether anything was written

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        for csv in self.csvs.values():
            csv.close()
        if self.lock_handle is not None:
            os.close(self.lock_handle)  # which also unlocks

    # --- before anything is written ---------------------------------------------------------------------------

    def open(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """-> the newest sound checkpoint of the run to resume, or run.json's content for a run of version 1.0 that
        stopped before its first checkpoint; None for a new run.

        Raises:
            RunError: if a run exists and neither flag is set, no checkpoint can be used, a CSV has lost rows, a file is
                not a run's, the directory cannot be written, or another process uses it.
        """
        if not self.check(resume, overwrite):
            return None
        self.lock()
        return self.read_run() if resume else None

    def check(self, resume: bool, overwrite: bool) -> bool:
        """-> whether the directory holds a run. Files with names that no run uses are ignored."""
        if not self.path.is_dir():
            if os.path.lexists(self.path):
                raise RunError(f"--save {self.path} is not a directory")
            parent = next(p for p in self.path.absolute().parents if p.exists())
            if not parent.is_dir():
                raise RunError(f"--save {self.path}: {parent} is not a directory")
            self.check_permission(parent)
            return False
        self.check_permission(self.path)
        found = [name for name in FILES if os.path.lexists(self.path / name)]
        for name in found:
            if problem := self.why_foreign(name):
                raise RunError(f"{self.path / name} {problem}; move it, or name another directory by --save")
        holds_run = bool({RUN_JSON, LATEST, PREVIOUS, *CSVS} & set(found))
        if not holds_run and (others := sorted(set(found) - {LOCK})):
            raise RunError(f"--save {self.path} holds {others[0]}, but no run; move it, or name another directory")
        if holds_run and not resume and not overwrite:
            raise RunError(f"--save {self.path} holds a run; --resume continues it, --overwrite replaces it")
        return holds_run

    def check_permission(self, directory: Path) -> None:
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise RunError(f"--save {self.path}: no permission to write in {directory}")

    def why_foreign(self, name: str) -> str | None:
        """-> why this file, despite its name, is not from a run and must be kept; None if it may be from a run"""
        path = self.path / name
        if path.is_symlink():
            return "is a symbolic link"
        if not path.is_file():
            return "is not a file of a run"
        if name in CSVS and not is_run_csv(path):
            return "is not a run's table of epoch,loss,error"
        if name == RUN_JSON and self.read_json() is None and path.stat().st_size and not (self.path / LATEST).exists():
            return "is not a run's description"  # with a checkpoint it may be a run's, damaged: it is written again
        if name in (LATEST, PREVIOUS, BEST):
            try:
                read_checkpoint(path)
            except ForeignFile as error:
                return str(error).removeprefix(f"{path} ")
            except (ValueError, OSError):  # damaged: it may have been a run's
                pass
        return None

    def lock(self) -> None:
        """Makes the directory if it does not exist, and keeps other processes out until the end."""
        if self.lock_handle is not None:
            return
        if not self.path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            sync_directory(self.path.parent)
        with filename_in_errors(self.path / LOCK):
            handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | NO_FOLLOW, 0o666)
        try:
            if fcntl is None:
                raise OSError(UNSUPPORTED[0], "no locks on this system")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise RunError(f"--save {self.path} is in use by process {pid}") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(handle)
                raise
            warn(f"{self.path}: this file system has no locks ({error.strerror}); do not start a second process on "
                 "this run while one is running")
        self.lock_handle = handle
        with filename_in_errors(self.path / LOCK):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())

    def read_run(self) -> dict[str, Any] | None:
        """-> what ``open`` returns for a directory that holds a run"""
        checkpoint = self.newest_checkpoint()
        if checkpoint is None:
            for name in CSVS[1:]:
                path = self.path / name
                if path.exists() and path.read_bytes().count(b"\n") > 2:  # more than the header and epoch 1
                    raise RunError(f"--save {self.path} has no checkpoint left, but rows of several epochs in {name}; "
                                   f"put {LATEST} back, or start again with --overwrite or another --save")
            return self.read_json()
        for name, length in checkpoint["csvLengths"].items():
            check_csv(self.path / name, length, checkpoint.get("csvDigests", {}).get(name), checkpoint["epoch"])
        return checkpoint

    def newest_checkpoint(self) -> dict[str, Any] | None:
        """-> latest.pth; if it is damaged or missing, the newer of best.pth and previous.pth, with a warning"""
        problem, sound = None, {}
        for name in (LATEST, BEST, PREVIOUS):
            path = self.path / name
            try:
                sound[name] = read_checkpoint(path)
            except FileNotFoundError:
                if name == LATEST:
                    problem = f"{path} is missing"
            except OSError as error:
                problem = problem or f"{path} cannot be read ({error.strerror})"
            except ValueError:  # damaged, not foreign: ``check`` has refused foreign files
                problem = problem or f"{path} is damaged"
            if name == LATEST and sound:
                break
        if not sound:
            if any(os.path.lexists(self.path / name) for name in (LATEST, BEST, PREVIOUS)):
                raise RunError(f"{problem}; none of the run's checkpoints can be used: start again with --overwrite")
            return None
        name = max(sound, key=lambda name: epoch_of(sound[name]))
        checkpoint = sound[name]
        if not is_complete(checkpoint):
            raise RunError(f"{self.path / name} is not a checkpoint of a run: parts of it are missing or of a wrong "
                           "kind")
        if problem:
            warn(f"{problem}; continuing from {name}, epoch {checkpoint['epoch']}")
        self.current, self.current_epoch = name, checkpoint["epoch"]
        return checkpoint

    def read_json(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / RUN_JSON).read_text())
        except (OSError, ValueError, RecursionError):
            return None
        return content if has_entries(content, ABOUT_RUN) else None

    def read_best(self, epoch: int) -> dict[str, Any]:
        """-> best.pth; raises RunError if it is not the checkpoint of this epoch"""
        path = self.path / BEST
        try:
            checkpoint = read_checkpoint(path)
        except FileNotFoundError:
            raise RunError(f"{path} is missing, the checkpoint of epoch {epoch}; put it back, or start again with "
                           "--overwrite") from None
        if checkpoint.get("epoch") != epoch:
            raise RunError(f"{path} is the checkpoint of epoch {checkpoint.get('epoch')}, the best was epoch {epoch}; "
                           "put that back, or start again with --overwrite")
        return checkpoint

    # --- writing ----------------------------------------------------------------------------------------------

    def begin(self, state: dict[str, Any], saved: dict[str, Any] | None) -> None:
        """Prepares the directory for training: saves a checkpoint and run.json, and cuts the CSVs to the checkpoint.

        Args:
            state: the content of the checkpoint; saved only if the run is new, or its flags or "test" have changed
            saved: what ``open`` returned; if it is not a checkpoint, files of an earlier run are removed

        Raises:
            OSError: with the file that cannot be written as its filename.
            RunError: if another process uses the directory, or has begun a run there.
        """
        if self.lock_handle is None:
            self.lock()
            self.check(resume=False, overwrite=False)  # again, now that no other process can begin a run
        best = state["best"] if state.get("valImages") else None
        if best and best["epoch"] != state["epoch"]:
            self.read_best(best["epoch"])  # needed at the end: refuse the run now rather than then
        self.begun = True
        for name in os.listdir(self.path):  # temporary files of a process that was killed
            if name.endswith(".tmp") and name.startswith(tuple(f".{file}." for file in FILES)):
                (self.path / name).unlink(missing_ok=True)
        is_new = saved is None or "model" not in saved
        if is_new:  # before latest.pth is replaced: an earlier run's files must not be taken for the new run's
            for name in (PREVIOUS, BEST, *FIGURES):
                (self.path / name).unlink(missing_ok=True)
            self.current_epoch = None
        if is_new or any(state[name] != saved.get(name) for name in ("flags", "test")):
            self.write_checkpoint(state)
        changing = (*PROGRESS, "val", "test", "csvDigests")
        about = {name: value for name, value in state.items() if name not in changing}
        if self.read_json() != about:
            with replacing(self.path / RUN_JSON) as file:
                file.write((json.dumps(about, indent=2) + "\n").encode())
        if best and best["epoch"] == state["epoch"]:
            copy_file(self.path / self.current, self.path / BEST)  # a killed run may not have made this copy
        for name in CSVS:
            if name != "val.csv" or state.get("valImages"):
                self.open_csv(name, state["csvLengths"].get(name, 0))
            elif is_new:
                (self.path / name).unlink(missing_ok=True)

    def open_csv(self, name: str, length: int) -> None:
        """Opens a CSV for appending, cut to ``length`` bytes; length 0 makes a new one with its header."""
        with filename_in_errors(self.path / name):
            handle = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | NO_FOLLOW, 0o666)
            csv = self.csvs[name] = os.fdopen(handle, "r+b", buffering=0)
            csv.truncate(length)
            self.digests[name] = hashlib.sha256(csv.read())
        if length == 0:
            self.append(name, CSV_HEADER)

    def add(self, name: str, rows: list[tuple[float, float, float]]) -> None:
        """Appends rows of epoch, loss (mean over images, in nats) and error (in percent)."""
        self.append(name, "".join(f"{epoch:.9g},{loss:.7g},{error:.5g}\n" for epoch, loss, error in rows).encode())

    def append(self, name: str, content: bytes) -> None:
        self.digests[name].update(content)
        with filename_in_errors(self.path / name):
            while content:  # on a full disk write() takes a part and only then raises
                content = content[self.csvs[name].write(content):]

    def save(self, state: dict[str, Any], is_best: bool = False) -> None:
        """Syncs the CSVs, then replaces latest.pth. The one before stays as previous.pth, the best one as best.pth."""
        self.check_lock()
        for name, csv in self.csvs.items():
            with filename_in_errors(self.path / name):
                os.fsync(csv.fileno())
        self.write_checkpoint(state | {
            "csvLengths": {name: csv.tell() for name, csv in self.csvs.items()},
            "csvDigests": {name: digest.hexdigest() for name, digest in self.digests.items()}})
        if is_best:
            copy_file(self.path / LATEST, self.path / BEST)

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()  # torch.save to a file raises an error of its own for a full disk or a signal
        torch.save(state, content)
        latest = self.path / LATEST
        with replacing(latest) as file:
            file.write(content.getbuffer())
            # keep latest.pth as previous.pth, unless it is damaged or holds this same epoch
            if self.current == LATEST and self.current_epoch not in (None, state["epoch"]):
                copy_file(latest, self.path / PREVIOUS)
        self.current, self.current_epoch = LATEST, state["epoch"]

    def check_lock(self) -> None:
        """Raises RunError if the directory was moved or replaced since it was locked: its path may be another run's."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path / LOCK), os.fstat(self.lock_handle)):
                return
        raise RunError(f"{self.path / LOCK} is missing or another file: the directory may have been moved or replaced; "
                       "nothing more is written there")


def has_entries(content: Any, types: dict[str, Any]) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in types.items())


def is_complete(checkpoint: dict[str, Any]) -> bool:
    """Whether the checkpoint has all that a run continues from, each of the right type: it may be a stranger's."""
    if not (has_entries(checkpoint, ABOUT_RUN | PROGRESS) and checkpoint["epoch"] >= 0):
        return False
    lengths = checkpoint["csvLengths"]
    results = [checkpoint["best"], checkpoint.get("val"), checkpoint.get("test")]
    return (lengths.keys() <= set(CSVS) and all(type(n) is int and n >= 0 for n in lengths.values())
            and isinstance(checkpoint.get("csvDigests", {}), dict)
            and all(type(v) in (int, float) for v in checkpoint["mean"] + checkpoint["std"])
            and all(result is None or has_entries(result, {"error": (int, float)}) for result in results)
            and (checkpoint["best"] is None or type(checkpoint["best"].get("epoch")) is int)
            and (checkpoint["best"] is not None or checkpoint["epoch"] == 0)
            and checkpoint.get("path", "textbook") in EFFICIENT_OF_PATH)


def epoch_of(checkpoint: dict[str, Any]) -> int:
    """-> its epoch; -1 if the file, perhaps a stranger's, has none"""
    epoch = checkpoint.get("epoch")
    return epoch if type(epoch) is int else -1


def is_run_csv(path: Path) -> bool:
    """Whether the file begins like a run's CSV, with the header (or a part of it) or, as the ancestor's, without."""
    with open(path, "rb") as file:
        first = file.readline(100)
    if CSV_HEADER.startswith(first):
        return True
    try:
        return len([float(value) for value in first.split(b",")]) == 3
    except ValueError:
        return False


def check_csv(path: Path, length: int, digest: str | None, epoch: int) -> None:
    """Raises RunError unless the file's first ``length`` bytes are those of the time when ``epoch`` was saved.

    Checkpoints of version 1.0 have no digest. For these the bytes must end with a line, and the number of rows must be
    a multiple of the epochs.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(length)
    except FileNotFoundError:
        content = b""
    if len(content) < length:
        raise RunError(f"{path} has {len(content)} bytes, but the checkpoint was saved with {length}: rows are lost; "
                       "put the file back, or start again with --overwrite")
    if not content:
        return
    if digest:
        same = hashlib.sha256(content).hexdigest() == digest
    else:
        rows = content.count(b"\n") - 1
        fits = rows in (0, 1, epoch) if path.name == "test.csv" else rows % max(epoch, 1) == 0
        same = content.endswith(b"\n") and fits
    if not same:
        raise RunError(f"{path} was changed after the checkpoint was saved, perhaps by a program that saved it again; "
                       "put the original file back, or start again with --overwrite or another --save")
