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
import io
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import setproctitle
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import data
import densenet
import runs
from runs import EFFICIENT, Parser, Plotter, Processes, Run, RunError, Signals, Stopped, flag, number, path

ARCHS = ("densenet121", "densenet161", "densenet169", "densenet201")
LEARNING_RATE = {"sgd": 0.1, "adam": 1e-3, "rmsprop": 1e-2}
EPOCHS = {"svhn": 40}  # the paper's; 300 on the others
IMAGENET_MEAN_AND_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # which torchvision's weights were trained with
EVALUATION_BATCH = {"cpu": 250, "cuda": 1000}  # images; without gradients they take little memory
OF_THE_NETWORK = ("growthRate", "depth", "reduction", "no_bottleneck", "initChannels")  # --arch sets them


# --- flags ------------------------------------------------------------------------------------------------------

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("train.py", __doc__)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=data.DATASETS, default="cifar10",
                       help="folder: images in DIR/train/CLASS, and DIR/test/CLASS or DIR/val/CLASS (default: "
                            "%(default)s)")
    group.add_argument("--data", metavar="DIR", type=path, default="data",
                       help="the data set's folder or its parent; downloaded there if missing (default: %(default)s)")
    group.add_argument("--classes", metavar="NAME", nargs="+", default=None,
                       help="train and test on these classes only, as cat dog (default: all)")
    group.add_argument("--valSize", metavar="N", type=number(int, 0, 10**9), default=0,
                       help="training images held out for validation, an equal share of each class: val.csv, and the "
                            "test set is used once, at the end, with the best epoch's weights (default: none, test "
                            "after each epoch)")
    group.add_argument("--imageSize", metavar="S", type=number(int, 1, 4096), default=None,
                       help="height and width in pixels that a folder's images are brought to (default: 32; with "
                            "--arch 224)")
    group.add_argument("--extra", action="store_true", help="train on SVHN's extra images, too")
    group.add_argument("--no-augment", action="store_true",
                       help="no random crop (an eighth of the size as padding) and no random flip of training images; "
                            "with svhn always: digits must not be flipped")

    group = parser.add_argument_group("network (default: DenseNet-BC, L=100, k=12: 769,162 parameters)")
    group.add_argument("--arch", choices=ARCHS, default=None, help="one of ImageNet's networks, for images of 224x224")
    group.add_argument("--pretrained", action="store_true",
                       help="start --arch from torchvision's ImageNet weights (downloaded), but for the classifier")
    group.add_argument("--growthRate", metavar="K", type=number(int, 1, 4096), default=12,
                       help="k, the channels that each layer adds (default: %(default)s)")
    group.add_argument("--depth", metavar="L", type=number(int, 1, 4096), default=100,
                       help="layers: 6n + 4 with bottleneck, 3n + 4 without (default: %(default)s)")
    group.add_argument("--reduction", metavar="R", default=0.5,
                       type=number(float, math.nextafter(0, 1), 1, "above 0 and at most 1"),
                       help="share of the channels that a transition keeps (default: %(default)s)")
    group.add_argument("--no-bottleneck", action="store_true", help="the original layer: one 3x3 convolution")
    group.add_argument("--dropRate", metavar="P", default=0.0,
                       type=number(float, 0, math.nextafter(1, 0), "from 0 to below 1"),
                       help="dropout after every convolution but the first; the paper: 0.2 with --no-augment "
                            "(default: %(default)s)")
    group.add_argument("--initChannels", metavar="C", type=number(int, 1, 65536), default=None,
                       help="channels of the first convolution (default: 2k)")
    group.add_argument("--efficient", choices=tuple(EFFICIENT), default="yes",
                       help="the dense block in training. yes: memory linear in depth; max: less again, a little "
                            "slower; no: the textbook's (default: %(default)s)")

    group = parser.add_argument_group("training")
    group.add_argument("--batchSz", metavar="N", type=number(int, 1, 10**6), default=64,
                       help="images a step, over all processes (default: %(default)s)")
    group.add_argument("--nEpochs", metavar="N", type=number(int, 1, 10**6), default=None,
                       help="with --resume it can be more than the run had; the rest has its last rate (default: 300; "
                            "svhn 40)")
    group.add_argument("--opt", choices=tuple(LEARNING_RATE), default="sgd",
                       help="sgd: momentum 0.9, the rate falls to a tenth at 1/2 and a hundredth at 3/4 of the epochs; "
                            "adam, rmsprop: constant rate (default: %(default)s)")
    group.add_argument("--lr", metavar="R", type=number(float, 1e-12, 1e6), default=None,
                       help="learning rate at the start (default: " +
                            ", ".join(f"{opt} {rate:g}" for opt, rate in LEARNING_RATE.items()) + ")")
    group.add_argument("--weightDecay", metavar="D", type=number(float, 0, 1e6), default=1e-4,
                       help="L2 penalty on all parameters (default: %(default)s)")
    group.add_argument("--no-nesterov", action="store_true", help="plain momentum with --opt sgd")
    group.add_argument("--seed", metavar="S", type=number(int, 0, 2**32 - 1), default=1, help="default: %(default)s")
    group.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                       help="of products and activations; statistics, loss and weights are always float32. tf32: "
                            "products of 10-bit mantissas, on a GPU; bf16: bfloat16 (default: %(default)s)")
    group.add_argument("--syncBN", action="store_true",
                       help="batch norm by the statistics of all processes' images (default: of each one's own)")

    group = parser.add_argument_group("run")
    group.add_argument("--save", metavar="DIR", type=path, default=None,
                       help="run directory (default: work/<dataset>.base)")
    group.add_argument("--resume", action="store_true",
                       help="continue the run in --save, with its flags, or start it; can be repeated until it ends")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --save")
    group.add_argument("--evaluate", metavar="CHECKPOINT", type=path, default=None,
                       help="only print a checkpoint's loss and error on the test images")
    group.add_argument("--no-cuda", action="store_true", help="train on the CPU")
    group.add_argument("--device", metavar="D", default=None,
                       help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    group.add_argument("--deterministic", action="store_true",
                       help="the same numbers each time on a GPU too, where it is slower; a CPU always gives them")
    group.add_argument("--no-graph", action="store_true",
                       help="launch a GPU's operations one by one, not each step as one CUDA graph")
    group.add_argument("--no-plot", action="store_true", help="do not run plot.py after each epoch")
    return parser


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """-> all flags, and those that stand on the command line; ValueError for nonsense"""
    parser = get_args_parser()
    defaults = vars(parser.parse_args([]))
    unset = object()
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    args = argparse.Namespace(**defaults | given)
    if args.resume and args.overwrite:
        raise ValueError("--resume continues the run that --overwrite would replace; give one of them")
    if args.evaluate and (args.resume or args.overwrite):
        raise ValueError("--evaluate does not train; give it without --resume and --overwrite")
    if args.no_cuda and args.device not in (None, "cpu"):
        raise ValueError(f"--no-cuda contradicts --device {args.device}; give one of them")
    if args.pretrained and not args.arch:
        raise ValueError(f"--pretrained takes --arch; valid are {', '.join(ARCHS)}")
    for name in OF_THE_NETWORK if args.arch else ():
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"{flag(name, getattr(args, name))} contradicts --arch {args.arch}; give one of them")
    if args.dataset != "folder" and args.imageSize and not args.evaluate:
        raise ValueError(f"--imageSize {args.imageSize}: --dataset {args.dataset} has its own size; valid with folder")
    if args.dataset != "svhn" and args.extra:
        raise ValueError(f"--extra: --dataset {args.dataset} has no extra images; valid with svhn")
    if args.dataset == "folder":
        args.imageSize = args.imageSize or (224 if args.arch else 32)
    args.no_augment |= args.dataset == "svhn"
    args.nEpochs = args.nEpochs or EPOCHS.get(args.dataset, 300)
    args.lr = args.lr or LEARNING_RATE[args.opt]
    args.save = args.save or f"work/{args.dataset}.base"
    return args, given


