#!/usr/bin/env python3
"""Draw the learning curves of one run, or compare those of several: ./plot.py RUN [RUN ...]

Reads each run's train.csv, test.csv and, if there is one, val.csv. They may still be growing.
Writes loss.png, error.png and loss-error.png into the run's directory, or into --out.

This file imports nothing else of the project, so it can be copied anywhere.
"""

import argparse
import array
import codecs
import contextlib
import io
import math
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pandas as pd


@contextlib.contextmanager
def without_mplbackend() -> Iterator[None]:
    """A context that hides the environment variable MPLBACKEND from matplotlib's first import.

    That import raises ValueError if MPLBACKEND names a backend that is not installed. This file needs no backend.
    Afterwards the variable is restored, and programs that import this file still get the backend.
    """
    is_first_import = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend and is_first_import:
        with contextlib.suppress(ValueError, RuntimeError):  # the backend is not installed
            matplotlib.rcParams["backend"] = backend


with without_mplbackend():
    import matplotlib
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure  # without pyplot: no display, no global state, half the start-up time
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

COLUMNS = ["epoch", "loss", "error"]
FIGURES = {"loss.png": ["loss"], "error.png": ["error"], "loss-error.png": ["loss", "error"]}
AXIS_NAME = {"loss": "Cross-entropy loss", "error": "Error"}
NUMBER = {"loss": "{:#.3g}", "error": "{:.2f}%"}
TICK = {"loss": "{:g}", "error": "{:g}%"}

FLOOR = {"loss": 1e-4, "error": 0.01}  # lower values, which include 0, are on a linear part of the axis
DIVERGED = 1e38  # about the largest float32; larger values count as infinite
MAX_POINTS = 3000  # per line; more cannot be seen at 900 pixels and take seconds to draw
MAX_BYTES = 2**28  # per CSV, about 10 million rows; 300 epochs of ImageNet at batch size 64 have 6 million
MAX_EPOCH = 1e9  # matplotlib fails at axis limits near the largest float64

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's colour-blind-safe set
TRAIN = {"linewidth": 0.9, "alpha": 0.6, "zorder": 2}
VAL = {"linewidth": 1.1, "linestyle": "--", "zorder": 3}
TEST = {"linewidth": 1.6, "zorder": 4}
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "0.9",
    "font.size": 10, "legend.fontsize": 8.5, "legend.title_fontsize": 8.5, "legend.framealpha": 0.9,
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

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        flags, rest = super().parse_known_args(args, namespace)
        for name, value in vars(flags).items():
            if value == []:  # argparse drops the value of --out=--
                self.error(f"argument --{name}: expected one argument")
        return flags, rest


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="plot.py", description="Draw loss and error of one run, or compare several.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path,
                        help="directory with train.csv and test.csv, as train.py writes them")
    parser.add_argument("--out", metavar="DIR", type=Path,
                        help="directory for the figures, created if it does not exist (default: the run's own "
                             "directory; for several runs the current directory)")
    parser.add_argument("--labels", metavar="LABEL", nargs="+",
                        help="names of the runs in the legend, one for each RUN; write them after the RUNs "
                             "(default: the names of the directories)")
    return parser


def read_bytes(path: str | os.PathLike) -> bytes:
    """Returns the content of a regular file. A pipe could block and a device may have no end, so these are refused.

    Raises:
        ValueError: if the path is not a regular file, or the file is larger than MAX_BYTES.
        OSError: if the file cannot be read.
    """
    status = os.stat(path)  # check before open(), which would block on a pipe
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file; give a run whose CSVs are regular files")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{path}: {status.st_size:,} bytes, too large for a log of train.py; the limit is "
                         f"{MAX_BYTES:,} bytes")
    with open(path, "rb") as file:
        return file.read(status.st_size)  # the limit holds even if the file is growing


