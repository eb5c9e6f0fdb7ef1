#!/usr/bin/env python3
"""Trains a DenseNet: ./train.py [flags] writes train.csv, test.csv, run.json, latest.pth and figures to --save.

Without flags: the paper's DenseNet-BC (L=100, k=12) on CIFAR-10 with crop and flip, 300 epochs, on the GPU if there is
one; on several: torchrun --nproc-per-node=4 train.py [flags]. ./plot.py draws the CSVs again at any time.
"""

if __name__ == "__main__":
    from lib.stop import stop_on_signals
    stop_on_signals()  # before the slow imports

import argparse
import copy
import functools
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import setproctitle
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import densenet
from lib import cli, data, distributed
from lib.batches import Batches, batch_sizes, dropout_seed, epoch_randomness
from lib.cli import exit_status, network_arguments
from lib.cuda_graph import GraphedStep
from lib.data import Images
from lib.device import device_name, set_up_device
from lib.distributed import World, broadcast, broadcast_buffers, sum_over_ranks
from lib.evaluation import autocast, evaluate, evaluate_run
from lib.flags import parse_args, resumed_args, saved_flags
from lib.run import Run, RunError

IMAGENET_MEAN_AND_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of torchvision's pretrained networks


@exit_status
def main(argv: list[str] | None = None) -> None:
    # flags and run
    args, explicit = parse_args(argv, __doc__)
    if args.evaluate:
        return evaluate_run(args, explicit)
    world = distributed.start()
    run, saved = Run(args.save), None
    if world.rank == 0:  # only rank 0 reads and writes the run's directory
        saved = run.start(args.resume, args.overwrite)
    if saved := broadcast(saved, world):
        args = resumed_args(args, explicit, saved)
    elif args.resume:
        say(f"there is no run in {args.save} yet: this starts one", world)
    device = set_up_device(args, world)
    check_flags(args, device, world)
    setproctitle.setproctitle(f"train.py {args.save}")
    if saved and saved["epoch"] >= args.nEpochs and saved["test"]:  # nothing is left to do
        return finish(run, saved, args, world)

    # images and batches
    if saved and "data" not in explicit and not os.path.exists(args.data):  # not to be downloaded again elsewhere
        raise RunError(f"the run's --data {args.data} is not to be found from here; give --data")
    images = load_images(args, world)
    mean, std = images["train"].mean_and_std()
    if args.pretrained:
        mean, std = IMAGENET_MEAN_AND_STD
    about_images = {"classes": images["train"].classes, "mean": mean, "std": std}
    for part in ("train", "val", "test"):
        about_images[f"{part}Images"] = len(images[part].labels) if part in images else 0
    check_same_images(args, about_images, saved or broadcast(about_images, world))
    judge = "val" if args.valSize else "test"  # the images that judge each epoch

    # network and optimizer
    torch.manual_seed(args.seed)  # weights are drawn on the CPU: the same for every device
    net = make_net(args, nClasses=len(images["train"].classes), inChannels=images["train"].pixels.shape[1])
    net.check_input(images["train"].pixels[:1])
    if not saved:
        about_images |= load_initial_weights(net, args, world)
    net.efficient = choose_efficient(args, device, world, saved)
    if args.syncBN and world.size > 1:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device)
    if device.type == "cuda":
        net.to(memory_format=torch.channels_last)  # as the activations: else each step copies the weights
    optimizer, settings = make_optimizer(args, net, device, world)
    state = {"format": 1, "version": densenet.__version__, "flags": saved_flags(args),
             "environment": {"device": device_name(device), "processes": world.size, "threads": torch.get_num_threads(),
                             "torch": str(torch.__version__), "python": platform.python_version()},
             "arguments": net.arguments, "parameters": sum(p.numel() for p in net.parameters()),
             "efficient": net.efficient, **about_images, "scheduleEpochs": args.nEpochs, "epoch": 0, "best": None,
             "val": None, "test": None, "csvLengths": {}, "csvDigests": {}}
    if saved:
        state |= load_checkpoint(saved, net, optimizer, settings, args)
    batches = {part: Batches(found, state["mean"], state["std"], device, args.border) for part, found in images.items()}
    del images  # batches hold them
    step = make_step(args, distributed.average_gradients(net, world), optimizer, uses_graph(args, device, world))

    if world.rank == 0:
        run.begin(state | state_dicts(net, optimizer), saved)
    say(f"{args.save}: {args.arch or f'L={args.depth} k={args.growthRate}'}, {state['parameters']:,} parameters, "
        f"{state['environment']['device']}{f' x {world.size}' if world.size > 1 else ''}, "
        f"{ {False: 'textbook layers', True: 'efficient block', 'max': 'efficient block (max)'}[net.efficient]}, "
        f"{state['trainImages']:,} training and {state['testImages']:,} test images", world)
    for epoch in range(state["epoch"] + 1, args.nEpochs + 1):
        start = time.perf_counter()
        rate = learning_rate(args.schedule, args.lr, epoch, state["scheduleEpochs"])
        for group in optimizer.param_groups:
            group["lr"] = rate

        train_loss, train_error = train_epoch(step, batches["train"], args, epoch, run, world)
        broadcast_buffers(net, world)
        loss, error = evaluate(net, batches[judge], args, world)

        check_finite(f"{judge} loss", loss, epoch)
        is_best = not state["best"] or error < state["best"]["error"]
        if is_best:
            state["best"] = {"error": error, "epoch": epoch}
        state |= {"epoch": epoch, "test": None, judge: {"loss": loss, "error": error}}
        if world.rank == 0:
            run.add(f"{judge}.csv", [(epoch, loss, error)])
            run.save(state | state_dicts(net, optimizer), is_best=is_best and judge == "val")
            if not args.no_plot:
                run.plot()
        say(f"epoch {epoch}/{args.nEpochs}  rate {rate:g}  train loss {train_loss:.4f} error {train_error:.2f}%  "
            f"{judge} loss {loss:.4f} error {error:.2f}%  {time.perf_counter() - start:.1f} s", world)

    # with --valSize the test set is used only here, with the weights of the best epoch
    if judge == "val":
        last_weights, best = copy.deepcopy(net.state_dict()), state["best"]["epoch"]
        net.load_state_dict(broadcast(run.read_best(best)["model"] if world.rank == 0 else None, world))
        loss, error = evaluate(net, batches["test"], args, world)
        check_finite("test loss", loss, state["epoch"], saved=state["epoch"])
        net.load_state_dict(last_weights)
        state["test"] = {"loss": loss, "error": error}
        if world.rank == 0:
            run.add("test.csv", [(best, loss, error)])
            run.save(state | state_dicts(net, optimizer), keep_previous=False)
    finish(run, state, args, world)


