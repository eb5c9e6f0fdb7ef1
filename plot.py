#!/usr/bin/env python3
"""Draw the learning curves of one run, or compare those of several: ./plot.py RUN [RUN ...]

Reads train.csv, test.csv and, where there is one, val.csv of each run, also while training writes them.
Writes loss.png, error.png and loss-error.png into the run's directory, or into --out.
"""

import argparse
import contextlib
import io
import math
import os
import secrets
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state, half the start-up time
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

COLUMNS = ["epoch", "loss", "error"]
FIGURES = {"loss.png": ["loss"], "error.png": ["error"], "loss-error.png": ["loss", "error"]}
AXIS_NAME = {"loss": "Cross-entropy loss", "error": "Error"}
NUMBER = {"loss": "{:#.3g}", "error": "{:.2f}%"}
TICK = {"loss": "{:g}", "error": "{:g}%"}

FLOOR = {"loss": 1e-4, "error": 0.01}  # the log scale ends here; below it, down to zero, the axis is linear
DIVERGED = 1e38  # about the largest float32: from here on a value counts as infinite
MAX_POINTS = 3000  # a line: more cannot be seen at 900 pixels, and costs seconds

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe-Ito: colour-blind-safe
TRAIN = {"linewidth": 0.9, "alpha": 0.6, "zorder": 2}
VAL = {"linewidth": 1.1, "linestyle": "--", "zorder": 3}
TEST = {"linewidth": 1.6, "zorder": 4}
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "0.9",
    "font.size": 10, "legend.fontsize": 8.5, "legend.title_fontsize": 8.5, "legend.framealpha": 0.9,
    "text.parse_math": False,  # a label may hold dollar signs
}


class Run(NamedTuple):
    label: str
    train: pd.DataFrame  # its rolling mean
    val: pd.DataFrame
    test: pd.DataFrame


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="plot.py", description="Draw loss and error of one run, or compare several.")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path,
                        help="directory with train.csv and test.csv, as train.py writes them")
    parser.add_argument("--out", metavar="DIR", type=Path,
                        help="where the figures go, made if missing (default: the run's own directory; "
                             "for several runs the current directory)")
    parser.add_argument("--labels", metavar="LABEL", nargs="+",
                        help="one for each RUN, given after them (default: the names of the directories)")
    return parser


def read_csv(path: str | os.PathLike) -> pd.DataFrame:
    """The whole rows of a log, header or not: a last line without its newline may be cut in a number."""
    text = Path(path).read_bytes()
    text = text[: text.rfind(b"\n") + 1]
    first, _, rest = text.partition(b"\n")
    has_header = first.strip() == b"epoch,loss,error"
    rows = rest if has_header else text
    try:
        frame = pd.read_csv(io.BytesIO(rows), header=None, names=COLUMNS, dtype=np.float64,
                            na_values=["nan"], keep_default_na=False)
        if rows.count(b",") == 2 * len(frame) and np.isfinite(frame["epoch"]).all():
            return frame
    except ValueError:
        pass  # pandas does not say where: the slow reader does
    return read_line_by_line(path, rows, first_number=1 + has_header)


def read_line_by_line(path: str | os.PathLike, rows: bytes, first_number: int) -> pd.DataFrame:
    values = []
    for number, line in enumerate(rows.splitlines(), first_number):
        if not line.strip():
            continue
        try:
            epoch, loss, error = map(float, line.split(b","))
            if not math.isfinite(epoch):
                raise ValueError
        except ValueError:
            shown = line[:60].decode(errors="replace")
            raise ValueError(f"{path}, line {number}: {shown!r} is not epoch,loss,error: three numbers, of "
                             "which loss and error may be nan or inf") from None
        values.append((epoch, loss, error))
    return pd.DataFrame(values, columns=COLUMNS, dtype=np.float64)


def rows_per_epoch(frame: pd.DataFrame) -> int:
    """How many rows cover one epoch, at least 1: the batches of an epoch, fewer in a thinned log."""
    epochs = frame["epoch"].to_numpy()
    counts = np.unique(np.floor(epochs), return_counts=True)[1]
    if len(counts) > 2:  # counted where epochs are whole, so that rounded epoch numbers do no harm
        return int(np.median(counts[1:-1]))
    steps = np.diff(epochs)
    steps = steps[steps > 0]
    return max(1, round(1 / np.median(steps))) if len(steps) else 1


def rolling_epoch_mean(frame: pd.DataFrame) -> pd.DataFrame:
    """Each row's mean over the epoch that ends there; in the first epoch, over what there is so far."""
    finite = frame[["loss", "error"]].where(lambda values: values.abs() < DIVERGED)
    mean = finite.rolling(rows_per_epoch(frame), min_periods=1).mean()
    return pd.concat([frame["epoch"], mean], axis=1)


def read_run(directory: Path, label: str) -> Run:
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "no such directory"
        raise ValueError(f"{directory}: {what}; give the one in which train.py wrote train.csv and test.csv")
    frames = {}
    for name in ("train", "val", "test"):
        with contextlib.suppress(FileNotFoundError):
            frames[name] = read_csv(directory / f"{name}.csv")
    if not frames.keys() & {"train", "test"}:
        raise ValueError(f"{directory}: holds neither train.csv nor test.csv; one is needed at least")
    if all(frame.empty for frame in frames.values()):
        raise ValueError(f"{directory}: no rows yet in {' or '.join(f'{name}.csv' for name in frames)}")
    nothing = pd.DataFrame(columns=COLUMNS, dtype=np.float64)
    train, val, test = (frames.get(name, nothing) for name in ("train", "val", "test"))
    return Run(label, rolling_epoch_mean(train), val, test)


