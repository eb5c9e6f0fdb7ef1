"""A run's directory: its lock, CSVs, run.json and checkpoints.

Whatever moment the process dies at, what was saved before it stays valid and ``--resume`` continues there: the
checkpoint holds the CSVs' lengths, is replaced whole, and the one before it stays as previous.pth.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from densenet import read_checkpoint

CSVS = ("train.csv", "test.csv")
CSV_HEADER = b"epoch,loss,error\n"
CHECKPOINTS = ("latest.pth", "previous.pth")
FIGURES = ("loss.png", "error.png", "loss-error.png")
LOCK = ".lock"
FILES = {"run.json", LOCK, *CSVS, *CHECKPOINTS, *FIGURES}


class RunError(Exception):
    """What was asked cannot be done with this run directory; the message is one line for the user."""


class Run:
    """A run directory. Nothing is written, not even the directory, before ``open``."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.csvs: dict[str, BinaryIO] = {}
        self.lock_handle: int | None = None
        self.keep_previous = True  # latest.pth is worth keeping as previous.pth

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        for csv in self.csvs.values():
            csv.close()
        if self.lock_handle is not None:
            os.close(self.lock_handle)  # which also unlocks

    def check(self, resume: bool, overwrite: bool) -> bool:
        """-> whether the directory holds a run.

        Raises:
            RunError: if what it holds does not fit what the user asked for, or nothing can be written there.
        """
        if not self.path.exists():
            parent = next(p for p in self.path.absolute().parents if p.exists())
            if not parent.is_dir():
                raise RunError(f"--save {self.path}: {parent} is not a directory")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise RunError(f"--save {self.path}: no permission to write in {parent}")
            return False
        if not self.path.is_dir():
            raise RunError(f"--save {self.path} is not a directory")
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK):
            raise RunError(f"--save {self.path}: no permission to write there")
        found = {p.name for p in self.path.iterdir() if not is_temporary(p.name)}
        foreign = sorted(found - FILES)
        is_run = bool(found & {"run.json", *CSVS, *CHECKPOINTS})
        if not is_run and foreign:
            raise RunError(f"--save {self.path} is no run but holds other files ({foreign[0]}); name a new directory")
        if overwrite and foreign:
            raise RunError(f"--save {self.path} holds a file that is not a run's ({foreign[0]}); --overwrite replaces "
                           "only runs")
        if is_run and not resume and not overwrite:
            raise RunError(f"--save {self.path} holds a run; --resume continues it, --overwrite replaces it")
        return is_run

    def lock(self) -> None:
        """Makes the directory if need be and keeps other processes out until the end; again is no harm.

        Raises:
            RunError: if another process has it.
        """
        if self.lock_handle is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise RunError(f"--save {self.path} is in use by process {pid}") from None
        self.lock_handle = handle
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        for p in self.path.iterdir():
            if is_temporary(p.name):  # left by a process that was killed while it wrote
                p.unlink(missing_ok=True)

    def remove_files(self) -> None:
        """For --overwrite, after ``check`` and ``open``. Checkpoints go last: until then --resume still finds one."""
        for name in (*FIGURES, *CSVS, "run.json", *reversed(CHECKPOINTS)):
            (self.path / name).unlink(missing_ok=True)

    # --- CSVs -------------------------------------------------------------------------------------------------

    def open_csvs(self, lengths: dict[str, int]) -> None:
        """Opens them for appending, cut back to these lengths in bytes; new ones get their header."""
        for name in CSVS:
            csv = self.csvs[name] = open(self.path / name, "r+b" if (self.path / name).exists() else "w+b", buffering=0)
            size, length = os.fstat(csv.fileno()).st_size, lengths.get(name, 0)
            if size < length:
                raise RunError(f"{self.path / name} has {size} bytes, its checkpoint knows of {length}: rows were lost")
            csv.truncate(length)
            csv.seek(length)
            if length == 0:
                self.write(name, CSV_HEADER)

    def add(self, name: str, rows: list[tuple[float, float, float]]) -> None:
        """Appends rows of epoch, loss (mean over images, in nats) and error (in percent)."""
        text = "".join(f"{epoch:.7g},{loss:.7g},{error:.5g}\n" for epoch, loss, error in rows)
        self.write(name, text.encode())

    def write(self, name: str, content: bytes) -> None:
        while content:  # a full disk takes a part, then raises
            content = content[self.csvs[name].write(content):]

    # --- checkpoints ------------------------------------------------------------------------------------------

    def save(self, checkpoint: dict[str, Any]) -> None:
        """The CSVs, and then latest.pth with their lengths; the one before stays as previous.pth."""
        for csv in self.csvs.values():
            os.fsync(csv.fileno())
        checkpoint = checkpoint | {"csvLengths": {name: csv.tell() for name, csv in self.csvs.items()}}
        latest, previous = (self.path / name for name in CHECKPOINTS)
        with replacing(latest) as file:
            torch.save(checkpoint, file)
            if self.keep_previous and latest.exists():
                keep_as(latest, previous)
        self.keep_previous = True

    def load(self) -> dict[str, Any] | None:
        """The newest sound checkpoint; None if the run has none yet.

        Raises:
            RunError: if there are some, but none can be used.
        """
        problems = []
        for name in CHECKPOINTS:
            try:
                checkpoint = read_checkpoint(self.path / name)
            except FileNotFoundError:
                continue
            except ValueError as error:
                problems.append(str(error))
                continue
            if problems:
                warn(f"{problems[0]}; continuing from {name}, epoch {checkpoint['epoch']}")
                self.keep_previous = False
            return checkpoint
        if problems:
            raise RunError(problems[0])
        return None

    def write_json(self, content: dict[str, Any]) -> None:
        with replacing(self.path / "run.json") as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())

    def read_json(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / "run.json").read_text())
            return content if isinstance(content.get("flags"), dict) else None
        except (OSError, ValueError, AttributeError):
            return None


# --- files replaced whole ---------------------------------------------------------------------------------------

TEMPORARY = ".tmp-"


def is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes ``path``'s place, on disk, when the block ends well, and leaves nothing when it does not."""
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp's 0600 would shut out the group
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def keep_as(path: Path, other: Path) -> None:
    """``path``'s content as ``other`` too, which is replaced whole; ``path`` never vanishes."""
    temporary = Path(tempfile.mktemp(prefix=TEMPORARY, dir=path.parent))
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, other)
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def warn(message: str) -> None:
    print(f"train.py: warning: {message}", file=sys.stderr, flush=True)
