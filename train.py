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
import platform
import shlex
import sys
import time
from typing import Any, NoReturn

import numpy as np
import setproctitle
import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

import data
import densenet
from runs import Plotter, Run, RunError, Signals, Stopped, warn

LEARNING_RATE = {"sgd": 0.1, "adam": 1e-3, "rmsprop": 1e-2}
EFFICIENT = {"yes": True, "no": False, "max": "max"}
EVALUATION_BATCH = 250  # images; without gradients they take little memory
OF_THE_COMMAND = ("save", "no_plot", "resume", "overwrite", "evaluate")  # never taken from a saved run
MAY_CHANGE = ("device", "no_cuda", "data", *OF_THE_COMMAND)  # between a run's sessions; nEpochs can grow


# --- flags ------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def whole(minimum: int, maximum: int):
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid are whole numbers from {minimum} to {maximum}")
        return value
    return parse


def real(valid: str, is_valid):
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan  # which no comparison takes
        if not is_valid(value):
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
    group.add_argument("--growthRate", metavar="K", type=whole(1, 4096), default=12,
                       help="k, the channels that each layer adds (default: %(default)s)")
    group.add_argument("--depth", metavar="L", type=whole(1, 4096), default=100,
                       help="layers: 6n + 4 with bottleneck, 3n + 4 without (default: %(default)s)")
    group.add_argument("--reduction", metavar="R", type=real("above 0 and at most 1", lambda r: 0 < r <= 1),
                       default=0.5,
                       help="share of the channels that a transition keeps (default: %(default)s)")
    group.add_argument("--no-bottleneck", action="store_true", help="the original layer: one 3x3 convolution")
    group.add_argument("--dropRate", metavar="P", type=real("from 0 to below 1", lambda p: 0 <= p < 1),
                       default=0.0,
                       help="dropout after every convolution but the first; the paper: 0.2 with --no-augment "
                            "(default: %(default)s)")
    group.add_argument("--initChannels", metavar="C", type=whole(1, 65536), default=None,
                       help="channels of the first convolution (default: 2k)")
    group.add_argument("--efficient", choices=tuple(EFFICIENT), default="yes",
                       help="the dense block in training. yes: memory linear in depth; max: less again, a little "
                            "slower; no: the textbook's (default: %(default)s)")

    group = parser.add_argument_group("training")
    group.add_argument("--batchSz", metavar="N", type=whole(1, 10**6), default=64,
                       help="images a step (default: %(default)s)")
    group.add_argument("--nEpochs", metavar="N", type=whole(1, 10**6), default=300, help="default: %(default)s")
    group.add_argument("--opt", choices=tuple(LEARNING_RATE), default="sgd",
                       help="sgd: momentum 0.9, the rate falls to a tenth at 1/2 and a hundredth at 3/4 of the epochs; "
                            "adam, rmsprop: constant rate (default: %(default)s)")
    group.add_argument("--lr", metavar="R", type=real("from 1e-12 to 1e6", lambda r: 1e-12 <= r <= 1e6),
                       default=None,
                       help="learning rate at the start (default: " +
                            ", ".join(f"{opt} {rate:g}" for opt, rate in LEARNING_RATE.items()) + ")")
    group.add_argument("--weightDecay", metavar="D", type=real("from 0 to 1e6", lambda d: 0 <= d <= 1e6),
                       default=1e-4,
                       help="L2 penalty on all parameters (default: %(default)s)")
    group.add_argument("--no-nesterov", action="store_true", help="plain momentum with --opt sgd")
    group.add_argument("--seed", metavar="S", type=whole(0, 2**32 - 1), default=1, help="default: %(default)s")

    group = parser.add_argument_group("run")
    group.add_argument("--save", metavar="DIR", type=path, default=None, help="run directory (default: work/<dataset>.base)")
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
            raise RunError(f"--nEpochs {value} is less than the {of_run} of the run in {args.save}; valid with --resume "
                           "is that or more")
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
        raise ValueError(f"--device {args.device} does not exist here; valid are {', '.join(valid)}")
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


def make_optimizer(args: argparse.Namespace, net: torch.nn.Module) -> torch.optim.Optimizer:
    if args.opt == "sgd":
        return torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weightDecay,
                               nesterov=not args.no_nesterov)
    kind = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}[args.opt]
    return kind(net.parameters(), lr=args.lr, weight_decay=args.weightDecay)


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
        raise ValueError(f"a step of --depth {args.depth} --growthRate {args.growthRate} --batchSz {args.batchSz} takes "
                         f"more than {needed / 1e9:.0f} GB of memory; {device} has {available / 1e9:.0f} GB")


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


