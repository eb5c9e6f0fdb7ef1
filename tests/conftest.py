import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not keep a shared core from working ones
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small networks have no work for more, and -n 2 runs two tests at a time
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shutil

import pytest
import torch
from common import EPOCHS, SAMPLE, SMALL, cut_sample, stopped_at
from twin import use_twin

import train


def pytest_addoption(parser):
    parser.addoption("--twin", action="store_true",
                     help="trainings in this process replay a recorded step, as a GPU does by a CUDA graph")


@pytest.fixture(autouse=True)
def twin(request, monkeypatch):
    has_own_twins = request.path.name == "test_step.py"  # and checks on which devices train.py uses a graph
    if request.config.getoption("--twin") and not has_own_twins:
        use_twin(monkeypatch)


@pytest.fixture
def sample() -> str:
    """1,200 real images of CIFAR-10."""
    return str(SAMPLE)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """80 of them for training, 40 for testing."""
    return cut_sample(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small networks have no work for more
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def flags(images) -> list[str]:
    """Of a run of EPOCHS epochs with three steps each."""
    return ["--data", images, *SMALL, "--nEpochs", str(EPOCHS)]


@pytest.fixture(scope="module")
def whole(flags, one_thread, tmp_path_factory):
    """The uninterrupted run; not to be written to."""
    save = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*flags, "--save", str(save)]) == 0
    return save


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def stopped(flags, one_thread, tmp_path_factory):
    """A run that SIGTERM stopped in the second step of epoch 3, and a copy; the copy is not to be written to."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    assert stopped_at("train_step", 8, [*flags, "--save", str(run)]) == 143
    return run, shutil.copytree(run, run.with_name("copy"))


@pytest.fixture
def half(stopped):
    """That run, to be damaged: as it was, at the place that its flags name."""
    run, copy = stopped
    shutil.rmtree(run, ignore_errors=True)
    return shutil.copytree(copy, run)
