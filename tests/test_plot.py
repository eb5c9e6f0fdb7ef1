"""plot.py: what it reads and refuses, what the figures show, and how they are written."""

import gzip
import os
import shutil
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import common
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

import plot

HEADER = "epoch,loss,error\n"
FIGURES = sorted(plot.FIGURES)

refused = partial(common.refused, plot.main)


def write_run(path, n_epochs=3, batches=20, val=False):
    """Writes the CSVs of a run whose error halves every epoch."""
    path.mkdir(parents=True, exist_ok=True)
    epochs = np.arange(n_epochs * batches) / batches
    errors = 60 * 0.5**epochs * np.random.default_rng(0).uniform(0.8, 1.2, len(epochs))
    rows = [f"{epoch},{error / 50 + 0.01},{error}\n" for epoch, error in zip(epochs, errors, strict=True)]
    (path / "train.csv").write_text(HEADER + "".join(rows))
    rows = [f"{epoch},{1.5 * 0.5**epoch},{70 * 0.5**epoch}\n" for epoch in range(1, n_epochs + 1)]
    for name in ["test.csv"] + ["val.csv"] * val:
        (path / name).write_text(HEADER + "".join(rows))
    return path


def write_test_csv(path, *rows):
    (path / "test.csv").write_text("".join(f"{row}\n" for row in rows))
    return path


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def drawn(*runs, column="error"):
    """-> the axes with these runs drawn on them"""
    axes = Figure(layout="constrained").subplots()
    plot.draw(axes, [plot.read_run(path, path.name if len(runs) > 1 else "") for path in runs], column)
    return axes


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def y_ticks(axes):
    return [tick.get_text() for tick in axes.get_yticklabels()]


# --- the script -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_file_alone_draws_a_run_whatever_the_backend_and_the_encoding(tmp_path):
    run = write_run(tmp_path / "caf\xe9")
    script = shutil.copy(plot.__file__, tmp_path / "plot.py")
    done = subprocess.run([sys.executable, script, "caf\xe9"], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"MPLBACKEND": "nonsense", "PYTHONIOENCODING": "ascii"}, umask=0o027)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [rf"caf\xe9/{name}" for name in plot.FIGURES]
    assert names(tmp_path) == ["caf\xe9", "plot.py"] and names(run) == sorted([*FIGURES, "test.csv", "train.csv"])
    for name, width in (("loss.png", 900), ("error.png", 900), ("loss-error.png", 1800)):
        assert imread(run / name).shape[1] == width
        assert stat.S_IMODE((run / name).stat().st_mode) == 0o640  # by the umask, as of any new file


def test_the_script_is_executable():
    assert os.access(plot.__file__, os.X_OK)


def test_a_figure_replaces_an_old_one_as_a_whole_or_not_at_all(tmp_path, capsys):
    run = write_run(tmp_path)
    (run / "loss.png").write_bytes(b"old")
    before = names(run)
    with common.full_disk(1000):
        assert plot.main([str(run)]) == 1
    assert capsys.readouterr() == ("", f"plot.py: error: {run / 'loss.png'}: cannot be written (File too large)\n")
    assert (run / "loss.png").read_bytes() == b"old" and names(run) == before