# --- training ---------------------------------------------------------------------------------------------------

def learning_rate(opt: str, lr: float, epoch: int, nEpochs: int) -> float:
    """The rate in epoch 1 to nEpochs: a tenth from 1/2, a hundredth from 3/4 of the epochs (paper, section 4.2)."""
    if opt != "sgd":
        return lr
    return lr / 100 if 4 * (epoch - 1) >= 3 * nEpochs else lr / 10 if 2 * (epoch - 1) >= nEpochs else lr


def make_net(args: argparse.Namespace, **more) -> densenet.DenseNet:
    more |= dict(dropRate=args.dropRate, efficient=EFFICIENT[args.efficient])
    if args.arch:
        return getattr(densenet, args.arch)(**more)
    return densenet.DenseNet(args.growthRate, args.depth, args.reduction, bottleneck=not args.no_bottleneck,
                             initChannels=args.initChannels, **more)


def check_network(args: argparse.Namespace, device: torch.device, nProcesses: int) -> None:
    """Raises ValueError for a network that cannot be, or of which not even a part fits into the memory."""
    if args.batchSz % nProcesses:
        raise ValueError(f"--batchSz {args.batchSz} cannot be shared by {nProcesses} processes; valid are "
                         f"multiples of {nProcesses}")
    with torch.device("meta"):  # sizes alone
        net = make_net(args)
    side = (args.imageSize or 32) // (4 if args.arch else 1)
    # weights, gradients and momentum; the first block's output for a batch, and its gradient
    needed = 12 * count(net) + 8 * args.batchSz // nProcesses * side**2 * net.trans1.bn1.num_features
    available = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda"
                 else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > available:
        raise ValueError(f"a step of this network with --batchSz {args.batchSz} needs {needed / 1e9:.0f} GB of memory "
                         f"at least; {device} has {available / 1e9:.0f} GB")