def read_csv(path: str | os.PathLike) -> pd.DataFrame:
    """Returns the rows of a log. The header line and a byte order mark are optional.

    A last line without a newline is left out: training may still be writing it.

    Raises:
        ValueError: if a row is not three numbers (the message names the line), or as in ``read_bytes``.
        OSError: if the file cannot be read.
    """
    text = read_bytes(path).removeprefix(codecs.BOM_UTF8)  # spreadsheets add the mark when they save a CSV
    text = text[: text.rfind(b"\n") + 1]
    first, _, rest = text.partition(b"\n")
    has_header = first.strip() == b"epoch,loss,error"
    rows = rest if has_header else text
    try:
        frame = pd.read_csv(io.BytesIO(rows), header=None, names=COLUMNS, dtype=np.float64,
                            na_values=["nan"], keep_default_na=False)
        # pandas pads short rows with nan, so count the commas as well
        if rows.count(b",") == 2 * len(frame) and (frame["epoch"].abs() < MAX_EPOCH).all():
            return frame
    except ValueError:
        pass  # the slow reader below names the line; pandas does not always do so
    return read_line_by_line(path, rows, first_number=1 + has_header)


def read_line_by_line(path: str | os.PathLike, rows: bytes, first_number: int) -> pd.DataFrame:
    """Parses the rows slowly. The ValueError for a bad row names the file and the line, and quotes the line."""
    values = array.array("d")  # 24 bytes per row; a list of tuples would take 150
    for number, line in enumerate(io.BytesIO(rows), first_number):
        if not line.strip():
            continue
        try:
            epoch, loss, error = map(float, line.split(b","))
            if not abs(epoch) < MAX_EPOCH:  # true for nan, too
                raise ValueError
        except ValueError:
            shown = line[:60].rstrip(b"\r\n").decode(errors="replace")
            raise ValueError(f"{path}, line {number}: {shown!r} is not a row epoch,loss,error of three numbers; the "
                             f"epoch must be below {MAX_EPOCH:g}, loss and error may be nan or inf") from None
        values.extend((epoch, loss, error))
    return pd.DataFrame(np.array(values).reshape(-1, 3), columns=COLUMNS, dtype=np.float64)


def rows_per_epoch(frame: pd.DataFrame) -> int:
    """The number of rows per epoch, at least 1. It is the number of batches, or less if the log was thinned."""
    epochs = frame["epoch"].to_numpy()
    counts = np.unique(np.floor(epochs), return_counts=True)[1]
    if len(counts) > 2:  # count the rows of the complete epochs: exact even if the epoch numbers are rounded
        return int(np.median(counts[1:-1]))
    steps = np.diff(epochs)
    steps = steps[steps > 0]
    if not len(steps):
        return 1
    step = max(float(np.median(steps)), 1 / MAX_BYTES)  # keeps 1 / step finite; no log has more rows than bytes
    return max(1, round(1 / step))


def is_drawable(values: pd.DataFrame | pd.Series) -> pd.DataFrame | pd.Series:
    """True where a loss or an error is not negative, infinite or nan."""
    return (values >= 0) & (values < DIVERGED)


def rolling_epoch_mean(frame: pd.DataFrame) -> pd.DataFrame:
    """Replaces each loss and error by the mean of the epoch's worth of rows that ends there, or of all rows so far."""
    drawable = frame[["loss", "error"]].where(is_drawable)
    window = min(rows_per_epoch(frame), len(frame) + 1)
    mean = drawable.rolling(window, min_periods=1).mean()
    return pd.concat([frame["epoch"], mean], axis=1)


def read_run(directory: Path, label: str) -> Run:
    """Reads those of train.csv, val.csv and test.csv that exist.

    Raises:
        ValueError: if train.csv and test.csv are both missing, if there are no rows, or as in ``read_csv``.
        OSError: if a file cannot be read.
    """
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "no such directory"
        raise ValueError(f"{directory}: {problem}; give the directory in which train.py wrote train.csv and test.csv")
    frames = {}
    for name in ("train", "val", "test"):
        with contextlib.suppress(FileNotFoundError):
            frames[name] = read_csv(directory / f"{name}.csv")
    if not frames.keys() & {"train", "test"}:
        raise ValueError(f"{directory}: contains neither train.csv nor test.csv; at least one of them is needed")
    if all(frame.empty for frame in frames.values()):
        raise ValueError(f"{directory}: no rows yet in {' or '.join(f'{name}.csv' for name in frames)}")
    no_rows = pd.DataFrame(columns=COLUMNS, dtype=np.float64)
    train, val, test = (frames.get(name, no_rows) for name in ("train", "val", "test"))
    return Run(label, rolling_epoch_mean(train), val, test)


