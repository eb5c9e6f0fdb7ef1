"""How much memory a training step needs, how much there is, and which path of the dense block that allows.

The textbook layers are the fastest where they fit on a GPU, and in bfloat16; the efficient block is the fastest in
float32 on a CPU (README, "Which path runs").
"""

import argparse
import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import torch

from densenet import DenseNet
from lib.cli import EFFICIENT

SHARE = 0.8  # of the memory that a step may take by this arithmetic: libraries' workspaces and fragments need the rest
STATE_TENSORS = {"sgd": 1, "adam": 2, "rmsprop": 1}  # as large as a parameter, that an optimizer keeps for it


class Choice(NamedTuple):
    efficient: bool | str  # DenseNet's argument
    reason: str  # why, in a few words


def kept_by_textbook(net: DenseNet, size: int, value_bytes: int = 4, mask_bytes: int = 4) -> int:
    """Bytes that the textbook layers keep for the backward pass, for an image of size x size.

    A batch norm keeps its input, a ReLU its output, which is also the convolution's input; a concatenation keeps
    nothing. Dropout keeps a mask, of ``mask_bytes`` a value: 1 on a GPU, a whole value on a CPU.
    """
    small, dropout = net.arguments["smallInputs"], net.arguments["dropRate"] > 0
    pixels = size * size
    values = net.arguments["inChannels"] * pixels
    masks = indices = 0
    if not small:
        for stage in ("conv1", "pool"):
            size = (size - 1) // 2 + 1
            pixels = size * size
            if stage == "conv1":
                values += 2 * net.conv1.out_channels * pixels  # bn0's input, ReLU's output
            else:
                indices = net.conv1.out_channels * pixels  # of the maxima, int64
    for b in range(1, net.nBlocks + 1):
        for layer in getattr(net, f"dense{b}"):
            inner = layer.bn2.num_features if hasattr(layer, "bn2") else 0
            values += 2 * (layer.bn1.num_features + inner) * pixels
            masks += dropout * (inner + net.arguments["growthRate"]) * pixels
        if b < net.nBlocks:
            conv = getattr(net, f"trans{b}").conv1
            values += (2 * conv.in_channels + conv.out_channels) * pixels  # batch norm, ReLU; the pooling's input
            masks += dropout * conv.out_channels * pixels
            size //= 2
            pixels = size * size
    values += 2 * net.bn1.num_features * pixels + net.fc.in_features
    log_probabilities = 4 * net.fc.out_features  # always float32
    return values * value_bytes + masks * mask_bytes + 8 * indices + log_probabilities


def step_bytes(net: DenseNet, args: argparse.Namespace, size: int, images: int, batch_size: int, on_gpu: bool) -> int:
    """Bytes of a training step with the textbook layers: what they keep for ``batch_size`` images, weights, gradients,
    the optimizer's state, and the data set's ``images`` bytes."""
    value_bytes = 2 if args.precision == "bf16" else 4
    kept = kept_by_textbook(net, size, value_bytes, mask_bytes=1 if on_gpu else value_bytes)
    return batch_size * kept + 4 * (2 + STATE_TENSORS[args.opt]) * count(net) + images


def choose_path(args: argparse.Namespace, net: DenseNet, size: int, images: int, batch_size: int,
                device: torch.device, sharing: int = 1) -> Choice:
    """The fastest path of the dense block that fits.

    Args:
        images: bytes of the data set on the device
        batch_size: images of a rank
        sharing: ranks that share the device's memory
    """
    if args.syncBN:
        return Choice(False, "--syncBN needs the textbook layers")
    if args.efficient != "auto":
        return Choice(EFFICIENT[args.efficient], f"--efficient {args.efficient}")
    if device.type not in ("cpu", "cuda"):
        return Choice(False, f"the efficient block does not run on {device.type}")
    if device.type == "cpu" and args.precision != "bf16":
        return Choice(True, "the fastest on a CPU in float32")
    needed = sharing * step_bytes(net, args, size, images, batch_size, device.type == "cuda")
    available = total_memory(device)
    figures = f"{needed / 1e9:.1f} of {available / 1e9:.1f} GB"
    if needed <= SHARE * available:
        return Choice(False, f"a step of the textbook layers fits, with {figures}")
    return Choice(True, f"a step of the textbook layers does not fit, with {figures}")


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine: its physical memory or, if that is less, the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *cgroup_limits()])


def cgroup_limits(cgroups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The memory limits of this process's control group and of those above it (Linux; versions 1 and 2), in bytes."""
    limits = []
    with contextlib.suppress(OSError):
        for line in cgroups.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            base, file = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
            group = base / name.lstrip("/")
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                    limits.append(int((folder / file).read_text()))
                if folder == base:
                    break
    return limits


def count(net: torch.nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in net.parameters())
