"""The known faults of --inject. Put into one layer, they show that numcheck.py and compare_grads.py catch them."""

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn as nn

import densenet
from densenet import Bottleneck, DenseBlock, DenseNet, SingleLayer
from lib.layers import parts_of

FAULTS = {
    "cat-grad": "the backward pass of one layer's concatenation returns the channels in the wrong order",
    "grad-scale": "the gradient of one layer's first convolution is scaled by 1.01",
    "bn-no-mean": "batch norm's backward pass treats the mean as a constant",
    "cat-order": "one layer reads the concatenated channels in the wrong order, forward and backward",
    "stats-twice": "the running statistics of one batch norm are updated twice per step",
}
WRONG_GRADIENTS = ("cat-grad", "grad-scale", "bn-no-mean")  # with the others, gradients still match the forward pass


def add_inject_flag(parser: argparse.ArgumentParser, faults: Iterable[str]) -> None:
    parser.add_argument("--inject", metavar="FAULT", choices=tuple(faults), default=None,
                        help="put a known fault into the layers under test, to show that it is caught; FAULT is " +
                             ", ".join(f"{name} ({FAULTS[name]})" for name in faults))


def target_of(net: DenseNet) -> nn.Module:
    """-> the layer that gets the fault: the middle one of the middle block"""
    blocks = [*parts_of(net, DenseBlock).values()]
    block = blocks[len(blocks) // 2]
    return block[len(block) // 2]


@contextlib.contextmanager
def injected(fault: str | None, layer: nn.Module, efficient: bool = False) -> Iterator[None]:
    """A context in which ``layer`` has a fault.

    Args:
        fault: a key of FAULTS; None for no fault.
        layer: a dense layer or transition. Pass a copy: unless ``efficient``, it keeps the fault after the context.
        efficient: the efficient block computes the layer, so put the fault into the block's functions.
    """
    if fault == "grad-scale":
        layer.conv1.weight.register_hook(lambda grad: 1.01 * grad)
    elif fault and efficient:
        with broken_block(fault, layer):
            yield
        return
    elif fault:
        break_layer(fault, layer)
    yield


def break_layer(fault: str, layer: nn.Module) -> None:
    """Replaces the forward method of the layer, or of its last batch norm."""
    norm = getattr(layer, "bn2", layer.bn1)
    forward, normalise = layer.forward, norm.forward
    if fault == "bn-no-mean":
        norm.forward = lambda x: batch_norm_without_mean(norm, x)
    elif fault == "stats-twice":
        def normalise_twice(x: torch.Tensor) -> torch.Tensor:
            normalise(x)
            return normalise(x)

        norm.forward = normalise_twice
    elif isinstance(layer, (Bottleneck, SingleLayer)):  # a transition does not concatenate
        layer.forward = lambda x: torch.cat((x, forward(misorder(fault, x))[:, x.shape[1]:]), 1)


def misorder(fault: str, x: torch.Tensor) -> torch.Tensor:
    """cat-order: -> x with its last channel moved to the front. cat-grad: -> x, but its gradient is reordered so."""
    if fault == "cat-order":
        return x.roll(1, 1)
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda grad: grad.roll(1, 1))
    return x


def batch_norm_without_mean(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Batch norm in training mode without a gradient through the mean; (N, C, H, W) -> (N, C, H, W)."""
    with torch.no_grad():
        type(norm).forward(norm, x)  # updates the running statistics
    x = x - x.mean((0, 2, 3), keepdim=True).detach()
    rstd = (x.square().mean((0, 2, 3), keepdim=True) + norm.eps).rsqrt()
    return x * rstd * norm.weight[:, None, None] + norm.bias[:, None, None]


def broken_block(fault: str, layer: nn.Module):
    """A context in which the efficient block has the fault where it computes ``layer``; bn-no-mean: in all layers."""
    block, backward = densenet.EfficientBlock, densenet.outer_backward
    tile_functions, update = densenet.tile_functions, densenet.update_running_statistics
    first = layer.bn1.weight, layer.bn1.bias, layer.conv1.weight

    class Misordered(block):
        @classmethod
        def apply(cls, x, spec, *parameters):
            # reorder the input channels of the layer's parameters, which is the same as to reorder the channels of x
            reordered = list(parameters)
            for i, p in enumerate(parameters):
                if any(p is own for own in first):
                    reordered[i] = p.roll(1, 0 if p.dim() == 1 else 1)  # gamma, beta: (C,); weight: (outputs, C, h, w)
            return block.apply(x, spec, *reordered)

    def misordered_backward(f, vjp, dout, xhat, gamma, beta, G, sums, is_first):
        if gamma.data_ptr() != layer.bn1.weight.data_ptr():
            return backward(f, vjp, dout, xhat, gamma, beta, G, sums, is_first)
        from_layer, its_sums = [torch.empty_like(g) for g in G], torch.zeros_like(sums)
        grads = backward(f, vjp, dout, xhat, gamma, beta, from_layer, its_sums, is_first=True)
        torch._foreach_add_(G, [g.roll(1, 1) for g in from_layer])  # G already holds the gradient from later layers
        sums += its_sums.roll(1, 1)
        return grads

    def without_mean(compiled):
        functions = vars(tile_functions(compiled)).copy()
        for name in ("standardise_backward", "standardise_affine_relu_backward"):
            functions[name] = without_first_sum(functions[name])
        return SimpleNamespace(**functions)

    def without_first_sum(function):
        def run(*arguments):
            arguments = [torch.stack((torch.zeros_like(a[0]), a[1])) if torch.is_tensor(a) and a.dim() == 2 else a
                         for a in arguments]  # the sums are the only matrix
            return function(*arguments)
        return run

    def update_twice(norms, means, variances):
        update(norms, means, variances)
        for norm, mean, variance in zip(norms, means, variances, strict=True):
            if norm is layer.bn1:
                update([norm], [mean], [variance])

    name, replacement = {
        "cat-order": ("EfficientBlock", Misordered),
        "cat-grad": ("outer_backward", misordered_backward),
        "bn-no-mean": ("tile_functions", without_mean),
        "stats-twice": ("update_running_statistics", update_twice),
    }[fault]
    return patch.object(densenet, name, replacement)
