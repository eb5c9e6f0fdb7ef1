"""The training, validation and test images that train.py's flags choose."""

import argparse
from typing import Any, NamedTuple

import numpy as np

from lib import data
from lib.data import ImageSet
from lib.distributed import World, barrier, broadcast
from lib.image_set import normal_form
from lib.run_directory import RunError

IMAGENET_MEAN_AND_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # which torchvision's weights were trained with


class Sets(NamedTuple):
    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    mean: list[float]  # of each channel, in [0, 1]: what images are normalised by
    std: list[float]
    digests: dict[str, str | None]  # of each set's images, labels and classes

    @property
    def nbytes(self) -> int:
        return sum(s.images.nbytes for s in (self.train, self.val, self.test) if s)


def load_sets(args: argparse.Namespace) -> Sets:
    """Raises ValueError for data that are missing, damaged or not enough."""
    train, test = data.load(args.dataset, args.data, extra=args.extra, imageSize=args.imageSize or 32)
    if args.classes:
        train, test = (data.select_classes(images, args.classes) for images in (train, test))
    if args.pretrained:  # its first convolution reads three channels
        train, test = (data.with_channels(images, 3) for images in (train, test))
    val = None
    if args.valSize:
        train, val = data.hold_out(train, args.valSize, args.seed)
    if args.batchSz > len(train.images):
        raise ValueError(f"--batchSz {args.batchSz} is more than the {len(train.images)} training images")
    mean, std = IMAGENET_MEAN_AND_STD if args.pretrained else data.mean_and_std(train.images)
    digests = {name: images and data.digest(images) for name, images in dict(train=train, val=val, test=test).items()}
    return Sets(train, val, test, mean, std, digests)


def load_on_every_rank(args: argparse.Namespace, saved: dict[str, Any] | None, world: World) -> Sets:
    """The same images everywhere. One rank of each machine loads first: the others find what it has downloaded."""
    sets = None
    if world.local_rank == 0:
        sets = load_sets(args)
    barrier(world)
    if sets is None:
        sets = load_sets(args)
    if broadcast(sets.digests, world) != sets.digests:
        raise ValueError(f"--data {args.data} holds other images than on rank 0")
    if saved:
        check_same_images(args, sets, saved)
    return sets


def check_same_images(args: argparse.Namespace, sets: Sets, saved: dict[str, Any]) -> None:
    """Raises RunError if the saved run had other images. Checkpoints of version 1.0 have no digests."""
    now = {"classes": sets.train.classes, **set_sizes(sets)}
    before = {name: saved.get(name) for name in now}
    before["classes"] = [normal_form(str(name)) for name in saved["classes"]]
    colours, before_colours = sets.mean + sets.std, saved["mean"] + saved["std"]
    same_colours = len(colours) == len(before_colours) and np.allclose(colours, before_colours, rtol=0, atol=1e-9)
    if now != before or not same_colours or saved.get("digests", sets.digests) != sets.digests:
        raise RunError(f"--data {args.data} holds other images than those of the run in {args.save}")


def set_sizes(sets: Sets) -> dict[str, int]:
    return {"trainImages": len(sets.train.images), "valImages": len(sets.val.images) if sets.val else 0,
            "testImages": len(sets.test.images)}