# --- training ------------------------------------------------------------------------------------

def train_step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, precision: str, images: torch.Tensor,
               labels: torch.Tensor, images_per_rank: float) -> torch.Tensor:
    """Trains on a batch. -> (2,): mean loss and error in percent, on the device: reading them waits for a GPU

    ``images_per_rank`` is the global batch size / world size. DDP averages gradients over the ranks, so a summed loss
    divided by it gives the mean over the global batch, even if one rank has an image more than another. Averaged over
    the ranks, the loss and error returned are those of the global batch, too.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, precision):
        output = net(images)
    loss = F.nll_loss(output, labels, reduction="sum") / images_per_rank
    loss.backward()
    optimizer.step()
    wrong = (output.detach().argmax(1) != labels).sum()
    return torch.stack((loss.detach(), wrong * 100 / images_per_rank))


def train_epoch(step: Callable[..., torch.Tensor], batches: Batches, args: argparse.Namespace, epoch: int, run: Run,
                world: World) -> list[float]:
    """-> the epoch's mean loss and error in percent; train.csv gets one row per step. Raises FloatingPointError for a
    loss that is not finite."""
    torch.manual_seed(dropout_seed(args.seed, epoch, world.rank))
    random = epoch_randomness(batches.n, args.seed, epoch, batches.padding)
    if args.no_augment:
        stream = batches.plain(args.batchSz, random.order, world.rank, world.size)
    else:
        stream = batches.augmented(random, args.batchSz, world.rank, world.size)
    n = len(batch_sizes(batches.n, args.batchSz, world.size))
    read_every = 1 if batches.device.type == "cpu" else math.ceil(n / 8)  # steps; a read waits for the GPU
    pending, sizes, total, done = [], [], np.zeros(2), 0  # pending: steps whose results are still on the device
    with tqdm(total=n, desc=f"epoch {epoch}/{args.nEpochs}", unit="step", leave=False,
              disable=None if world.rank == 0 else True) as bar:  # None: no bar unless stderr is a terminal
        for images, labels, size in stream:  # size of the global batch
            pending.append(step(images, labels, size / world.size))
            sizes.append(size)
            bar.update()
            if len(pending) == read_every or done + len(pending) == n:
                values = (sum_over_ranks(torch.stack(pending), world) / world.size).tolist()
                for i, (loss, _) in enumerate(values, done + 1):  # before any of these steps is written
                    check_finite(f"loss of step {i}", loss, epoch)
                if world.rank == 0:
                    # the fraction of an epoch at which the step began
                    run.add("train.csv", [(epoch - 1 + i / n, *v) for i, v in enumerate(values, done)])
                bar.set_postfix(loss=f"{values[-1][0]:.3f}", error=f"{values[-1][1]:.1f}%", refresh=False)
                total += np.array(sizes) @ np.array(values)  # means times batch sizes: sums over images
                done += len(pending)
                pending, sizes = [], []
    return (total / batches.n).tolist()


def learning_rate(schedule: str, lr: float, epoch: int, nEpochs: int) -> float:
    """-> the rate in an epoch, from 1 on; it never rises, and epochs after ``nEpochs`` keep the last one

    step: lr / 10 once half of the epochs are done (from epoch 151 of 300 on), lr / 100 once 3/4 are (paper, 4.2).
    cosine: lr (1 + cos(pi t)) / 2, where t is the share of epochs that are done.
    """
    epoch = min(epoch, nEpochs)
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * (epoch - 1) / nEpochs)) / 2
    if schedule == "step" and 4 * (epoch - 1) >= 3 * nEpochs:  # in integers: 3/4 of 50 epochs is not a whole number
        return lr / 100
    return lr / 10 if schedule == "step" and 2 * (epoch - 1) >= nEpochs else lr


def check_finite(name: str, value: float, epoch: int, saved: int | None = None) -> None:
    """Raises FloatingPointError for infinity and nan. ``saved``: the epoch in latest.pth, by default the one before."""
    if not math.isfinite(value):
        saved = epoch - 1 if saved is None else saved
        kept = f"latest.pth holds epoch {saved}" if saved else "no epoch was finished yet"
        raise FloatingPointError(f"the {name} is {value} in epoch {epoch}; {kept}; start again with a lower --lr (and "
                                 "--overwrite or another --save)")


# --- images -----------------------------------------------------------------------------------------------------

def load_images(args: argparse.Namespace, world: World) -> dict[str, Images]:
    """-> "train", "test" and, with --valSize, "val" """
    for is_turn in (world.local_rank == 0, world.local_rank > 0):  # local rank 0 downloads, then the others read
        if is_turn:
            train, test = data.load(args.dataset, args.data, extra=args.extra, imageSize=args.imageSize or 32,
                                    classes=args.classes)
        distributed.barrier(world)
    if args.pretrained:  # torchvision's first convolution takes three channels
        train, test = train.with_channels(3), test.with_channels(3)
    images = {"train": train, "test": test}
    if args.valSize:
        images["train"], images["val"] = train.hold_out(args.valSize, args.seed)
    if args.batchSz > len(images["train"].labels):
        raise ValueError(f"--batchSz {args.batchSz} is more than the {len(images['train'].labels)} training images")
    return images


def check_same_images(args: argparse.Namespace, now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises RunError if the classes, counts, mean or deviation are not those of the saved run, or of rank 0."""
    for name, value in now.items():
        is_same = value == before[name]
        if name in ("mean", "std"):
            is_same = len(value) == len(before[name]) and np.allclose(value, before[name], rtol=0, atol=1e-9)
        if not is_same and not (args.init and name in ("mean", "std")):  # those of a run with --init may be its file's
            raise RunError(f"--data {args.data} holds other images than those of the run in {args.save}")