def test_figures_of_several_runs_go_into_the_current_directory(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert plot.main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out.split() == list(plot.FIGURES)
    assert names(tmp_path / "here") == FIGURES
    assert names(runs[0]) == ["test.csv", "train.csv"]


def test_out_is_a_directory_or_the_file_of_the_figure_with_both_panels(tmp_path):
    run = write_run(tmp_path / "run")
    for out in ("new/figures", "new/both.png", "new/both.svg"):
        assert plot.main([str(run), "--out", str(tmp_path / out)]) == 0
    assert names(tmp_path / "new") == ["both.png", "both.svg", "figures"]
    assert names(tmp_path / "new" / "figures") == FIGURES
    assert imread(tmp_path / "new/both.png").shape[1] == 1800
    assert ElementTree.parse(tmp_path / "new/both.svg").getroot().tag.endswith("svg")
    assert names(run) == ["test.csv", "train.csv"]


# --- what the figures show --------------------------------------------------------------------------------------

def test_the_axes_are_logarithmic_with_round_numbers_at_the_ticks(tmp_path):
    axes = drawn(write_run(tmp_path / "run", n_epochs=6))
    assert axes.get_yscale() == "log" and y_ticks(axes) == ["1%", "2%", "5%", "10%", "20%", "50%"]
    write_test_csv(tmp_path, "1,0.36,11.9", "2,0.341,11.1")
    assert y_ticks(drawn(tmp_path)) == ["11%", "11.2%", "11.4%", "11.6%", "11.8%", "12%"]
    assert y_ticks(drawn(write_test_csv(tmp_path, "1,2,90", "2,1,13"))) == ["20%", "40%", "60%", "80%"]
    write_test_csv(tmp_path, "1,2.3,90", "2,1e30,90")
    assert 3 <= len(y_ticks(drawn(tmp_path, column="loss"))) <= 15
    axes = drawn(write_test_csv(tmp_path, "1,2.4,97", "2,1.2,9"))
    assert 8 < axes.get_ylim()[0] < 9 and axes.get_ylim()[1] == 100


@pytest.mark.parametrize(("batches", "ticks"), [
    (400, np.arange(9) / 20), (2400, [0, 1, 2]), (22_000, [0, 5, 10, 15, 22])])
def test_epochs_fill_the_axis_and_the_last_whole_one_has_a_tick(tmp_path, batches, ticks):
    rows = (f"{batch / 1000},2.3,90\n" for batch in range(batches + 1))
    (tmp_path / "train.csv").write_text("".join(rows))
    axes = drawn(tmp_path)
    assert axes.get_xlim() == (0, batches / 1000)
    assert list(axes.get_xticks()) == pytest.approx(ticks)


def test_legend_gives_final_and_best(tmp_path):
    run = write_test_csv(tmp_path, "1,0.9,30", "2,0.15,4.712", "3,0.3,4.768", "4,0.2,4.766")
    assert legend(drawn(run)) == ["test (final 4.77%, best 4.71% at epoch 2)"]
    assert legend(drawn(run, column="loss")) == ["test (final 0.200, best 0.150 at epoch 2)"]


def test_zero_is_drawn_on_a_linear_part_at_the_bottom(tmp_path):
    axes = drawn(write_test_csv(tmp_path, "1,2,40", "2,1,10", "3,0,0"))
    assert axes.get_ylim()[0] < 0 and y_ticks(axes)[0] == "0%" and "20%" in y_ticks(axes)
    assert y_ticks(drawn(write_test_csv(tmp_path, "1,0,0", "2,0,0")))[0] == "0%"  # nothing is above it


def test_validation_is_dashed(tmp_path):
    assert legend(drawn(write_run(tmp_path / "a")))[0] == "train (mean over an epoch)"
    axes = drawn(write_run(tmp_path / "b", val=True))
    assert legend(axes)[1] == "validation (final 8.75%, best 8.75% at epoch 3)"
    assert [line.get_linestyle() for line in axes.get_lines()] == ["-", "--", "-"]


def test_a_single_row_is_drawn_as_a_point(tmp_path):
    (tmp_path / "train.csv").write_text(HEADER + "0,2.3,89.1\n")
    axes = drawn(tmp_path)
    assert axes.get_lines()[0].get_marker() == "o"  # a line of one point would be invisible
    assert legend(axes) == ["train (mean over an epoch)", "test (no rows yet)"]
    assert list(axes.get_xticks()) == [0] and len(y_ticks(axes)) > 1


def test_a_diverged_run_shows_its_finite_values(tmp_path):
    axes = drawn(write_test_csv(tmp_path, "1,2.3,80", "2,1.9,70", "3,1e30,90", "4,nan,90", "5,inf,nan"), column="loss")
    assert axes.get_lines()[1].get_ydata().tolist() == [2.3, 1.9, 1e30]
    assert legend(axes) == ["test (final inf, best 1.90 at epoch 2)"]
    assert axes.get_xlim() == (1, 5)
    write_test_csv(tmp_path, "1,nan,90", "2,inf,90")
    assert [text.get_text() for text in drawn(tmp_path, column="loss").texts] == ["no finite values"]
    assert plot.main([str(tmp_path)]) == 0


def test_long_lines_are_thinned_and_keep_their_ends(tmp_path):
    train = drawn(write_run(tmp_path, n_epochs=50, batches=100)).get_lines()[0]
    assert 1000 < len(train.get_xdata()) <= plot.MAX_POINTS
    assert train.get_xdata()[[0, -1]].tolist() == [0, 49.99]


@pytest.mark.parametrize("n", [2, 9])
def test_each_run_has_a_colour_and_its_train_line_is_lighter_and_thinner(tmp_path, n):
    axes = drawn(*[write_run(tmp_path / f"run{i}") for i in range(n)])
    train, test = axes.get_lines()[0::2], axes.get_lines()[1::2]
    colours = [to_hex(line.get_color()) for line in test]
    assert len(set(colours)) == n and [to_hex(line.get_color()) for line in train] == colours
    for light, solid in zip(train, test, strict=True):
        assert light.get_alpha() < 1 and light.get_linewidth() < solid.get_linewidth()
    assert [text.split()[0] for text in legend(axes)] == ["train", *(f"run{i}" for i in range(n))]


@pytest.mark.filterwarnings("error")  # matplotlib warns if its font has no glyph for a character
def test_labels_tell_the_runs_apart_and_are_short_and_plain(tmp_path):
    a, b, other = Path("x/a"), Path("x/b"), Path("y/a")
    assert plot.labels_for([a, b], None) == ["a", "b"]
    assert plot.labels_for([a, other], None) == ["x/a", "y/a"]
    assert plot.labels_for([a], None) == [""]
    assert plot.labels_for([a, b], ["\x1b[31mred", "y" * 200]) == [r"\x1b[31mred", f"{'y' * 11}...{'y' * 10}"]
    run = str(write_run(tmp_path / os.fsdecode(b"caf\xe9")))
    assert plot.main([run, run, "--out", str(tmp_path), "--labels", r"$\oops$", "a\nb"]) == 0


def test_mean_is_over_the_epochs_worth_of_rows_that_ends_at_the_row():
    epochs = [epoch + batch / 100 - 1 for epoch in range(1, 5) for batch in range(100)]  # the ancestor's sum
    frame = pd.DataFrame({"epoch": epochs, "loss": np.random.default_rng(1).random(400), "error": 0.0})
    mean = plot.rolling_epoch_mean(frame)
    for row in (0, 1, 50, 99, 100, 217, 349):
        expected = frame["loss"].to_numpy()[max(0, row - 99) : row + 1].mean()
        assert mean["loss"][row] == pytest.approx(expected, rel=1e-12)
    assert mean["epoch"].tolist() == epochs and (mean["error"] == 0).all()


# --- reading ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("header", "last"), [
    (HEADER, ""), ("", "1.5,0."), (HEADER.replace("\n", "\r\n"), "1.5,nan,4")])
