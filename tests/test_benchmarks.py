"""tests/benchmarks: step.py measures the rows it is asked for; reference.sh's pieces make the uninterrupted run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import SMALL, differences, refused

import train

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import step

TINY = ["--depths", "10", "--growthRate", "4", "--batchSz", "4", "--imageSize", "8", "--steps", "1"]


def script(name, *arguments):
    return subprocess.run([BENCHMARKS / name, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable})


@pytest.mark.slow
def test_two_rows_are_measured_in_turn_into_table_and_json(tmp_path, capsys):
    names = ["ours textbook channels_last", "ours block"]
    assert step.main([*TINY, "--only", *names, "--json", str(tmp_path / "step.json")]) == 0
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["torch"] == str(torch.__version__) and written["processor"] and written["threads"] >= 1
    assert (written["precision"], written["batchSz"], written["imageSize"]) == ("fp32", 4, 8)
    textbook, block = written["rows"]
    assert [textbook["name"], block["name"]] == names
    printed = capsys.readouterr().out
    for row in (textbook, block):
        assert row["network"] == "BC 10-4" and row["turns"] == [row["seconds"]] and row["seconds"] > 0
        assert row["first"] > 0 and row["peak"] >= 0 and f"\n{row['name']}  " in printed
    assert 0 < block["kept"] < 0.7 * textbook["kept"]


def test_a_part_of_a_rows_name_is_refused_with_the_valid_names(capsys):
    line = refused(step.main, capsys, *TINY, "--only", "ours bl")
    assert "'ours bl'" in line and "'ours block'" in line


@pytest.mark.slow
def test_pieces_of_a_run_bounded_in_time_make_the_uninterrupted_run_also_after_a_move(sample, tmp_path):
    flags = ["--data", sample, *SMALL, "--nEpochs", "3"]
    assert train.main([*flags, "--save", str(tmp_path / "whole")]) == 0
    here, there = tmp_path / "here", tmp_path / "there"
    for seconds in (2, 6, 10, 600):
        result = script("reference.sh", seconds, here, *flags)
        if result.returncode == 0:
            break
        assert result.returncode == 75 and "the same command continues it" in result.stdout, result.stderr
        if here.exists():
            shutil.copytree(here, there)
            shutil.rmtree(here)
            here, there = there, here
    assert seconds > 2 and differences(tmp_path / "whole", here) == []
    assert script("reference.sh", 60, tmp_path / "new", "--depth", "11").returncode == 2  # as train.py's: do not repeat
    assert script("reference.sh", "soon", tmp_path / "new").returncode == 2
