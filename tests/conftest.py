import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads leave the core to working ones
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks gain nothing by more, and -n 2 runs two tests at a time
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shutil

import pytest
import torch
from common import EPOCHS, SAMPLE, SMALL, cut_sample, stopped_at
from twin import use_twin

import train


def pytest_addoption(parser):
    parser.addoption("--twin", action="store_true",
                     help="trainings replay a recorded step on the CPU, as they replay a CUDA graph on a GPU")


@pytest.fixture(autouse=True)
def twin(request, monkeypatch):
    has_own_twins = request.path.name == "test_step.py"  # it also checks on which devices train.py uses a graph
    if request.config.getoption("--twin") and not has_own_twins:
        use_twin(monkeypatch)


@pytest.fixture
def sample() -> str:
    """Directory of the built-in sample: 1,200 real images of CIFAR-10."""
    return str(SAMPLE)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Directory of a data set of 80 training and 40 test images, cut from the sample."""
    return cut_sample(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def flags(images) -> list[str]:
    """train.py's flags, without --save, for a run of EPOCHS epochs with three steps each."""
    return ["--data", images, *SMALL, "--nEpochs", str(EPOCHS)]


@pytest.fixture(scope="module")
def whole(flags, one_thread, tmp_path_factory):
    """The directory of a finished run that was never interrupted. Tests must not write to it."""
    save = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags, "--save", str(save)]) == 0
    return save


@pytest.fixture
def run(whole, tmp_path):
    """A copy of ``whole`` that a test may damage."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def stopped(flags, one_thread, tmp_path_factory):
    """A run that was stopped in the second step of epoch 3. Tests must not write to it."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    assert stopped_at("train_step", 8, [*flags, "--save", str(run)]) == 143
    return run


@pytest.fixture
def interrupted(stopped, tmp_path):
    """A copy of ``stopped`` that a test may damage or resume."""
    return shutil.copytree(stopped, tmp_path / "interrupted")
