"""What the tests of training share: a small data set, a small network, and how two runs are compared."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import train

SAMPLE = Path(__file__).resolve().parent / "cifar10-sample"
RECORD = 3073  # bytes: label and 32x32x3 pixels
EPOCHS = 4  # of the fixtures' runs
SMALL = ["--depth", "10", "--growthRate", "4", "--batchSz", "32", "--no-plot", "--no-cuda"]


def cut_sample(folder: Path, train: int = 80, test: int = 40) -> str:
    """The first images of the built-in sample as a data set of its own; 80 are three steps of 32 or less."""
    folder.mkdir(parents=True)
    for name, n in (("data_batch_1.bin", train), ("test_batch.bin", test)):
        (folder / name).write_bytes((SAMPLE / name).read_bytes()[:n * RECORD])
    return str(folder)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def differences(a: Path, b: Path) -> list[str]:
    """What is not the same in two run directories: any byte of a CSV, any value of a checkpoint and run.json."""
    def load(path):
        return torch.load(path, weights_only=True) if path.exists() else None

    logs = {p.name for run in (a, b) for p in run.glob("*.csv")}
    different = [name for name in sorted(logs) if (a / name).read_bytes() != (b / name).read_bytes()]
    for name, read in (("latest.pth", load), ("best.pth", load), ("run.json", lambda p: json.loads(p.read_text()))):
        values = [flat(read(run / name)) for run in (a, b)]
        different += [f"{name}{key}" for key in sorted(values[0].keys() | values[1].keys())
                      if key != "/flags/save" and values[0].get(key) != values[1].get(key)]
    return different


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Nested dicts and lists -> one dict; of a tensor its type, shape and bytes."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, child in items for k, v in flat(child, f"{key}/{name}").items()}
    if isinstance(value, torch.Tensor):
        value = (str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes())
    return {key: value}


def without_lock(directory: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(directory).items() if name != ".lock"}


def one_line(text: str, start: str = "train.py: error: ") -> str:
    """The text, which has to be a single line that starts like this."""
    assert text.startswith(start) and text.count("\n") == 1, text
    return text


def refused(capfd, run: Path, *flags: str, status: int = 2) -> str:
    """The one line with which train.py refuses these flags, having changed nothing in the run directory."""
    before = without_lock(run)
    capfd.readouterr()
    assert train.main(["--save", str(run), "--no-plot", *flags]) == status
    assert without_lock(run) == before
    out, err = capfd.readouterr()
    assert out == ""
    return one_line(err)


def resume(run: Path, *flags: str) -> int:
    return train.main(["--resume", "--save", str(run), "--no-plot", *flags])


def edit(checkpoint: Path, **changes: Any) -> None:
    """Changes entries of a checkpoint, or removes those that are None."""
    content = torch.load(checkpoint, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if name not in changes or value is not None}, checkpoint)


def stopped_at(function, call, argv, number=signal.SIGTERM, module=train):
    """-> the exit status of train.main, to which a signal comes as this call of a function begins"""
    original, calls = getattr(module, function), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, counted)
        return train.main(argv)
