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
from lib.distributed import World, broadcast, share_buffers, sum_over_ranks
from lib.errors import how_to_continue, report
from lib.flags import get_args_parser, parse_args, resumed_args
from lib.image_set import normal_form, shorten
from lib.layers import PATHS
from lib.memory import count
from lib.network import check_images, check_network, make_net, pretrained_weights
from lib.plot_process import Plotter
from lib.run_directory import Run, RunError, is_finished
from lib.sets import Sets, load_on_every_rank
from lib.signals import Stopped, stopping
from lib.state import initial_state, resumed_state


class Training(NamedTuple):
    """All that the loop needs."""

    args: argparse.Namespace
    train: Batches
    val: Batches | None
    test: Batches
    net: densenet.DenseNet
    step: Callable[..., torch.Tensor]  # images, labels, share -> loss and error, as train_step
    optimizer: torch.optim.Optimizer
    state: dict[str, Any]  # the checkpoint but for weights, optimizer and CSVs


# --- the training loop ------------------------------------------------------------------------------------------

def train_step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, precision: str, images: torch.Tensor,
               labels: torch.Tensor, share: float) -> torch.Tensor:
    """-> (2,): the batch's mean loss and its error in percent, on the device: reading them waits for it

    ``share`` is the global batch size / world size. DDP averages gradients over the ranks, so a summed loss divided by
    this gives the mean over the global batch, even where one rank has an image more than another. The mean of loss and
    error over the ranks is the global batch's, too.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, precision):
        output = net(images)
    loss = F.nll_loss(output, labels, reduction="sum") / share
    loss.backward()
    optimizer.step()
    return torch.stack((loss.detach(), (output.detach().argmax(1) != labels).sum() * 100 / share))


def train_epoch(step: Callable[..., torch.Tensor], batches: Batches, args: argparse.Namespace, epoch: int, run: Run,
                world: World) -> list[float]:
    """-> the epoch's mean loss and error in percent; train.csv gets a row a step.

    Raises:
        FloatingPointError: on rank 0, if a loss is not finite.
    """
    torch.manual_seed(dropout_seed(args.seed, epoch, world.rank))
    random = draw(batches.n, args.seed, epoch, batches.padding)
    stream = (batches.plain(args.batchSz, random.order, world.rank, world.size) if args.no_augment
              else batches.augmented(random, args.batchSz, world.rank, world.size))
    n = len(batch_sizes(batches.n, args.batchSz, world.size))
    read_every = 1 if batches.device.type == "cpu" else math.ceil(n / 8)  # a read waits for the GPU
    pending, sizes, total, done = [], [], np.zeros(2), 0
    with tqdm(total=n, desc=f"epoch {epoch}/{args.nEpochs}", unit="step", leave=False,
              disable=None if world.rank == 0 else True) as bar:  # None: hidden where stderr is no terminal
        for images, labels, size in stream:  # size: of the batch, over all ranks
            pending.append(step(images, labels, size / world.size))
            sizes.append(size)
            bar.update()
            if len(pending) == read_every or done + len(pending) == n:
                values = (sum_over_ranks(torch.stack(pending), world) / world.size).tolist()
                if world.rank == 0:
                    check_finite(values, epoch, done)
                    run.add("train.csv", [(epoch - 1 + i / n, *v) for i, v in enumerate(values, done)])
                bar.set_postfix(loss=f"{values[-1][0]:.3f}", error=f"{values[-1][1]:.1f}%", refresh=False)
                total += np.array(sizes) @ np.array(values)  # sums over images: means times batch sizes
                done += len(pending)
                pending, sizes = [], []
    return (total / batches.n).tolist()


@torch.no_grad()
def evaluate(net: densenet.DenseNet, batches: Batches, args: argparse.Namespace, world: World,
             per_class: bool = False) -> Any:
    """-> mean loss and error in percent over all images, of which each rank takes its part; with ``per_class`` then
    a list of each class's error in percent (None for a class without images)"""
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
    mean = (sum_over_ranks(total, world) / batches.n).tolist()
    if not per_class:
        return mean
    return *mean, [100 * w / n if n else None for w, n in zip(sum_over_ranks(wrong, world).tolist(),
                                                                 sum_over_ranks(seen, world).tolist(), strict=True)]


