#!/usr/bin/env python3
"""Trains a DenseNet: ./train.py [flags] writes train.csv, test.csv, run.json, latest.pth and figures to --save.

Without flags: the paper's DenseNet-BC (L=100, k=12) on CIFAR-10 with crop and flip, 300 epochs, on the GPU if there is
one. ./train.py --help lists the flags; ./plot.py draws the CSVs again at any time.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes during the slow imports

import argparse
import math
import os
import shlex
import sys
import time
from typing import Any, NoReturn

import numpy as np
import setproctitle
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import densenet
from runs import Plotter, Run, RunError, Signals, Stopped, environment, restore_environment, tell

LEARNING_RATE = {"sgd": 0.1, "adam": 1e-3, "rmsprop": 1e-2}
EFFICIENT = {"yes": True, "no": False, "max": "max"}
EVALUATION_BATCH = 250  # images; without gradients they take little memory
PER_SESSION = ("resume", "overwrite", "evaluate")  # flags that are no part of a run
OF_THE_COMMAND = ("save", "no_plot", *PER_SESSION)  # never taken from a saved run
MAY_CHANGE = ("device", "no_cuda", "data", *OF_THE_COMMAND)  # between a run's sessions; nEpochs can grow


# --- flags ------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def number(kind: type, minimum: float, maximum: float, valid: str = ""):
    """A flag's type: numbers of this kind between these, both included."""
    valid = valid or f"{'a whole number ' if kind is int else ''}from {minimum} to {maximum}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which no comparison takes
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is {valid}")
        return value
    return parse


def path(text: str) -> str:
    if not text or not text.isprintable():  # neither could be shown in one line
        raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is a path of printable characters")
    return text


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=("cifar10",), default="cifar10", help="default: %(default)s")
    group.add_argument("--data", metavar="DIR", type=path, default="data",
                       help="the data set's folder or its parent; downloaded there if missing (default: %(default)s)")
    group.add_argument("--no-augment", action="store_true",
                       help="no random crop (4 pixels of padding) and no random flip of training images")

    group = parser.add_argument_group("network (default: DenseNet-BC, L=100, k=12: 769,162 parameters)")
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
                       help="images a step (default: %(default)s)")
    group.add_argument("--nEpochs", metavar="N", type=number(int, 1, 10**6), default=300, help="default: %(default)s")
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
    args.lr = args.lr or LEARNING_RATE[args.opt]
    args.save = args.save or f"work/{args.dataset}.base"
    return args, given


def flag(name: str, value: Any) -> str:
    """As on a command line: --depth=40, --no-cuda, or nothing for a flag that is not set."""
    if value is None or value is False:
        return ""
    return f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")


def saved_args(about: dict[str, Any], save: str) -> argparse.Namespace:
    """The flags of a saved run, tested like those of a command line; those it does not know have their default."""
    try:
        return parse_args([text for name, value in about["flags"].items() if (text := flag(name, value))])[0]
    except ValueError as error:
        raise RunError(f"{save} holds a run with flags that this train.py does not take ({error})") from None


def resumed_args(args: argparse.Namespace, given: dict[str, Any], saved: argparse.Namespace) -> argparse.Namespace:
    """The saved run's flags, and of the given ones those that may change.

    Raises:
        RunError: if a given flag contradicts the run.
    """
    for name, value in given.items():
        of_run = getattr(saved, name)
        if name == "nEpochs" and value < of_run:
            raise RunError(f"--nEpochs {value} is less than the run in {args.save} has; valid are {of_run} or more")
        if name not in ("nEpochs", *MAY_CHANGE) and value != of_run:
            raise RunError(f"{flag(name, value)} contradicts the run in {args.save}, which has "
                           f"{flag(name, of_run) or 'not set it'}; leave it out to continue that run, or name another "
                           "--save")
    merged = vars(saved) | given | {name: getattr(args, name) for name in OF_THE_COMMAND}
    if "device" in given or "no_cuda" in given:  # one replaces the other
        merged |= {"device": args.device, "no_cuda": args.no_cuda}
    return argparse.Namespace(**merged)


def pick_device(args: argparse.Namespace) -> torch.device:
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
        torch.backends.cudnn.benchmark = False
    gpus = torch.cuda.device_count()  # without touching any
    if args.device is None:
        return torch.device("cuda" if gpus and not args.no_cuda else "cpu")
    valid = ["cpu"] + ["cuda"] * bool(gpus) + [f"cuda:{i}" for i in range(gpus)]
    if torch.backends.mps.is_available():
        valid.append("mps")
    if args.device not in valid:
        raise ValueError(f"--device {args.device!r} does not exist here; valid are {', '.join(valid)}")
    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # or libraries would open a context on GPU 0
    return device


