#!/usr/bin/env python3
"""Trains a DenseNet: ./train.py [flags] writes train.csv, test.csv, run.json, latest.pth and figures to --save.

Without flags: the paper's DenseNet-BC (L=100, k=12) on CIFAR-10 with crop and flip, 300 epochs, on the GPU if there is
one; on several: torchrun --nproc-per-node=4 train.py [flags]. ./plot.py draws the CSVs again at any time.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes during the slow imports

import argparse
import contextlib
import copy
import functools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import setproctitle
import torch
import torch.nn.functional as F
from tqdm import tqdm

import densenet
from lib import data, distributed
from lib.batches import Batches, batch_sizes, draw, dropout_seed
from lib.cli import printable, tell, warn
from lib.cuda_graph import GraphedStep
from lib.device import environment, is_out_of_memory, restore_threads, set_up_device, warn_of_differences
from lib.distributed import World, broadcast, broadcast_buffers, sum_over_ranks
from lib.errors import how_to_continue, report
from lib.flags import get_args_parser, parse_args, resumed_args
from lib.image_set import normal_form, shorten
from lib.memory import count_parameters
from lib.network import check_images, check_network, choose_compiled_or_not, make_net, pretrained_weights
from lib.plot_process import Plotter
from lib.run_directory import Run, RunError, is_finished
from lib.sets import Sets, load_on_every_rank
from lib.signals import Stopped, raise_on_signals
from lib.state import initial_state, resumed_state


class Training(NamedTuple):
    """What ``fit`` works with."""

    args: argparse.Namespace
    train: Batches
    val: Batches | None
    test: Batches
    net: densenet.DenseNet
    step: Callable[..., torch.Tensor]  # images, labels, images per rank -> loss and error
    optimizer: torch.optim.Optimizer
    state: dict[str, Any]  # what a checkpoint holds besides weights, optimizer and CSVs


# --- the training loop ------------------------------------------------------------------------------------------

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
    """-> the epoch's mean loss and error in percent; train.csv gets one row per step. Raises FloatingPointError on
    rank 0 for a loss that is not finite."""
    torch.manual_seed(dropout_seed(args.seed, epoch, world.rank))
    random = draw(batches.n, args.seed, epoch, batches.padding)
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
                if world.rank == 0:
                    check_finite(values, epoch, done)
                    run.add("train.csv", [(epoch - 1 + i / n, *v) for i, v in enumerate(values, done)])
                bar.set_postfix(loss=f"{values[-1][0]:.3f}", error=f"{values[-1][1]:.1f}%", refresh=False)
                total += np.array(sizes) @ np.array(values)  # means times batch sizes: sums over images
                done += len(pending)
                pending, sizes = [], []
    return (total / batches.n).tolist()


@torch.no_grad()
def evaluate(net: densenet.DenseNet, batches: Batches, args: argparse.Namespace, world: World,
             per_class: bool = False) -> tuple[float, float, list[float | None] | None]:
    """-> mean loss and error in percent over the images of all ranks; with ``per_class`` also each class's error in
    percent, None for a class without images"""
    net.eval()
    dtype = torch.float32 if batches.device.type == "mps" else torch.float64  # mps has no float64
    total = torch.zeros(2, dtype=dtype, device=batches.device)
    wrong, seen = (torch.zeros(net.fc.out_features, dtype=dtype, device=batches.device) for _ in range(2))
    for images, labels, _ in batches.plain(evaluation_size(batches, args.batchSz), None, world.rank, world.size):
        with autocast(images.device, args.precision):
            output = net(images)
        is_wrong = output.argmax(1) != labels
        total[0] += F.nll_loss(output, labels, reduction="sum")
        total[1] += is_wrong.sum() * 100
        if per_class:
            wrong += labels[is_wrong].bincount(minlength=len(wrong))
            seen += labels.bincount(minlength=len(seen))
    net.train()
    loss, error = (sum_over_ranks(total, world) / batches.n).tolist()
    if not per_class:
        return loss, error, None
    wrong, seen = sum_over_ranks(wrong, world).tolist(), sum_over_ranks(seen, world).tolist()
    return loss, error, [100 * w / n if n else None for w, n in zip(wrong, seen, strict=True)]


def fit(training: Training, run: Run, plotter: Plotter, world: World) -> dict[str, Any]:
    """Trains until the last epoch. -> the state after it"""
    args, train, val, test, net, step, optimizer, state = training  # state is updated in place
    name = "val" if val else "test"  # the images that judge each epoch
    for epoch in range(state["epoch"] + 1, args.nEpochs + 1):
        start = time.perf_counter()
        rate = learning_rate(args.opt, args.lr, epoch, state["scheduleEpochs"])
        for group in optimizer.param_groups:
            group["lr"] = rate

        train_loss, train_error = train_epoch(step, train, args, epoch, run, world)

        broadcast_buffers(net, world)
        loss, error, _ = evaluate(net, val or test, args, world)
        is_best = not state["best"] or error < state["best"]["error"]
        if is_best:
            state["best"] = {"error": error, "epoch": epoch}
        state |= {"epoch": epoch, "test": None, name: {"loss": loss, "error": error}}

        if world.rank == 0:
            check_evaluation(name, loss, epoch)
            run.add(f"{name}.csv", [(epoch, loss, error)])
            run.save(state | state_dicts(net, optimizer), is_best=is_best and val is not None)
            say(f"epoch {epoch}/{args.nEpochs}  rate {rate:g}  train loss {train_loss:.4f} error {train_error:.2f}%  "
                f"{name} loss {loss:.4f} error {error:.2f}%  {time.perf_counter() - start:.1f} s")
            plotter.start()
    if not state["test"]:  # --valSize: the test set is used only here
        test_best_weights(training, run, world)
    return state


def test_best_weights(training: Training, run: Run, world: World) -> None:
    """Tests the weights of the best epoch: the only use of the test set in a run with validation, at its end."""
    args, net, optimizer, state = training.args, training.net, training.optimizer, training.state
    last_weights, epoch = copy.deepcopy(net.state_dict()), state["best"]["epoch"]
    net.load_state_dict(broadcast(run.read_best(epoch)["model"] if world.rank == 0 else None, world))
    loss, error, _ = evaluate(net, training.test, args, world)
    check_evaluation("test", loss, state["epoch"])
    net.load_state_dict(last_weights)
    state["test"] = {"loss": loss, "error": error}
    if world.rank == 0:
        run.add("test.csv", [(epoch, loss, error)])
        run.save(state | state_dicts(net, optimizer))


def evaluation_size(batches: Batches, training_size: int) -> int:
    """-> images per evaluation step: those with the pixels of 250 images of 32x32 on a CPU, of 1,000 on a GPU, but at
    least ``training_size``. Nothing is kept for a backward pass, so larger batches than in training fit."""
    images = 1000 if batches.device.type == "cuda" else 250
    return max(training_size, images * 32 * 32 // (batches.height * batches.width))


def learning_rate(opt: str, lr: float, epoch: int, nEpochs: int) -> float:
    """-> the rate in epoch 1 to nEpochs; sgd: lr / 10 from half of the epochs on, lr / 100 from 3/4 (paper, 4.2)"""
    if opt != "sgd":
        return lr
    if 4 * (epoch - 1) >= 3 * nEpochs:  # in integers: 3/4 of 50 epochs is not a whole number
        return lr / 100
    return lr / 10 if 2 * (epoch - 1) >= nEpochs else lr


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # a graph does not repeat a cached cast


def check_finite(values: list[list[float]], epoch: int, done: int) -> None:
    """Raises FloatingPointError for a loss that is not finite; ``done``: the epoch's steps before these values."""
    for i, (loss, _) in enumerate(values, done + 1):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {epoch}, iteration {i}; {advice(epoch)}")


