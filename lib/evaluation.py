"""Evaluation on test or validation images: of each epoch, and of a checkpoint by ``train.py --evaluate``."""

import argparse
import contextlib
import csv
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import densenet
from lib import data
from lib.batches import Batches
from lib.cli import say
from lib.device import set_up_device
from lib.distributed import World, sum_over_ranks
from lib.flags import restore


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision != "bf16":
        return contextlib.nullcontext()
    # no cache: a graph would replay the first step's casts of the weights
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@torch.no_grad()
def evaluate(net: densenet.DenseNet, batches: Batches, args: argparse.Namespace, world: World,
             outputs: list[torch.Tensor] | None = None) -> list[float]:
    """-> mean loss and error in percent over the images of all ranks; ``outputs`` gets the log-probabilities"""
    net.eval()
    dtype = torch.float32 if batches.device.type == "mps" else torch.float64  # mps has no float64
    total = torch.zeros(2, dtype=dtype, device=batches.device)
    size = max(args.batchSz, 250 * 32 * 32 // (batches.height * batches.width))  # as many pixels at any image size
    for images, labels, _ in batches.plain(size, None, world.rank, world.size):
        with autocast(images.device, args.precision):
            output = net(images)
        total[0] += F.nll_loss(output, labels, reduction="sum")
        total[1] += (output.argmax(1) != labels).sum() * 100
        if outputs is not None:
            outputs.append(output.cpu())
    net.train()
    return (sum_over_ranks(total, world) / batches.n).tolist()


def evaluate_run(args: argparse.Namespace, explicit: dict[str, Any]) -> None:
    """Prints the test loss, error and each class's error of --evaluate, a checkpoint or a run's directory, whose flags
    are the defaults; writes --predictions."""
    file = Path(args.evaluate)
    if file.is_dir():
        file /= "best.pth" if (file / "best.pth").exists() else "latest.pth"
    try:
        checkpoint = densenet.read_checkpoint(file)
    except OSError as error:
        raise ValueError(f"--evaluate {file}: {error.strerror}") from None
    net, of_run = densenet.network_of(checkpoint, file), restore(checkpoint, str(file))
    for name in ("dataset", "data", "classes", "imageSize", "precision", "deterministic"):
        if name not in explicit:
            setattr(args, name, getattr(of_run, name))
    if "data" not in explicit and not os.path.exists(args.data):
        raise ValueError(f"the run's --data {args.data} is not to be found from here; give --data")
    if args.precision == "tf32" and "precision" not in explicit and not torch.cuda.is_available():
        args.precision = "fp32"  # of a run on a GPU
    device = set_up_device(args, World())
    [test] = data.load(args.dataset, args.data, ["test"], imageSize=args.imageSize or 32, classes=args.classes,
                       download="data" in explicit)
    test = test.with_channels(net.arguments["inChannels"])
    if test.classes != net.classes:
        raise ValueError(f"--data {args.data} has the classes {data.shorten(test.classes)}, the checkpoint "
                         f"{data.shorten(net.classes)}")
    batches, outputs = Batches(test, net.mean.flatten().tolist(), net.std.flatten().tolist(), device), []
    loss, error = evaluate(net.to(device), batches, args, World(), outputs)
    say(f"{file}: test loss {loss:.4f}, error {error:.2f}% of {batches.n} images ({args.precision})")
    probability, prediction = torch.cat(outputs).float().exp().max(1)
    for label, name in enumerate(test.classes):
        wrong = prediction[test.labels == label] != label
        say(f"  {name}: {100 * wrong.float().mean():.2f}%" if len(wrong) else f"  {name}: no images")
    if args.predictions:
        names = test.files or range(batches.n)
        with open(args.predictions, "w", newline="", errors="surrogateescape") as table:
            writer = csv.writer(table)
            writer.writerow(("image", "label", "prediction", "probability"))
            writer.writerows((name, test.classes[label], test.classes[found], f"{p:.6g}") for name, label, found, p
                             in zip(names, test.labels, prediction, probability.tolist(), strict=True))
        say(args.predictions)
