"""The least bytes that a training step has to read or write, if its operations are fused into as few kernels as their
data dependences allow.

Values per pixel, with batch norm as in densenet.EfficientBlock: each channel is normalised once (xhat), and G collects
the gradient of xhat. Affine and ReLU are part of the kernel that reads, statistics and sums of the one that writes.

    layer that reads C_l    4 C_l    xhat read forward and backward, G read and written
                          + 8 k      forward: the bottleneck's 4k channels written and read
                          + 3 k      forward: the k new channels written, read, and written again normalised
                          + 18 k     backward: G and xhat of the k new channels read; for the bottleneck's 4k channels
                                     xhat read, gradient written, and both read again when the sums are known
    block with input C_0    5 C_0    x read, xhat written; G and xhat read, dx written
    after a block of C      3 C      xhat read forward and backward, G written for the first time
                          + 2 C'/4   transition to C' channels: pooled output written, its gradient read
                            2 C      last block, per image: pooled features written, their gradient read
    stem, 3x3, to C_0       2 C_0    output written, its gradient read
    stem, 7x7, to C_0       4 C_0    at 1/2 the side: written, read by batch norm and pooling, read twice backward
                          + 3 C_0    at 1/4 the side: pooled output written, its gradient read twice

A value has 4 bytes, with bf16 2. The images (4 bytes) are read twice. A parameter moves 8 x 4 bytes: the weight is read
forward, backward and by SGD, the gradient written and read, the momentum read and written, the weight written.
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
    """The number of activations read or written in a step, as the table above counts them."""
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
    bytes_per_value = 2 if precision == "bf16" else 4
    return bytes_per_value * values_to_move(size) + 4 * 2 * images + 4 * 8 * count_parameters(net)
