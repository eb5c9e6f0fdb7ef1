"""How much memory a training step needs, how much there is, and which path of the dense block fits.

On a CPU in float32 the efficient block is the fastest. In all other cases the textbook layers are, where they fit, and
the compiled block comes next on CPUs with AVX-512 (README, "Which path runs").
"""

import argparse
import contextlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from densenet import DenseNet
from lib.cli import EFFICIENT
from lib.layers import COMPILED_PATHS, PATHS

WORTH_COMPILING = 5000  # steps: compiling takes half a minute, and saves 0.35 s a step of BC 100-12 in bf16
USABLE_SHARE = 0.8  # of the memory; the rest is for what is not counted: libraries' workspaces and fragmentation
STATE_TENSORS = {"sgd": 1, "adam": 2, "rmsprop": 1}  # that the optimizer keeps for each parameter, of its size


class Choice(NamedTuple):
    path: str  # of layers.EFFICIENT_OF_PATH
    reason: str  # why, in a few words


def kept_by_textbook(net: DenseNet, size: int, value_bytes: int = 4, mask_bytes: int = 4) -> int:
    """Bytes that the textbook layers keep for the backward pass, for one image of size x size pixels.

    A batch norm keeps its input. A ReLU keeps its output, which is also the convolution's input. A concatenation keeps
    nothing. Dropout keeps a mask: ``mask_bytes`` per value are 1 on a GPU and those of the value itself on a CPU.
    """
    values = net.arguments["inChannels"] * size**2
    masks = indices = 0
    if not net.arguments["smallInputs"]:
        size = (size - 1) // 2 + 1  # after conv1 with stride 2
        values += 2 * net.conv1.out_channels * size**2  # bn0's input, ReLU's output
        size = (size - 1) // 2 + 1  # after max pooling with stride 2
        indices = net.conv1.out_channels * size**2  # of the maxima, int64
    for b in range(1, net.nBlocks + 1):
        pixels = size**2
        for layer in getattr(net, f"dense{b}"):
            inner = layer.bn2.num_features if hasattr(layer, "bn2") else 0
            values += 2 * (layer.bn1.num_features + inner) * pixels
            masks += (inner + net.arguments["growthRate"]) * pixels
        if b < net.nBlocks:
            conv = getattr(net, f"trans{b}").conv1
            values += (2 * conv.in_channels + conv.out_channels) * pixels  # batch norm, ReLU; the pooling's input
            masks += conv.out_channels * pixels
            size //= 2
    values += 2 * net.bn1.num_features * pixels + net.fc.in_features
    if net.arguments["dropRate"] == 0:
        masks = 0
    log_probabilities = 4 * net.fc.out_features  # bytes: always float32
    return values * value_bytes + masks * mask_bytes + 8 * indices + log_probabilities


def step_bytes(net: DenseNet, args: argparse.Namespace, size: int, data_bytes: int, batch_size: int,
               on_gpu: bool) -> int:
    """Bytes of a training step with the textbook layers: what they keep for ``batch_size`` images of size x size
    pixels, weights, gradients, the optimizer's state, and the data set's ``data_bytes``."""
    value_bytes = 2 if args.precision == "bf16" else 4
    kept = kept_by_textbook(net, size, value_bytes, mask_bytes=1 if on_gpu else value_bytes)
    return batch_size * kept + 4 * (2 + STATE_TENSORS[args.opt]) * count_parameters(net) + data_bytes


def choose_path(args: argparse.Namespace, net: DenseNet, size: int, data_bytes: int, batch_size: int,
                device: torch.device, steps: int, sharing: int = 1) -> Choice:
    """The fastest path of the dense block that fits. Raises ValueError if --compile is of no use on the device.

    Args:
        size: height and width of an image in pixels
        data_bytes: size of the data set, which is held on the device
        batch_size: images per rank
        steps: training steps of the whole run
        sharing: ranks that share the device's memory
    """
    if args.syncBN:
        return Choice(PATHS[False], "--syncBN needs the textbook layers")
    if device.type not in ("cpu", "cuda"):
        if args.compile:
            raise ValueError(f"--compile: the efficient block does not run on {device.type}; leave it out")
        return Choice(PATHS[False], f"the efficient block does not run on {device.type}")
    paths = COMPILED_PATHS if args.compile else PATHS
    if args.efficient != "auto":
        return Choice(paths[EFFICIENT[args.efficient]], f"--efficient {args.efficient}")
    if args.compile:
        return Choice(paths[True], "--compile")
    if device.type == "cpu" and args.precision != "bf16":
        return Choice(PATHS[True], "the fastest on a CPU in float32")
    needed = sharing * step_bytes(net, args, size, data_bytes, batch_size, device.type == "cuda")
    available = total_memory(device)
    figures = f"{needed / 1e9:.1f} of {available / 1e9:.1f} GB"
    if needed <= USABLE_SHARE * available:
        return Choice(PATHS[False], f"a step of the textbook layers fits, with {figures}")
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # compiling was measured to pay there
    if device.type == "cpu" and steps >= WORTH_COMPILING and has_avx512 and has_cxx_compiler():
        paths = COMPILED_PATHS
    return Choice(paths[True], f"a step of the textbook layers does not fit, with {figures}")


def has_cxx_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler, which it needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def total_memory(device: torch.device) -> int:
    """-> bytes of the GPU's memory; else of the physical memory, or of a container's limit if that is less"""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *cgroup_limits()])


def cgroup_limits(cgroups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """-> bytes: the memory limits of this process's control group and of its ancestors (Linux, cgroup 1 and 2)"""
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


def count_parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
