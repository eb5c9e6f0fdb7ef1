"""What the tests share: a small data set and network, runs and their comparison, output of scripts."""

import contextlib
import csv
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = Path(__file__).resolve().parent / "cifar10-sample"
RECORD = 3073  # bytes: label and 32x32x3 pixels
EPOCHS = 3  # of the fixtures' runs, with three steps each
SMALL = ["--depth", "10", "--growthRate", "4", "--batchSz", "32", "--no-plot", "--no-cuda"]


def slow(*values: Any) -> Any:
    """A case of a parametrised test that "not slow" leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def cut_sample(folder: Path, train: int = 80, test: int = 40) -> str:
    """Makes a data set of the sample's first images -> its path. 80 training images are steps of 32, 32 and 16."""
    folder.mkdir(parents=True)
    for name, n in (("data_batch_1.bin", train), ("test_batch.bin", test)):
        (folder / name).write_bytes((SAMPLE / name).read_bytes()[:n * RECORD])
    return str(folder)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """-> the norm of a - b, relative to that of b"""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def efficient_blocks(output: torch.Tensor) -> int:
    """-> how many dense blocks of the graph behind ``output`` the efficient block computed"""
    found, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [source for source, _ in node.next_functions]
    return sum(node.name() == "EfficientBlockBackward" for node in found)


# --- runs -------------------------------------------------------------------------------------------------------

def contents(directory: Path) -> dict[str, bytes]:
    """-> relative path: content, of all files in it but a run's lock"""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*"))
            if p.is_file() and p.name != ".lock"}


def checkpoint(run: Path, name: str = "latest.pth") -> dict[str, Any]:
    return torch.load(run / name, weights_only=True)


def edit_checkpoint(path: Path, /, **changes: Any) -> None:
    """Changes entries of a checkpoint; None removes the entry."""
    content = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if name not in changes or value is not None}, path)


def rows(path: Path) -> list[tuple[float, ...]]:
    """The rows of train.csv, val.csv or test.csv, without the header."""
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["epoch", "loss", "error"]
    return [tuple(map(float, line)) for line in lines]


def differences(a: Path, b: Path) -> list[str]:
    """-> the CSVs, and the entries of checkpoints, that differ between two runs; not --save itself"""
    csvs = {p.name for run in (a, b) for p in run.glob("*.csv")}
    different = [name for name in sorted(csvs) if (a / name).read_bytes() != (b / name).read_bytes()]
    for name in ("latest.pth", "best.pth"):
        in_a, in_b = (flat(checkpoint(run, name) if (run / name).exists() else None) for run in (a, b))
        different += [f"{name}{key}" for key in sorted(in_a.keys() | in_b.keys())
                      if key != "/flags/save" and in_a.get(key) != in_b.get(key)]
    return different


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested dicts and lists -> one dict, "/name/0/name": value; a tensor becomes its type, shape and bytes."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, child in items for k, v in flat(child, f"{key}/{name}").items()}
    if isinstance(value, torch.Tensor):
        value = (str(value.dtype), tuple(value.shape), value.cpu().contiguous().numpy().tobytes())
    return {key: value}


def resume(run: Path, *flags: str) -> int:
    return train.main(["--resume", "--save", str(run), "--no-plot", *flags])


class Stopped(BaseException):
    """Ends a training as a signal does: nothing handles it."""


def stopped_at(function: str, call: int, argv: list[str], module: Any = train) -> int:
    """Runs train.main(argv) until the call number ``call`` (from 1) of module.function. -> 143, as of SIGTERM, or the
    exit status if there are not that many calls"""
    calls = []

    def with_stop(original):
        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise Stopped
            return original(*args, **kwargs)
        return counted

    with pytest.MonkeyPatch.context() as patch:
        if function == "train_step":  # replaying a graph does not call it: count the calls of make_step's result
            make_step = train.make_step
            patch.setattr(train, "make_step", lambda *args: with_stop(make_step(*args)))
        else:
            patch.setattr(module, function, with_stop(getattr(module, function)))
        try:
            return train.main(argv)
        except Stopped:
            return 143


@contextlib.contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """A context in which no file can grow beyond ``size`` bytes: a write raises OSError, "File too large"."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- what a script says -----------------------------------------------------------------------------------------

def run_script(script: str, *args: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of the project, by its absolute path, in another process."""
    return subprocess.run([sys.executable, ROOT / script, *map(str, args)], capture_output=True, text=True, timeout=300,
                          cwd=cwd, env=os.environ | environment)


def one_line(text: str, start: str = "train.py: error: ") -> str:
    """-> the text, which must be a single line that begins with ``start``"""
    assert text.startswith(start) and text.count("\n") == 1 and text.endswith("\n"), text
    return text


def refused(main: Callable, capture, *args: object) -> str:
    """-> the line on stderr with which a script's main() refuses these arguments; ``capture``: capsys or capfd"""
    assert main([str(arg) for arg in args]) == 2
    out, err = capture.readouterr()
    assert out == ""
    return one_line(err, f"{main.__module__}.py: error: ")


def run_refused(capture, run: Path, *flags: str) -> str:
    """-> the line with which train.py refuses these flags; nothing in the run's directory may change"""
    before = contents(run)
    capture.readouterr()
    line = refused(train.main, capture, "--save", run, "--no-plot", *flags)
    assert contents(run) == before
    return line
