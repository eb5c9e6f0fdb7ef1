"""A run's directory: lock, CSVs, run.json, checkpoints. Only rank 0 uses it.

The checkpoint is the run. It holds the flags, the progress, weights and optimizer, and for each CSV its length and
SHA-256 at that moment. It is replaced whole, and the one before it stays as previous.pth. So whatever moment the
process dies at, what was saved before stays valid, and ``--resume`` continues there. run.json is for people.
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
from lib.files import UNSUPPORTED, copy_file, naming, replacing, sync_directory

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

CSVS = ("train.csv", "val.csv", "test.csv")
CSV_HEADER = b"epoch,loss,error\n"
LATEST, PREVIOUS = "latest.pth", "previous.pth"
BEST = "best.pth"  # the epoch with the lowest validation error, where there is a validation set
FIGURES = ("loss.png", "error.png", "loss-error.png")
LOCK, ABOUT = ".lock", "run.json"
FILES = (ABOUT, LOCK, LATEST, PREVIOUS, BEST, *CSVS, *FIGURES)
PARTS = {"flags": dict, "scheduleEpochs": int, "environment": dict, "mean": list, "std": list, "classes": list}
PROGRESS = {"epoch": int, "best": (dict, type(None)), "csvLengths": dict, "model": dict, "optimizer": dict}
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # a link could lead to another file of the user's


def is_finished(saved: dict[str, Any] | None, nEpochs: int) -> bool:
    """Whether the saved run has nothing left to train or test, so that its images are not needed."""
    return saved is not None and saved.get("epoch", 0) >= nEpochs and bool(saved.get("test"))


class RunError(ValueError):
    """What was asked cannot be done with this run directory; the message is one line for the user."""


class Run:
    """First ``open``; then ``begin``, and ``add`` and ``save`` until ``close``."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.csvs: dict[str, BinaryIO] = {}
        self.digests: dict[str, Any] = {}  # of each CSV, a hashlib object that has seen all its bytes
        self.lock_handle: int | None = None
        self.loaded = LATEST  # the checkpoint that ``open`` read
        self.saved_epoch: int | None = None  # of latest.pth
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
            RunError: if the directory does not fit what the user asked for, nothing can be written there, another
                process has it, no checkpoint can be used, or rows of a CSV are lost.
        """
        if not self.check(resume, overwrite):
            return None
        self.lock()
        return self.read() if resume else None

    def check(self, resume: bool, overwrite: bool) -> bool:
        """-> whether the directory holds a run. Files with other names than a run's do not matter."""
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
            if problem := self.foreign(name):
                raise RunError(f"{self.path / name} {problem}; move it, or name another directory by --save")
        holds_run = bool({ABOUT, LATEST, PREVIOUS, *CSVS} & set(found))
        if not holds_run and (others := sorted(set(found) - {LOCK})):
            raise RunError(f"--save {self.path} holds {others[0]}, but no run; move it, or name another directory")
        if holds_run and not resume and not overwrite:
            raise RunError(f"--save {self.path} holds a run; --resume continues it, --overwrite replaces it")
        return holds_run

    def check_permission(self, directory: Path) -> None:
        if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
            raise RunError(f"--save {self.path}: no permission to write in {directory}")

    def foreign(self, name: str) -> str | None:
        """Why a file with a run's name is not a run's, and must not be replaced; None if it may be one."""
        path = self.path / name
        if path.is_symlink():
            return "is a symbolic link, which a run's files are not"
        if not path.is_file():
            return "is not a file of a run"
        if name in CSVS and not is_log(path):
            return "is not a run's table of epoch,loss,error"
        if name == ABOUT and self.read_json() is None and path.stat().st_size and not (self.path / LATEST).exists():
            return "is not a run's"  # beside a checkpoint it may be a damaged one, and is written again
        if name in (LATEST, PREVIOUS, BEST):
            try:
                read_checkpoint(path)
            except ForeignFile as error:
                return str(error).removeprefix(f"{path} ")
            except (ValueError, OSError):  # damaged: it may have been one
                pass
        return None

    def lock(self) -> None:
        """Makes the directory if need be, and keeps other processes out until the end."""
        if self.lock_handle is not None:
            return
        if not self.path.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            sync_directory(self.path.parent)
        with naming(self.path / LOCK):
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
                 "this run while one is at work")
        self.lock_handle = handle
        with naming(self.path / LOCK):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())

    def read(self) -> dict[str, Any] | None:
        """As ``open``, of a directory that holds a run."""
        checkpoint = self.newest_checkpoint()
        if checkpoint is None:
            for name in CSVS[1:]:
                path = self.path / name
                if path.exists() and path.read_bytes().count(b"\n") > 2:  # header, epoch 1
                    raise RunError(f"--save {self.path} has no checkpoint left, but rows of some epochs in {name}; put "
                                   f"{LATEST} back, or start again with --overwrite or elsewhere")
            return self.read_json()
        for name, length in checkpoint["csvLengths"].items():
            check_csv(self.path / name, length, checkpoint.get("csvDigests", {}).get(name), checkpoint["epoch"])
        return checkpoint

    def newest_checkpoint(self) -> dict[str, Any] | None:
        """latest.pth; if that is damaged or missing, the newer one of best.pth and previous.pth, with a warning."""
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
            except ValueError:  # a foreign file was refused by ``check``
                problem = problem or f"{path} is damaged"
            if name == LATEST and sound:
                break
        if not sound:
            if any(os.path.lexists(self.path / name) for name in (LATEST, BEST, PREVIOUS)):
                raise RunError(f"{problem}; none of the run's checkpoints can be used: start again with --overwrite")
            return None
        name = max(sound, key=lambda name: epoch_of(sound[name]))
        checkpoint = sound[name]
        if not is_whole(checkpoint):
            raise RunError(f"{self.path / name} is not a checkpoint of a run: parts of it are missing or of a wrong "
                           "kind")
        if problem:
            warn(f"{problem}; continuing from {name}, epoch {checkpoint['epoch']}")
        self.loaded, self.saved_epoch = name, checkpoint["epoch"]
        return checkpoint

    def read_json(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / ABOUT).read_text())
        except (OSError, ValueError, RecursionError):
            return None
        return content if has(content, PARTS) else None

    def read_best(self, epoch: int) -> dict[str, Any]:
        """Raises RunError if best.pth is not the checkpoint of this epoch."""
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
        """Opens the run for training: its checkpoint, run.json, then the CSVs as they were at the checkpoint.

        Args:
            state: the checkpoint, with "csvLengths"; it is saved if it differs from ``saved``, as by other flags
            saved: what ``open`` returned; if that is no checkpoint, what an earlier run has left is removed

        Raises:
            OSError: with the file that cannot be written as its filename.
            RunError: if another process has the directory, or has begun a run there.
        """
        if self.lock_handle is None:
            self.lock()
            self.check(resume=False, overwrite=False)  # again, now that nobody else can begin a run
        best = state["best"] if state.get("valImages") else None
        if best and best["epoch"] != state["epoch"]:
            self.read_best(best["epoch"])  # now, and not only at the end, where it is needed
        self.begun = True
        for name in os.listdir(self.path):  # left by a process that was killed while it wrote
            if name.endswith(".tmp") and name.startswith(tuple(f".{file}." for file in FILES)):
                (self.path / name).unlink(missing_ok=True)
        is_new = saved is None or "model" not in saved
        if is_new:  # before latest.pth is replaced: none of these may be taken for the new run's
            for name in (PREVIOUS, BEST, *FIGURES):
                (self.path / name).unlink(missing_ok=True)
            self.saved_epoch = None
        if is_new or any(state[name] != saved.get(name) for name in ("flags", "test")):
            self.write_checkpoint(state)
        about = {name: value for name, value in state.items() if name not in ("model", "optimizer", "csvDigests")}
        about = {name: value for name, value in about.items() if name not in PROGRESS and name not in ("val", "test")}
        if self.read_json() != about:
            with replacing(self.path / ABOUT) as file:
                file.write((json.dumps(about, indent=2) + "\n").encode())
        if best and best["epoch"] == state["epoch"]:
            copy_file(self.path / self.loaded, self.path / BEST)  # it may have been killed before that copy
        for name in CSVS:
            if name != "val.csv" or state.get("valImages"):
                self.open_csv(name, state["csvLengths"].get(name, 0))
            elif is_new:
                (self.path / name).unlink(missing_ok=True)

    def open_csv(self, name: str, length: int) -> None:
        """Cut to ``length`` bytes; a new one gets its header."""
        with naming(self.path / name):
            handle = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | NO_FOLLOW, 0o666)
            csv = self.csvs[name] = os.fdopen(handle, "r+b", buffering=0)
            csv.truncate(length)
            self.digests[name] = hashlib.sha256(csv.read())
        if length == 0:
            self.write(name, CSV_HEADER)

    def add(self, name: str, rows: list[tuple[float, float, float]]) -> None:
        """Appends rows of epoch, loss (mean over images, in nats) and error (in percent)."""
        self.write(name, "".join(f"{epoch:.9g},{loss:.7g},{error:.5g}\n" for epoch, loss, error in rows).encode())

    def write(self, name: str, content: bytes) -> None:
        self.digests[name].update(content)
        with naming(self.path / name):
            while content:  # a full disk takes a part, then raises
                content = content[self.csvs[name].write(content):]

    def save(self, state: dict[str, Any], is_best: bool = False) -> None:
        """Puts the CSVs on disk, then latest.pth. The one before stays as previous.pth, the best one as best.pth."""
        self.check_lock()
        for name, csv in self.csvs.items():
            with naming(self.path / name):
                os.fsync(csv.fileno())
        self.write_checkpoint(state | {
            "csvLengths": {name: csv.tell() for name, csv in self.csvs.items()},
            "csvDigests": {name: digest.hexdigest() for name, digest in self.digests.items()}})
        if is_best:
            copy_file(self.path / LATEST, self.path / BEST)

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        content = io.BytesIO()  # torch.save into a file hides the error of a full disk, and a signal, behind its own
        torch.save(state, content)
        latest = self.path / LATEST
        with replacing(latest) as file:
            file.write(content.getbuffer())
            # keep latest.pth as previous.pth, unless it is damaged or holds this same epoch
            if self.loaded == LATEST and self.saved_epoch not in (None, state["epoch"]):
                copy_file(latest, self.path / PREVIOUS)
        self.loaded, self.saved_epoch = LATEST, state["epoch"]

    def check_lock(self) -> None:
        """Raises RunError if the directory was moved away under the process: its path may be another run's now."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path / LOCK), os.fstat(self.lock_handle)):
                return
        raise RunError(f"{self.path / LOCK} is missing or another file: the directory may have been moved or replaced; "
                       "nothing more is written there")


def has(content: Any, kinds: dict[str, Any]) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())


def is_whole(checkpoint: dict[str, Any]) -> bool:
    """Whether all that a run continues from is there and of its kind: the file may be a stranger's."""
    if not (has(checkpoint, PARTS) and has(checkpoint, PROGRESS) and checkpoint["epoch"] >= 0):
        return False
    lengths = checkpoint["csvLengths"]
    results = [checkpoint["best"], checkpoint.get("val"), checkpoint.get("test")]
    return (lengths.keys() <= set(CSVS) and all(type(n) is int and n >= 0 for n in lengths.values())
            and isinstance(checkpoint.get("csvDigests", {}), dict)
            and all(type(v) in (int, float) for v in checkpoint["mean"] + checkpoint["std"])
            and all(result is None or has(result, {"error": (int, float)}) for result in results)
            and (checkpoint["best"] is None or type(checkpoint["best"].get("epoch")) is int)
            and (checkpoint["best"] is not None or checkpoint["epoch"] == 0)
            and checkpoint.get("path", "textbook") in ("textbook", "efficient", "max"))


def epoch_of(checkpoint: dict[str, Any]) -> int:
    epoch = checkpoint.get("epoch")
    return epoch if type(epoch) is int else -1


def is_log(path: Path) -> bool:
    """Whether a CSV is a run's (or its beginning), with a header or, as the ancestor writes it, without."""
    with open(path, "rb") as file:
        first = file.readline(100)
    if CSV_HEADER.startswith(first):
        return True
    try:
        return len([float(value) for value in first.split(b",")]) == 3
    except ValueError:
        return False


def check_csv(path: Path, length: int, digest: str | None, epoch: int) -> None:
    """Raises RunError unless the file's first ``length`` bytes are the ones that the checkpoint of ``epoch`` saw.

    Checkpoints of version 1.0 have no digest. There the cut must fall at a line's end and leave a whole number of rows
    for each epoch.
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
        whole = rows in (0, 1, epoch) if path.name == "test.csv" else rows % max(epoch, 1) == 0
        same = content.endswith(b"\n") and whole
    if not same:
        raise RunError(f"{path} was changed after the checkpoint was saved, perhaps by a program that saved it again; "
                       "put the original file back, or start again with --overwrite or another --save")
