"""plot.py: what it reads from a run's CSVs, what it refuses, and the mean over an epoch."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from common import slow
from plot_helpers import ESCAPED, ESCAPES, HEADER, SCRIPT, names, refused, write_run

import plot

# --- reading ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("header", [HEADER, "", HEADER.replace("\n", "\r\n")])
def test_reads_with_and_without_header(tmp_path, header):
    (tmp_path / "a.csv").write_bytes((header + "0.0,2.5,90.0\n0.5,1e-3,0\n").encode())
    frame = plot.read_csv(tmp_path / "a.csv")
    assert list(frame.columns) == ["epoch", "loss", "error"]
    assert frame.to_numpy().tolist() == [[0, 2.5, 90], [0.5, 1e-3, 0]]


@pytest.mark.parametrize("header", [HEADER, "", HEADER.replace("\n", "\r\n")])
def test_reads_a_csv_with_a_byte_order_mark(tmp_path, capsys, header):
    (tmp_path / "test.csv").write_text(header + "1,2.5,90\n2,1e-3,0\n", encoding="utf-8-sig")
    assert plot.read_csv(tmp_path / "test.csv").to_numpy().tolist() == [[1, 2.5, 90], [2, 1e-3, 0]]
    (tmp_path / "test.csv").write_text(header + "bad\n", encoding="utf-8-sig")
    assert f"line {2 if header else 1}: 'bad'" in refused(capsys, tmp_path)


def test_blank_lines_are_skipped(tmp_path):
    (tmp_path / "a.csv").write_text(HEADER + "1,2,90\n  \n\n2,nan,80\n")
    assert str(plot.read_csv(tmp_path / "a.csv").to_numpy().tolist()) == "[[1.0, 2.0, 90.0], [2.0, nan, 80.0]]"


@pytest.mark.parametrize("last", ["1", "1.5", "1.5,", "1.5,0.", "1.5,0.3,", "1.5,0.3,4", "1.5,0.3,-", "junk"])
def test_ignores_a_last_line_without_newline(tmp_path, last):
    (tmp_path / "a.csv").write_text(HEADER + "0,2,90\n1,1,80\n" + last)
    assert plot.read_csv(str(tmp_path / "a.csv"))["error"].tolist() == [90, 80]


@pytest.mark.parametrize("text", ["", HEADER, "epoch,lo", HEADER + "1,2,3", "1,2,3"])
def test_a_file_without_a_complete_row_gives_an_empty_frame(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    frame = plot.read_csv(tmp_path / "a.csv")
    assert list(frame.columns) == ["epoch", "loss", "error"]
    assert frame.empty and frame.to_numpy().dtype == np.float64


def test_reads_nan_and_inf_of_a_diverged_run(tmp_path):
    (tmp_path / "a.csv").write_text(HEADER + "0,2,90\n1,nan,90\n2,inf,nan\n3,-inf,NaN\n")
    frame = plot.read_csv(tmp_path / "a.csv")
    assert str(frame["loss"].tolist()) == "[2.0, nan, inf, -inf]"
    assert str(frame["error"].tolist()) == "[90.0, 90.0, nan, nan]"


@pytest.mark.parametrize("header", [HEADER, ""])
@pytest.mark.parametrize("bad", ["x,1,2", "1,2", "1,2,3,4", "1,,3", "1,2,", "1;2;3", "1,2,3%", "nan,1,2",
                                 "inf,1,2", "epoch,loss,error", "1,2,3 4", "\0\0\0"])
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, capsys, header, bad):
    run = write_run(tmp_path)
    (run / "test.csv").write_text(f"{header}1,2,90\n2,2,80\n{bad}\n3,2,70\n")
    before = names(run)
    line = 4 if header else 3
    error = refused(capsys, run)
    assert f"{run / 'test.csv'}, line {line}: {bad!r}" in error
    assert "epoch,loss,error" in error
    assert names(run) == before


def test_all_rows_of_the_wrong_width_are_refused(tmp_path, capsys):
    (tmp_path / "test.csv").write_text("1,2,3,4\n2,3,4,5\n")
    assert f"{tmp_path / 'test.csv'}, line 1: '1,2,3,4'" in refused(capsys, tmp_path)


def test_a_long_row_is_refused_even_if_a_short_row_evens_out_the_number_of_commas(tmp_path, capsys):
    (tmp_path / "test.csv").write_text("1,2,3\n1,2,3,4\n1,2\n")
    assert "line 2: '1,2,3,4'" in refused(capsys, tmp_path)


# --- files that no run has written ------------------------------------------------------------------------------

def run_with_3_gb(*args):
    """Runs the script with at most 3 GB of memory. It needs less than 1 GB for any run."""
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, ({3 * 2**30},) * 2); import plot; "
    command = [sys.executable, "-B", "-c", code + "sys.exit(plot.main(sys.argv[1:]))", *args]
    return subprocess.run(command, cwd=SCRIPT.parent, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [
    ("device", "train.csv"), slow("device", "test.csv"), slow("pipe", "val.csv")])
def test_devices_and_pipes_are_refused(tmp_path, kind, name):
    run = write_run(tmp_path, val=True)
    (run / name).unlink()
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to("/dev/zero")
    result = run_with_3_gb(run)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"plot.py: error: {run / name}: not a regular file")
    assert result.stderr.count("\n") == 1
    assert names(run) == ["test.csv", "train.csv", "val.csv"]


@pytest.mark.slow
def test_a_csv_larger_than_any_run_writes_is_refused(tmp_path):
    run = write_run(tmp_path)
    os.truncate(run / "train.csv", 2**40)
    result = run_with_3_gb(run)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"{run / 'train.csv'}: 1,099,511,627,776 bytes, too large" in result.stderr


@pytest.mark.slow
def test_reads_through_a_symbolic_link(tmp_path):
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    (run / "train.csv").unlink()
    (run / "train.csv").symlink_to(other / "train.csv")
    assert plot.main([str(run)]) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("epoch", ["1e9", "-1e9", "1e20", "1.7e308", "-1.7e308"])
def test_epochs_too_large_for_an_axis_are_refused(tmp_path, capsys, epoch):
    (tmp_path / "test.csv").write_text(f"0,1,2\n{epoch},1,2\n0,1,2\n")
    assert f"line 2: '{epoch},1,2'" in refused(capsys, tmp_path)


def test_unprintable_characters_are_escaped_in_messages(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert f"none{ESCAPED}: no such directory" in refused(capsys, tmp_path / f"none{ESCAPES}")
    assert f"--labels: 1 (a{ESCAPED})" in refused(capsys, run, run, "--labels", f"a{ESCAPES}")
    assert f"unrecognized arguments: --a{ESCAPED}" in refused(capsys, run, f"--a{ESCAPES}")
    (run / f"file{ESCAPES}").touch()
    assert f"file{ESCAPED}: is not a directory" in refused(capsys, run, "--out", run / f"file{ESCAPES}")
    (run / "test.csv").write_text(f"1,2,3\n{ESCAPES}\n")
    assert f"line 2: '{ESCAPED}'" in refused(capsys, run)


# --- other refusals ---------------------------------------------------------------------------------------------

def test_a_path_without_rows_of_a_run_is_refused(tmp_path, capsys):
    empty, header_only = tmp_path / "empty", tmp_path / "header"
    empty.mkdir()
    header_only.mkdir()
    for name in ("train.csv", "test.csv"):
        (header_only / name).write_text(HEADER)
    file = tmp_path / "file"
    file.write_text("1,2,3\n")
    assert f"{tmp_path / 'none'}: no such directory" in refused(capsys, tmp_path / "none")
    assert f"{file}: is not a directory" in refused(capsys, file)
    assert f"{empty}: contains neither train.csv nor test.csv" in refused(capsys, empty)
    assert f"{header_only}: no rows yet in train.csv or test.csv" in refused(capsys, header_only)
    assert names(empty) == [] and names(header_only) == ["test.csv", "train.csv"]


def test_nothing_is_written_if_one_of_several_runs_is_refused(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    assert "none: no such directory" in refused(capsys, run, tmp_path / "none", "--out", out)
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"]])
def test_refuses_the_wrong_number_of_labels(tmp_path, capsys, labels):
    run = write_run(tmp_path / "run")
    error = refused(capsys, run, run, "--out", tmp_path, "--labels", *labels)
    assert f"--labels: {len(labels)} ({', '.join(labels)}) for 2 runs; give one for each run" in error
    assert names(tmp_path) == ["run"]


def test_refuses_an_out_that_is_a_file(tmp_path, capsys):
    run, file = write_run(tmp_path / "run"), tmp_path / "file"
    file.write_text("kept")
    assert f"{file}: is not a directory" in refused(capsys, run, "--out", file)
    assert f"{file}: is not a directory" in refused(capsys, run, "--out", file / "below")
    assert file.read_text() == "kept"


def test_refuses_a_csv_that_is_a_directory(tmp_path, capsys):
    (tmp_path / "train.csv").mkdir()
    assert f"{tmp_path / 'train.csv'}: not a regular file" in refused(capsys, tmp_path)


@pytest.mark.parametrize(("args", "message"), [
    ([], "the following arguments are required: RUN"),
    (["run", "--speed"], "unrecognized arguments: --speed"),
    (["run", "--out"], "argument --out: expected one argument"),
    (["run", "--out=--"], "argument --out: expected one argument"),
])
def test_wrong_command_lines_end_in_one_line(capsys, args, message):
    assert message in refused(capsys, *args)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_refuses_without_permission(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    try:
        run.chmod(0o500)
        assert f"{run}: no permission to write there" in refused(capsys, run)
        (run / "train.csv").chmod(0)
        error = refused(capsys, run, "--out", tmp_path)
        assert f"{run / 'train.csv'}: cannot be read (Permission denied)" in error
        run.chmod(0)
        assert "cannot be read (Permission denied)" in refused(capsys, run, "--out", tmp_path)
    finally:
        run.chmod(0o700)
    assert names(tmp_path) == ["run"] and names(run) == ["test.csv", "train.csv"]


# --- the window and the mean over it ----------------------------------------------------------------------------

def train_frame(n_rows, batches, decimals=17):
    epochs = np.arange(n_rows) / batches
    values = np.random.default_rng(1).random((n_rows, 2))
    return pd.DataFrame({"epoch": epochs.round(decimals), "loss": values[:, 0], "error": 100 * values[:, 1]})


@pytest.mark.parametrize("batches", [1, 2, 98, 391, 782])
@pytest.mark.parametrize("n_epochs", [1, 1.5, 2, 3.5, 10])
def test_window_is_the_number_of_batches_per_epoch(batches, n_epochs):
    assert plot.rows_per_epoch(train_frame(max(1, int(n_epochs * batches)), batches)) == batches


@pytest.mark.parametrize("n_rows", [2, 3, 100])
def test_window_is_known_before_the_first_epoch_ends(n_rows):
    assert plot.rows_per_epoch(train_frame(n_rows, 782)) == 782


def test_window_with_the_ancestors_rounding_of_epochs():
    epochs = [epoch + batch / 782 - 1 for epoch in range(1, 6) for batch in range(782)]
    assert plot.rows_per_epoch(pd.DataFrame({"epoch": epochs})) == 782


def test_window_with_epochs_rounded_to_3_decimals():
    assert plot.rows_per_epoch(train_frame(10 * 782, 782, decimals=3)) == 782


def thinned(frame, k):
    """Replaces every k rows by their mean."""
    return frame.groupby(np.arange(len(frame)) // k).mean()


@pytest.mark.parametrize("k", [2, 10, 17, 78])
@pytest.mark.parametrize("n_epochs", [1, 2, 20])
def test_window_of_a_thinned_log(k, n_epochs):
    window = plot.rows_per_epoch(thinned(train_frame(n_epochs * 782, 782), k))
    assert abs(window - 782 / k) <= 1


@pytest.mark.parametrize("k", [782, 3 * 782])
def test_window_of_a_log_with_one_row_per_epoch_or_fewer(k):
    assert plot.rows_per_epoch(thinned(train_frame(30 * 782, 782), k)) == 1


def test_window_of_a_log_that_starts_late_or_repeats_rows():
    frame = train_frame(6 * 100, 100)
    assert plot.rows_per_epoch(frame[frame["epoch"] > 2.7]) == 100
    assert plot.rows_per_epoch(frame[frame["epoch"].between(2.7, 4.3)]) == 100
    assert plot.rows_per_epoch(pd.concat([frame[:250], frame[200:]])) == 100


@pytest.mark.parametrize("epochs", [[0.0], [7.0], [0.5, 0.5], [3.0, 2.0], [1.0, 3.0]])
def test_window_is_one_row_if_the_epochs_do_not_tell(epochs):
    assert plot.rows_per_epoch(pd.DataFrame({"epoch": epochs})) == 1


def test_mean_is_over_the_epoch_that_ends_at_the_row():
    frame = train_frame(350, 100)
    mean = plot.rolling_epoch_mean(frame)
    assert mean["epoch"].equals(frame["epoch"])
    for row in (0, 1, 50, 99, 100, 217, 349):
        for column in ("loss", "error"):
            expected = frame[column].to_numpy()[max(0, row - 99) : row + 1].mean()
            assert mean[column][row] == pytest.approx(expected, rel=1e-12)


def test_mean_of_fewer_rows_than_the_window():
    mean = plot.rolling_epoch_mean(train_frame(7, 782))
    assert len(mean) == 7 and np.isfinite(mean.to_numpy()).all()


def test_mean_skips_values_that_are_not_finite():
    frame = train_frame(40, 10)
    frame.loc[[12, 13, 14], "loss"] = [np.nan, np.inf, 1e300]
    mean = plot.rolling_epoch_mean(frame)
    expected = frame["loss"].to_numpy()[[6, 7, 8, 9, 10, 11, 15]].mean()
    assert mean["loss"][15] == pytest.approx(expected)
    assert mean["loss"][30] == pytest.approx(frame["loss"][21:31].mean())
    assert np.isfinite(mean.to_numpy()).all()


def test_mean_of_zeros_is_exactly_zero():
    frame = train_frame(40, 10)
    frame.loc[20:, "error"] = 0.0
    assert (plot.rolling_epoch_mean(frame)["error"][29:] == 0).all()
