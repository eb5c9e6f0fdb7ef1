"""The training, validation and test images that train.py's flags choose."""

import argparse
from typing import Any, NamedTuple

import numpy as np

from lib import data
from lib.data import ImageSet
from lib.distributed import World, barrier, broadcast
from lib.image_set import normal_form
from lib.run_directory import RunError

IMAGENET_MEAN_AND_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of torchvision's pretrained networks


class Sets(NamedTuple):
    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    mean: list[float]  # of each channel, in [0, 1]; images are normalised by it and std
    std: list[float]
    digests: dict[str, str | None]  # data.digest of "train", "val" and "test"

    @property
    def nbytes(self) -> int:
        return sum(s.images.nbytes for s in (self.train, self.val, self.test) if s)


def load_sets(args: argparse.Namespace) -> Sets:
    """Reads the images. Raises ValueError if they are missing, damaged or too few."""
    train, test = data.load(args.dataset, args.data, extra=args.extra, imageSize=args.imageSize or 32)
    if args.classes:
        train, test = (data.select_classes(images, args.classes) for images in (train, test))
    if args.pretrained:  # torchvision's first convolution takes three channels
        train, test = (data.with_channels(images, 3) for images in (train, test))
    val = None
    if args.valSize:
        train, val = data.hold_out(train, args.valSize, args.seed)
    if args.batchSz > len(train.images):
        raise ValueError(f"--batchSz {args.batchSz} is more than the {len(train.images)} training images")
    mean, std = IMAGENET_MEAN_AND_STD if args.pretrained else data.mean_and_std(train.images)
    digests = {"train": data.digest(train), "val": data.digest(val) if val else None, "test": data.digest(test)}
    return Sets(train, val, test, mean, std, digests)


def load_on_every_rank(args: argparse.Namespace, saved: dict[str, Any] | None, world: World) -> Sets:
    """Loads the images on every rank; on each machine local rank 0 goes first, and downloads for the others. Raises
    ValueError as ``load_sets``, or if the images are not those of rank 0 or of the saved run."""
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
    mean_std, saved_mean_std = sets.mean + sets.std, saved["mean"] + saved["std"]
    is_same = len(mean_std) == len(saved_mean_std) and np.allclose(mean_std, saved_mean_std, rtol=0, atol=1e-9)
    if now != before or not is_same or saved.get("digests", sets.digests) != sets.digests:
        raise RunError(f"--data {args.data} holds other images than those of the run in {args.save}")


def set_sizes(sets: Sets) -> dict[str, int]:
    return {"trainImages": len(sets.train.images), "valImages": len(sets.val.images) if sets.val else 0,
            "testImages": len(sets.test.images)}
