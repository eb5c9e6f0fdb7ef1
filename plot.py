#!/usr/bin/env python3
"""Draw the learning curves of one run, or compare those of several: ./plot.py RUN [RUN ...]

Reads each run's train.csv, test.csv and, if there is one, val.csv. They may still be growing.
Writes loss.png, error.png and loss-error.png into the run's directory, or where --out says.

This file imports nothing else of the project, so it can be copied anywhere.
"""

import argparse
import io
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pandas as pd

if __name__ == "__main__":
    os.environ.pop("MPLBACKEND", None)  # if it names a backend that is not installed, importing matplotlib fails

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no backend, no display, half the start-up time
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

COLUMNS = ["epoch", "loss", "error"]
HEADER = b"epoch,loss,error"
START_OF_ROW = re.compile(rb"[-+.,0-9einfaN]*")  # numbers, nan and inf
MAX_EPOCH = 1e9  # matplotlib fails at axis limits near the largest float64

FIGURES = {"loss.png": ["loss"], "error.png": ["error"], "loss-error.png": ["loss", "error"]}
AXIS_NAME = {"loss": "Cross-entropy loss", "error": "Error"}
NUMBER = {"loss": "{:#.3g}", "error": "{:.2f}%"}
TICK = {"loss": "{:g}", "error": "{:g}%"}

FLOOR = {"loss": 1e-4, "error": 0.01}  # lower values, which include 0, are on a linear part of the axis
MAX_POINTS = 3000  # per line; more cannot be seen at 900 pixels and take seconds to draw

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's colour-blind-safe set
TRAIN = {"linewidth": 0.9, "alpha": 0.6, "zorder": 2}
VAL = {"linewidth": 1.1, "linestyle": "--", "zorder": 3}
TEST = {"linewidth": 1.6, "zorder": 4}
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "0.9",
    "font.size": 10, "legend.fontsize": 8.5, "legend.frameon": False,
    "text.parse_math": False,  # labels may contain dollar signs
}


class Run(NamedTuple):
    """The logs of one run, each with the columns epoch, loss (cross-entropy) and error (percent)."""

    label: str  # the run's name in a comparison; empty for a single run
    train: pd.DataFrame  # as rolling_epoch_mean returns it
    val: pd.DataFrame  # empty without a validation set
    test: pd.DataFrame


