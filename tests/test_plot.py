"""plot.py: the script as a user runs it, what the figures show, and how they are written."""

import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import common
import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from plot_helpers import ESCAPED, ESCAPES, FIGURES, HEADER, SCRIPT, names, write_run

import plot

run_script = partial(common.run_script, "plot.py")


def drawn(run, column="error"):
    """-> the axes with one run, or a list of runs, drawn on them"""
    runs = run if isinstance(run, list) else [run]
    axes = Figure(layout="constrained").subplots()
    plot.draw(axes, [plot.read_run(path, path.name if len(runs) > 1 else "") for path in runs], column)
    return axes


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def y_ticks(axes):
    return [tick.get_text() for tick in axes.get_yticklabels()]


def assert_shows_curves(path, width, height=600):
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape == (height, width, 3)
    assert 0.01 < (image < 0.9).any(axis=2).mean() < 0.3  # neither blank nor filled
    blue = np.abs(image - np.array([0, 0x72, 0xB2]) / 255).max(axis=2) < 0.02
    assert blue.sum() > 200  # the test curve


# --- the real script --------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_script_draws_a_run_into_its_directory(tmp_path):
    run = write_run(tmp_path / "run")
    result = run_script(run, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == [str(run / name) for name in ("loss.png", "error.png", "loss-error.png")]
    assert_shows_curves(run / "loss.png", 900)
    assert_shows_curves(run / "error.png", 900)
    assert_shows_curves(run / "loss-error.png", 1800)
    assert names(run) == sorted([*FIGURES, "test.csv", "train.csv"])
    assert names(tmp_path) == ["run"]


def test_script_is_executable_and_starts_with_its_own_interpreter_line():
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")


@pytest.mark.slow
def test_script_refuses_in_one_line_without_traceback(tmp_path):
    result = run_script(tmp_path / "none")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert f"{tmp_path / 'none'}: no such directory" in result.stderr


@pytest.mark.slow
def test_help_says_where_the_figures_go():
    result = run_script("--help")
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    assert "default: the run's own directory; for several runs the current directory" in text


@pytest.mark.slow
def test_the_script_draws_the_234600_rows_of_300_epochs(tmp_path):
    write_run(tmp_path, n_epochs=300, batches=782)
    assert run_script(tmp_path).returncode == 0
    assert_shows_curves(tmp_path / "error.png", 900)


@pytest.mark.slow
def test_imports_neither_torch_nor_pyplot():
    code = "import sys, plot; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, timeout=60).returncode == 0


BACKENDS = ["module://matplotlib_inline.backend_inline", "nonsense", "svg", ""]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_mplbackend_has_no_effect_on_the_script(tmp_path, backend):
    run = write_run(tmp_path)
    for argument in ("--help", run):
        result = run_script(argument, MPLBACKEND=backend)
        assert (result.returncode, result.stderr) == (0, "")
    assert names(run) == sorted([*FIGURES, "test.csv", "train.csv"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", [BACKENDS[0], *map(common.slow, BACKENDS[1:])])
def test_import_leaves_the_environment_as_it_was(backend):
    code = ("import os, subprocess, sys; before = dict(os.environ); import plot; "
            "child = [sys.executable, '-c', 'import os; print(repr(os.environ[\"MPLBACKEND\"]))']; "
            "print(os.environ == before, subprocess.check_output(child, text=True))")
    result = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, env=os.environ | {"MPLBACKEND": backend},
                            capture_output=True, text=True, timeout=60)
    assert (result.stdout.split(), result.stderr) == (["True", repr(backend)], "")


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "expected"), [("", "svg"), ("import matplotlib; matplotlib.use('pdf'); ", "pdf")])
def test_a_program_that_imports_plot_keeps_its_own_backend(setting, expected):
    code = f"{setting}import plot, matplotlib; print(matplotlib.get_backend())"
    result = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, env=os.environ | {"MPLBACKEND": "svg"},
                            capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == [expected]


@pytest.mark.slow
def test_figures_get_the_permissions_of_the_umask(tmp_path):
    run = write_run(tmp_path)
    assert subprocess.run([sys.executable, SCRIPT, run], umask=0o027, capture_output=True).returncode == 0
    assert [stat.S_IMODE((run / name).stat().st_mode) for name in FIGURES] == [0o640] * 3


