"""Faults that the tests of compare_grads.py and numcheck.py plant into the network, to show that the tools find them.

``plant(monkeypatch, fault, n)`` breaks the layers with n input channels, or all.
"""

from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.nn.functional as F

import densenet
from densenet import Bottleneck, SingleLayer, Transition


def misordered(right, layer, x):
    """The layer reads the concatenated channels in the wrong order."""
    return torch.cat((x, right(layer, x.roll(1, 1))[:, x.shape[1]:]), 1)


def scaled(right, layer, x):
    """The gradient of the layer's first weight is scaled by 1.01."""
    weight = layer.conv1.weight.view_as(layer.conv1.weight)
    weight.register_hook(lambda gradient: 1.01 * gradient)
    with patch.dict(layer.conv1._parameters, weight=weight):
        return right(layer, x)


def without_mean(right, layer, x):
    """The backward pass of the layer's batch norm takes the mean for a constant."""
    with patch.object(layer.bn1, "forward", partial(norm_without_mean, layer.bn1)):
        return right(layer, x)


def norm_without_mean(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        nn.BatchNorm2d.forward(norm, x)  # updates the running statistics
    x = x - x.mean((0, 2, 3), keepdim=True).detach()
    rstd = (x.square().mean((0, 2, 3), keepdim=True) + norm.eps).rsqrt()
    return x * rstd * norm.weight[:, None, None] + norm.bias[:, None, None]


def updated_twice(right, layer, x):
    """The running statistics of the layer's batch norm are updated twice."""
    with torch.no_grad():
        layer.bn1(x)
    return right(layer, x)


def plant(monkeypatch, fault, n: int | None = None) -> None:
    """Breaks Bottleneck, SingleLayer and Transition by one of the functions above."""
    for kind in (Bottleneck, SingleLayer, Transition):
        def forward(self, x, right=kind.forward):
            return fault(right, self, x) if n in (None, x.shape[1]) else right(self, x)
        monkeypatch.setattr(kind, "forward", forward)


def replace_function(monkeypatch, name: str, wrong) -> None:
    """Replaces a function of torch.nn.functional in densenet.py alone, not in torchvision."""
    monkeypatch.setattr(densenet, "F", SimpleNamespace(**vars(F) | {name: wrong}))


def scaled_in_block(monkeypatch, which) -> None:
    """Scales a gradient that the efficient block returns by 1.01: that of its input, or of its last convolution."""
    right = densenet.EfficientBlock.backward

    def backward(ctx, *gradients):
        gradients = list(right(ctx, *gradients))
        at = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.dim() == 4]
        i = at[0] if which == "input" else at[-1]
        gradients[i] = 1.01 * gradients[i]
        return tuple(gradients)

    monkeypatch.setattr(densenet.EfficientBlock, "backward", staticmethod(backward))