class OneLineParser(argparse.ArgumentParser):
    """Raises ValueError for a wrong command line. argparse itself would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="plot.py", description="Draw loss and error of one run, or compare several.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path,
                        help="directory with train.csv and test.csv, as train.py writes them")
    parser.add_argument("--out", metavar="PATH", type=Path,
                        help="directory for the figures, created if it does not exist (default: the run's own "
                             "directory; for several runs the current directory); or a file name that ends in .png "
                             "or .svg, for one figure with both panels")
    parser.add_argument("--labels", metavar="LABEL", nargs="+",
                        help="names of the runs in the legend, one for each RUN; write them after the RUNs "
                             "(default: the names of the directories)")
    return parser


def read_csv(path: Path) -> pd.DataFrame:
    """Returns the rows of a log, with or without a header line.

    A last line without a newline is left out: training may still be writing it.

    Raises:
        ValueError: if a line is not three numbers; the message names it.
        OSError: if the file cannot be read.
    """
    lines = path.read_bytes()
    last = lines[lines.rfind(b"\n") + 1 :]
    if START_OF_ROW.fullmatch(last) or HEADER.startswith(last):
        lines = lines.removesuffix(last)
    has_header = lines[: lines.find(b"\n")].rstrip() == HEADER
    try:
        frame = pd.read_csv(io.BytesIO(lines), header=None, names=COLUMNS, skiprows=int(has_header), dtype=np.float64,
                            na_values=["nan", "NaN"], keep_default_na=False, lineterminator="\n")
        # pandas fills short rows with nan, so count the commas as well
        if lines.count(b",") == 2 * (len(frame) + has_header) and frame["epoch"].between(0, MAX_EPOCH).all():
            return frame
    except pd.errors.EmptyDataError:
        return pd.DataFrame(columns=COLUMNS, dtype=np.float64)
    except ValueError:
        pass  # pandas does not always name the line
    for number, line in enumerate(lines.split(b"\n"), 1):
        try:
            epoch, _, _ = map(float, line.split(b","))
            is_row = 0 <= epoch <= MAX_EPOCH
        except ValueError:
            is_row = number == 1 and has_header
        if line.strip() and not is_row:
            shown = line[:60].rstrip().decode(errors="replace")
            raise ValueError(f"{path}, line {number}: {shown!r} is not a row epoch,loss,error of three numbers; the "
                             f"epoch must be from 0 to {MAX_EPOCH:g}, loss and error may be nan or inf")
    raise ValueError(f"{path}: its lines are not rows epoch,loss,error of three numbers")


def is_drawable(values: pd.DataFrame | pd.Series) -> pd.DataFrame | pd.Series:
    """True where a loss or an error is not negative, infinite or nan."""
    return (values >= 0) & np.isfinite(values)


def rolling_epoch_mean(frame: pd.DataFrame) -> pd.DataFrame:
    """Replaces each loss and error by the mean of the epoch's worth of rows that ends there, or of all rows so far."""
    rows_per_epoch = max((frame["epoch"] // 1).value_counts(), default=1)
    mean = frame[["loss", "error"]].where(is_drawable).rolling(rows_per_epoch, min_periods=1).mean()
    return pd.concat([frame["epoch"], mean], axis=1)


def read_run(directory: Path, label: str) -> Run:
    """Reads those of train.csv, val.csv and test.csv that exist.

    Raises:
        ValueError: if train.csv and test.csv are both missing, if there are no rows, or as in ``read_csv``.
        OSError: if a file cannot be read.
    """
    names = [name for name in ("train.csv", "val.csv", "test.csv") if (directory / name).exists()]
    if not {"train.csv", "test.csv"} & {*names}:
        problem = "has neither train.csv nor test.csv" if directory.is_dir() else "is not a directory"
        raise ValueError(f"{directory}: {problem}; give a directory in which train.py wrote train.csv and test.csv")
    frames = {name: read_csv(directory / name) for name in names}
    if all(frame.empty for frame in frames.values()):
        raise ValueError(f"{directory}: no rows yet in {' or '.join(names)}")
    no_rows = pd.DataFrame(columns=COLUMNS, dtype=np.float64)
    train, val, test = (frames.get(name, no_rows) for name in ("train.csv", "val.csv", "test.csv"))
    return Run(label, rolling_epoch_mean(train), val, test)


def printable(text: object) -> str:
    """Escapes unprintable characters: a name or label may hold control sequences for a terminal, or invalid UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def labels_for(runs: list[Path], labels: list[str] | None) -> list[str]:
    """The name of each run in the legend, at most 24 characters; empty for a single run without ``--labels``."""
    if labels is None:
        labels = [path.resolve().name for path in runs] if len(runs) > 1 else [""]
        if len(set(labels)) < len(labels):
            labels = [str(path) for path in runs]
    if len(labels) != len(runs):
        raise ValueError(f"--labels: {len(labels)} ({', '.join(labels)}) for {len(runs)} runs; give one for each run")
    labels = [printable(label) for label in labels]
    return [label if len(label) <= 24 else f"{label[:11]}...{label[-10:]}" for label in labels]


def summary(frame: pd.DataFrame, column: str) -> str:
    """The last and the best value for the legend: "final 4.77%, best 4.71% at epoch 2"."""
    if frame.empty:
        return "no rows yet"
    number = NUMBER[column].format
    final = number(frame[column].iloc[-1])
    drawable = frame[is_drawable(frame[column])]
    if drawable.empty:
        return f"final {final}"
    best = drawable.loc[drawable[column].idxmin()]
    return f"final {final}, best {number(best[column])} at epoch {best['epoch']:g}"


def add_line(axes: Axes, frame: pd.DataFrame, column: str, **style) -> Line2D:
    """Draws the drawable values of a column, thinned to MAX_POINTS."""
    frame = frame[is_drawable(frame[column])]
    kept = np.linspace(0, len(frame) - 1, min(len(frame), MAX_POINTS)).round().astype(int)
    if len(kept) == 1:  # a line of one point is invisible
        style |= {"marker": "o", "markersize": 4, "clip_on": False}
    return axes.plot(frame["epoch"].to_numpy()[kept], frame[column].to_numpy()[kept], **style)[0]


def scale_x(axes: Axes, first: float, last: float) -> None:
    """Sets limits at the first and the last row, and ticks at whole epochs, the last of them included."""
    ticks = MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]).tick_values(first, last)
    last_epoch = math.floor(last)
    if last_epoch > first:
        space = 0.4 * (ticks[1] - ticks[0])  # between the labels of the last two ticks
        ticks = [*ticks[ticks < last_epoch - space], last_epoch]
    if first == last:
        first, last, ticks = first - 0.5, last + 0.5, [first]
    axes.set_xticks([tick for tick in ticks if first <= tick <= last])
    axes.set_xlim(first, last)


def scale_y(axes: Axes, values: np.ndarray, column: str) -> None:
    """Sets a log scale with plain numbers at the ticks. If values are below FLOOR, the lowest part is linear."""
    if not len(values):
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
        return
    in_log_part = values[values >= FLOOR[column]]
    low, high = (in_log_part.min(), in_log_part.max()) if len(in_log_part) else (FLOOR[column], 10 * FLOOR[column])
    margin = max((high / low) ** 0.04, 1.02)
    bottom, top = low / margin, high * margin
    if column == "error":
        top = min(top, max(high, 100))
    if top < 8 * bottom:  # powers of ten and their multiples would be too few
        locator = MaxNLocator(8, steps=[1, 2, 5, 10])
    else:
        locator = LogLocator(subs=[1, 2, 5] if top < 1e5 * bottom else [1], numticks=12)
    ticks = [tick for tick in locator.tick_values(bottom, top) if bottom <= tick <= top]
    if len(in_log_part) < len(values):
        axes.set_yscale("symlog", linthresh=bottom, linscale=0.4)
        bottom, ticks = -0.1 * bottom, [0, *ticks]  # slightly below 0, so that a line at 0 is visible
    else:
        axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_yticks(ticks, [TICK[column].format(tick) for tick in ticks])
    axes.minorticks_off()


def draw(axes: Axes, runs: list[Run], column: str) -> None:
    """Draws a column of all runs against the epoch, with axes and a legend above them, where it hides no curve."""
    many = len(runs) > len(COLOURS)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(runs))) if many else COLOURS
    handles = []
    if any(len(run.train) for run in runs):
        colour = COLOURS[0] if len(runs) == 1 else "0.3"
        handles.append(Line2D([], [], color=colour, label="train (mean over an epoch)", **TRAIN))
    for run, colour in zip(runs, colours, strict=False):
        add_line(axes, run.train, column, color=colour, **TRAIN)
        for name, frame, style in (("validation", run.val, VAL), ("test", run.test, TEST)):
            if name == "test" or len(frame):
                label = f"{run.label} {name} ({summary(frame, column)})".lstrip()
                handles.append(add_line(axes, frame, column, color=colour, label=label, **style))
    scale_y(axes, np.concatenate([line.get_ydata() for line in axes.get_lines()]), column)
    epochs = pd.concat([frame["epoch"] for run in runs for frame in (run.train, run.val, run.test)])
    scale_x(axes, epochs.min(), epochs.max())
    axes.set(xlabel="Epoch", ylabel=AXIS_NAME[column])
    legend = axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1))
    legend.set_in_layout(False)  # long labels would shrink the axes; write_figure reserves space instead


def write_figure(path: Path, runs: list[Run], columns: list[str]) -> None:
    """Writes a PNG or SVG with a panel of 6 x 4 inches at 150 dpi for each column. It replaces an old file as a whole.

    Raises:
        OSError: if the file cannot be written. An old one is kept.
    """
    legend_height = 0.31 + 0.19 * sum(2 if len(run.val) else 1 for run in runs)  # inches
    content = io.BytesIO()
    with matplotlib.style.context(STYLE, after_reset=True):  # the user's matplotlibrc has no effect
        figure = Figure(figsize=(6 * len(columns), 4 + legend_height), dpi=150, layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 4 / (4 + legend_height)))
        for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
            draw(axes, runs, column)
        figure.savefig(content, format=path.suffix[1:].lower())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.getvalue())  # permissions by the umask; tempfile would set 0600
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fail(message: str, status: int) -> int:
    print("plot.py: error:", printable(message), file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 all figures written, 1 a figure could not be written, 2 bad input."""
    try:
        args = get_args_parser().parse_args(argv)
        labels = labels_for(args.runs, args.labels)
        runs = [read_run(path, label) for path, label in zip(args.runs, labels, strict=True)]
        out = args.out or (args.runs[0] if len(runs) == 1 else Path())
        if out.suffix.lower() in (".png", ".svg"):
            directory, figures = out.parent, {out: FIGURES["loss-error.png"]}
        else:
            directory, figures = out, {out / name: columns for name, columns in FIGURES.items()}
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ValueError(f"{directory}: no permission to write there; choose another place with --out")
    except ValueError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}; each RUN must be readable, --out a writable directory", 2)
    for path, columns in figures.items():
        try:
            write_figure(path, runs, columns)
        except OSError as error:
            return fail(f"{path}: cannot be written ({error.strerror})", 1)
        print(printable(path))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that it cannot encode are escaped
    sys.exit(main())