def check_images(args: argparse.Namespace, images: torch.Tensor, nProcesses: int) -> None:
    """Raises ValueError if they are too small for the network, or a process's part of a batch for batch norm."""
    smallest = min(data.batch_sizes(len(images), args.batchSz, nProcesses)) // nProcesses
    with torch.device("meta"):  # shapes alone
        net = make_net(args, inChannels=images.shape[1])
        try:
            net(torch.empty(2, *images.shape[1:]))
        except ValueError as error:
            raise ValueError(f"--imageSize {args.imageSize}: {error}") from None
        try:
            net(torch.empty(smallest, *images.shape[1:]))
        except ValueError:
            raise ValueError(f"--batchSz {args.batchSz} for {len(images)} images leaves a process one image alone, and "
                             "the network one value a channel of it, without a variance; valid are others, or a "
                             "larger --imageSize") from None


def make_net_and_optimizer(args: argparse.Namespace, images: data.ImageSet, device: torch.device,
                           checkpoint: dict[str, Any] | None) -> tuple[densenet.DenseNet, torch.optim.Optimizer]:
    """New from --seed or torchvision's weights, or as the checkpoint has them."""
    torch.manual_seed(args.seed)  # before anything is drawn; on the CPU, so alike for every device
    net = make_net(args, nClasses=len(images.classes), inChannels=images.images.shape[1])
    if args.pretrained and not checkpoint:
        net.load_torchvision(pretrained_weights(args.arch), classifier=False)
    if args.syncBN and torch.distributed.is_initialized():  # one process's statistics are all there is
        runs.SyncBatchNorm2d.replace_all(net)
    net.to(device)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[args.opt]
    more = (dict(momentum=0.9, nesterov=not args.no_nesterov) if args.opt == "sgd"
            else dict(capturable=device.type == "cuda"))  # its step count is a tensor on the GPU
    optimizer = kind(net.parameters(), lr=args.lr, weight_decay=args.weightDecay, **more)
    if checkpoint:
        try:
            net.load_state_dict(checkpoint["model"])
            groups = [group | more for group in checkpoint["optimizer"]["param_groups"]]  # the device may be another
            optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": groups})
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(f"the checkpoint in {args.save} does not fit its own flags: its weights are those of "
                           "another network") from error
    return net, optimizer


