"""What the tests of data sets and batches share."""

import numpy as np
import pytest
import torch

from lib import data

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def noise(n, height=32, width=32, channels=3):
    """-> uint8 (n, channels, height, width), random from 1 to 255: no pixel is black"""
    return torch.from_numpy(np.random.default_rng(1).integers(1, 256, (n, channels, height, width), dtype=np.uint8))


def load_error(dataset, folder, **settings):
    """-> the one-line message with which data.load refuses the data"""
    with pytest.raises(data.DataError) as raised:
        data.load(dataset, str(folder), **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)
