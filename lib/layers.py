"""A network's layers in order of computation, the path that ran, its backward graph, and ReLU's kinks."""

import torch
import torch.nn as nn
from torch.autograd.graph import Node

from densenet import Bottleneck, DenseBlock, DenseNet, SingleLayer, Transition

PATHS = {False: "textbook", True: "efficient", "max": "max"}  # DenseNet's efficient -> a block's last_path
SHIFT = 0.05  # standard deviations: how far settle_kinks may move a batch norm's output


def layers_of(net: DenseNet) -> list[tuple[str, nn.Module]]:
    """In order of computation."""
    return [(name, module) for name, module in net.named_modules()
            if isinstance(module, (Bottleneck, SingleLayer, Transition)) or name in ("conv1", "bn1", "fc")]


def parts_of(net: DenseNet, kind: type) -> dict[str, nn.Module]:
    """Its dense blocks or its transitions, in order of computation."""
    return {name: module for name, module in net.named_children() if isinstance(module, kind)}


def check_path(net: DenseNet, path: bool | str) -> None:
    """Raises RuntimeError if a dense block took another path: what is checked then says nothing of this one."""
    for name, block in parts_of(net, DenseBlock).items():
        if block.last_path != PATHS[path]:
            raise RuntimeError(f"{name} took the {block.last_path} path; to be checked was the {PATHS[path]} path")


def describe(net: DenseNet) -> str:
    a = net.arguments
    letters = "B" * a["bottleneck"] + "C" * (a["reduction"] < 1)
    size = f"L={a['depth']}" if a["depth"] else f"blocks {a['blockConfig']}"
    return f"DenseNet{'-' * bool(letters)}{letters} {size} k={a['growthRate']}"


def operations(output: torch.Tensor) -> list[Node]:
    """Each node of the backward graph once, the output's first."""
    found = [output.grad_fn]
    seen = set(found)
    for operation in found:  # grows on the way: a recursion would end at about depth 250
        for source, _ in operation.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                found.append(source)
    return found


@torch.no_grad()
def settle_kinks(module: nn.Module, x: torch.Tensor) -> float:
    """Moves the batch norms' biases a little, so that no ReLU reads a value near zero; -> the least distance left.

    At zero ReLU has no derivative. A value that the difference's step, or float32's rounding, carries across zero
    changes the gradient by a jump, and both results are right: a difference of 1e-2 that would hide real errors.
    So each channel is shifted, by at most SHIFT standard deviations, to the middle of the widest gap in its values.
    """
    distances = []

    def shift(norm: nn.BatchNorm2d, _inputs, out: torch.Tensor) -> torch.Tensor:
        values = out.transpose(0, 1).flatten(1)  # (C, N * H * W)
        window = SHIFT * values.std(1, keepdim=True)
        values = torch.cat((-window, values.clamp(-window, window), window), 1).sort(1).values
        gap, at = values.diff(dim=1).max(1, keepdim=True)
        middle = values.gather(1, at) + gap / 2
        norm.bias -= middle.squeeze(1)
        distances.append(gap.min().item() / 2)
        return out - middle[:, :, None]

    hooks = [m.register_forward_hook(shift) for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    module(x)
    for hook in hooks:
        hook.remove()
    return min(distances)
