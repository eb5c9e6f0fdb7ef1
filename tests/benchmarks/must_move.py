"""The bytes of every tensor that a training step has to read or write, each fused into as few kernels as its data
dependences allow.

In values a pixel, for batch norm as in densenet.EfficientBlock (xhat is made once a channel, G collects its
gradient; affine and ReLU belong to the kernel that reads, statistics and sums to the one that writes):

    layer of C_l channels   4 C_l    xhat read forward and backward, G read and written
                          + 8 k      forward: the 4k channels between the convolutions, written and read
                          + 3 k      forward: the k new ones written, read and written normalised
                          + 18 k     backward: G and xhat of the k new ones read; of the 4k between, xhat read, the
                                     gradient written, both read again once the sums are known
    block of input C_0      5 C_0    x read, xhat written; G and xhat read, dx written
    behind a block of C     3 C      xhat read forward and backward, G written for the first time
                          + 2 C'/4   transition to C' channels: pooled output written, its gradient read
                            2 C      after the last block, an image: pooled features written, their gradient read
    stem, 3x3, to C_0       2 C_0    output written, its gradient read
    stem, 7x7, to C_0       4 C_0    at half the side: written, read by batch norm and pooling, twice in its backward
                          + 3 C_0    at a quarter: pooled output written, its gradient read twice

Each value is 4 bytes, with bf16 2. The images (4 bytes) are read twice. Each parameter is 8 times 4 bytes: weight read
forward, backward and by SGD, gradient written and read, momentum read and written, weight written.
"""

import math
from typing import NamedTuple

import torch

import densenet
from lib.memory import count_parameters


class Size(NamedTuple):
    growthRate: int
    layers: tuple[int, ...]  # of each block
    batchSz: int
    imageSize: int = 32
    smallInputs: bool = True


SIZES = {
    "bc40-16": Size(12, (6, 6, 6), 16),
    "bc100-64": Size(12, (16, 16, 16), 64),
    "bc100-256": Size(12, (16, 16, 16), 256),
    "bc190-64": Size(40, (31, 31, 31), 64),
    "densenet121-64": Size(32, (6, 12, 24, 16), 64, 224, smallInputs=False),
}


def classes(size: Size) -> int:
    return 10 if size.smallInputs else 1000


def values_to_move(size: Size) -> int:
    """Activations read or written, as the table above counts them."""
    k, n = size.growthRate, size.batchSz
    c, side = 2 * k, size.imageSize
    if size.smallInputs:
        values = 2 * c * n * side**2
    else:
        half, side = math.ceil(side / 2), math.ceil(side / 4)
        values = 4 * c * n * half**2 + 3 * c * n * side**2
    for b, layers in enumerate(size.layers, 1):
        pixels = n * side**2
        values += 5 * c * pixels
        for _ in range(layers):
            values += (4 * c + 29 * k) * pixels
            c += k
        values += 3 * c * pixels
        if b < len(size.layers):
            c, side = c // 2, side // 2
            values += 2 * c * n * side**2
        else:
            values += 2 * c * n
    return values


def bytes_to_move(size: Size, precision: str) -> int:
    with torch.device("meta"):
        net = densenet.DenseNet(size.growthRate, blockConfig=size.layers, nClasses=classes(size),
                                smallInputs=size.smallInputs)
    images = size.batchSz * 3 * size.imageSize**2
    return (2 if precision == "bf16" else 4) * values_to_move(size) + 4 * 2 * images + 4 * 8 * count_parameters(net)
