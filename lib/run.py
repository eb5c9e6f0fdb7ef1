"""A run's directory: its lock, CSVs, run.json and checkpoints. Only rank 0 uses it.

latest.pth is a dict of plain values and CPU tensors, read by ``torch.load(file, weights_only=True)`` on any machine:

    format          1
    version         of densenet.py
    flags           train.py's flags, with the defaults that depend on other flags filled in
    environment     device, processes, threads and versions, for people
    arguments       DenseNet's, which rebuild the network
    parameters      their number
    efficient       how dense blocks are computed, DenseNet's argument: True, False or "max"
    mean, std       of each channel, in [0, 1]: normalise images
    classes         their names
    trainImages     number of images; also valImages and testImages: they tell whether --data is still the same
    scheduleEpochs  the number of epochs that the learning rate's schedule was made for
    epoch           the last one that was finished, 0 before the first
    best            {"epoch", "error"}: the lowest error on val.csv's images, without --valSize on test.csv's
    val, test       {"loss", "error"} of the last evaluation, None before; val only with --valSize, test then at the end
    csvLengths      bytes of each CSV at the end of this epoch: a resumed run cuts them to it ({} before the first)
    csvDigests      SHA-256 of these bytes: a file that was changed is noticed
    model           the network's state dict
    optimizer       the optimizer's state dict, with the momentum

There is no state of a random number generator: each epoch draws from seeds of its own (batches.py).

Each checkpoint replaces latest.pth as a whole, and that of the epoch before stays as previous.pth: whenever the process
is killed, a whole one is on disk. best.pth is the best epoch's, with --valSize.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from densenet import ForeignFile, read_checkpoint
from lib.cli import Failure, warn

LATEST, PREVIOUS, BEST = "latest.pth", "previous.pth", "best.pth"
CSVS = ("train.csv", "val.csv", "test.csv")
CSV_HEADER = b"epoch,loss,error\n"
FIGURES = ("loss.png", "error.png", "loss-error.png")
FILES = (LATEST, PREVIOUS, BEST, "run.json", *CSVS, *FIGURES)
NEEDED = ("flags", "arguments", "mean", "std", "classes", "trainImages", "valImages", "testImages", "scheduleEpochs",
          "epoch", "best", "val", "test", "csvLengths", "model", "optimizer")  # version 1 lacks the others
PROGRESS = ("epoch", "best", "val", "test", "csvLengths", "csvDigests", "model", "optimizer")  # not in run.json
PLOT = Path(__file__).resolve().parent.parent / "plot.py"


class RunError(ValueError):
    """This directory does not allow what the user asked for. The message is one line."""


class Run:
    """Call ``start``, ``begin``, then ``add`` and ``save`` in each epoch."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.csvs: dict[str, BinaryIO] = {}
        self.digests: dict[str, Any] = {}  # for each CSV a hashlib object, updated with all its bytes
        self.lock_file: BinaryIO | None = None
        self.continues_latest = True  # otherwise from previous.pth or best.pth
        self.plotter: subprocess.Popen | None = None
        self.can_plot = True

    def start(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """-> the checkpoint to continue from, or None for a new run. Takes the lock of a run that is there.

        Raises:
            RunError: if a run exists and neither flag is set, if none of its checkpoints can be used, if another
                process uses it, or if a file that a new run would overwrite is not from a run.
        """
        found = self.files()
        if not found:
            return None
        self.lock()
        latest = self.read(LATEST)
        others = [] if latest and self.csvs_fit(*latest) else self.read(PREVIOUS, BEST)
        if not (latest or others or self.has_run_json()):
            raise RunError(f"--save {self.path} holds {found[0]}, but no run; move it, or name another directory")
        if not resume and not overwrite:
            raise RunError(f"--save {self.path} holds a run; --resume continues it, --overwrite replaces it")
        if overwrite:
            return None
        usable = [checkpoint for checkpoint in latest + others if self.csvs_fit(checkpoint)]
        if latest:
            problem = "does not fit the CSVs, which were changed or have lost rows"
        else:
            problem = "is damaged" if (self.path / LATEST).exists() else "is missing"
        if not usable:
            raise RunError(f"{self.path / LATEST} {problem}, and neither {PREVIOUS} nor {BEST} can be used; put the "
                           "files back, or start again with --overwrite or another --save")
        saved = max(usable, key=lambda checkpoint: checkpoint["epoch"])
        self.continues_latest = saved in latest
        if not self.continues_latest:
            warn(f"{self.path / LATEST} {problem}; continuing from the checkpoint of epoch {saved['epoch']}")
        if saved.get("valImages") and saved["best"] and saved["best"]["epoch"] != saved["epoch"]:
            self.read_best(saved["best"]["epoch"])  # needed at the end: refuse the run now rather than then
        return saved

    def files(self) -> list[str]:
        """-> the names of a run's files that are there"""
        return [name for name in FILES if os.path.lexists(self.path / name)]

    def lock(self) -> None:
        """Keeps other processes out until this one ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock_file = open(self.path / ".lock", "a+b")  # noqa: SIM115 (open until the end)
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.lock_file.truncate(0)
            self.lock_file.write(f"{os.getpid()}\n".encode())
            self.lock_file.flush()
        except BlockingIOError:
            self.lock_file.seek(0)
            pid = self.lock_file.read(32).decode(errors="replace").strip()
            raise RunError(f"--save {self.path} is in use by process {pid}") from None
        except OSError as error:
            raise RunError(f"--save {self.path}: {error.strerror}") from None

    def read(self, *names: str) -> list[dict[str, Any]]:
        """-> those of these checkpoints that are there and undamaged"""
        sound = []
        for name in names:
            try:
                checkpoint = read_checkpoint(self.path / name)
                if missing := [key for key in NEEDED if key not in checkpoint]:
                    raise ForeignFile(f"{self.path / name} is no checkpoint of this train.py: it has no {missing[0]}")
                sound.append(checkpoint)
            except ForeignFile as error:
                raise RunError(f"{error}; move it, or name another directory by --save") from None
            except (OSError, ValueError):  # missing or damaged
                pass
        return sound

    def csvs_fit(self, checkpoint: dict[str, Any]) -> bool:
        """Whether each CSV begins with the bytes that it had when the checkpoint was saved."""
        for name, length in checkpoint["csvLengths"].items():
            path = self.path / name
            content = path.read_bytes()[:length] if path.exists() else b""
            digest = checkpoint.get("csvDigests", {}).get(name)
            # a file that is to be begun anew has length 0, and its old digest
            if len(content) < length or (digest and length and hashlib.sha256(content).hexdigest() != digest):
                return False
        return True

    def has_run_json(self) -> bool:
        try:
            return "dataset" in json.loads((self.path / "run.json").read_text())["flags"]
        except (OSError, ValueError, LookupError, TypeError):
            return False

    # --- writing ----------------------------------------------------------------------------------------------

    def begin(self, state: dict[str, Any], saved: dict[str, Any] | None) -> None:
        """Writes run.json, and latest.pth if it is not yet this state; cuts the CSVs to the checkpoint's lengths.

        A new run's checkpoint is on disk before anything of a replaced run goes.

        Args:
            state: the content of the checkpoint
            saved: what ``start`` returned
        """
        if self.lock_file is None:
            self.lock()
            if self.files():
                raise RunError(f"--save {self.path}: another process has begun a run there")
        names = [name for name in CSVS if name != "val.csv" or state["valImages"]]
        for name in {*names} & {*self.files()}:
            with naming(self.path / name):
                open(self.path / name, "ab").close()  # if it cannot be written, the run is refused now
        is_same = saved and all(state[name] == saved.get(name) for name in ("flags", "test"))
        if not is_same or not self.continues_latest:
            self.write(state, keep_previous=False)
        for name in names:
            with naming(self.path / name):
                csv = self.csvs[name] = open(self.path / name, "a+b", buffering=0)  # noqa: SIM115 (open until the end)
                csv.truncate(state["csvLengths"].get(name, 0))
                csv.seek(0)
                self.digests[name] = hashlib.sha256(csv.read())
            if csv.tell() == 0:
                self.append(name, CSV_HEADER)
        for name in FILES:  # of a process that was killed
            (self.path / f".{name}.tmp").unlink(missing_ok=True)
        about = {name: value for name, value in state.items() if name not in PROGRESS}
        with replacing(self.path / "run.json") as file:
            file.write((json.dumps(about, indent=2) + "\n").encode())
        if state["epoch"] == 0:  # what is left of a replaced run
            for name in {PREVIOUS, BEST, *CSVS, *FIGURES} - {*names}:
                (self.path / name).unlink(missing_ok=True)
        elif state["valImages"] and state["best"]["epoch"] == state["epoch"]:
            copy(self.path / LATEST, self.path / BEST)  # a killed run may not have made this copy

    def add(self, name: str, rows: list[tuple[float, float, float]]) -> None:
        """Appends rows of epoch, loss (mean over images, in nats) and error (in percent)."""
        self.append(name, "".join(f"{epoch:.9g},{loss:.7g},{error:.5g}\n" for epoch, loss, error in rows).encode())

    def append(self, name: str, content: bytes) -> None:
        self.digests[name].update(content)
        with naming(self.path / name):
            while content:  # on a full disk write() takes a part and only then raises
                content = content[self.csvs[name].write(content):]

    def save(self, state: dict[str, Any], is_best: bool = False, keep_previous: bool = True) -> None:
        """Replaces latest.pth. The one before stays as previous.pth, the best one as best.pth."""
        for name, csv in self.csvs.items():
            with naming(self.path / name):
                os.fsync(csv.fileno())
        lengths = {name: csv.tell() for name, csv in self.csvs.items()}
        digests = {name: digest.hexdigest() for name, digest in self.digests.items()}
        self.write(state | {"csvLengths": lengths, "csvDigests": digests}, keep_previous)
        if is_best:
            copy(self.path / LATEST, self.path / BEST)

    def write(self, state: dict[str, Any], keep_previous: bool) -> None:
        content = io.BytesIO()  # torch's own writing to a full disk ends in an error that does not say so
        torch.save(on_cpu(state), content)
        with replacing(self.path / LATEST) as file:
            file.write(content.getbuffer())
            if keep_previous:
                copy(self.path / LATEST, self.path / PREVIOUS)

    def read_best(self, epoch: int) -> dict[str, Any]:
        """-> best.pth; raises RunError if it is not the checkpoint of this epoch"""
        path = self.path / BEST
        checkpoint = read_checkpoint(path) if path.exists() else {}
        if checkpoint.get("epoch") != epoch:
            raise RunError(f"{path} is not the checkpoint of epoch {epoch}, the best one; put that back, or start "
                           "again with --overwrite")
        return checkpoint

    # --- drawing ----------------------------------------------------------------------------------------------

    def plot(self, wait: bool = False) -> None:
        """Runs plot.py in the background, unless it still runs; with ``wait`` to its end, with all rows."""
        if self.plotter and (wait or self.plotter.poll() is not None):
            error = self.plotter.communicate()[1].decode(errors="replace").strip()
            if self.plotter.returncode:
                self.can_plot = False
                warn(f"no figures, but the training is not affected: {(error.splitlines() or ['no message'])[-1]}")
            self.plotter = None
        if self.can_plot and not self.plotter:
            try:
                self.plotter = subprocess.Popen([sys.executable, PLOT, "--", self.path], stdin=subprocess.DEVNULL,
                                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                                start_new_session=True)  # Ctrl-C does not reach it
                if wait:
                    self.plotter.wait()
            except OSError as error:  # no memory for another process
                self.can_plot = False
                warn(f"no figures, but the training is not affected: {error.strerror}")


# --- files that are replaced as a whole -------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A context with a new file that replaces ``path`` at its end, synced to disk: whenever the process is killed, a
    reader finds either the old content or the new. If it raises, ``path`` is unchanged."""
    with naming(path):
        temporary = path.with_name(f".{path.name}.tmp")  # the directory is locked: no other process writes it
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some file systems cannot sync a directory
            os.fsync(directory)
        os.close(directory)


def copy(path: Path, other: Path) -> None:
    """Replaces ``other`` by a copy of ``path``, not by a hard link: damage to one file leaves the other sound."""
    with open(path, "rb") as source, replacing(other) as target:
        shutil.copyfileobj(source, target)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context that tells which file could not be written: errors of write() and fsync() do not."""
    try:
        yield
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}; what was saved before is whole, --resume continues from it") from None


def on_cpu(value: Any) -> Any:
    """-> the value with each tensor on the CPU"""
    if isinstance(value, dict):
        return {name: on_cpu(child) for name, child in value.items()}
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