# --- network and optimizer --------------------------------------------------------------------------------------

def check_flags(args: argparse.Namespace, device: torch.device, world: World) -> None:
    """Raises ValueError for an impossible network or batch size, before any image is read."""
    if args.batchSz % world.size:
        raise ValueError(f"--batchSz {args.batchSz} cannot be shared by {world.size} processes; valid are multiples of "
                         f"{world.size}")
    if args.syncBN and device.type != "cuda":
        raise ValueError(f"--syncBN needs GPUs, and this trains on {device}; leave it out")
    with torch.device("meta"):  # shapes without memory
        make_net(args)


def make_net(args: argparse.Namespace, **arguments) -> densenet.DenseNet:
    """Adds ``arguments`` to those that the flags give. Raises ValueError for impossible geometry."""
    if args.arch:
        return getattr(densenet, args.arch)(dropRate=args.dropRate, **arguments)
    return densenet.DenseNet(**network_arguments(args), dropRate=args.dropRate, initChannels=args.initChannels,
                             **arguments)


def load_initial_weights(net: densenet.DenseNet, args: argparse.Namespace, world: World) -> dict[str, list[float]]:
    """Loads the weights of --pretrained or --init. -> mean and std, if they come with those of --init"""
    if args.pretrained:
        for is_turn in (world.local_rank == 0, world.local_rank > 0):  # local rank 0 downloads, then the others read
            if is_turn:
                try:
                    weights = torchvision.models.get_model_weights(args.arch).DEFAULT.get_state_dict(check_hash=True)
                except Exception as error:  # urllib's and torch's
                    raise ValueError(f"--pretrained: the download failed ({error})") from None
            distributed.barrier(world)
        net.load_weights(weights, classifier=False)
    if not args.init:
        return {}
    try:
        found = densenet.read_file(args.init)
        weights = densenet.our_names(found)
        fits = all(name in weights and weights[name].shape == value.shape
                   for name, value in net.fc.state_dict(prefix="fc.").items())
        net.load_weights(weights, classifier=fits)
    except OSError as error:
        raise ValueError(f"--init {args.init}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--init {args.init}: {error}") from None
    if not fits:
        say(f"--init {args.init}: its classifier does not fit, and a new one is trained", world)
    return {name: found[name] for name in ("mean", "std") if name in found}


