"""train.py's flags: on the command line, and of the run that --resume continues."""

import argparse
import math
import os
from typing import Any

from lib import data
from lib.cli import NETWORK_FLAGS, Parser, add_network_flags, flag, number, path
from lib.network import ARCHS
from lib.run_directory import RunError, is_finished

LEARNING_RATE = {"sgd": 0.1, "adam": 1e-3, "rmsprop": 1e-2}
EPOCHS = {"svhn": 40}  # the paper's; 300 on the others
SET_BY_ARCH = (*NETWORK_FLAGS, "initChannels")  # refused beside --arch


def get_args_parser(description: str = "") -> Parser:
    parser = Parser("train.py", description)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=data.DATASETS, default="cifar10",
                       help="folder: images in DIR/train/CLASS, and DIR/test/CLASS or DIR/val/CLASS (default: "
                            "%(default)s)")
    group.add_argument("--data", metavar="DIR", type=path, default="data",
                       help="the data set's folder or its parent; downloaded there if missing (default: %(default)s)")
    group.add_argument("--classes", metavar="NAME", nargs="+", default=None,
                       help="train and test on these classes only, such as cat dog (default: all)")
    group.add_argument("--valSize", metavar="N", type=number(int, 0, 10**9), default=0,
                       help="training images held out for validation, the same share of each class; val.csv is "
                            "written, and the test set is used once, at the end, with the best epoch's weights "
                            "(default: none, test after each epoch)")
    group.add_argument("--imageSize", metavar="S", type=number(int, 1, 4096), default=None,
                       help="height and width in pixels to which a folder's images are resized and cropped "
                            "(default: 32; with --arch 224)")
    group.add_argument("--extra", action="store_true", help="also train on SVHN's extra images")
    group.add_argument("--no-augment", action="store_true",
                       help="no random crop (an eighth of the size as padding) and no random flip of training images; "
                            "always set with svhn: digits must not be flipped")
    group.add_argument("--border", choices=("black", "mean"), default="black",
                       help="colour of the crop's padding. black: the ancestor's; mean: the mean colour, as in the "
                            "paper's official code (default: %(default)s)")

    group = parser.add_argument_group("network (default: DenseNet-BC, L=100, k=12: 769,162 parameters)")
    group.add_argument("--arch", choices=ARCHS, default=None, help="one of ImageNet's networks, for images of 224x224")
    group.add_argument("--pretrained", action="store_true",
                       help="start --arch from torchvision's ImageNet weights (downloaded), except the classifier")
    add_network_flags(group, depth=100)
    group.add_argument("--dropRate", metavar="P", default=0.0,
                       type=number(float, 0, math.nextafter(1, 0), "from 0 to below 1"),
                       help="dropout after every convolution but the first; the paper: 0.2 with --no-augment "
                            "(default: %(default)s)")
    group.add_argument("--initChannels", metavar="C", type=number(int, 1, 65536), default=None,
                       help="channels of the first convolution (default: 2k)")
    group.add_argument("--efficient", choices=("auto", "yes", "no", "max"), default="auto",
                       help="how the dense block is computed in training. yes: in memory linear in depth; max: in "
                            "less memory again, a little slower; no: by the textbook layers; auto: the fastest way "
                            "that fits into memory (default: %(default)s)")
    group.add_argument("--compile", action="store_true",
                       help="compile the efficient block's functions with torch.compile, which takes 15 to 35 s at the "
                            "start and on a CPU needs a C++ compiler. --efficient auto does so for long runs in bf16 "
                            "on CPUs with AVX-512 without memory for the textbook layers")

    group = parser.add_argument_group("training")
    group.add_argument("--batchSz", metavar="N", type=number(int, 1, 10**6), default=64,
                       help="images per training step, summed over all processes (default: %(default)s)")
    group.add_argument("--nEpochs", metavar="N", type=number(int, 1, 10**6), default=None,
                       help="epochs to train (default: 300; svhn 40). With --resume it may be increased; the added "
                            "epochs use the last learning rate")
    group.add_argument("--opt", choices=tuple(LEARNING_RATE), default="sgd",
                       help="sgd: momentum 0.9, the rate falls to a tenth at 1/2 and a hundredth at 3/4 of the epochs; "
                            "adam, rmsprop: constant rate (default: %(default)s)")
    group.add_argument("--lr", metavar="R", type=number(float, 1e-12, 1e6), default=None,
                       help="learning rate at the start (default: " +
                            ", ".join(f"{opt} {rate:g}" for opt, rate in LEARNING_RATE.items()) + ")")
    group.add_argument("--weightDecay", metavar="D", type=number(float, 0, 1e6), default=1e-4,
                       help="L2 penalty on all parameters (default: %(default)s)")
    group.add_argument("--no-nesterov", action="store_true", help="plain momentum with --opt sgd")
    group.add_argument("--seed", metavar="S", type=number(int, 0, 2**32 - 1), default=1,
                       help="seed of weights, order, crops, flips, dropout and validation split (default: %(default)s)")
    group.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                       help="number format of matrix products and activations; statistics, loss and weights are "
                            "always float32. tf32: products of 10-bit mantissas, GPU only; bf16: bfloat16 "
                            "(default: %(default)s)")
    group.add_argument("--syncBN", action="store_true",
                       help="batch norm over the images of all processes (default: over each process's own images)")

    group = parser.add_argument_group("run")
    group.add_argument("--save", metavar="DIR", type=path, default=None,
                       help="run directory (default: work/<dataset>.base)")
    group.add_argument("--resume", action="store_true",
                       help="continue the run in --save with its flags, or start one; repeat it until the run ends")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --save")
    group.add_argument("--evaluate", metavar="CHECKPOINT", type=path, default=None,
                       help="only print a checkpoint's loss and error on the test images")
    group.add_argument("--no-cuda", action="store_true", help="train on the CPU")
    group.add_argument("--device", metavar="D", default=None,
                       help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    group.add_argument("--deterministic", action="store_true",
                       help="repeatable results on a GPU, at the cost of speed; on a CPU they always are")
    group.add_argument("--no-graph", action="store_true",
                       help="on a GPU, launch each operation by itself instead of a step as one CUDA graph")
    group.add_argument("--no-plot", action="store_true", help="do not run plot.py after each epoch")
    return parser


def parse_args(argv: list[str] | None, description: str = "") -> tuple[argparse.Namespace, dict[str, Any]]:
    """-> all flags, and those given on the command line. Raises ValueError for flags that contradict each other."""
    args, explicit = get_args_parser(description).parse(argv)
    if args.resume and args.overwrite:
        raise ValueError("--resume continues the run that --overwrite would replace; give one of them")
    if args.evaluate and (args.resume or args.overwrite):
        raise ValueError("--evaluate does not train; give it without --resume and --overwrite")
    if args.no_cuda and args.device not in (None, "cpu"):
        raise ValueError(f"--no-cuda contradicts --device {args.device}; give one of them")
    if args.pretrained and not args.arch:
        raise ValueError(f"--pretrained needs --arch; valid are {', '.join(ARCHS)}")
    if args.arch:
        for name in SET_BY_ARCH:
            if name in explicit:
                raise ValueError(f"{flag(name, explicit[name])} contradicts --arch {args.arch}; give one of them")
    if args.dataset != "folder" and args.imageSize and not args.evaluate:
        raise ValueError(f"--imageSize {args.imageSize}: --dataset {args.dataset} has its own size; valid with folder")
    if args.dataset != "svhn" and args.extra:
        raise ValueError(f"--extra: --dataset {args.dataset} has no extra images; valid with svhn")
    if args.compile and (args.efficient == "no" or args.syncBN):
        raise ValueError(f"--compile is for the efficient block, and {'--syncBN' if args.syncBN else '--efficient no'} "
                         "trains by the textbook layers; leave out one of them")
    if args.no_nesterov and args.opt != "sgd":
        raise ValueError(f"--no-nesterov with --opt {args.opt}; valid only with sgd")
    if "border" in explicit and (args.no_augment or args.dataset == "svhn"):
        raise ValueError(f"--border {args.border}: images that are not augmented have no border; leave it out")
    for variable in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if args.overwrite and os.environ.get(variable, "0") != "0":
            raise ValueError("--overwrite would replace what was trained before this restart "
                             f"({variable}={os.environ[variable]}); restart with --resume")
    return fill_in_defaults(args), explicit


def fill_in_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Sets, in place, the defaults that depend on other flags."""
    if args.dataset == "folder":
        args.imageSize = args.imageSize or (224 if args.arch else 32)
    args.no_augment = args.no_augment or args.dataset == "svhn"
    args.nEpochs = args.nEpochs or EPOCHS.get(args.dataset, 300)
    args.lr = args.lr or LEARNING_RATE[args.opt]
    args.save = args.save or f"work/{args.dataset}.base"
    return args


# --- resuming ---------------------------------------------------------------------------------------------------

NOT_SAVED = ("resume", "overwrite", "evaluate")  # what to do with a run, not part of it
NOT_RESTORED = ("save", "no_plot", *NOT_SAVED)  # always from the command line, never from the saved run
MAY_CHANGE = ("device", "no_cuda", "no_graph", "data", *NOT_RESTORED)  # when a run is resumed; nEpochs may grow


def resumed_args(args: argparse.Namespace, explicit: dict[str, Any], saved: dict[str, Any]) -> argparse.Namespace:
    """-> the saved run's flags, updated with the explicit ones

    Raises:
        RunError: if an explicit flag contradicts the run, or the run has flags that this version does not know.
    """
    try:
        of_run = fill_in_defaults(get_args_parser().restore(saved["flags"]))
    except ValueError as error:
        raise RunError(f"{args.save} holds a run with flags that this train.py does not take ({error})") from None
    for name, value in explicit.items():
        before = getattr(of_run, name)
        if name == "nEpochs" and value < before:
            raise RunError(f"--nEpochs {value} is less than the run in {args.save} has; valid are {before} or more")
        if name not in ("nEpochs", *MAY_CHANGE) and value != before:
            raise RunError(f"{flag(name, value)} contradicts the run in {args.save}, which has "
                           f"{flag(name, before) or 'not set it'}; leave it out to continue that run, or name another "
                           "--save")
    merged = vars(of_run) | explicit | {name: getattr(args, name) for name in NOT_RESTORED}
    if "device" in explicit or "no_cuda" in explicit:  # each replaces the saved value of both
        merged |= {"device": args.device, "no_cuda": args.no_cuda}
    if "data" not in explicit and not os.path.exists(of_run.data) and not is_finished(saved, merged["nEpochs"]):
        raise RunError(f"the run's --data {of_run.data} is not to be found from here; start in the directory in which "
                       "the run was started, or give --data")
    return argparse.Namespace(**merged)
