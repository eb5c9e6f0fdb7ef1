"""Every script works from any working directory, and importing one leaves MPLBACKEND alone."""

import importlib
import subprocess
import sys

import pytest
from common import ROOT, run_script

import make_graph

SCRIPTS = ["train.py", "plot.py", "compare_grads.py", "numcheck.py", "make_graph.py"]


def test_this_file_knows_every_script():
    assert {path.name for path in ROOT.glob("*.py")} == {*SCRIPTS, "densenet.py"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_the_script_s_usage_and_writes_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(script.removesuffix(".py")).main
    try:
        assert main(["--help"]) == 0
    except SystemExit as stop:
        assert stop.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: {script} ") and err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plot_draws_a_run_given_by_a_relative_path(tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("train.csv", "test.csv"):
        (tmp_path / "run" / name).write_text("epoch,loss,error\n1,1.5,50\n2,1.25,40\n")
    done = run_script("plot.py", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0


@pytest.mark.slow
def test_a_graph_is_written_into_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_graph.main(["--graph", "block", "--growthRate", "4"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph-block.png", "graph-block.svg"]


IMPORT = """
import os
import torch, torchvision  # once, before the forks: this takes the time

for tool, backend in (("compare_grads", "nonsense"), ("numcheck", ""), ("make_graph", "module://nowhere"),
                      ("make_graph", "svg")):
    child = os.fork()
    if child == 0:
        os.environ["MPLBACKEND"] = backend
        __import__(tool)
        import matplotlib
        assert os.environ["MPLBACKEND"] == backend
        assert backend != "svg" or matplotlib.get_backend() == "svg"
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, (tool, backend)
"""


@pytest.mark.slow
def test_importing_a_tool_does_not_change_mplbackend():
    """A program that imports a tool and draws its own figures gets the backend that it asked for."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