def test_a_file_that_still_grows_is_read_up_to_its_last_whole_line(tmp_path, header, last):
    (tmp_path / "a.csv").write_text(f"{header}0,2,90\n  \n1,1e-3,80\n2,nan,NaN\n3,inf,0\n{last}", newline="")
    frame = plot.read_csv(tmp_path / "a.csv")
    assert list(frame.columns) == ["epoch", "loss", "error"]
    np.testing.assert_array_equal(frame, [[0, 2, 90], [1, 1e-3, 80], [2, np.nan, np.nan], [3, np.inf, 0]])


@pytest.mark.parametrize("text", [HEADER, "epoch,lo", "1,2,3"])
def test_a_run_without_a_complete_row_is_refused(tmp_path, capsys, text):
    (tmp_path / "test.csv").write_text(text)
    assert f"{tmp_path}: no rows yet in test.csv" in refused(capsys, tmp_path)


@pytest.mark.parametrize("bad", ["x,1,2", "1,2", "1,2,3,4", "-1,1,2", "1e20,1,2", "\x1b[31m"])
def test_a_bad_line_is_refused_by_file_and_number(tmp_path, capsys, bad):
    run = write_run(tmp_path)
    for end in ("\n3,2,70\n4,5\n", "\n"):  # a later short row must not even out the commas
        (run / "test.csv").write_text(f"{HEADER}1,2,90\n2,2,80\n{bad}{end}")
        assert f"{run / 'test.csv'}, line 4: {plot.printable(repr(bad))}" in refused(capsys, run)
    assert names(run) == ["test.csv", "train.csv"]


@pytest.mark.parametrize("content", [
    b"epoch,loss,error\r0,2.3,90\r0.5,2.2,80\r", gzip.compress(b"0,2.3,90\n", mtime=0), b"a note",
    b"1,2,3,4\n2,3,4,5\n"])
def test_a_csv_of_another_kind_is_refused_and_not_left_out(tmp_path, capsys, content):
    run = write_run(tmp_path)
    (run / "train.csv").write_bytes(content)
    assert f"{run / 'train.csv'}, line 1: " in refused(capsys, run)


def test_what_is_no_run_is_refused_and_nothing_is_written(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    expected = "give a directory in which train.py wrote train.csv and test.csv"
    assert f"none\\x1b: is not a directory; {expected}" in refused(capsys, run, tmp_path / "none\x1b", "--out", out)
    assert f"train.csv: is not a directory; {expected}" in refused(capsys, run / "train.csv")
    assert f"{tmp_path}: has neither train.csv nor test.csv; {expected}" in refused(capsys, tmp_path)
    assert "give one for each run" in refused(capsys, run, run, "--out", out, "--labels", "a")
    assert "unrecognized arguments: --speed" in refused(capsys, run, "--speed")
    assert names(tmp_path) == ["run"] and names(run) == ["test.csv", "train.csv"]


def test_an_out_that_cannot_be_written_is_refused_before_drawing(tmp_path, capsys, monkeypatch):
    run, file = write_run(tmp_path / "run"), tmp_path / "file"
    file.write_text("kept")
    monkeypatch.setattr(plot, "draw", None)
    for out in (file, file / "below", file / "below.png"):
        assert f"{file}" in refused(capsys, run, "--out", out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert f"{run}: no permission to write there" in refused(capsys, run)
    assert file.read_text() == "kept" and names(run) == ["test.csv", "train.csv"]
