"""Every script works from any working directory, and with any value of MPLBACKEND."""

import os
import subprocess
import sys

import pytest
from common import ROOT, SMALL, run_script

SCRIPTS = ["train.py", "plot.py", "compare_grads.py", "numcheck.py", "make_graph.py"]


def test_this_file_knows_every_script():
    assert {path.name for path in ROOT.glob("*.py")} == {*SCRIPTS, "densenet.py"}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works_from_another_directory_and_with_an_unknown_backend(script, tmp_path):
    done = run_script(script, "--help", cwd=tmp_path, MPLBACKEND="module://nowhere")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {script} ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_training_from_another_directory_draws_its_figures(tmp_path, images):
    done = run_script("train.py", *[flag for flag in SMALL if flag != "--no-plot"], "--data", images, "--nEpochs", 1,
                      "--no-cuda", "--save", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0


@pytest.mark.slow
def test_plot_draws_a_run_given_by_a_relative_path(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("train.csv", "test.csv"):
        (tmp_path / "run" / name).write_text("epoch,loss,error\n1,1.5,50\n2,1.25,40\n")
    done = run_script("plot.py", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0


@pytest.mark.slow
def test_a_graph_is_written_into_the_working_directory(tmp_path):
    done = run_script("make_graph.py", "--graph", "block", "--growthRate", 4, cwd=tmp_path, MPLBACKEND="nonsense")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph-block.png", "graph-block.svg"]


@pytest.mark.slow
@pytest.mark.parametrize(("tools", "backend"), [
    ("compare_grads, numcheck, make_graph", "nonsense"),
    *(("make_graph", backend) for backend in ("module://nowhere", "svg", ""))])
def test_importing_a_tool_does_not_change_mplbackend(tools, backend):
    """A program that imports a tool and draws its own figures gets the backend that it asked for."""
    code = (f"import os, {tools}, matplotlib\n"
            "print(os.environ['MPLBACKEND'])\n"
            "print(matplotlib.get_backend() if os.environ['MPLBACKEND'] == 'svg' else '')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT,
                          env=os.environ | {"MPLBACKEND": backend})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{backend}\n{'svg' if backend == 'svg' else ''}\n"