def fit(training: Training, run: Run, plotter: Plotter, world: World) -> dict[str, Any]:
    """Trains to the last epoch. -> the state after it"""
    args, train, val, test, net, step, optimizer, state = training  # the state is changed in place
    name = "val" if val else "test"
    for epoch in range(state["epoch"] + 1, args.nEpochs + 1):
        start = time.perf_counter()
        rate = learning_rate(args.opt, args.lr, epoch, state["scheduleEpochs"])
        for group in optimizer.param_groups:
            group["lr"] = rate

        train_loss, train_error = train_epoch(step, train, args, epoch, run, world)

        share_buffers(net, world)
        loss, error = evaluate(net, val or test, args, world)
        is_best = not state["best"] or error < state["best"]["error"]
        if is_best:
            state["best"] = {"error": error, "epoch": epoch}
        state |= {"epoch": epoch, "test": None, name: {"loss": loss, "error": error}}

        if world.rank == 0:
            check_evaluation(name, loss, epoch)
            run.add(f"{name}.csv", [(epoch, loss, error)])
            run.save(state | weights(net, optimizer), is_best=is_best and val is not None)
            say(f"epoch {epoch}/{args.nEpochs}  rate {rate:g}  train loss {train_loss:.4f} error {train_error:.2f}%  "
                f"{name} loss {loss:.4f} error {error:.2f}%  {time.perf_counter() - start:.1f} s")
            plotter.start()
    if not state["test"]:
        test_best(training, run, world)
    return state


def test_best(training: Training, run: Run, world: World) -> None:
    """The one use of the test set in a run with validation: at its end, with the weights of the best epoch."""
    args, net, optimizer, state = training.args, training.net, training.optimizer, training.state
    last, epoch = copy.deepcopy(net.state_dict()), state["best"]["epoch"]
    net.load_state_dict(broadcast(run.read_best(epoch)["model"] if world.rank == 0 else None, world))
    loss, error = evaluate(net, training.test, args, world)
    check_evaluation("test", loss, state["epoch"])
    net.load_state_dict(last)
    state["test"] = {"loss": loss, "error": error}
    if world.rank == 0:
        run.add("test.csv", [(epoch, loss, error)])
        run.save(state | weights(net, optimizer))


