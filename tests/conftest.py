import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads must not keep a shared core from working ones
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SAMPLE = ROOT / "tests" / "cifar10-sample"


@pytest.fixture
def sample() -> str:
    """1,200 real images of CIFAR-10."""
    return str(SAMPLE)
