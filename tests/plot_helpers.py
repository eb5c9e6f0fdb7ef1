"""Helpers shared by the tests of plot.py: write a run's CSVs, run main() on bad input, list a directory."""

from functools import partial
from pathlib import Path

import common
import numpy as np

import plot

SCRIPT = Path(plot.__file__).resolve()
HEADER = "epoch,loss,error\n"
FIGURES = ["error.png", "loss-error.png", "loss.png"]
ESCAPES = "\x1b[31m\x07\x9b2J\u202e"  # set the colour, ring the bell, clear the screen, write from right to left
ESCAPED = r"\x1b[31m\x07\x9b2J\u202e"

refused = partial(common.refused, plot.main)


def write_run(path, n_epochs=3, batches=20, header=HEADER, zeros=False, val=False):
    """Writes the CSVs of a run whose error halves every epoch. With ``zeros``, the last training error is 0."""
    path.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).uniform(0.8, 1.2, n_epochs * batches)
    epochs = np.arange(n_epochs * batches) / batches
    errors = 60 * 0.5**epochs * noise * (1 - zeros * (epochs >= n_epochs - 1))
    rows = [f"{epoch},{error / 50 + 0.01},{error}\n" for epoch, error in zip(epochs, errors, strict=True)]
    (path / "train.csv").write_text(header + "".join(rows))
    rows = [f"{epoch},{1.5 * 0.5**epoch},{70 * 0.5**epoch}\n" for epoch in range(1, n_epochs + 1)]
    for name in ["test.csv"] + ["val.csv"] * val:
        (path / name).write_text(header + "".join(rows))
    return path


def names(path):
    return sorted(entry.name for entry in path.iterdir())
