"""A run's directory (lock, CSVs, run.json, checkpoints) and flags, and what surrounds it: signals, processes, devices.

Whatever moment the process dies at, what was saved before stays valid and ``--resume`` continues there: a checkpoint
holds the CSVs' lengths, is replaced whole, and the one before it stays as previous.pth.
"""

import argparse
import contextlib
import ctypes
import fcntl
import inspect
import json
import math
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision

from densenet import ForeignFile, read_checkpoint

CSVS = ("train.csv", "val.csv", "test.csv")
CSV_HEADER = b"epoch,loss,error\n"
CHECKPOINTS = ("latest.pth", "previous.pth")
BEST = "best.pth"  # the epoch with the lowest validation error, where there is a validation set
FIGURES = ("loss.png", "error.png", "loss-error.png")
LOCK = ".lock"
FILES = {"run.json", LOCK, BEST, *CSVS, *CHECKPOINTS, *FIGURES}
ABOUT = {"flags": dict, "scheduleEpochs": int, "environment": dict, "mean": list, "std": list, "classes": list}
PROGRESS = {"epoch": int, "best": dict, "csvLengths": dict, "model": dict, "optimizer": dict}


PER_SESSION = ("resume", "overwrite", "evaluate")  # flags that are no part of a run
OF_THE_COMMAND = ("save", "no_plot", *PER_SESSION)  # never taken from a saved run
MAY_CHANGE = ("device", "no_cuda", "data", *OF_THE_COMMAND)  # between a run's sessions; nEpochs can grow
EFFICIENT = {"yes": True, "no": False, "max": "max"}  # a flag's value -> DenseNet's
ParseArgs = Callable[[list[str]], tuple[argparse.Namespace, dict[str, Any]]]


class RunError(ValueError):
    """What was asked cannot be done with this run directory; the message is one line for the user."""