@pytest.mark.slow
def test_failed_write_keeps_the_old_figure_and_leaves_nothing_behind(tmp_path):
    run = write_run(tmp_path)
    (run / "loss.png").write_bytes(b"old")
    before = names(run)
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); import plot; "
    code = limit + "sys.exit(plot.main(sys.argv[1:]))"  # no file can grow beyond 1000 bytes, as on a full disk
    result = subprocess.run([sys.executable, "-B", "-c", code, run], cwd=SCRIPT.parent, capture_output=True,
                            text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"plot.py: error: {run / 'loss.png'}: cannot be written (File too large)\n"
    assert (run / "loss.png").read_bytes() == b"old"
    assert names(run) == before


# --- what the figures show --------------------------------------------------------------------------------------

def test_error_axis_is_logarithmic_with_plain_percent(tmp_path):
    axes = drawn(write_run(tmp_path, n_epochs=6))
    assert axes.get_yscale() == "log"
    assert {"5%", "10%", "20%"} <= set(y_ticks(axes))
    assert not [tick for tick in y_ticks(axes) if "^" in tick or "$" in tick or not tick.endswith("%")]
    assert axes.get_ylim()[1] <= 100


def test_legend_gives_final_and_best(tmp_path):
    run = write_run(tmp_path)
    (run / "test.csv").write_text(HEADER + "1,0.9,30\n2,0.15,4.712\n3,0.3,4.768\n4,0.2,4.766\n")
    assert legend(drawn(run))[-1] == "test (final 4.77%, best 4.71% at epoch 2)"
    assert legend(drawn(run, "loss"))[-1] == "test (final 0.200, best 0.150 at epoch 2)"


def test_zero_error_is_drawn_at_the_bottom_of_the_axis(tmp_path):
    axes = drawn(write_run(tmp_path, zeros=True))
    train = axes.get_lines()[0]
    assert train.get_ydata()[-1] == 0
    points = axes.transData.transform([(1, 0), (1, 10), (1, 20), (1, 40)])
    heights = axes.transAxes.inverted().transform(points)[:, 1]
    assert 0 < heights[0] < 0.05 and 0.4 < heights[1] < heights[3] < 1
    assert heights[2] - heights[1] == pytest.approx(heights[3] - heights[2]) and heights[3] - heights[1] > 0.1
    assert y_ticks(axes)[0] == "0%" and "20%" in y_ticks(axes)
    assert "0%" not in y_ticks(drawn(write_run(tmp_path)))


@pytest.mark.slow
def test_errors_that_are_all_zero_are_drawn(tmp_path):
    (tmp_path / "test.csv").write_text(HEADER + "1,0,0\n2,0,0\n")
    assert y_ticks(drawn(tmp_path))[0] == "0%"
    assert plot.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(("n_epochs", "last"), [(1, 1), (2, 2), (7, 7), (300, 300)])
def test_epoch_ticks_are_whole_numbers(tmp_path, n_epochs, last):
    axes = drawn(write_run(tmp_path, n_epochs=n_epochs, batches=3))
    ticks = axes.get_xticks()
    assert (ticks == ticks.round()).all()
    assert axes.get_xlim() == (0, last)


@pytest.mark.slow
def test_a_single_row_is_drawn_as_a_point(tmp_path):
    (tmp_path / "train.csv").write_text(HEADER + "0.0,2.3,89.1\n")
    (tmp_path / "test.csv").write_text(HEADER)
    axes = drawn(tmp_path)
    assert axes.get_lines()[0].get_marker() == "o"  # a line of one point would be invisible
    assert legend(axes) == ["train (mean over an epoch)", "test (no rows yet)"]
    assert len(y_ticks(axes)) >= 2 and axes.get_ylim()[1] == 100
    assert plot.main([str(tmp_path)]) == 0
    assert matplotlib.image.imread(tmp_path / "loss.png").shape == (600, 900, 4)


@pytest.mark.slow
def test_a_run_without_training_rows_is_drawn(tmp_path):
    run = write_run(tmp_path)
    (run / "train.csv").unlink()
    assert len(drawn(run).get_lines()) == 1
    assert plot.main([str(run)]) == 0


def test_validation_is_drawn_if_there_is_a_val_csv(tmp_path):
    assert "validation" not in legend(drawn(write_run(tmp_path)))
    axes = drawn(write_run(tmp_path, val=True))
    assert legend(axes)[1] == "validation (final 8.75%, best 8.75% at epoch 3)"
    assert axes.get_lines()[1].get_linestyle() == "--"


@pytest.mark.slow
def test_csvs_without_a_header_are_drawn(tmp_path):
    run = write_run(tmp_path, header="")
    train, test = drawn(run).get_lines()
    assert len(train.get_xdata()) == 60 and test.get_xdata().tolist() == [1, 2, 3]
    assert plot.main([str(run)]) == 0
    assert_shows_curves(run / "error.png", 900)


def test_long_lines_are_thinned_and_keep_their_ends(tmp_path):
    train = drawn(write_run(tmp_path, n_epochs=50, batches=100)).get_lines()[0]
    assert 1000 < len(train.get_xdata()) <= plot.MAX_POINTS
    assert train.get_xdata()[0] == 0 and train.get_xdata()[-1] == 49.99


def test_a_diverged_run_shows_its_finite_values(tmp_path):
    rows = ["1,2.3,80", "2,1.9,70", "3,1e30,90", "4,nan,90", "5,inf,nan"]
    (tmp_path / "test.csv").write_text("\n".join(rows) + "\n")
    axes = drawn(tmp_path, "loss")
    assert axes.get_lines()[0].get_ydata().tolist() == [2.3, 1.9, 1e30]
    assert 3 <= len(axes.get_yticks()) <= 20
    assert legend(axes) == ["test (final inf, best 1.90 at epoch 2)"]
    assert axes.get_xlim() == (1, 5)
    (tmp_path / "test.csv").write_text("1,nan,90\n2,1.7e308,90\n")
    assert [text.get_text() for text in drawn(tmp_path, "loss").texts] == ["no finite values"]
    assert plot.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(("bottom", "top", "expected"), [
    (0.4, 100, [0.5, 1, 2, 5, 10, 20, 50, 100]),
    (4.1, 12, [5, 6, 7, 8, 9, 10]),
    (60, 95, [60, 70, 80, 90]),
    (1e-4, 1e3, [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1e3]),
])
def test_ticks_are_round_numbers_inside_the_axis(bottom, top, expected):
    assert plot.ticks_between(bottom, top) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rows", [
    ["0,1,2", "5e-324,1,3"],  # 1 / step overflows
    common.slow(["0,1,2", "1e-300,1,3"]),  # 1 / step fits no integer type
    common.slow(["-9e8,1,2", "9e8,1,3"]),
    common.slow(["0,-1,-2", "1,nan,nan"]),  # the point is far below the axes
    ["0,1,2", "1,1.7e308,1.7e308"],  # 309 digits in the legend
])
def test_extreme_numbers_are_drawn_without_a_warning(tmp_path, capsys, rows):
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    assert plot.main([str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("error")  # matplotlib warns, and prints the character, if its font has no glyph for it
def test_unprintable_characters_are_escaped_in_the_legend(tmp_path):
    run = str(write_run(tmp_path / "run"))
    assert plot.labels_for([Path(run)] * 2, ["\x1b[31mred", "a\nb"]) == [r"\x1b[31mred", r"a\nb"]
    assert plot.main([run, run, "--out", str(tmp_path), "--labels", "\x1b[31mred", "a\nb"]) == 0


# --- several runs -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_figures_of_several_runs_go_into_the_current_directory(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert plot.main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out == "loss.png\nerror.png\nloss-error.png\n"
    assert names(tmp_path / "here") == FIGURES
    assert names(runs[0]) == ["test.csv", "train.csv"]
    width = matplotlib.image.imread("error.png").shape[1]
    assert (width, matplotlib.image.imread("loss-error.png").shape[1]) == (900, 1800)


def test_out_is_created_with_its_parents(tmp_path):
    run = write_run(tmp_path / "run")
    assert plot.main([str(run), "--out", str(tmp_path / "new" / "figures")]) == 0
    assert names(tmp_path / "new" / "figures") == FIGURES
    assert names(run) == ["test.csv", "train.csv"]


@pytest.mark.parametrize("n", [2, 3, 9])
def test_each_run_has_a_colour_and_its_train_line_is_lighter_and_thinner(tmp_path, n):
    axes = drawn([write_run(tmp_path / f"run{i}") for i in range(n)])
    train, test = axes.get_lines()[0::2], axes.get_lines()[1::2]
    colours = [to_hex(line.get_color()) for line in test]
    assert len(set(colours)) == n
    assert [to_hex(line.get_color()) for line in train] == colours
    for light, solid in zip(train, test, strict=True):
        assert light.get_alpha() < 1 and light.get_linewidth() < solid.get_linewidth()
    assert [text.split()[0] for text in legend(axes)] == [f"run{i}" for i in range(n)]


def test_labels_tell_the_runs_apart_and_are_short():
    runs = [Path("x/a"), Path("x/b")]
    assert plot.labels_for(runs, None) == ["a", "b"]
    assert plot.labels_for(runs, ["k = 12", "k = 24"]) == ["k = 12", "k = 24"]
    assert plot.labels_for([Path("x/a"), Path("y/a")], None) == ["x/a", "y/a"]
    assert plot.labels_for([Path("x/a")], None) == [""]
    assert len(plot.labels_for([Path("x" * 200)], ["y" * 200])[0]) <= 32


@pytest.mark.slow
def test_a_directory_name_that_is_not_utf8_can_be_drawn(tmp_path):
    run = str(write_run(tmp_path / os.fsdecode(b"caf\xe9")))
    assert plot.main([run]) == 0
    assert plot.main([run, str(write_run(tmp_path / "other")), "--out", str(tmp_path)]) == 0


@pytest.mark.slow
def test_labels_with_dollars_and_underscores_are_plain_text(tmp_path):
    run = str(write_run(tmp_path / "run"))
    assert plot.main([run, run, "--out", str(tmp_path), "--labels", r"$\oops$", "_hidden"]) == 0


# --- files and their names on stdout ----------------------------------------------------------------------------

@pytest.mark.slow
def test_unprintable_characters_are_escaped_in_the_list_of_figures(tmp_path, capsys):
    run = write_run(tmp_path / f"run{ESCAPES}")
    assert plot.main([str(run)]) == 0
    expected = [rf"{tmp_path}/run{ESCAPED}/{name}" for name in ("loss.png", "error.png", "loss-error.png")]
    assert capsys.readouterr() == ("\n".join([*expected, ""]), "")
    run = write_run(tmp_path / "two\nlines")
    assert plot.main([str(run)]) == 0
    assert capsys.readouterr().out.startswith(rf"{tmp_path}/two\nlines/loss.png" + "\n")


@pytest.mark.slow
@pytest.mark.parametrize(("encoding", "shown"), [
    ("ascii", r"caf\xe9"), common.slow("utf-8", "caf\xe9")])
def test_characters_that_stdout_cannot_encode_are_escaped(tmp_path, encoding, shown):
    run = write_run(tmp_path / "caf\xe9")
    result = subprocess.run([sys.executable, SCRIPT, run], capture_output=True, timeout=60,
                            env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode().splitlines()[0] == f"{tmp_path}/{shown}/loss.png"


@pytest.mark.slow
def test_a_figure_that_cannot_be_replaced_is_reported_in_one_line(tmp_path, capsys):
    run = write_run(tmp_path)
    (run / "error.png").mkdir()  # cannot be replaced by a file
    assert plot.main([str(run)]) == 1
    expected = f"plot.py: error: {run / 'error.png'}: cannot be written (Is a directory)\n"
    assert capsys.readouterr() == ("", expected)
    assert names(run) == ["error.png", "loss.png", "test.csv", "train.csv"]


@pytest.mark.slow
def test_an_old_figure_is_not_overwritten_in_place(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "loss.png").write_bytes(b"old")
    os.link(run / "loss.png", tmp_path / "second link.png")  # shows what happens to the old file's content
    assert plot.main([str(run)]) == 0
    assert (tmp_path / "second link.png").read_bytes() == b"old"
    assert (run / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82")  # the last chunk of a complete PNG
    assert names(run) == sorted([*FIGURES, "test.csv", "train.csv"])
