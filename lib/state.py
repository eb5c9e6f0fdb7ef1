"""The state that a checkpoint holds besides weights and optimizer: of a new run, and of a resumed one."""

import argparse
import math
from typing import Any

import torch

import densenet
from lib.device import environment
from lib.distributed import World, broadcast
from lib.flags import NOT_SAVED
from lib.memory import choose_path
from lib.network import make_net
from lib.sets import Sets, set_sizes

KEPT_ON_RESUME = ("scheduleEpochs", "environment", "path", "pathReason", "mean", "std", "epoch", "val", "test", "best",
                  "csvLengths", "csvDigests")  # a resumed run takes these from its checkpoint


def initial_state(args: argparse.Namespace, sets: Sets, device: torch.device, world: World) -> dict[str, Any]:
    """-> the state before the first epoch, with the path of the dense block that fits into memory"""
    with torch.device("meta"):  # shapes without memory
        net = make_net(args, nClasses=len(sets.train.classes), inChannels=sets.train.images.shape[1])
    choice = choose_path(args, net, sets.train.images.shape[-1], sets.nbytes, args.batchSz // world.size, device,
                         steps=args.nEpochs * math.ceil(len(sets.train.images) / args.batchSz),
                         sharing=world.local_size if device.type == "cpu" else 1)
    choice = broadcast(choice, world)  # another rank's memory may differ
    return {"format": 1, "version": densenet.__version__,
            "flags": {name: value for name, value in vars(args).items() if name not in NOT_SAVED},
            "scheduleEpochs": args.nEpochs, "environment": environment(device, args.precision, world),
            "path": choice.path, "pathReason": choice.reason,
            "mean": sets.mean, "std": sets.std, "classes": sets.train.classes, **set_sizes(sets),
            "digests": sets.digests, "epoch": 0, "val": None, "test": None, "best": None, "csvLengths": {}}


def resumed_state(state: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """-> the present run's ``state``, with the progress of the ``saved`` one

    A finished run with validation that gets more epochs loses its test result: it is tested again at its new end.
    """
    state = state | {name: saved[name] for name in KEPT_ON_RESUME if name in saved}
    if state["valImages"] and state["test"] and state["epoch"] < state["flags"]["nEpochs"]:
        state |= {"test": None, "csvLengths": state["csvLengths"] | {"test.csv": 0}}
    return state