class Run:
    """A run directory: ``check`` and ``lock``, ``read``, ``begin``, then ``add`` and ``save``."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.csvs: dict[str, BinaryIO] = {}
        self.holds_run = False
        self.lock_handle: int | None = None
        self.loaded = CHECKPOINTS[0]  # what load took
        self.savedEpoch = 0  # of latest.pth

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        for csv in self.csvs.values():
            csv.close()
        if self.lock_handle is not None:
            os.close(self.lock_handle)  # which also unlocks

    # --- before anything is written ---------------------------------------------------------------------------

    def check(self, resume: bool, overwrite: bool) -> bool:
        """-> whether the directory holds a run.

        Raises:
            RunError: if what it holds does not fit what the user asked for, or nothing can be written there.
        """
        if not self.path.is_dir():
            if os.path.lexists(self.path):
                raise RunError(f"--save {self.path} is not a directory")
            parent = next(p for p in self.path.absolute().parents if p.exists())
            if not parent.is_dir():
                raise RunError(f"--save {self.path}: {parent} is not a directory")
            check_permission(self.path, parent)
            return False
        check_permission(self.path, self.path)
        found = {p.name: p for p in self.path.iterdir() if not is_temporary(p.name)}
        foreign = sorted(name for name, p in found.items() if not p.is_file() or name not in FILES
                         or (name in CSVS and not is_log(p)))
        self.holds_run = bool(found.keys() & {"run.json", *CSVS} - set(foreign))
        if not self.holds_run and (others := sorted(found.keys() - {LOCK})):
            raise RunError(f"--save {self.path} is no run but holds other files ({others[0]}); name a new directory")
        if in_the_way := [name for name in foreign if overwrite or name in FILES]:
            raise RunError(f"--save {self.path} holds {in_the_way[0]}, which is not a run's; move it, or name a new "
                           "directory")
        if self.holds_run and not resume and not overwrite:
            raise RunError(f"--save {self.path} holds a run; --resume continues it, --overwrite replaces it")
        return self.holds_run

    def lock(self) -> None:
        """Makes the directory if need be and keeps other processes out until the end; again is no harm.

        Raises:
            RunError: if another process has it, or has begun a run there since ``check``.
        """
        if self.lock_handle is not None:
            return
        made = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        if made:
            sync_directory(self.path.parent)
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
        if not self.holds_run:
            self.check(resume=False, overwrite=False)

    def read(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """-> what run.json tells of the run (or the checkpoint, where run.json is lost), and the newest sound
        checkpoint; None for what there is not.

        Raises:
            RunError: if there are checkpoints but none can be used, or some of a CSV's rows are lost.
        """
        checkpoint, about = self.load(), self.read_json()
        sizes = {name: p.stat().st_size if (p := self.path / name).exists() else 0 for name in CSVS}
        if checkpoint is None:
            for name in CSVS[1:]:
                if sizes[name] and (self.path / name).read_bytes().count(b"\n") > 2:  # header, epoch 1
                    raise RunError(f"--save {self.path} has no checkpoint left, but rows of some epochs in {name}; put "
                                   "latest.pth back, or start again with --overwrite or elsewhere")
            return about, None
        for name, length in checkpoint["csvLengths"].items():
            if sizes.get(name, 0) < length:
                raise RunError(f"{self.path / name} has {sizes.get(name, 0)} bytes, but the checkpoint was saved with "
                               f"{length}: rows are lost; put the file back, or start again with --overwrite")
        if checkpoint.get("valImages") and checkpoint["best"]["epoch"] != checkpoint["epoch"]:
            self.read_best(checkpoint["best"]["epoch"])  # not only when it is needed, at the end
        return about or checkpoint, checkpoint

    def load(self) -> dict[str, Any] | None:
        """The newest sound checkpoint; None if the run has none yet.

        Raises:
            RunError: if there are some, but none can be used.
        """
        problem = None
        for name in CHECKPOINTS:
            path = self.path / name
            try:
                checkpoint = read_checkpoint(path)
            except FileNotFoundError:
                problem = problem or f"{path} is missing"
                continue
            except ValueError as error:
                if isinstance(error, ForeignFile):  # it must not be replaced
                    raise
                problem = f"{path} is damaged"
                continue
            if not has(checkpoint, ABOUT | PROGRESS):
                raise RunError(f"{path} is not a checkpoint of a run: parts of it are missing")
            if problem:
                warn(f"{problem}; continuing from {name}, epoch {checkpoint['epoch']}")
            self.loaded, self.savedEpoch = name, checkpoint["epoch"]
            return checkpoint
        if any(os.path.lexists(self.path / name) for name in CHECKPOINTS):
            raise RunError(f"{problem}; none of the run's checkpoints can be used: start again with --overwrite")
        return None

    def read_json(self) -> dict[str, Any] | None:
        try:
            content = json.loads((self.path / "run.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return content if has(content, ABOUT) else None

    # --- writing ----------------------------------------------------------------------------------------------

    def begin(self, about: dict[str, Any], checkpoint: dict[str, Any] | None, overwrite: bool) -> None:
        """Opens the run for training: the CSVs as they were at the checkpoint (new ones get their header), run.json.

        Raises:
            OSError: naming the file that cannot be written.
        """
        for name in os.listdir(self.path):
            if is_temporary(name):  # left by a process that was killed while it wrote
                (self.path / name).unlink(missing_ok=True)
        if overwrite:  # run.json first: until the checkpoints go, --resume still has a run
            for name in ("run.json", *CHECKPOINTS, BEST, *FIGURES, *CSVS):
                (self.path / name).unlink(missing_ok=True)
        if self.read_json() != about:
            with replacing(self.path / "run.json") as file:
                file.write((json.dumps(about, indent=2) + "\n").encode())
        if checkpoint and about["valImages"] and checkpoint["best"]["epoch"] == checkpoint["epoch"]:
            self.keep_as_best(self.loaded)  # it may have been killed between the two
        lengths = dict(checkpoint["csvLengths"]) if checkpoint else {}
        if checkpoint and about["valImages"] and checkpoint["epoch"] < about["flags"]["nEpochs"]:
            lengths["test.csv"] = 0  # of a shorter run's end: there will be another
        for name in CSVS if about["valImages"] else ("train.csv", "test.csv"):
            with naming(self.path / name):
                handle = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                csv = self.csvs[name] = os.fdopen(handle, "r+b", buffering=0)
                csv.truncate(lengths.get(name, 0))
                csv.seek(0, os.SEEK_END)
            if csv.tell() == 0:
                self.write(name, CSV_HEADER)

    def add(self, name: str, rows: list[tuple[float, float, float]]) -> None:
        """Appends rows of epoch, loss (mean over images, in nats) and error (in percent)."""
        self.write(name, "".join(f"{epoch:.9g},{loss:.7g},{error:.5g}\n" for epoch, loss, error in rows).encode())

    def write(self, name: str, content: bytes) -> None:
        with naming(self.path / name):
            while content:  # a full disk takes a part, then raises
                content = content[self.csvs[name].write(content):]

    def save(self, checkpoint: dict[str, Any], best: bool = False) -> None:
        """The CSVs, then latest.pth with their lengths; the one before stays as previous.pth, the best as best.pth."""
        for name, csv in self.csvs.items():
            with naming(self.path / name):
                os.fsync(csv.fileno())
        lengths = {name: csv.tell() for name, csv in self.csvs.items()}
        latest, previous = (self.path / name for name in CHECKPOINTS)
        with replacing(latest) as file:
            torch.save(checkpoint | {"csvLengths": lengths}, file)
            if self.loaded == latest.name and latest.exists() and self.savedEpoch != checkpoint["epoch"]:
                keep_as(latest, previous)  # unless it is damaged, or this one with the test result added
        self.loaded, self.savedEpoch = latest.name, checkpoint["epoch"]
        if best:
            self.keep_as_best(latest.name)

    def keep_as_best(self, name: str) -> None:
        with naming(self.path / BEST):
            keep_as(self.path / name, self.path / BEST)

    def read_best(self, epoch: int) -> dict[str, Any]:
        """Raises RunError if best.pth is not that of this epoch."""
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


class Bystander(Run):
    """In all processes but the first, which writes for all."""

    def lock(self) -> None:
        pass

    def begin(self, about: dict[str, Any], checkpoint: dict[str, Any] | None, overwrite: bool) -> None:
        pass

    def add(self, name: str, rows: list[tuple[float, float, float]]) -> None:
        pass

    def save(self, checkpoint: dict[str, Any], best: bool = False) -> None:
        pass


def check_permission(save: Path, directory: Path) -> None:
    if not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        raise RunError(f"--save {save}: no permission to write in {directory}")


def has(content: Any, kinds: dict[str, type]) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())


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


# --- flags ------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def number(kind: type, minimum: float, maximum: float, valid: str = ""):
    """A flag's type: numbers of this kind between these, both included."""
    valid = valid or f"{'a whole number ' if kind is int else ''}from {minimum} to {maximum}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which no comparison takes
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is {valid}")
        return value
    return parse


