"""The network that train.py's flags describe: builds it, refuses early what cannot be trained, gets its weights."""

import argparse
import contextlib
import hashlib
import io
from pathlib import Path

import torch
import torchvision

import densenet
from lib import data
from lib.cli import network_arguments, warn
from lib.distributed import World, sum_over_ranks
from lib.layers import PATHS, CompileFailed, set_path
from lib.memory import count_parameters, total_memory

ARCHS = ("densenet121", "densenet161", "densenet169", "densenet201")


def make_net(args: argparse.Namespace, **arguments) -> densenet.DenseNet:
    """Adds ``arguments`` to those that the flags give. Raises ValueError for impossible geometry."""
    if args.arch:
        return getattr(densenet, args.arch)(dropRate=args.dropRate, **arguments)
    return densenet.DenseNet(**network_arguments(args), dropRate=args.dropRate, initChannels=args.initChannels,
                             **arguments)


def choose_compiled_or_not(net: densenet.DenseNet, path: str, world: World) -> dict[str, str]:
    """Makes the network's blocks take ``path``. If a rank cannot compile them, rank 0 warns, and all ranks train with
    the same path uncompiled.

    -> what that changes in the run's state: its path and the reason, or nothing
    """
    reason = ""
    try:
        set_path(net, path)
    except CompileFailed as error:
        reason = str(error)
    if path in PATHS.values():  # nothing was compiled
        return {}
    failures = sum_over_ranks(torch.tensor([float(reason != "")], device=net.fc.weight.device), world).item()
    if failures == 0:
        return {}
    path = PATHS[net.efficient]
    set_path(net, path)
    if world.rank == 0:
        warn(reason or "the efficient block runs without torch.compile, which failed in another process")
    return {"path": path, "pathReason": "torch.compile failed"}


def check_network(args: argparse.Namespace, device: torch.device, nRanks: int) -> None:
    """Raises ValueError for a batch that cannot be split equally over the ranks, for impossible geometry, or if even a
    part of a step needs more than the memory."""
    if args.batchSz % nRanks:
        raise ValueError(f"--batchSz {args.batchSz} cannot be shared by {nRanks} processes; valid are multiples of "
                         f"{nRanks}")
    with torch.device("meta"):  # shapes without memory
        net = make_net(args)
    side = (args.imageSize or 32) // (4 if args.arch else 1)
    # in float32 weights, gradients and momentum; the first block's output for a batch, and its gradient
    needed = 12 * count_parameters(net) + 8 * args.batchSz // nRanks * side**2 * net.trans1.bn1.num_features
    available = total_memory(device)
    if needed > available:
        raise ValueError(f"a step of this network with --batchSz {args.batchSz} needs {needed / 1e9:.0f} GB of memory "
                         f"at least; {device} has {available / 1e9:.0f} GB")


def check_images(args: argparse.Namespace, images: torch.Tensor, smallest: int) -> None:
    """Raises ValueError if the images are too small for the network, or batch norm gets one value per channel.

    ``smallest``: the smallest number of images that a rank has in a step.
    """
    with torch.device("meta"):  # shapes without memory
        net = make_net(args, inChannels=images.shape[1])
        try:
            net(torch.empty(2, *images.shape[1:]))
        except ValueError as error:
            raise ValueError(f"--imageSize {args.imageSize}: {error}") from None
        try:
            net(torch.empty(smallest, *images.shape[1:]))
        except ValueError:
            raise ValueError(f"--batchSz {args.batchSz} for {len(images)} images: the smallest batch gives a process "
                             "one image with a 1x1 feature map, and batch norm needs at least two values; valid are "
                             "other batch sizes, or a larger --imageSize") from None


def pretrained_weights(arch: str) -> dict[str, torch.Tensor]:
    """torchvision's weights, from torch's cache or downloaded into it; the SHA-256 in the file's name is checked.

    Raises:
        ValueError: if the cached file is damaged, or the download fails.
    """
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/")[-1])
    is_cached = file.exists()
    try:
        if is_cached:  # torch checks only what it downloads
            with open(file, "rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            expected = file.stem.rsplit("-")[-1]
            if not found.startswith(expected):
                raise ValueError(f"its SHA-256 begins with {found[:len(expected)]}, not {expected}")
        with data.quiet_download(), contextlib.redirect_stderr(io.StringIO()):  # torch prints the URL
            return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # urllib's, pickle's, zipfile's, torch's
        reason = " ".join(str(error).split())[:200]
        if is_cached:
            raise ValueError(f"--pretrained: {file} is damaged ({reason}); remove it") from None
        raise ValueError(f"--pretrained: there is no {file}, and its download failed ({reason}); put it there"
                         ) from None