def printable(text: object) -> str:
    """Escapes unprintable characters: a name or label may hold control sequences for a terminal, or invalid UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def labels_for(runs: list[Path], labels: list[str] | None) -> list[str]:
    """The name of each run in the legend, at most 32 characters; empty for a single run without ``--labels``."""
    if labels is None:
        labels = [path.resolve().name for path in runs] if len(runs) > 1 else [""]
        if len(set(labels)) < len(labels):
            labels = [str(path) for path in runs]
    if len(labels) != len(runs):
        raise ValueError(f"--labels: {len(labels)} ({', '.join(labels)}) for {len(runs)} runs; give one for each run")
    labels = [printable(label) for label in labels]
    return [label if len(label) <= 32 else f"{label[:15]}...{label[-14:]}" for label in labels]


def check_out(out: Path) -> None:
    """Raises ValueError if figures cannot be written to this directory. Call it before the slow drawing."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing}: is not a directory; choose another place for the figures with --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing}: no permission to write there; choose another place with --out")


def formatted(value: float, column: str) -> str:
    return f"{value:.3g}" if abs(value) > 1e6 else NUMBER[column].format(value)  # 1e308 would have 309 digits


def summary(frame: pd.DataFrame, column: str) -> str:
    """The last and the best value for the legend: "final 4.77%, best 4.71% at epoch 2"."""
    if frame.empty:
        return "no rows yet"
    final = formatted(frame[column].iloc[-1], column)
    if len(frame) == 1:
        return f"{final} at epoch {frame['epoch'].iloc[0]:g}"
    drawable = frame[is_drawable(frame[column])]
    if drawable.empty:
        return f"final {final}"
    best = drawable.loc[drawable[column].idxmin()]
    return f"final {final}, best {formatted(best[column], column)} at epoch {best['epoch']:g}"


def add_line(axes: Axes, frame: pd.DataFrame, column: str, **style) -> Line2D:
    """Draws the drawable values of a column, thinned to MAX_POINTS."""
    frame = frame[is_drawable(frame[column])]
    kept = np.linspace(0, len(frame) - 1, min(len(frame), MAX_POINTS)).round().astype(int)
    if len(kept) == 1:  # a line of one point is invisible
        style |= {"marker": "o", "markersize": 4, "clip_on": False}
    return axes.plot(frame["epoch"].to_numpy()[kept], frame[column].to_numpy()[kept], **style)[0]