def path(text: str) -> str:
    if not text or not text.isprintable():  # neither could be shown in one line
        raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is a path of printable characters")
    return text


def words(name: str, value: Any) -> list[str]:
    """As on a command line: --depth=40, --no-cuda, --classes cat dog, or nothing for a flag that is not set."""
    if value is None or value is False:
        return []
    name = f"--{name.replace('_', '-')}"
    return [name, *value] if isinstance(value, list) else [name if value is True else f"{name}={value}"]


def flag(name: str, value: Any) -> str:
    return " ".join(words(name, value))


def saved_args(about: dict[str, Any], save: str, parse_args: ParseArgs) -> argparse.Namespace:
    """The flags of a saved run, tested like those of a command line; those it does not know have their default."""
    try:
        return parse_args([word for name, value in about["flags"].items() for word in words(name, value)])[0]
    except ValueError as error:
        raise RunError(f"{save} holds a run with flags that this train.py does not take ({error})") from None


def resumed_args(args: argparse.Namespace, given: dict[str, Any], saved: argparse.Namespace) -> argparse.Namespace:
    """The saved run's flags, and of the given ones those that may change.

    Raises:
        RunError: if a given flag contradicts the run.
    """
    for name, value in given.items():
        of_run = getattr(saved, name)
        if name == "nEpochs" and value < of_run:
            raise RunError(f"--nEpochs {value} is less than the run in {args.save} has; valid are {of_run} or more")
        if name not in ("nEpochs", *MAY_CHANGE) and value != of_run:
            raise RunError(f"{flag(name, value)} contradicts the run in {args.save}, which has "
                           f"{flag(name, of_run) or 'not set it'}; leave it out to continue that run, or name another "
                           "--save")
    if "data" not in given and not os.path.exists(saved.data):
        raise RunError(f"the run's --data {saved.data} is not to be found from here; start in the directory in which "
                       "the run was started, or give --data")
    merged = vars(saved) | given | {name: getattr(args, name) for name in OF_THE_COMMAND}
    if "device" in given or "no_cuda" in given:  # one replaces the other
        merged |= {"device": args.device, "no_cuda": args.no_cuda}
    return argparse.Namespace(**merged)


