"""What the tests of reading images and of batches share."""

import numpy as np
import pytest
import torch

from lib import data

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def noise(n, height=32, width=32, channels=3):
    return torch.from_numpy(np.random.default_rng(1).integers(1, 256, (n, channels, height, width), dtype=np.uint8))


def refused(dataset, folder, **settings):
    """-> the one line that load() refuses the data with"""
    with pytest.raises(data.DataError) as refusal:
        data.load(dataset, str(folder), **settings)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)