def readable(name: str | Path) -> str:
    return os.fsencode(name).decode(errors="replace")  # a directory's name may be no UTF-8


def labels_for(runs: list[Path], labels: list[str] | None) -> list[str]:
    if labels is None:
        labels = [path.resolve().name for path in runs] if len(runs) > 1 else [""]
        if len(set(labels)) < len(labels):
            labels = [str(path) for path in runs]
    if len(labels) != len(runs):
        raise ValueError(f"--labels: {len(labels)} ({', '.join(labels)}) for {len(runs)} RUN; give as many")
    labels = [readable(label) for label in labels]
    return [label if len(label) <= 32 else f"{label[:15]}...{label[-14:]}" for label in labels]


def check_out(out: Path) -> None:
    """Refuse before anything is drawn what could not be written afterwards."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing}: is a file; the figures need a directory, see --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing}: no permission to write there; choose another place with --out")


def summary(frame: pd.DataFrame, column: str) -> str:
    if frame.empty:
        return "no rows yet"
    finite = frame[frame[column].abs() < DIVERGED]
    final, best = (NUMBER[column].format(value) for value in (frame[column].iloc[-1], finite[column].min()))
    if len(frame) == 1:
        return f"{final} at epoch {frame['epoch'].iloc[0]:g}"
    if finite.empty:
        return f"final {final}"
    return f"final {final}, best {best} at epoch {finite['epoch'][finite[column].idxmin()]:g}"


def add_line(axes: Axes, frame: pd.DataFrame, column: str, **style) -> Line2D:
    frame = frame[frame[column].abs() < DIVERGED]
    kept = np.linspace(0, len(frame) - 1, min(len(frame), MAX_POINTS)).round().astype(int)
    if len(kept) == 1:  # a line of one point is invisible
        style |= {"marker": "o", "markersize": 4, "clip_on": False}
    return axes.plot(frame["epoch"].to_numpy()[kept], frame[column].to_numpy()[kept], **style)[0]


def ticks_between(bottom: float, top: float) -> list[float]:
    powers = range(math.floor(math.log10(bottom)), math.floor(math.log10(top)) + 1)

    def ladder(*steps: int) -> list[float]:
        return [tick for power in powers for step in steps if bottom <= (tick := step * 10.0**power) <= top]

    if len(powers) > 6:
        return ladder(1)[:: 1 + len(powers) // 15]
    return ladder(1, 2, 5) if len(ladder(1, 2, 5)) > 2 else ladder(*range(1, 10))


def scale_y(axes: Axes, values: np.ndarray, column: str) -> None:
    """A log scale with plain ticks, and with a linear foot down to 0 if there are values near it."""
    if not len(values):
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
        return
    seen = values[values >= FLOOR[column]]
    low, high = (seen.min(), seen.max()) if len(seen) else (FLOOR[column], 10 * FLOOR[column])
    margin = 1.15 if high > 2 * low else 1.5
    bottom, top = low / margin, high * margin
    if column == "error" and high <= 100:
        top = min(top, 100)
    ticks = ticks_between(bottom, top)
    if len(seen) < len(values):
        axes.set_yscale("symlog", linthresh=bottom, linscale=0.4)
        bottom, ticks = -0.1 * bottom, [0, *ticks]  # a little below 0, for a line along it
    else:
        axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    axes.set_yticks(ticks, [TICK[column].format(tick) for tick in ticks])
    axes.minorticks_off()


def draw_run(axes: Axes, run: Run, column: str, colour: str) -> list[Line2D]:
    """Train thin and light, validation dashed, test solid and on top: the last of the lines returned."""
    lines = [add_line(axes, frame, column, color=colour, label=label, **style)
             for frame, label, style in ((run.train, "train (mean over an epoch)", TRAIN),
                                         (run.val, f"validation ({summary(run.val, column)})", VAL)) if len(frame)]
    label = f"{run.label} test ({summary(run.test, column)})".lstrip()
    return [*lines, add_line(axes, run.test, column, color=colour, label=label, **TEST)]


def draw(axes: Axes, runs: list[Run], column: str) -> None:
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
                         loc="lower left", bbox_to_anchor=(0, 1))  # above: inside, it would hide curves
    legend.set_in_layout(False)  # or long labels would squeeze the axes; render() keeps room for it


def render(runs: list[Run], columns: list[str]) -> bytes:
    legend = 0 if len(runs) == 1 else 0.35 + 0.18 * len(runs)  # its height in inches, above the axes
    with matplotlib.style.context(STYLE, after_reset=True):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(6 * len(columns), 4 + legend), dpi=150, layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0, 1, 4 / (4 + legend)))
        for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
            draw(axes, runs, column)
        return png_of(figure)


def png_of(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def replace_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:  # unlike tempfile's, with the permissions that the umask gives
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def complain(message: str, status: int) -> int:
    print("plot.py: error:", " ".join(message.split()), file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    try:
        args = get_args_parser().parse_args(argv)
        labels = labels_for(args.runs, args.labels)
        runs = [read_run(path, label) for path, label in zip(args.runs, labels, strict=True)]
        out = args.out or (args.runs[0] if len(runs) == 1 else Path())
        check_out(out)
        figures = {out / name: render(runs, columns) for name, columns in FIGURES.items()}
    except ValueError as error:
        return complain(str(error), 2)
    except OSError as error:
        return complain(f"{error.filename}: cannot be read ({error.strerror})", 2)
    target = out
    try:
        out.mkdir(parents=True, exist_ok=True)
        for target, png in figures.items():
            replace_file(target, png)
        target = "standard output"
        print(*map(readable, figures), sep="\n", flush=True)
    except OSError as error:
        return complain(f"{target}: cannot be written ({error.strerror})", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