def find_saved(run: Run, args: argparse.Namespace, given: dict[str, Any], parse_args: ParseArgs):
    """-> the flags to train with; what run.json tells of the run to resume and its checkpoint, or None for each

    Raises:
        RunError: if the directory does not fit what the user asked for.
    """
    if not run.check(args.resume, args.overwrite):
        return args, None, None
    run.lock()
    about, checkpoint = run.read() if args.resume else (None, None)
    if about is None:
        return args, None, None
    saved = saved_args(about, args.save, parse_args)  # newer than the checkpoint's, if nEpochs has grown since that
    if checkpoint:
        for name, value in vars(saved_args(checkpoint, args.save, parse_args)).items():
            if name not in ("nEpochs", *MAY_CHANGE) and value != getattr(saved, name):
                raise RunError(f"the checkpoint in {args.save} is another run's: {name} is {value} there, and "
                               f"{getattr(saved, name)} in run.json")
    return resumed_args(args, given, saved), about, checkpoint


# --- files replaced whole ---------------------------------------------------------------------------------------

def temporary_for(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")  # one name suffices: the lock lets one process write


def is_temporary(name: str) -> bool:
    """Also plot.py's, which have a random part."""
    return name.endswith(".tmp") and name.startswith(tuple(f".{file}." for file in FILES))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes ``path``'s place, on disk, when the block ends well, and leaves nothing when it does not.

    Raises:
        OSError: naming ``path``.
    """
    temporary = temporary_for(path)
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)


def keep_as(path: Path, other: Path) -> None:
    """``path``'s content as ``other`` too, which is replaced whole; ``path`` never vanishes."""
    temporary = temporary_for(other)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from inside names the file: those of writing and fsync do not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


# --- around the training ----------------------------------------------------------------------------------------

def environment(device: torch.device, precision: str, processes: int) -> dict[str, Any]:
    """What a run's last bits depend on, besides its flags."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return {"device": name, "threads": torch.get_num_threads(),
            "cpuCapability": torch.backends.cpu.get_cpu_capability(),
            "precision": precision, "processes": processes,
            "python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__), "numpy": np.__version__,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None}


def restore_environment(saved: dict[str, Any], now: dict[str, Any], told: bool) -> dict[str, Any]:
    """Sets the run's thread count; each other difference is ``told``. -> the environment as it is then"""
    threads = saved.get("threads")
    if isinstance(threads, int) and threads > 0 and saved.get("processes") == now["processes"]:
        torch.set_num_threads(threads)
    now = now | {"threads": torch.get_num_threads()}
    for name, value in now.items():
        if told and value != saved.get(name):
            warn(f"{name} is {value}, the run had {saved.get(name)}: it continues, but not to the same last bits")
    return now


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came."""


class Signals:
    """SIGTERM and Ctrl-C raise Stopped: at once, or when ``writing`` is set, at the next ``check``. A second one kills.
    """

    def __init__(self):
        self.received: int | None = None
        self.writing = False

    def __enter__(self) -> "Signals":
        caught = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]  # nohup
        self.before = {s: signal.signal(s, self.note) for s in caught}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def note(self, number: int, _frame) -> None:
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)
        self.received = number
        if not self.writing:
            raise Stopped

    def check(self) -> None:
        if self.received is not None:
            raise Stopped


# --- several processes ------------------------------------------------------------------------------------------

class Elsewhere(Exception):
    """Another process failed, and tells of it."""


class Processes:
    """The processes that torchrun has started for one training; without it one, and no process group.

    All processes call each method at the same point, or they would wait for each other for ever.
    """

    def __init__(self, signals: Signals):
        """Raises ValueError for an environment that torchrun does not make."""
        self.signals = signals
        variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        if "MASTER_ADDR" in os.environ:  # or it is not torchrun's, and not for us
            variables = {name: os.environ.get(name, "") for name in variables}
        if bad := [f"{name}={value}" for name, value in variables.items() if not value.isdecimal()]:
            raise ValueError(f"the environment has {bad[0]}; several processes are started by torchrun")
        self.rank, self.size, self.localRank, self.localSize = map(int, variables.values())
        self.first = self.rank == 0
        self.connected = self.started = False
        self.stop: tuple[dist.Work, torch.Tensor] | None = None

    def start(self, device: torch.device) -> None:
        if self.size > 1:
            store = next(dist.rendezvous("env://"))[0]
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                    store=dist.PrefixStore(self.agree_on_prefix(store), store), rank=self.rank,
                                    world_size=self.size, device_id=device if device.type == "cuda" else None)
            self.connected = self.started = True

    def agree_on_prefix(self, store: dist.Store) -> str:
        """A new name for this start's keys: after a restart torchrun's store still has those of the processes before,
        and who reads them waits for a dead one (pytorch #135712). What others left cannot answer one's own number."""
        own = secrets.token_hex(8)
        store.set(f"hello {self.rank}", own)
        if not self.first:
            prefix = store.get(f"answer {own}").decode()  # waits for it
            store.set(f"{prefix} {self.rank}", "seen")
            return prefix
        for rank in range(1, self.size):
            while not store.check([f"{own} {rank}"]):
                store.set(f"answer {store.get(f'hello {rank}').decode()}", own)
                time.sleep(0.01)
        return own

    def end(self) -> None:
        """Once, whatever has happened; without it a process that fails may end by a signal."""
        if self.connected:
            with contextlib.suppress(RuntimeError):  # the others may be gone
                if self.stop:
                    self.stop[0].wait(timedelta(seconds=5))
                dist.destroy_process_group()
            self.connected = False

    def say(self, message: str) -> None:
        if self.first:
            with naming(Path("standard output")):
                print(message, flush=True)

    def together(self, function: Callable[[], Any]) -> Any:
        """What the function gives in each process. If one fails, all do: the first with the message, others Elsewhere.
        """
        if self.size == 1:
            return function()
        result = message = None
        try:
            result = function()
        except (ValueError, OSError) as error:
            message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, message)
        failed = next((rank for rank in range(self.size) if messages[rank] is not None), None)
        if failed is not None:
            raise RunError(f"{f'process {failed}: ' * (failed > 0)}{messages[failed]}") if self.first else Elsewhere
        return result

    def from_first(self, function: Callable[[], Any]) -> Any:
        """What the function gives in the first process, which alone calls it, in all of them."""
        result = [self.together(function if self.first else lambda: None)]
        if self.size > 1:
            dist.broadcast_object_list(result, device=torch.device("cpu"))
        return result[0]

    def one_by_one(self, function: Callable[[], Any]) -> Any:
        """As ``together``, but one process of each machine comes first: the others find what it has downloaded."""
        early = self.together(function if self.localRank == 0 else lambda: None)
        return self.together((lambda: early) if self.localRank == 0 else function)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wrap(self, net: nn.Module) -> nn.Module:
        """Averages the gradients while the backward pass goes on. Batch statistics stay each process's own."""
        if self.size == 1:
            return net
        ddp = nn.parallel.DistributedDataParallel
        names = inspect.signature(ddp).parameters  # torch 2.15 renamed it
        no_sync = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 weights: the bytes' order is the same
        return ddp(net, gradient_as_bucket_view=True, **no_sync)

    def share_buffers(self, net: nn.Module) -> None:
        """The first process's running statistics in all: for an evaluation, and as those of the checkpoint."""
        if self.size > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)

    def check(self) -> None:
        """Raises Stopped if a signal came to any process; in all of them after the same step.

        Each tells the others without waiting, and reads what they told a step ago.
        """
        if self.size == 1:
            return self.signals.check()
        if self.stop:
            work, number = self.stop
            work.wait()
            if number.item():
                self.signals.received = int(number)
                raise Stopped
        number = torch.tensor(self.signals.received or 0)
        self.stop = dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True), number


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the statistics of all processes' images, on any device (torch's refuses CPU tensors)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        n = x.numel() // x.shape[1]
        var, mean = (v.double() for v in torch.var_mean(x.to(self.weight.dtype), (0, 2, 3), correction=0))
        sums = torch.cat((mean * n, (var + mean.square()) * n, mean.new_tensor([n])))  # double: squares lose nothing
        *sums, m = AllReduce.apply(sums).split([self.num_features, self.num_features, 1])
        mean, var = sums[0] / m, sums[1] / m - (sums[0] / m).square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * m / (m - 1)).to(self.running_var.dtype), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        scale, shift = ((v.to(self.weight.dtype)[:, None, None]) for v in (scale, self.bias - mean * scale))
        return torch.addcmul(shift, x, scale).to(x.dtype)

    @staticmethod
    def replace_all(net: nn.Module) -> None:
        """Before an optimizer takes the parameters."""
        for module in [*net.modules()]:
            for name, norm in module.named_children():
                if type(norm) is nn.BatchNorm2d:
                    new = SyncBatchNorm2d(norm.num_features, norm.eps, norm.momentum).to(norm.weight)
                    new.load_state_dict(norm.state_dict())
                    setattr(module, name, new)


