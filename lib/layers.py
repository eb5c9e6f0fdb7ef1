"""A network's layers in order, the path its dense blocks took, its backward graph, and inputs of ReLU near zero."""

import torch
import torch.nn as nn
from torch.autograd.graph import Node

import densenet
from densenet import Bottleneck, DenseNet, SingleLayer, Transition

PATHS = {False: "textbook", True: "efficient", "max": "max"}  # DenseNet's argument efficient -> its name
COMPILED_PATHS = {True: "compiled efficient", "max": "compiled max"}  # the same after compile_block
EFFICIENT_OF_PATH = {path: efficient for paths in (PATHS, COMPILED_PATHS) for efficient, path in paths.items()}
SHIFT = 0.05  # in standard deviations: the most that settle_kinks moves an output of batch norm


def layers_of(net: DenseNet) -> list[tuple[str, nn.Module]]:
    """-> names and modules of all dense layers and transitions, conv1, bn1 and fc, in order of computation"""
    return [(name, module) for name, module in net.named_modules()
            if isinstance(module, (Bottleneck, SingleLayer, Transition)) or name in ("conv1", "bn1", "fc")]


def parts_of(net: DenseNet, kind: type) -> dict[str, nn.Module]:
    """-> name and module of each direct child of this type (Sequential for dense blocks, Transition), in order of computation"""
    return {name: module for name, module in net.named_children() if isinstance(module, kind)}


class CompileFailed(RuntimeError):
    """The dense blocks cannot be compiled. The message gives the reason."""


def set_path(net: DenseNet, path: str) -> None:
    """Makes the network's dense blocks take ``path``."""
    net.efficient = EFFICIENT_OF_PATH[path]
    if path in COMPILED_PATHS.values():
        densenet.compile_block()


def describe(net: DenseNet) -> str:
    """Such as "DenseNet-BC L=100 k=12": B is for bottleneck, C for compression, L the depth, k the growth rate."""
    a = net.arguments
    letters = ("B" if a["bottleneck"] else "") + ("C" if a["reduction"] < 1 else "")
    name = f"DenseNet-{letters}" if letters else "DenseNet"
    size = f"L={a['depth']}" if a["depth"] else f"blocks {a['blockConfig']}"
    return f"{name} {size} k={a['growthRate']}"


def operations(output: torch.Tensor) -> list[Node]:
    """-> each node of the backward graph once, breadth first from that of ``output``"""
    found = [output.grad_fn]
    seen = set(found)
    for operation in found:  # the list grows in the loop; a recursion would reach Python's limit at about depth 250
        for source, _ in operation.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                found.append(source)
    return found


@torch.no_grad()
def settle_kinks(module: nn.Module, x: torch.Tensor) -> float:
    """Changes the biases of batch norm a little, in place, so that no ReLU has an input near zero.

    ReLU has no derivative at zero. If the step of a numerical derivative, or the rounding of float32, moves an input
    across zero, the gradient jumps: two correct results then differ by about 1e-2, which would hide real errors.
    Therefore each bias is chosen so that zero lies in the middle of the widest gap between its channel's values. No
    value moves by more than SHIFT standard deviations.

    Args:
        module: in training mode. One forward pass changes its batch norms one after the other.
        x: the module's input, (N, C, H, W).

    Returns:
        The smallest absolute value among the inputs of all ReLUs.
    """
    distances = []

    def shift(norm: nn.BatchNorm2d, _inputs, out: torch.Tensor) -> torch.Tensor:
        values = out.transpose(0, 1).flatten(1)  # (C, N * H * W)
        window = SHIFT * values.std(1, keepdim=True)
        values = torch.cat((-window, values.clamp(-window, window), window), 1).sort(1).values
        gap, index = values.diff(dim=1).max(1, keepdim=True)
        middle = values.gather(1, index) + gap / 2
        norm.bias -= middle.squeeze(1)
        distances.append(gap.min().item() / 2)
        return out - middle[:, :, None]  # the output with the new bias, for the layers that follow

    hooks = [m.register_forward_hook(shift) for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        module(x)
    finally:
        for hook in hooks:
            hook.remove()
    return min(distances)