def check_evaluation(name: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {name} loss is {loss} after epoch {epoch}; {advice(epoch)}")


def advice(epoch: int) -> str:
    kept = f"latest.pth holds epoch {epoch - 1}" if epoch > 1 else "no epoch was finished yet"
    return f"{kept}; start again with a lower --lr (and --overwrite or another --save)"


def state_dicts(net: densenet.DenseNet, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


def say(message: str) -> None:
    """Prints a line of the run's progress."""
    try:
        print(printable(message), flush=True)
    except OSError as error:
        error.filename = "standard output"
        raise


# --- network and optimizer --------------------------------------------------------------------------------------

def prepare(args: argparse.Namespace, saved: dict[str, Any] | None, device: torch.device, world: World) -> Training:
    """Reads the images, builds network and optimizer, and writes nothing yet. Raises ValueError for images, a network
    or a batch size that cannot be used."""
    if world.rank == 0:
        check_network(args, device, world.size)  # before a download
    sets = load_on_every_rank(args, saved, world)
    if world.rank == 0:
        smallest = min(batch_sizes(len(sets.train.images), args.batchSz, world.size)) // world.size
        check_images(args, sets.train.images, smallest)
    state = initial_state(args, sets, device, world)
    if saved:
        state = resumed_state(state, saved)
    net, optimizer = make_net_and_optimizer(args, sets, device, world, state, saved)
    state |= {"arguments": net.arguments, "parameters": count_parameters(net)}
    train, val, test = (Batches(images, sets.mean, sets.std, device, border=args.border) if images else None
                        for images in (sets.train, sets.val, sets.test))
    step = make_step(args, distributed.average_gradients(net, world), optimizer, uses_graph(args, device, world))
    return Training(args, train, val, test, net, step, optimizer, state)


def make_net_and_optimizer(args: argparse.Namespace, sets: Sets, device: torch.device, world: World,
                           state: dict[str, Any], saved: dict[str, Any] | None
                           ) -> tuple[densenet.DenseNet, torch.optim.Optimizer]:
    """-> both from the checkpoint ``saved``; or new ones, with weights from --seed or torchvision's"""
    torch.manual_seed(args.seed)  # weights are drawn on the CPU: the same for every device
    net = make_net(args, nClasses=len(sets.train.classes), inChannels=sets.train.images.shape[1])
    is_resumed = saved is not None and "model" in saved
    if args.pretrained and not is_resumed:
        if world.local_rank == 0:
            pretrained_weights(args.arch)
        distributed.barrier(world)
        net.load_torchvision(pretrained_weights(args.arch), classifier=False)
    if args.syncBN and world.size > 1:
        distributed.SyncBatchNorm2d.replace_all(net)
    net.to(device)
    if device.type == "cuda":
        net.to(memory_format=torch.channels_last)  # as the activations: else each step copies the weights
    with autocast(device, args.precision):
        state |= choose_compiled_or_not(net, state["path"], world)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[args.opt]
    if args.opt == "sgd":
        settings = dict(momentum=0.9, nesterov=not args.no_nesterov)
    else:
        settings = dict(capturable=uses_graph(args, device, world))  # for a graph the step count is on the GPU
    optimizer = kind(net.parameters(), lr=args.lr, weight_decay=args.weightDecay, **settings)
    if is_resumed:
        try:
            net.load_state_dict(saved["model"])
            groups = [group | settings for group in saved["optimizer"]["param_groups"]]  # the device may have changed
            optimizer.load_state_dict(saved["optimizer"] | {"param_groups": groups})
            match_formats(optimizer)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            raise RunError(f"the checkpoint in {args.save} does not fit its own flags: its weights are those of "
                           "another network") from error
    return net.train(), optimizer


def match_formats(optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer's state the memory format of the parameters: otherwise a step takes torch's slow path."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value).detach()


def uses_graph(args: argparse.Namespace, device: torch.device, world: World) -> bool:
    return device.type == "cuda" and world.size == 1 and not args.no_graph  # DDP's steps are not captured


def make_step(args: argparse.Namespace, net: torch.nn.Module, optimizer: torch.optim.Optimizer,
              graphed: bool) -> Callable[..., torch.Tensor]:
    """-> train_step as a function of (images, labels, images_per_rank), as one CUDA graph if ``graphed``"""
    step = functools.partial(train_step, net, optimizer, args.precision)
    return GraphedStep(step, net, optimizer, args.batchSz) if graphed else step


# --- main -------------------------------------------------------------------------------------------------------

def train(args: argparse.Namespace, explicit: dict[str, Any], run: Run, world: World) -> None:
    """A run from its start, or with --resume from its checkpoint to its end.

    To resume, ``Run.open`` reads the checkpoint, ``resumed_args`` its flags, ``prepare`` its weights and momentum;
    ``Run.begin`` cuts the CSVs to their lengths at the checkpoint, and ``fit`` continues with the next epoch.
    """
    saved = None
    if world.rank == 0:
        saved = run.open(args.resume, args.overwrite)
        if saved:
            args = resumed_args(args, explicit, saved)
    args, saved = broadcast((args, saved), world)
    device = set_up_device(args, world)
    if saved:
        restore_threads(saved["environment"], world)
    plotter = Plotter(args.save, enabled=not args.no_plot and world.rank == 0)
    result = saved
    if not is_finished(saved, args.nEpochs):
        training = prepare(args, saved, device, world)
        if world.rank == 0:
            run.begin(training.state | state_dicts(training.net, training.optimizer), saved)
            announce(args, training.state, saved, device, world)
        setproctitle.setproctitle(f"train.py {args.save}")
        result = fit(training, run, plotter, world)
    plotter.draw_last()
    if world.rank == 0:
        say(summary(args, result))


def announce(args: argparse.Namespace, state: dict[str, Any], saved: dict[str, Any] | None, device: torch.device,
             world: World) -> None:
    """Prints the run's first line, after warnings of what differs from the ``saved`` run."""
    if saved:
        warn_of_differences(saved["environment"], environment(device, args.precision, world), args)
        if args.dropRate > 0 and "version" not in saved:
            warn("this run was started by version 1.0, which drew dropout from other seeds: it continues with new ones")
    network = args.arch or f"L={args.depth} k={args.growthRate}"
    ranks = f" x {world.size}" if world.size > 1 else ""
    say(f"{args.save}: {network}, {state['parameters']:,} parameters, {state['environment']['device']}{ranks}, "
        f"{state['path']} path ({state['pathReason']}), {state['trainImages']:,} training and "
        f"{state['testImages']:,} test images")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and world.size == 1 and gpus > 1 and not args.device:
        say(f"there are {gpus} GPUs here and this process uses one; for all of them: torchrun --nproc-per-node={gpus} "
            "train.py ...")


def summary(args: argparse.Namespace, result: dict[str, Any]) -> str:
    error, best = result["test"]["error"], result["best"]
    if args.valSize:
        text = (f"test error {error:.2f}% with the weights of epoch {best['epoch']}, the best in validation with "
                f"{best['error']:.2f}%,")
    else:
        text = f"final test error {error:.2f}%, best {best['error']:.2f}% (epoch {best['epoch']})"
    return f"{text} after {result['epoch']} epochs; everything is in {args.save}"


def evaluate_checkpoint(args: argparse.Namespace, explicit: dict[str, Any], world: World) -> None:
    """Prints the test loss, error and each class's error of the checkpoint --evaluate. --dataset, --data, --classes,
    --imageSize, --precision, --device, --no-cuda and --deterministic default to those of its run."""
    if world.size > 1:
        raise ValueError("--evaluate is for one process; start it without torchrun")
    checkpoint = densenet.read_checkpoint(args.evaluate)
    net = densenet.load(args.evaluate)
    try:
        saved = get_args_parser().restore(checkpoint.get("flags", {}))
    except ValueError as error:
        raise ValueError(f"{args.evaluate} has flags that this train.py does not take ({error})") from None
    for name in ("dataset", "data", "classes", "imageSize", "precision", "device", "no_cuda", "deterministic"):
        if name not in explicit:
            setattr(args, name, getattr(saved, name))
    if "device" in explicit or "no_cuda" in explicit:
        args.device, args.no_cuda = explicit.get("device"), explicit.get("no_cuda", False)
    if "data" not in explicit and not os.path.exists(args.data):
        raise ValueError(f"the run's --data {args.data} is not to be found from here; give --data")
    device = set_up_device(args, World())
    test = data.load_test(args.dataset, args.data, imageSize=args.imageSize or 32, download="data" in explicit)
    if args.classes:
        test = data.select_classes(test, args.classes)
    test = data.with_channels(test, net.arguments["inChannels"])
    if test.classes != [*map(normal_form, net.classes)]:
        raise ValueError(f"--data {args.data} has the classes {shorten(test.classes)}, the checkpoint "
                         f"{shorten(net.classes)}")
    batches = Batches(test, net.mean.flatten().tolist(), net.std.flatten().tolist(), device)
    loss, error, class_errors = evaluate(net.to(device), batches, args, World(), per_class=True)
    say(f"{args.evaluate}: test loss {loss:.4f}, error {error:.2f}% of {batches.n} images")
    for name, error in zip(net.classes, class_errors, strict=True):
        say(f"  {name}: no images" if error is None else f"  {name}: {error:.2f}%")


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 done, 2 refused before anything was written, 1 failed later, 128 + n stopped by signal n"""
    run, world = None, World()
    try:
        world = distributed.read_world()
        args, explicit = parse_args(argv, __doc__)
    except SystemExit as stop:  # argparse's, after --help
        return stop.code
    except ValueError as error:
        return report(error, run, world)
    try:
        # on other ranks a signal keeps its default action: it ends them at once
        with raise_on_signals() if world.rank == 0 else contextlib.nullcontext():
            try:
                if args.evaluate:
                    evaluate_checkpoint(args, explicit, world)
                    return 0
                distributed.start(world)
                with Run(args.save) as run:
                    train(args, explicit, run, world)
                return 0
            except Exception as error:
                return report(error, run, world)
            finally:
                distributed.end()
    except Stopped as stop:
        tell(f"stopped by {signal.Signals(stop.number).name}{how_to_continue(run, world)}")
        return 128 + stop.number


if __name__ == "__main__":
    if sys.stdout is None:  # closed in the shell by >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the end)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    status = main()
    try:
        sys.stdout.flush()
    except OSError:  # already reported; with a broken stdout Python would report it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
