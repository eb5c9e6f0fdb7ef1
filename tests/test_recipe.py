"""The recipe as a whole: a small training in float64 must give the losses in tests/golden, on every machine.

This pins initialisation, order, crop, flip, normalisation, network, loss, optimizer, weight decay, rate, running
statistics and evaluation: a change of any of them fails here. Threads, memory formats and the block's path change the
losses by less than 1e-15, relatively. If a change is wanted, this makes the CSVs again, from the repository's root:

    PYTHONPATH=. python tests/test_recipe.py
"""

import csv
import tempfile
from pathlib import Path

import pytest
import torch
from common import cut_sample, slow

import train
from lib.distributed import World
from lib.plot_process import Plotter

GOLDEN = Path(__file__).resolve().parent / "golden"
FLAGS = ["--depth", "10", "--growthRate", "4", "--initChannels", "6", "--batchSz", "8", "--nEpochs", "4", "--no-cuda",
         "--no-graph"]  # a graph's Adam has a rate and step count in float32
OPTIMIZERS = {"sgd": "0.1", "adam": "0.001"}
HEADER = ["table", "epoch", "loss", "error"]


class Table:
    """In the place of a run directory: keeps the rows as they are, where train.csv has seven digits."""

    def __init__(self):
        self.rows = []

    def add(self, name, rows):
        self.rows += [(name.removesuffix(".csv"), *row) for row in rows]

    def save(self, *_, **__):
        pass


def curve(folder, opt, efficient="yes"):
    """Trains 4 epochs of 5 steps in float64 by train.py's own functions; the rate drops after 10 and after 15 steps.

    -> the rows of train.csv and test.csv, and the state at the end
    """
    args, _ = train.parse_args(["--data", cut_sample(folder / "images", 40, 20), *FLAGS, "--opt", opt,
                                "--lr", OPTIMIZERS[opt], "--efficient", efficient])
    torch.set_default_dtype(torch.float64)  # float32's normal distribution depends on the processor's vector units
    try:
        training = train.prepare(args, None, torch.device("cpu"), World())
    finally:
        torch.set_default_dtype(torch.float32)
    net = training.net
    net.register_forward_pre_hook(lambda _, images: images[0].double())

    def step(*batch):
        values = training.step(*batch)
        assert values.dtype == torch.float64 and net.dense1.last_path == training.state["path"]
        return values

    table = Table()
    state = train.fit(training._replace(step=step), table, Plotter("", enabled=False), World())
    return table.rows, state


def read(opt):
    with open(GOLDEN / f"{opt}.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == HEADER
    return [(table, *map(float, values)) for table, *values in lines]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("opt, efficient", [
    ("sgd", "no"), slow("sgd", "yes"), slow("sgd", "max"), slow("adam", "no"), ("adam", "yes"), slow("adam", "max")])
def test_losses_of_a_small_training_are_the_golden_ones(tmp_path, opt, efficient):
    """To make the CSVs in tests/golden again: PYTHONPATH=. python tests/test_recipe.py"""
    rows, state = curve(tmp_path, opt, efficient)
    expected = read(opt)
    assert state["path"] == {"no": "textbook", "yes": "efficient", "max": "max"}[efficient]
    assert [row[0] for row in rows] == [row[0] for row in expected]
    for row, want in zip(rows, expected, strict=True):
        assert row[1:] == pytest.approx(want[1:], rel=1e-8, abs=0), f"{row[0]}, epoch {row[1]}"


@pytest.mark.usefixtures("one_thread")
def test_the_best_epoch_is_the_first_with_the_lowest_test_error(tmp_path):
    rows, state = curve(tmp_path, "adam")
    errors = [error for table, _, _, error in rows if table == "test"]
    assert errors[0] > min(errors)
    assert state["best"] == {"error": min(errors), "epoch": errors.index(min(errors)) + 1}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in OPTIMIZERS:
        with tempfile.TemporaryDirectory() as scratch, open(GOLDEN / f"{name}.csv", "w", newline="") as output:
            writer = csv.writer(output, lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows((table, *(f"{value:.17g}" for value in values))
                             for table, *values in curve(Path(scratch), name)[0])