def train_epoch(net, optimizer, batches: data.Batches, args, epoch: int, run: Run, signals: "Signals") -> list[float]:
    """-> the epoch's mean loss and error; a row an iteration goes to train.csv.

    Raises:
        Diverged: if a loss is not finite; nothing of the epoch is saved then.
    """
    net.train()
    torch.manual_seed(data.epoch_seed(args.seed, epoch))  # for dropout
    random = data.draw(batches.n, args.seed, epoch)
    stream = batches.plain(args.batchSz, random.order) if args.no_augment else batches.augmented(random, args.batchSz)
    n = math.ceil(batches.n / args.batchSz)
    read_every = 1 if batches.device.type == "cpu" else math.ceil(n / 8)  # a read waits for the GPU
    pending, total = [], np.zeros(2)
    with tqdm(total=n, desc=f"epoch {epoch}/{args.nEpochs}", unit="step", leave=False, disable=None) as bar:
        for i, (images, labels) in enumerate(stream):
            pending.append(train_step(net, optimizer, images, labels))
            signals.check()
            bar.update()
            if len(pending) < read_every and i < n - 1:
                continue
            first = i + 1 - len(pending)
            rows = [(epoch - 1 + j / n, *row) for j, row in enumerate(torch.stack(pending).tolist(), first)]
            for j, (_, loss, _) in enumerate(rows, first + 1):
                if not math.isfinite(loss):
                    raise Diverged(f"the loss is {loss} in epoch {epoch}, iteration {j}")
            run.add("train.csv", rows)
            sizes = np.minimum(args.batchSz, batches.n - np.arange(first, i + 1) * args.batchSz)
            total += (np.array(rows)[:, 1:] * sizes[:, None]).sum(0)
            bar.set_postfix(rate=f"{optimizer.param_groups[0]['lr']:g}", loss=f"{rows[-1][1]:.3f}",
                            error=f"{rows[-1][2]:.1f}%", refresh=False)
            pending = []
    return (total / batches.n).tolist()


@torch.no_grad()
def evaluate(net, batches: data.Batches, signals: "Signals") -> list[float]:
    """-> mean loss and error in percent over all images"""
    net.eval()
    total = torch.zeros(2, dtype=torch.float64 if batches.device.type != "mps" else None, device=batches.device)
    for images, labels in batches.plain(EVALUATION_BATCH):
        output = net(images)
        total[0] += F.nll_loss(output, labels, reduction="sum")
        total[1] += (output.argmax(1) != labels).sum() * 100
        signals.check()
    return (total / batches.n).tolist()


# --- the run ----------------------------------------------------------------------------------------------------

class Signals:
    """SIGTERM and Ctrl-C let the step under way finish; a second one stops at once."""

    def __init__(self):
        self.received: int | None = None

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def note(self, signum, _frame):
        self.received = signum
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)

    def check(self):
        if self.received is not None:
            raise Stopped