class AllReduce(torch.autograd.Function):
    """The sum over all processes; as every one of them reads it, so is its gradient."""

    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return AllReduce.forward(ctx, grad.contiguous())


# --- devices, the CUDA graph, errors ----------------------------------------------------------------------------

def pick_device(args: argparse.Namespace, processes: Processes) -> torch.device:
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.benchmark = not args.deterministic  # shapes are few: worth trying its algorithms out
    tf32 = args.precision == "tf32"  # cuDNN's own default is True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    device = choose_device(args, processes)
    if args.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"--precision tf32 is a GPU's; valid on {device} are fp32, bf16")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or libraries would open a context on GPU 0
    else:
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next one, for up to a fifth more memory. Given back, each page would be
    cleared before it comes again: a tenth of the time of BC 100-12 on a CPU."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: where its own adjusting ends, which the next line stops
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def choose_device(args: argparse.Namespace, processes: Processes) -> torch.device:
    gpus = torch.cuda.device_count()  # without touching any
    if processes.size > 1 and (args.device or "cuda") == "cuda" and gpus and not args.no_cuda:
        if gpus < processes.localSize:
            raise ValueError(f"--nproc-per-node {processes.localSize} is more than the {gpus} GPUs here; valid is at "
                             "most that, or any number with --no-cuda")
        return torch.device("cuda", processes.localRank)
    if args.device is None:
        return torch.device("cuda:0" if gpus and not args.no_cuda else "cpu")
    valid = ["cpu"] + ["cuda"] * bool(gpus) + [f"cuda:{i}" for i in range(gpus)]
    if torch.backends.mps.is_available():
        valid.append("mps")
    if args.device not in valid:
        raise ValueError(f"--device {args.device!r} does not exist here; valid are {', '.join(valid)}")
    if processes.size > 1 and args.device != "cpu":
        raise ValueError(f"--device {args.device} for {processes.size} processes; valid are cpu, cuda")
    return torch.device("cuda:0" if args.device == "cuda" else args.device)