# --- training ---------------------------------------------------------------------------------------------------

def learning_rate(opt: str, lr: float, epoch: int, nEpochs: int) -> float:
    """The rate in epoch 1 to nEpochs: a tenth from 1/2, a hundredth from 3/4 of the epochs (paper, section 4.2)."""
    if opt != "sgd":
        return lr
    return lr / 100 if 4 * (epoch - 1) >= 3 * nEpochs else lr / 10 if 2 * (epoch - 1) >= nEpochs else lr


def network_arguments(args: argparse.Namespace) -> dict[str, Any]:
    return dict(growthRate=args.growthRate, depth=args.depth, reduction=args.reduction,
                bottleneck=not args.no_bottleneck, dropRate=args.dropRate, initChannels=args.initChannels,
                efficient=EFFICIENT[args.efficient])


def check_network(args: argparse.Namespace, device: torch.device) -> None:
    """Raises ValueError for a network that cannot be, or of which not even a part fits into the memory."""
    with torch.device("meta"):  # sizes alone
        net = densenet.DenseNet(**network_arguments(args))
    # weights, gradients and momentum; the first block's output for a batch of 32x32 images, and its gradient
    needed = 12 * count(net) + 8 * args.batchSz * 32 * 32 * net.trans1.bn1.num_features
    available = (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda"
                 else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if needed > available:
        raise ValueError(f"a step of this network with --batchSz {args.batchSz} needs {needed / 1e9:.0f} GB of memory "
                         f"at least; {device} has {available / 1e9:.0f} GB")


def make_net_and_optimizer(args: argparse.Namespace, images: data.ImageSet, device: torch.device,
                           checkpoint: dict[str, Any] | None) -> tuple[densenet.DenseNet, torch.optim.Optimizer]:
    """New from --seed, or as the checkpoint has them."""
    torch.manual_seed(args.seed)  # before anything is drawn; on the CPU, so alike for every device
    net = densenet.DenseNet(nClasses=len(images.classes), inChannels=images.images.shape[1], **network_arguments(args))
    net.to(device)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[args.opt]
    momentum = dict(momentum=0.9, nesterov=not args.no_nesterov) if args.opt == "sgd" else {}
    optimizer = kind(net.parameters(), lr=args.lr, weight_decay=args.weightDecay, **momentum)
    if checkpoint:
        try:
            net.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(f"the checkpoint in {args.save} does not fit its own flags: its weights are those of "
                           "another network") from error
    return net, optimizer


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def train_step(net, optimizer, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-> the batch's mean loss and its error in percent, on the device: reading them would wait for it"""
    optimizer.zero_grad(set_to_none=True)
    output = net(images)
    loss = F.nll_loss(output, labels)
    loss.backward()
    optimizer.step()
    return torch.stack((loss.detach(), (output.detach().argmax(1) != labels).float().mean() * 100))


def train_epoch(net, optimizer, batches: data.Batches, args, epoch: int, run: Run, signals: Signals) -> list[float]:
    """-> the epoch's mean loss and error in percent; a row an iteration goes to train.csv.

    Raises:
        FloatingPointError: if a loss is not finite.
        Stopped: at the end of the step in which a signal came.
    """
    net.train()
    torch.manual_seed(data.epoch_seed(args.seed, epoch))  # for dropout
    random = data.draw(batches.n, args.seed, epoch)
    stream = batches.plain(args.batchSz, random.order) if args.no_augment else batches.augmented(random, args.batchSz)
    n = math.ceil(batches.n / args.batchSz)
    read_every = 1 if batches.device.type == "cpu" else math.ceil(n / 8)  # a read waits for the GPU
    pending, sizes, total = [], [], np.zeros(2)
    with tqdm(total=n, desc=f"epoch {epoch}/{args.nEpochs}", unit="step", leave=False, disable=None) as bar:
        for i, (images, labels) in enumerate(stream, 1):
            pending.append(train_step(net, optimizer, images, labels))
            sizes.append(len(labels))
            signals.check()
            bar.update()
            if len(pending) == read_every or i == n:
                values = torch.stack(pending).tolist()
                check_finite(values, epoch, i - len(values) + 1)
                run.add("train.csv", [(epoch - 1 + j / n, *v) for j, v in enumerate(values, i - len(values))])
                total += np.array(sizes) @ np.array(values)
                bar.set_postfix(rate=f"{optimizer.param_groups[0]['lr']:g}", loss=f"{values[-1][0]:.3f}",
                                error=f"{values[-1][1]:.1f}%", refresh=False)
                pending, sizes = [], []
    return (total / batches.n).tolist()


def check_finite(values: list[list[float]], epoch: int, iteration: int) -> None:
    for i, (loss, _) in enumerate(values, iteration):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {epoch}, iteration {i}; {last_good(epoch)}")


def last_good(epoch: int) -> str:
    kept = f"latest.pth is that of epoch {epoch - 1}" if epoch > 1 else "nothing was saved yet"
    return f"{kept}, a new run with a lower --lr may go well"


@torch.no_grad()
def evaluate(net, batches: data.Batches, signals: Signals) -> list[float]:
    """-> mean loss and error in percent over all images"""
    net.eval()
    total = torch.zeros(2, dtype=torch.float32 if batches.device.type == "mps" else torch.float64,
                        device=batches.device)
    for images, labels in batches.plain(EVALUATION_BATCH):
        output = net(images)
        total[0] += F.nll_loss(output, labels, reduction="sum")
        total[1] += (output.argmax(1) != labels).sum() * 100
        signals.check()
    return (total / batches.n).tolist()


# --- the run ----------------------------------------------------------------------------------------------------

def find_saved(run: Run, args: argparse.Namespace, given: dict[str, Any]):
    """-> the flags to train with; what run.json tells of the run to resume and its checkpoint, or None for each

    Raises:
        RunError: if the directory does not fit what the user asked for.
    """
    if not run.check(args.resume, args.overwrite):
        return args, None, None
    run.lock()
    about, checkpoint = run.read() if args.resume else (None, None)
    if about is None:
        return args, None, None
    saved = saved_args(about, args.save)  # newer than the checkpoint's, if nEpochs has grown since that
    if checkpoint:
        for name, value in vars(saved_args(checkpoint, args.save)).items():
            if name not in ("nEpochs", *MAY_CHANGE) and value != getattr(saved, name):
                raise RunError(f"the checkpoint in {args.save} is another run's: {name} is {value} there, and "
                               f"{getattr(saved, name)} in run.json")
    return resumed_args(args, given, saved), about, checkpoint


def describe_run(args: argparse.Namespace, saved: dict[str, Any] | None, device: torch.device, net: densenet.DenseNet,
                 trainSet: data.ImageSet, testSet: data.ImageSet) -> dict[str, Any]:
    """What run.json tells, and every checkpoint; of a saved run, but for the flags, as it was.

    Raises:
        RunError: if these are not the images of the saved run.
    """
    mean, std = data.mean_and_std(trainSet.images)
    about = {"format": 1, "flags": {name: value for name, value in vars(args).items() if name not in PER_SESSION},
             "scheduleEpochs": args.nEpochs, "environment": environment(device), "arguments": net.arguments,
             "parameters": count(net), "mean": mean, "std": std, "classes": trainSet.classes,
             "trainImages": len(trainSet.images), "testImages": len(testSet.images)}
    if saved is None:
        return about
    same = [about[name] == saved.get(name) for name in ("classes", "trainImages", "testImages")]
    if not all(same) or not np.allclose(mean + std, saved["mean"] + saved["std"], rtol=0, atol=1e-9):
        raise RunError(f"--data {args.data} holds other images than those of the run in {args.save}")
    return about | {name: saved[name] for name in ("scheduleEpochs", "environment", "mean", "std")}


def fit(args: argparse.Namespace, saved: dict[str, Any] | None, checkpoint: dict[str, Any] | None, run: Run,
        plotter: Plotter, signals: Signals) -> dict[str, Any]:
    """Trains from the checkpoint to the last epoch; -> its number, its test result and the best one.

    Whatever is refused is refused before ``signals.writing``.
    """
    device = pick_device(args)
    if saved:
        restore_environment(saved["environment"], device)
    check_network(args, device)  # before a download
    sets = data.load(args.dataset, args.data)
    if args.batchSz > len(sets[0].images):
        raise ValueError(f"--batchSz {args.batchSz} is more than the {len(sets[0].images)} training images")
    net, optimizer = make_net_and_optimizer(args, sets[0], device, checkpoint)
    about = describe_run(args, saved, device, net, *sets)
    progress = {name: checkpoint[name] if checkpoint else None for name in ("epoch", "test", "best")}

    run.lock()
    signals.writing = True
    run.begin(about, checkpoint["csvLengths"] if checkpoint else {}, args.overwrite)
    setproctitle.setproctitle(f"train.py {args.save}")
    print(f"{args.save}: L={args.depth} k={args.growthRate}, {count(net):,} parameters, "
          f"{about['environment']['device']}, {about['trainImages']:,} training and {about['testImages']:,} test "
          "images", flush=True)
    trainBatches, testBatches = (data.Batches(s, about["mean"], about["std"], device) for s in sets)
    for epoch in range((progress["epoch"] or 0) + 1, args.nEpochs + 1):
        start = time.perf_counter()
        rate = learning_rate(args.opt, args.lr, epoch, about["scheduleEpochs"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        trainLoss, trainError = train_epoch(net, optimizer, trainBatches, args, epoch, run, signals)
        loss, error = evaluate(net, testBatches, signals)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the test loss is {loss} after epoch {epoch}; {last_good(epoch)}")
        run.add("test.csv", [(epoch, loss, error)])
        if epoch == 1 or error < progress["best"]["error"]:
            progress["best"] = {"error": error, "epoch": epoch}
        progress |= {"epoch": epoch, "test": {"loss": loss, "error": error}}
        run.save(about | progress | {"model": net.state_dict(), "optimizer": optimizer.state_dict()})
        print(f"epoch {epoch}/{args.nEpochs}  rate {rate:g}  train loss {trainLoss:.4f} error {trainError:.2f}%  test "
              f"loss {loss:.4f} error {error:.2f}%  {time.perf_counter() - start:.1f} s", flush=True)
        plotter.start()
        signals.check()
    return progress


def train(args: argparse.Namespace, given: dict[str, Any], signals: Signals) -> None:
    """The whole run, or what is left of it."""
    with Run(args.save) as run:
        args, saved, checkpoint = find_saved(run, args, given)
        plotter = Plotter(args.save, enabled=not args.no_plot)
        is_done = checkpoint and checkpoint["epoch"] >= args.nEpochs
        try:
            result = checkpoint if is_done else fit(args, saved, checkpoint, run, plotter, signals)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            raise MemoryError(f"the memory does not hold a step of --batchSz {args.batchSz}; a new run with a smaller "
                              "one, or with --efficient max, needs less") from error
        plotter.start()
        plotter.finish()
        print(f"final test error {result['test']['error']:.2f}%, best {result['best']['error']:.2f}% (epoch "
              f"{result['best']['epoch']}) after {result['epoch']} epochs; everything is in {args.save}", flush=True)


def evaluate_checkpoint(args: argparse.Namespace, signals: Signals) -> None:
    device = pick_device(args)
    net = densenet.load(args.evaluate, device)
    _, testSet = data.load(args.dataset, args.data)
    if testSet.classes != net.classes:
        raise ValueError(f"--data {args.data} has the classes {testSet.classes}, the checkpoint {net.classes}")
    batches = data.Batches(testSet, net.mean.flatten().tolist(), net.std.flatten().tolist(), device)
    loss, error = evaluate(net, batches, signals)
    print(f"{args.evaluate}: test loss {loss:.4f}, error {error:.2f}% of {batches.n} images", flush=True)


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 done, 2 refused before anything was written, 1 failed later, 128 + n stopped by signal n"""
    with Signals() as signals:
        try:
            args, given = parse_args(argv)
            if args.evaluate:
                evaluate_checkpoint(args, signals)
            else:
                train(args, given, signals)
            return 0
        except SystemExit as stop:  # argparse's, after --help
            return stop.code
        except Stopped:
            status, reason = 128 + signals.received, f"stopped by {signal.Signals(signals.received).name}"
        except Exception as error:
            status, reason = 1 if signals.writing else 2, f"error: {explain(error)}"
            if isinstance(error, (FloatingPointError, MemoryError)):  # as it would go again
                return complain(reason, status)
        if signals.writing:
            reason += f"; ./train.py --save {shlex.quote(args.save)} --resume continues from the last epoch saved"
        return complain(reason, status)


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def explain(error: Exception) -> str:
    """For what a user can cause or mend; anything else is a fault of the program and is raised again."""
    if isinstance(error, (ValueError, FloatingPointError, MemoryError)):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, torch.AcceleratorError):
        return str(error).splitlines()[0]
    raise error


def complain(reason: str, status: int) -> int:
    tell(" ".join(reason.split()))
    return status


if __name__ == "__main__":
    sys.stdout, sys.stderr = (stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")  # None if closed, as by 2>&-
                              for stream in (sys.stdout, sys.stderr))
    status = main()
    try:
        sys.stdout.flush()
    except OSError:  # already told; or Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(status)