class Plotter:
    """plot.py in the background, one at a time."""

    def __init__(self, args: argparse.Namespace):
        self.command = [sys.executable, str(Path(__file__).resolve().with_name("plot.py")), args.save]
        self.process: subprocess.Popen | None = None
        self.enabled = not args.no_plot

    def start(self, wait: bool = False) -> None:
        if self.process is not None and (wait or self.process.poll() is not None):
            self.finish()
        if self.enabled and self.process is None:
            self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                            start_new_session=True)  # Ctrl-C is for the training
        if wait and self.process is not None:
            self.finish()

    def finish(self) -> None:
        _, stderr = self.process.communicate()
        if self.process.returncode and self.enabled:
            reason = (stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            warn(f"plot.py failed, so no figures ({reason}); training goes on")
            self.enabled = False
        self.process = None


def environment(device: torch.device) -> dict[str, Any]:
    """What a run's exact numbers depend on, besides its flags."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return {"device": name, "threads": torch.get_num_threads(), "cpuCapability": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__), "numpy": np.__version__}


def restore_environment(saved: dict[str, Any], device: torch.device) -> None:
    torch.set_num_threads(saved["threads"])
    for name, value in environment(device).items():
        if value != saved[name]:
            warn(f"{name} is {value}, the run had {saved[name]}: it continues, but not to the same last bits")


def train(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """The whole run; -> exit status. Whatever is refused is refused before anything is written."""
    with Run(args.save) as run, Signals() as signals:
        checkpoint = None
        if run.check(args.resume, args.overwrite):
            run.lock()
            checkpoint = run.load() if args.resume else None
            saved = checkpoint or (run.read_json() if args.resume else None)
            if saved:
                args = merge_saved(args, given, saved["flags"])
        device = pick_device(args)
        trainSet, testSet = data.load(args.dataset, args.data)
        if args.batchSz > len(trainSet.images):
            raise ValueError(f"--batchSz {args.batchSz} is more than the {len(trainSet.images)} training images")
        if checkpoint and checkpoint["classes"] != trainSet.classes:
            raise RunError(f"--data {args.data} has the classes {trainSet.classes}, the run {checkpoint['classes']}")
        mean, std = (checkpoint["mean"], checkpoint["std"]) if checkpoint else data.mean_and_std(trainSet.images)
        net = make_net(args, len(trainSet.classes), trainSet.images.shape[1]).to(device)
        optimizer = make_optimizer(args, net)

        run.lock()
        if args.overwrite:
            run.remove_files()
        state = {"epoch": 0, "scheduleEpochs": args.nEpochs, "environment": environment(device), "best": None}
        if checkpoint:
            net.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            restore_environment(checkpoint["environment"], device)
            state = {name: checkpoint[name] for name in ("epoch", "scheduleEpochs", "environment", "test", "best")}
        state |= {"format": 1, "flags": flags_of_run(args), "arguments": net.arguments, "mean": mean, "std": std,
                  "classes": trainSet.classes}
        run.open_csvs(checkpoint["csvLengths"] if checkpoint else {})
        run.write_json({**state, "parameters": sum(p.numel() for p in net.parameters()),
                        "trainImages": len(trainSet.images), "testImages": len(testSet.images)})
        setproctitle.setproctitle(f"train.py {args.save}")
        print(f"{args.save}: {describe(net)} on {state['environment']['device']}, {len(trainSet.images)} training and "
              f"{len(testSet.images)} test images", flush=True)

        trainBatches, testBatches = (data.Batches(s, mean, std, device) for s in (trainSet, testSet))
        plotter = Plotter(args)
        try:
            for epoch in range(state["epoch"] + 1, args.nEpochs + 1):
                start = time.perf_counter()
                rate = learning_rate(args.opt, args.lr, epoch, state["scheduleEpochs"])
                for group in optimizer.param_groups:
                    group["lr"] = rate
                trainLoss, trainError = train_epoch(net, optimizer, trainBatches, args, epoch, run, signals)
                testLoss, testError = evaluate(net, testBatches, signals)
                if not math.isfinite(testLoss):
                    raise Diverged(f"the test loss is {testLoss} after epoch {epoch}")
                run.add("test.csv", [(epoch, testLoss, testError)])
                state |= {"epoch": epoch, "test": {"loss": testLoss, "error": testError}}
                if state["best"] is None or testError < state["best"]["error"]:
                    state["best"] = {"error": testError, "epoch": epoch}
                run.save({**state, "model": net.state_dict(), "optimizer": optimizer.state_dict()})
                print(f"epoch {epoch}/{args.nEpochs}  rate {rate:g}  train loss {trainLoss:.4f} error {trainError:.2f}%  "
                      f"test loss {testLoss:.4f} error {testError:.2f}%  {time.perf_counter() - start:.1f} s", flush=True)
                plotter.start()
                signals.check()
        except Stopped:
            name = signal.Signals(signals.received).name
            print(f"train.py: stopped by {name}; ./train.py --save {args.save} --resume continues after epoch "
                  f"{state['epoch']}", file=sys.stderr)
            return 128 + signals.received
        plotter.start(wait=True)
        print(f"{args.save}: {state['epoch']} epochs, final test error {state['test']['error']:.2f}%, best "
              f"{state['best']['error']:.2f}% (epoch {state['best']['epoch']}); CSVs, figures and latest.pth are there")
        return 0


def flags_of_run(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in PER_SESSION}


def describe(net: densenet.DenseNet) -> str:
    a = net.arguments
    kind = "DenseNet" + ("-B" * a["bottleneck"] + "C" * (a["reduction"] < 1)).replace("-BC", "-BC")
    return (f"{kind} L={a['depth']} k={a['growthRate']}, {sum(p.numel() for p in net.parameters()):,} parameters")


def evaluate_checkpoint(args: argparse.Namespace) -> int:
    device = pick_device(args)
    net = densenet.load(args.evaluate, device)
    _, testSet = data.load(args.dataset, args.data)
    if testSet.classes != net.classes:
        raise ValueError(f"--data {args.data} has the classes {testSet.classes}, the checkpoint {net.classes}")
    batches = data.Batches(testSet, net.mean.flatten().tolist(), net.std.flatten().tolist(), device)
    with Signals() as signals:
        loss, error = evaluate(net, batches, signals)
    print(f"{args.evaluate}: test loss {loss:.4f}, error {error:.2f}% of {batches.n} images")
    return 0


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 done, 2 refused before anything was written, 1 failed later, 128 + n stopped by signal n"""
    try:
        args, given = parse_args(argv)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after an error
        return stop.code
    try:
        return evaluate_checkpoint(args) if args.evaluate else train(args, given)
    except (ValueError, RunError) as error:
        return fail(error, 2)
    except (Diverged, OSError) as error:
        return fail(error, 1)
    except torch.OutOfMemoryError:
        return fail(f"the GPU's memory does not hold a step of --batchSz {args.batchSz}; --efficient max or a smaller "
                    "--batchSz needs less", 1)


def fail(reason: Exception | str, status: int) -> int:
    print(f"train.py: error: {reason}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