def pretrained_weights(arch: str) -> dict[str, torch.Tensor]:
    """Raises ValueError if they are neither in torch's cache, and sound, nor can be downloaded."""
    weights = torchvision.models.get_model_weights(arch).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/")[-1])
    there = file.exists()
    try:
        with data.quiet_download(), contextlib.redirect_stderr(io.StringIO()):  # where torch announces it
            return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # urllib's, pickle's, zipfile's, torch's
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--pretrained: {file} is damaged ({reason}); remove it" if there else
                         f"--pretrained: there is no {file}, and its download failed ({reason}); put it there"
                         ) from None


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # a CUDA graph must cast anew each time


def train_step(net, optimizer, precision: str, images: torch.Tensor, labels: torch.Tensor,
               share: float) -> torch.Tensor:
    """-> the batch's mean loss and its error in percent, on the device: reading them would wait for it

    ``share`` is the whole batch's size over the number of processes, so that their mean gradient is the batch's, even
    where one has an image more than another. Loss and error are such that their mean is the batch's, too.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, precision):
        output = net(images)
    loss = F.nll_loss(output, labels, reduction="sum") / share
    loss.backward()
    optimizer.step()
    return torch.stack((loss.detach(), (output.detach().argmax(1) != labels).sum() * 100 / share))


def train_epoch(step, batches: data.Batches, args, epoch: int, run: Run, processes: Processes) -> list[float]:
    """-> the epoch's mean loss and error in percent; a row an iteration goes to train.csv.

    Raises:
        FloatingPointError: if a loss is not finite.
        Stopped: at the end of the step in which a signal came.
    """
    torch.manual_seed(data.epoch_seed(args.seed, epoch * processes.size + processes.rank))  # for dropout
    random = data.draw(batches.n, args.seed, epoch, batches.padding)
    stream = (batches.plain(args.batchSz, random.order, processes.rank, processes.size) if args.no_augment
              else batches.augmented(random, args.batchSz, processes.rank, processes.size))
    sizes = data.batch_sizes(batches.n, args.batchSz, processes.size)
    n = len(sizes)
    read_every = 1 if batches.device.type == "cpu" else math.ceil(n / 8)  # a read waits for the GPU
    pending, total = [], np.zeros(2)
    with tqdm(total=n, desc=f"epoch {epoch}/{args.nEpochs}", unit="step", leave=False,
              disable=None if processes.first else True) as bar:
        for i, (images, labels) in enumerate(stream):
            pending.append(step(images, labels, sizes[i] / processes.size))
            processes.check()
            bar.update()
            if len(pending) == read_every or i == n - 1:
                values = (processes.sum(torch.stack(pending)) / processes.size).tolist()
                first = i + 1 - len(values)  # of these iterations
                check_finite(values, epoch, first)
                run.add("train.csv", [(epoch - 1 + j / n, *v) for j, v in enumerate(values, first)])
                total += np.array(sizes[first:i + 1]) @ np.array(values)
                bar.set_postfix(loss=f"{values[-1][0]:.3f}", error=f"{values[-1][1]:.1f}%", refresh=False)
                pending = []
    return (total / batches.n).tolist()


def check_finite(values: list[list[float]], epoch: int, first: int) -> None:
    for i, (loss, _) in enumerate(values, first):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {epoch}, iteration {i + 1}; {last_good(epoch)}")


def last_good(epoch: int) -> str:
    kept = f"latest.pth is that of epoch {epoch - 1}" if epoch > 1 else "nothing was saved yet"
    return f"{kept}; a new run with a lower --lr may go well (with --overwrite or another --save)"


@torch.no_grad()
def evaluate(net, batches: data.Batches, precision: str, processes: Processes) -> list[float]:
    """-> mean loss and error in percent over all images, of which each process takes its share"""
    net.eval()
    total = torch.zeros(2, dtype=torch.float32 if batches.device.type == "mps" else torch.float64,
                        device=batches.device)
    batchSz = EVALUATION_BATCH.get(batches.device.type, 250)
    for images, labels in batches.plain(batchSz, None, processes.rank, processes.size):
        with autocast(images.device, precision):
            output = net(images)
        total[0] += F.nll_loss(output, labels, reduction="sum")
        total[1] += (output.argmax(1) != labels).sum() * 100
        if processes.size == 1:  # several stop together, at the next step
            processes.check()
    net.train()
    return (processes.sum(total) / batches.n).tolist()


# --- the run ----------------------------------------------------------------------------------------------------

class Sets(NamedTuple):
    train: data.ImageSet
    val: data.ImageSet | None
    test: data.ImageSet


def load_sets(args: argparse.Namespace) -> Sets:
    """Raises ValueError for data that are missing, damaged or not enough."""
    train, test = data.load(args.dataset, args.data, extra=args.extra, imageSize=args.imageSize or 32)
    if args.classes:
        train, test = (data.select_classes(images, args.classes) for images in (train, test))
    if args.pretrained:  # its first convolution reads three channels
        train, test = (s._replace(images=s.images.expand(-1, 3, -1, -1)) for s in (train, test))
    val = None
    if args.valSize:
        train, val = data.hold_out(train, args.valSize, args.seed)
    if args.batchSz > len(train.images):
        raise ValueError(f"--batchSz {args.batchSz} is more than the {len(train.images)} training images")
    return Sets(train, val, test)


def describe_run(args: argparse.Namespace, saved: dict[str, Any] | None, now: dict[str, Any], net: densenet.DenseNet,
                 sets: Sets) -> dict[str, Any]:
    """What run.json tells, and every checkpoint; of a saved run, but for the flags, as it was.

    Raises:
        RunError: if these are not the images of the saved run.
    """
    mean, std = IMAGENET_MEAN_AND_STD if args.pretrained else data.mean_and_std(sets.train.images)
    about = {"format": 1, "flags": {name: value for name, value in vars(args).items() if name not in runs.PER_SESSION},
             "scheduleEpochs": args.nEpochs, "environment": now, "arguments": net.arguments,
             "parameters": count(net), "mean": mean, "std": std, "classes": sets.train.classes,
             "trainImages": len(sets.train.images), "valImages": len(sets.val.images) if sets.val else 0,
             "testImages": len(sets.test.images)}
    if saved is None:
        return about
    same = [about[name] == saved.get(name) for name in ("classes", "trainImages", "valImages", "testImages")]
    if not all(same) or not np.allclose(mean + std, saved["mean"] + saved["std"], rtol=0, atol=1e-9):
        raise RunError(f"--data {args.data} holds other images than those of the run in {args.save}")
    return about | {name: saved[name] for name in ("scheduleEpochs", "environment", "mean", "std")}


def prepare(args: argparse.Namespace, device: torch.device, saved: dict[str, Any] | None,
            checkpoint: dict[str, Any] | None, processes: Processes):
    """-> images, network, optimizer and what run.json is to tell; nothing is written yet

    Raises:
        ValueError: for whatever has to be refused.
    """
    now = runs.environment(device, args.precision, processes.size)
    if saved:
        now = runs.restore_environment(saved["environment"], now, told=processes.first)
    processes.together(lambda: check_network(args, device, processes.size))  # before a download
    sets = processes.one_by_one(lambda: load_sets(args))
    processes.together(lambda: check_images(args, sets.train.images, processes.size))
    net, optimizer = processes.one_by_one(lambda: make_net_and_optimizer(args, sets.train, device, checkpoint))
    about = processes.together(lambda: describe_run(args, saved, now, net, sets))
    return sets, net, optimizer, about


def fit(args: argparse.Namespace, device: torch.device, saved: dict[str, Any] | None,
        checkpoint: dict[str, Any] | None, run: Run, plotter: Plotter, processes: Processes) -> dict[str, Any]:
    """Trains from the checkpoint to the last epoch; -> its number, its results and the best one."""
    sets, net, optimizer, about = prepare(args, device, saved, checkpoint, processes)
    progress = {name: checkpoint[name] if checkpoint else None for name in ("epoch", "val", "test", "best")}

    processes.from_first(run.lock)
    processes.signals.writing = True
    processes.from_first(lambda: run.begin(about, checkpoint, args.overwrite))
    setproctitle.setproctitle(f"train.py {args.save}")
    announce(args, about, device, processes)
    train, val, test = (s and data.Batches(s, about["mean"], about["std"], device) for s in sets)
    step = make_step(args, processes.wrap(net), optimizer, device, processes)
    for epoch in range((progress["epoch"] or 0) + 1, args.nEpochs + 1):
        start = time.perf_counter()
        rate = learning_rate(args.opt, args.lr, epoch, about["scheduleEpochs"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        trainLoss, trainError = train_epoch(step, train, args, epoch, run, processes)
        processes.share_buffers(net)
        name = "val" if val else "test"
        loss, error = evaluate(net, val or test, args.precision, processes)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the {name} loss is {loss} after epoch {epoch}; {last_good(epoch)}")
        run.add(f"{name}.csv", [(epoch, loss, error)])
        is_best = epoch == 1 or error < progress["best"]["error"]
        if is_best:
            progress["best"] = {"error": error, "epoch": epoch}
        progress |= {"epoch": epoch, "test": None, name: {"loss": loss, "error": error}}
        state = about | progress | {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        processes.from_first(functools.partial(run.save, state, best=is_best and val is not None))
        processes.say(f"epoch {epoch}/{args.nEpochs}  rate {rate:g}  train loss {trainLoss:.4f} error "
                      f"{trainError:.2f}%  {name} loss {loss:.4f} error {error:.2f}%  "
                      f"{time.perf_counter() - start:.1f} s")
        plotter.start()
        processes.check()
    if not progress["test"]:
        progress["test"] = test_best(args, net, optimizer, test, about | progress, run, processes)
    return progress


def announce(args: argparse.Namespace, about: dict[str, Any], device: torch.device, processes: Processes) -> None:
    network = args.arch or f"L={args.depth} k={args.growthRate}"
    processes.say(f"{args.save}: {network}, {about['parameters']:,} parameters, {about['environment']['device']}"
                  f"{f' x {processes.size}' * (processes.size > 1)}, {about['trainImages']:,} training and "
                  f"{about['testImages']:,} test images")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and processes.size == 1 and gpus > 1 and not args.device:
        processes.say(f"there are {gpus} GPUs here and this process uses one; for all of them: torchrun "
                      f"--nproc-per-node={gpus} train.py ...")


def make_step(args: argparse.Namespace, net, optimizer, device: torch.device, processes: Processes):
    """-> the function that takes images, labels and share, and trains on them"""
    net.train()
    step = functools.partial(train_step, net, optimizer, args.precision)
    if device.type == "cuda" and processes.size == 1 and not args.no_graph:
        return runs.GraphedStep(step, net, optimizer, args.batchSz)
    return step


def test_best(args: argparse.Namespace, net: densenet.DenseNet, optimizer, test: data.Batches,
              about: dict[str, Any], run: Run, processes: Processes) -> dict[str, float]:
    """The one use of the test set in a run with validation: with the weights of the best epoch."""
    epoch = about["best"]["epoch"]
    last = copy.deepcopy(net.state_dict())
    net.load_state_dict(processes.from_first(lambda: run.read_best(epoch)["model"]))
    loss, error = evaluate(net, test, args.precision, processes)
    run.add("test.csv", [(epoch, loss, error)])
    about["test"] = {"loss": loss, "error": error}
    processes.from_first(lambda: run.save(about | {"model": last, "optimizer": optimizer.state_dict()}))
    return about["test"]


def train(args: argparse.Namespace, given: dict[str, Any], processes: Processes) -> None:
    """The whole run, or what is left of it."""
    if args.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise ValueError("--overwrite would replace what was trained before this restart; restart with --resume")
    device = runs.pick_device(args, processes)
    processes.start(device)
    with (Run if processes.first else runs.Bystander)(args.save) as run:
        args, saved, checkpoint = processes.from_first(lambda: runs.find_saved(run, args, given, parse_args))
        plotter = Plotter(args.save, enabled=not args.no_plot and processes.first)
        is_done = checkpoint and checkpoint["epoch"] >= args.nEpochs and checkpoint["test"]
        try:
            result = checkpoint if is_done else fit(args, device, saved, checkpoint, run, plotter, processes)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not runs.is_out_of_memory(error):
                raise
            raise MemoryError(f"the memory does not hold a step of --batchSz {args.batchSz}; a new run with a smaller "
                              "one, or with --efficient max, needs less") from error
        plotter.finish()  # what an earlier epoch started may have missed the last rows
        plotter.start()
        plotter.finish()
        error, best = result["test"]["error"], result["best"]
        what = (f"test error {error:.2f}% with the weights of epoch {best['epoch']}, the best in validation with "
                f"{best['error']:.2f}%," if args.valSize else
                f"final test error {error:.2f}%, best {best['error']:.2f}% (epoch {best['epoch']})")
        processes.say(f"{what} after {result['epoch']} epochs; everything is in {args.save}")


def evaluate_checkpoint(args: argparse.Namespace, given: dict[str, Any], processes: Processes) -> None:
    """Of the flags that choose images, those that are not given are the checkpoint's."""
    if processes.size > 1:
        raise ValueError("--evaluate is for one process; start it without torchrun")
    device = runs.pick_device(args, processes)
    checkpoint = densenet.read_checkpoint(args.evaluate)
    net = densenet.load(args.evaluate, device)
    for name in ("dataset", "data", "classes", "imageSize", "pretrained", "precision"):
        if name not in given:
            setattr(args, name, checkpoint.get("flags", {}).get(name, getattr(args, name)))
    if "data" not in given and not os.path.exists(args.data):
        raise ValueError(f"the run's --data {args.data} is not to be found from here; give --data")
    args.valSize, args.batchSz = 0, 1
    test = load_sets(args).test
    if test.classes != net.classes:
        raise ValueError(f"--data {args.data} has the classes {test.classes}, the checkpoint {net.classes}")
    batches = data.Batches(test, net.mean.flatten().tolist(), net.std.flatten().tolist(), device)
    loss, error = evaluate(net, batches, args.precision, processes)
    processes.say(f"{args.evaluate}: test loss {loss:.4f}, error {error:.2f}% of {batches.n} images")


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 done, 2 refused before anything was written, 1 failed later, 128 + n stopped by signal n"""
    processes = None
    with Signals() as signals:
        try:
            processes = Processes(signals)
            args, given = parse_args(argv)
            if args.evaluate:
                evaluate_checkpoint(args, given, processes)
            else:
                train(args, given, processes)
            return 0
        except SystemExit as stop:  # argparse's, after --help
            return stop.code
        except Stopped:
            status, reason = 128 + signals.received, f"stopped by {signal.Signals(signals.received).name}"
        except runs.Elsewhere:
            return 1 if signals.writing else 2
        except Exception as error:
            status, reason = 1 if signals.writing else 2, f"error: {runs.explain(error, processes)}"
            if isinstance(error, (FloatingPointError, MemoryError)):  # as it would go again
                return runs.complain(reason, status, processes, everywhere=isinstance(error, FloatingPointError))
        finally:
            if processes:
                processes.end()
        if signals.writing:
            again = (f"./train.py --save {shlex.quote(args.save)} --resume" if processes.size == 1 else
                     "the same command with --resume")
            reason += f"; {again} continues from the last epoch saved"
        return runs.complain(reason, status, processes)


if __name__ == "__main__":
    sys.stdout, sys.stderr = (stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # None if closed, as by 2>&-
                              for stream in (sys.stdout, sys.stderr))
    status = main()
    try:
        sys.stdout.flush()
    except OSError:  # already told; or Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