class GraphedStep:
    """A training step with its thousands of kernels as one CUDA graph, launched at the price of one.

    A graph has fixed shapes and a fixed rate: a batch of another size runs eagerly, another rate is captured anew.
    """

    def __init__(self, eager: Callable[..., torch.Tensor], net: nn.Module, optimizer: torch.optim.Optimizer,
                 batchSz: int):
        """``eager`` takes images, labels and their number, and trains ``net`` on them by ``optimizer``."""
        self.eager, self.net, self.optimizer, self.batchSz = eager, net, optimizer, batchSz
        self.rate: float | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.possible = True

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, share: float) -> torch.Tensor:
        whole = len(images) == self.batchSz
        if whole and self.possible and self.rate != self.optimizer.param_groups[0]["lr"]:
            self.prepare(images, labels)
        if not whole or not self.possible:
            return self.eager(images, labels, share)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.result.clone()

    def prepare(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Captures for the present rate; where that cannot be, says so and changes nothing."""
        self.images, self.labels, self.graph = images.clone(), labels.clone(), None
        self.rate = self.optimizer.param_groups[0]["lr"]
        problem = ""
        try:
            self.warm_up()
            self.graph = self.capture()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            while isinstance(error.__context__, RuntimeError):  # ending a failed capture fails again
                error = error.__context__
            problem = (str(error).splitlines() or [type(error).__name__])[0]
        if problem:  # behind the except clause, which would keep the failed step's tensors alive
            self.possible = False
            warn(f"no CUDA graph, each step is launched operation by operation: {problem}")

    def step(self) -> None:
        self.result = self.eager(self.images, self.labels, self.batchSz)

    def state(self) -> list[torch.Tensor]:
        """All that a step changes."""
        moments = [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return [*self.net.parameters(), *self.net.buffers(), *moments]

    def warm_up(self) -> None:
        """Three steps, as capturing needs them: libraries choose their kernels, the optimizer makes its state. Then all
        is as it was; state that was not there before is zero, which SGD, Adam and RMSprop begin with."""
        before = {tensor: tensor.detach().clone() for tensor in self.state()}
        try:
            with torch.random.fork_rng([self.images.device] if self.images.is_cuda else []):
                for _ in range(3):
                    self.on_side_stream()
        finally:
            with torch.no_grad():
                for tensor in self.state():
                    tensor.copy_(before[tensor]) if tensor in before else tensor.zero_()

    def on_side_stream(self) -> None:
        self.stream = self.stream or torch.cuda.Stream()  # one: memory is cached by stream
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                self.step()
        finally:  # what follows must not overtake it
            torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self) -> torch.cuda.CUDAGraph:
        """A capture runs nothing: it only records."""
        self.optimizer.zero_grad(set_to_none=True)  # gradients in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.step()
        return graph


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def explain(error: Exception, processes: Processes | None) -> str:
    """For what a user can cause or mend; anything else is a fault of the program and is raised again."""
    if isinstance(error, (ValueError, FloatingPointError, MemoryError)):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, torch.AcceleratorError):
        return str(error).splitlines()[0]
    if processes and processes.size > 1 and isinstance(error, RuntimeError) and is_of_a_lost_process(error):
        return "another process has ended"
    raise error


def is_of_a_lost_process(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def complain(reason: str, status: int, processes: Processes | None, everywhere: bool = False) -> int:
    """In one line; of what happens ``everywhere``, as all before the start and a signal, only the first process's."""
    if processes is None or processes.first:
        tell(" ".join(reason.split()))
    elif processes.started and status <= 2 and not everywhere:
        tell(f"process {processes.rank}: {' '.join(reason.split())}")
    return status


# --- figures ----------------------------------------------------------------------------------------------------

class Plotter:
    """plot.py in the background, one at a time; if it fails, that is said once and it is not tried again."""

    def __init__(self, save: str, enabled: bool):
        self.command = [sys.executable, str(Path(__file__).resolve().with_name("plot.py")), "--", save]
        self.process: subprocess.Popen | None = None
        self.enabled = enabled

    def start(self) -> None:
        """Starts it, unless it is still at work."""
        if self.process is not None and self.process.poll() is not None:
            self.finish()
        if self.enabled and self.process is None:
            try:
                self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                                stderr=subprocess.PIPE, start_new_session=True)  # Ctrl-C is not for it
            except OSError as error:
                self.give_up(str(error))

    def finish(self) -> None:
        """Waits for its end."""
        if self.process is None:
            return
        _, stderr = self.process.communicate()
        if self.process.returncode:
            self.give_up((stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1])
        self.process = None

    def give_up(self, reason: str) -> None:
        self.enabled = False
        warn(f"no figures, but the training is not affected: {reason}")


def warn(message: str) -> None:
    tell(f"warning: {message}")


def tell(message: str) -> None:
    with contextlib.suppress(OSError):  # where not even this can be written, it must not stop a training
        sys.stderr.write(f"train.py: {message}\n")  # in one piece: several processes may share it
        sys.stderr.flush()