def evaluation_size(batches: Batches, training_size: int) -> int:
    """Images of an evaluation step, which keeps nothing for a backward pass: as many pixels as 250 images of 32x32 have
    on a CPU, 1,000 on a GPU; never fewer than a training step."""
    images = 1000 if batches.device.type == "cuda" else 250
    return max(training_size, images * 32 * 32 // (batches.height * batches.width))


def learning_rate(opt: str, lr: float, epoch: int, nEpochs: int) -> float:
    """The rate in epoch 1 to nEpochs: a tenth from 1/2, a hundredth from 3/4 of the epochs (paper, section 4.2)."""
    if opt != "sgd":
        return lr
    if 4 * (epoch - 1) >= 3 * nEpochs:  # whole numbers: 3/4 of 50 epochs is not one
        return lr / 100
    return lr / 10 if 2 * (epoch - 1) >= nEpochs else lr


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # a CUDA graph must cast anew each time


def check_finite(values: list[list[float]], epoch: int, first: int) -> None:
    """Raises FloatingPointError; ``first`` is the number of steps before ``values`` in the epoch."""
    for i, (loss, _) in enumerate(values, first + 1):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {epoch}, iteration {i}; {advice(epoch)}")


def check_evaluation(name: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {name} loss is {loss} after epoch {epoch}; {advice(epoch)}")


def advice(epoch: int) -> str:
    kept = f"latest.pth holds epoch {epoch - 1}" if epoch > 1 else "no epoch was finished yet"
    return f"{kept}; start again with a lower --lr (and --overwrite or another --save)"


def weights(net: densenet.DenseNet, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
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
    """Reads the images and builds the network; nothing is written yet.

    Raises:
        ValueError: for whatever has to be refused.
    """
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
    state |= {"arguments": net.arguments, "parameters": count(net)}
    train, val, test = (images and Batches(images, sets.mean, sets.std, device, border=args.border)
                        for images in (sets.train, sets.val, sets.test))
    step = make_step(args, distributed.average_gradients(net, world), optimizer, uses_graph(args, device, world))
    return Training(args, train, val, test, net, step, optimizer, state)


def make_net_and_optimizer(args: argparse.Namespace, sets: Sets, device: torch.device, world: World,
                           state: dict[str, Any], saved: dict[str, Any] | None
                           ) -> tuple[densenet.DenseNet, torch.optim.Optimizer]:
    """New from --seed or from torchvision's weights, or as the checkpoint has them."""
    torch.manual_seed(args.seed)  # before anything is drawn; on the CPU, so alike for every device
    efficient = {name: value for value, name in PATHS.items()}[state["path"]]
    net = make_net(args, nClasses=len(sets.train.classes), inChannels=sets.train.images.shape[1], efficient=efficient)
    is_resumed = saved is not None and "model" in saved
    if args.pretrained and not is_resumed:
        if world.local_rank == 0:
            pretrained_weights(args.arch)
        distributed.barrier(world)
        net.load_torchvision(pretrained_weights(args.arch), classifier=False)
    if args.syncBN and world.size > 1:  # one rank's statistics are all there is
        distributed.SyncBatchNorm2d.replace_all(net)
    net.to(device)
    if device.type == "cuda":
        net.to(memory_format=torch.channels_last)  # as the activations are, or each step would copy the weights
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[args.opt]
    if args.opt == "sgd":
        settings = dict(momentum=0.9, nesterov=not args.no_nesterov)
    else:
        settings = dict(capturable=uses_graph(args, device, world))  # a graph needs its step count on the GPU
    optimizer = kind(net.parameters(), lr=args.lr, weight_decay=args.weightDecay, **settings)
    if is_resumed:
        try:
            net.load_state_dict(saved["model"])
            groups = [group | settings for group in saved["optimizer"]["param_groups"]]  # the device may be another
            optimizer.load_state_dict(saved["optimizer"] | {"param_groups": groups})
            match_formats(optimizer)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            raise RunError(f"the checkpoint in {args.save} does not fit its own flags: its weights are those of "
                           "another network") from error
    return net.train(), optimizer


def match_formats(optimizer: torch.optim.Optimizer) -> None:
    """Gives the optimizer's state its parameters' memory format: with another one a step would take the slow path."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value).detach()


def uses_graph(args: argparse.Namespace, device: torch.device, world: World) -> bool:
    return device.type == "cuda" and world.size == 1 and not args.no_graph  # DDP's steps are not captured


def make_step(args: argparse.Namespace, net: torch.nn.Module, optimizer: torch.optim.Optimizer,
              graphed: bool) -> Callable[..., torch.Tensor]:
    """-> the function that takes images, labels and share, and trains on them"""
    step = functools.partial(train_step, net, optimizer, args.precision)
    return GraphedStep(step, net, optimizer, args.batchSz) if graphed else step


# --- main -------------------------------------------------------------------------------------------------------

def train(args: argparse.Namespace, explicit: dict[str, Any], run: Run, world: World) -> None:
    """The whole run, or what is left of it.

    --resume: the checkpoint's flags hold (``Run.open``, ``resumed_args``), so do its images, weights and momentum
    (``prepare``), the CSVs are cut back to it (``Run.begin``), and ``fit`` goes on with the next epoch.
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
            run.begin(training.state | weights(training.net, training.optimizer), saved)
            announce(args, training.state, saved, device, world)
        setproctitle.setproctitle(f"train.py {args.save}")
        result = fit(training, run, plotter, world)
    plotter.draw_last()
    if world.rank == 0:
        say(summary(args, result))


def announce(args: argparse.Namespace, state: dict[str, Any], saved: dict[str, Any] | None, device: torch.device,
             world: World) -> None:
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
        what = (f"test error {error:.2f}% with the weights of epoch {best['epoch']}, the best in validation with "
                f"{best['error']:.2f}%,")
    else:
        what = f"final test error {error:.2f}%, best {best['error']:.2f}% (epoch {best['epoch']})"
    return f"{what} after {result['epoch']} epochs; everything is in {args.save}"


def evaluate_checkpoint(args: argparse.Namespace, explicit: dict[str, Any], world: World) -> None:
    """Prints the loss and error of --evaluate. --dataset, --data, --classes, --imageSize, --precision, --device,
    --no-cuda and --deterministic default to the checkpoint's."""
    if world.size > 1:
        raise ValueError("--evaluate is for one process; start it without torchrun")
    checkpoint = densenet.read_checkpoint(args.evaluate)
    net = densenet.load(args.evaluate)
    try:
        saved = get_args_parser().checked(checkpoint.get("flags", {}))
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
    loss, error, of_classes = evaluate(net.to(device), batches, args, World(), per_class=True)
    say(f"{args.evaluate}: test loss {loss:.4f}, error {error:.2f}% of {batches.n} images")
    for name, error in zip(net.classes, of_classes, strict=True):
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
        with stopping() if world.rank == 0 else contextlib.nullcontext():  # a signal ends the other ranks at once
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
    if sys.stdout is None:  # closed, as by >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the end)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    status = main()
    try:
        sys.stdout.flush()
    except OSError:  # already told; or Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
