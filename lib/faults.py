"""The faults that --inject puts into a layer, so that one can see the tools catch them."""

import argparse
import contextlib
from collections.abc import Iterable, Iterator
from unittest.mock import patch

import torch
import torch.nn as nn

import densenet
from densenet import Bottleneck, DenseBlock, DenseNet, SingleLayer
from lib.layers import parts_of

FAULTS = {
    "cat-grad": "one layer sends its gradient back to the parts of the concatenation in the wrong order",
    "grad-scale": "the gradient of one layer's first convolution is scaled by 1.01",
    "bn-no-mean": "batch norm's backward pass lacks its mean term",
    "cat-order": "one layer reads the concatenation in the wrong order, forward and backward",
    "stats-twice": "a batch norm's running statistics are updated twice a step",
}
WRONG_GRADIENTS = ("cat-grad", "grad-scale", "bn-no-mean")  # the others have right gradients, of a wrong function


def add_inject_flag(parser: argparse.ArgumentParser, faults: Iterable[str]) -> None:
    parser.add_argument("--inject", metavar="FAULT", choices=tuple(faults), default=None,
                        help="put a known fault into what is checked, to see it caught; FAULT is " +
                             ", ".join(f"{name} ({FAULTS[name]})" for name in faults))


def target_of(net: DenseNet) -> nn.Module:
    """The layer of a network that a fault is put into: halfway through."""
    blocks = [*parts_of(net, DenseBlock).values()]
    block = blocks[len(blocks) // 2]
    return block[len(block) // 2]


@contextlib.contextmanager
def injected(fault: str | None, layer: nn.Module, efficient: bool = False) -> Iterator[None]:
    """A fault in a layer, or in how the efficient block works it. The layer does not recover: give it a copy."""
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
    norm = getattr(layer, "bn2", layer.bn1)
    forward, normalise = layer.forward, norm.forward
    if fault == "bn-no-mean":
        norm.forward = lambda x: batch_norm_without_mean(norm, x)
    elif fault == "stats-twice":
        norm.forward = lambda x: (normalise(x), normalise(x))[1]
    elif isinstance(layer, (Bottleneck, SingleLayer)):  # a transition reads a concatenation, but makes none
        layer.forward = lambda x: torch.cat((x, forward(misorder(fault, x))[:, x.shape[1]:]), 1)


def misorder(fault: str, x: torch.Tensor) -> torch.Tensor:
    """The concatenation with its last channel first, or unchanged with its gradient so."""
    if fault == "cat-order":
        return x.roll(1, 1)
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda grad: grad.roll(1, 1))
    return x


def batch_norm_without_mean(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        type(norm).forward(norm, x)  # for the running statistics
    x = x - x.mean((0, 2, 3), keepdim=True).detach()
    rstd = (x.square().mean((0, 2, 3), keepdim=True) + norm.eps).rsqrt()
    return x * rstd * norm.weight[:, None, None] + norm.bias[:, None, None]


def broken_block(fault: str, layer: nn.Module):
    """A context in which the efficient block is faulty where it works ``layer``; bn-no-mean: in all layers."""
    block, backward = densenet.EfficientBlock, densenet.affine_relu_backward
    normalise_backward, update = densenet.normalise_backward, densenet.update_running_statistics
    first = layer.bn1.weight, layer.bn1.bias, layer.conv1.weight

    class Misordered(block):
        @classmethod
        def apply(cls, x, spec, *parameters):  # a layer's channels in another order: its parameters in another order
            return block.apply(x, spec, *(p.roll(1, min(1, p.dim() - 1)) if any(p is own for own in first) else p
                                          for p in parameters))

    def misordered_backward(pull, dout, xhat, gamma, beta, G, is_first):
        if gamma.data_ptr() != layer.bn1.weight.data_ptr():
            return backward(pull, dout, xhat, gamma, beta, G, is_first)
        own = [torch.empty_like(g) for g in G]
        sums, grads = backward(pull, dout, xhat, gamma, beta, own, is_first=True)
        torch._foreach_add_(G, [g.roll(1, 1) for g in own])  # no layer is the first
        return sums.roll(1, 1), grads

    def without_mean(G, xhat, rstd, sums, m):
        return normalise_backward(G, xhat, rstd, torch.stack((torch.zeros_like(sums[0]), sums[1])), m)

    def twice(norms, means, variances):
        update(norms, means, variances)
        again = [i for i, norm in enumerate(norms) if norm is layer.bn1]
        if again:
            update(*([values[i] for i in again] for values in (norms, means, variances)))

    return patch.object(densenet, *{
        "cat-order": ("EfficientBlock", Misordered), "cat-grad": ("affine_relu_backward", misordered_backward),
        "bn-no-mean": ("normalise_backward", without_mean), "stats-twice": ("update_running_statistics", twice)}[fault])