def ticks_between(bottom: float, top: float) -> list[float]:
    """Ticks for a log scale: powers of ten for a wide range, multiples of them for a narrow range."""
    powers = [10.0**exponent for exponent in range(math.floor(math.log10(bottom)), math.floor(math.log10(top)) + 1)]

    def ticks_at(*factors: int) -> list[float]:
        ticks = [factor * power for power in powers for factor in factors]
        return [tick for tick in ticks if bottom <= tick <= top]

    if len(powers) > 6:
        return ticks_at(1)[:: 1 + len(powers) // 15]
    ticks = ticks_at(1, 2, 5)
    return ticks if len(ticks) > 2 else ticks_at(*range(1, 10))


def scale_y(axes: Axes, values: np.ndarray, column: str) -> None:
    """Sets a log scale with plain numbers at the ticks. If values are below FLOOR, the lowest part is linear."""
    if not len(values):
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
        return
    in_log_part = values[values >= FLOOR[column]]
    low, high = (in_log_part.min(), in_log_part.max()) if len(in_log_part) else (FLOOR[column], 10 * FLOOR[column])
    margin = 1.15 if high > 2 * low else 1.5
    bottom, top = low / margin, high * margin
    if column == "error" and high <= 100:
        top = min(top, 100)
    ticks = ticks_between(bottom, top)
    if len(in_log_part) < len(values):
        axes.set_yscale("symlog", linthresh=bottom, linscale=0.4)
        bottom, ticks = -0.1 * bottom, [0, *ticks]  # slightly below 0, so that a line at 0 is visible
    else:
        axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_yticks(ticks, [TICK[column].format(tick) for tick in ticks])
    axes.minorticks_off()


def draw_run(axes: Axes, run: Run, column: str, colour: str) -> list[Line2D]:
    """Draws the lines of train and validation, if they have rows, and of test, which is returned last."""
    lines = []
    if len(run.train):
        lines.append(add_line(axes, run.train, column, color=colour, label="train (mean over an epoch)", **TRAIN))
    if len(run.val):
        label = f"validation ({summary(run.val, column)})"
        lines.append(add_line(axes, run.val, column, color=colour, label=label, **VAL))
    label = f"{run.label} test ({summary(run.test, column)})".lstrip()
    return [*lines, add_line(axes, run.test, column, color=colour, label=label, **TEST)]


def draw(axes: Axes, runs: list[Run], column: str) -> None:
    """Draws a column of all runs against the epoch, with axes and legend."""
    many = len(runs) > len(COLOURS)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(runs))) if many else COLOURS
    drawn = [draw_run(axes, run, column, colour) for run, colour in zip(runs, colours, strict=False)]
    scale_y(axes, np.concatenate([line.get_ydata() for lines in drawn for line in lines]), column)
    epochs = pd.concat([frame["epoch"] for run in runs for frame in (run.train, run.val, run.test)])
    first = math.floor(epochs.min())
    axes.set_xlim(first, max(math.ceil(epochs.max()), first + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set(xlabel="Epoch", ylabel=AXIS_NAME[column])
    if len(runs) == 1:
        axes.legend(handles=drawn[0])
        return
    validation = ", dashed: validation" if any(len(run.val) for run in runs) else ""
    legend = axes.legend(handles=[lines[-1] for lines in drawn], frameon=False, alignment="left",
                         title=f"thin: train (mean over an epoch){validation}",
                         loc="lower left", bbox_to_anchor=(0, 1))  # above the axes: inside, it would hide curves
    legend.set_in_layout(False)  # long labels would shrink the axes; render() reserves space instead


def render(runs: list[Run], columns: list[str]) -> bytes:
    """A PNG with a panel of 6 x 4 inches at 150 dpi for each column. The legend of several runs is above the panels."""
    legend_height = 0 if len(runs) == 1 else 0.35 + 0.18 * len(runs)  # inches
    png = io.BytesIO()
    with matplotlib.style.context(STYLE, after_reset=True):  # the user's matplotlibrc has no effect
        figure = Figure(figsize=(6 * len(columns), 4 + legend_height), dpi=150, layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 4 / (4 + legend_height)))
        for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
            draw(axes, runs, column)
        figure.savefig(png, format="png")
    return png.getvalue()


def replace_file(path: Path, content: bytes) -> None:
    """Replaces the file by a complete new one. If that fails, the old file is kept."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:  # permissions by the umask; tempfile would set 0600
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fail(message: str, status: int) -> int:
    print("plot.py: error:", printable(message), file=sys.stderr)
    return status


def print_paths(paths: list[Path]) -> None:
    """Prints one path per line. Characters that stdout cannot encode are escaped, too."""
    text = "".join(f"{printable(path)}\n" for path in paths)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 all figures written, 1 a figure could not be drawn or written, 2 bad input."""
    try:
        args = get_args_parser().parse_args(argv)
        labels = labels_for(args.runs, args.labels)
        runs = [read_run(path, label) for path, label in zip(args.runs, labels, strict=True)]
        out = args.out or (args.runs[0] if len(runs) == 1 else Path())
        check_out(out)
        figures = {out / name: render(runs, columns) for name, columns in FIGURES.items()}
    except ValueError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"{error.filename}: cannot be read ({error.strerror})", 2)
    except MemoryError:
        return fail("there is not enough memory to read and draw these CSVs", 1)
    target = out
    try:
        out.mkdir(parents=True, exist_ok=True)
        for target, png in figures.items():
            replace_file(target, png)
        target = "standard output"
        print_paths([*figures])
    except OSError as error:
        return fail(f"{target}: cannot be written ({error.strerror})", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