def choose_efficient(args: argparse.Namespace, device: torch.device, world: World,
                     saved: dict[str, Any] | None) -> bool | str:
    """-> DenseNet's argument ``efficient``; a resumed run keeps its own"""
    if saved and "efficient" in saved:
        return saved["efficient"]
    if saved and "path" in saved:  # of version 1.1, which names the path of the block
        return {"textbook": False, "max": "max", "compiled max": "max"}.get(saved["path"], True)
    if (args.syncBN and world.size > 1) or device.type not in ("cpu", "cuda"):
        return False  # the block would not run
    fits_best = device.type == "cpu" and args.precision == "fp32"  # measured: the textbook layers are faster elsewhere
    return {"auto": fits_best, "yes": True, "no": False, "max": "max"}[args.efficient]


def make_optimizer(args: argparse.Namespace, net: torch.nn.Module, device: torch.device,
                   world: World) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """-> the optimizer, and its settings besides rate and weight decay"""
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[args.opt]
    if args.opt == "sgd":
        settings = dict(momentum=0.9, nesterov=not args.no_nesterov)
    else:
        settings = dict(capturable=uses_graph(args, device, world))  # for a graph the step count is on the GPU
    return kind(net.parameters(), lr=args.lr, weight_decay=args.weightDecay, **settings), settings


def load_checkpoint(saved: dict[str, Any], net: densenet.DenseNet, optimizer: torch.optim.Optimizer,
                    settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Loads weights and momentum, in place. -> the saved run's progress"""
    try:
        net.load_state_dict(saved["model"])
        # capturable depends on the device, which may have changed
        groups = [group | settings for group in saved["optimizer"]["param_groups"]]
        optimizer.load_state_dict(saved["optimizer"] | {"param_groups": groups})
        progress = {name: saved[name] for name in ("scheduleEpochs", "mean", "std", "epoch", "best", "val", "test",
                                                   "csvLengths")}
        progress["csvDigests"] = saved.get("csvDigests", {})
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"the checkpoint in {args.save} does not fit its flags ({densenet.one_line(error)})") from None
    for parameter, moments in optimizer.state.items():  # in the parameters' memory format, else steps are slow
        for name, value in moments.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value).detach()
    if args.valSize and progress["test"]:  # a finished run gets more epochs: it is tested again at its new end
        progress |= {"test": None, "csvLengths": progress["csvLengths"] | {"test.csv": 0}}
    return progress


def uses_graph(args: argparse.Namespace, device: torch.device, world: World) -> bool:
    return device.type == "cuda" and world.size == 1 and not args.no_graph  # DDP's steps are not captured


def make_step(args: argparse.Namespace, net: torch.nn.Module, optimizer: torch.optim.Optimizer,
              graphed: bool) -> Callable[..., torch.Tensor]:
    """-> train_step as a function of (images, labels, images_per_rank), as one CUDA graph if ``graphed``"""
    step = functools.partial(train_step, net, optimizer, args.precision)
    return GraphedStep(step, net, optimizer, args.batchSz) if graphed else step


def state_dicts(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


# --- what it says -----------------------------------------------------------------------------------------------

def say(message: str, world: World) -> None:
    if world.rank == 0:
        cli.say(message)


def finish(run: Run, state: dict[str, Any], args: argparse.Namespace, world: World) -> None:
    """Draws the last rows, and prints the result."""
    if world.rank == 0 and not args.no_plot:
        run.plot(wait=True)
    error, best = state["test"]["error"], state["best"]
    if args.valSize:
        text = (f"test error {error:.2f}% with the weights of epoch {best['epoch']}, the best in validation with "
                f"{best['error']:.2f}%,")
    else:
        text = f"final test error {error:.2f}%, best {best['error']:.2f}% (epoch {best['epoch']})"
    say(f"{text} after {state['epoch']} epochs; everything is in {args.save}", world)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    sys.exit(main())
