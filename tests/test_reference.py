"""tests/benchmarks/reference.sh: pieces bounded in time make the uninterrupted run, also after a move."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import SMALL, differences

import train

SCRIPT = Path(__file__).resolve().parent / "benchmarks/reference.sh"


def piece(seconds, directory, *flags):
    return subprocess.run([str(SCRIPT), str(seconds), str(directory), *flags], capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable})


@pytest.mark.slow
def test_pieces_on_two_machines_make_the_uninterrupted_run(sample, tmp_path):
    flags = ["--data", sample, *SMALL, "--nEpochs", "3"]
    assert train.main([*flags, "--save", str(tmp_path / "whole")]) == 0
    here, there = tmp_path / "here", tmp_path / "there"
    statuses = []
    for seconds in (2, 6, 10, 600):
        result = piece(seconds, here, *flags)
        statuses.append(result.returncode)
        if result.returncode == 0:
            break
        assert result.returncode == 75, result.stderr
        assert "the same command continues it" in result.stdout
        if here.exists():  # what one machine leaves is brought to another
            shutil.copytree(here, there)
            shutil.rmtree(here)
            here, there = there, here
    assert statuses[0] == 75 and statuses[-1] == 0
    assert differences(tmp_path / "whole", here) == []


@pytest.mark.slow
def test_what_is_refused_is_not_to_be_continued(tmp_path):
    assert piece(60, tmp_path / "run", "--depth", "11").returncode == 2
    for seconds in ("0", "soon"):
        result = piece(seconds, tmp_path / "run")
        assert result.returncode == 2 and "SECONDS" in result.stderr
