import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not keep a shared core from working ones
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from common import SAMPLE, cut_sample


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
