"""train.py's flags: on the command line, and of the run that --resume continues."""

import argparse
import math
import os
from typing import Any

from lib.cli import NETWORK_FLAGS, Parser, add_network_flags, flag, new_file, number, path

ARCHS = ("densenet121", "densenet161", "densenet169", "densenet201")
DATASETS = ("cifar10", "cifar100", "svhn", "folder")
LEARNING_RATE = {"sgd": 0.1, "adam": 1e-3, "rmsprop": 1e-2}
SCHEDULE = {"sgd": "step", "adam": "constant", "rmsprop": "constant"}
EPOCHS = {"svhn": 40}  # the paper's; 300 on the others
WITH_EVALUATE = ("evaluate", "predictions", "dataset", "data", "classes", "imageSize", "precision", "device", "no_cuda",
                 "deterministic")


def get_args_parser(description: str = "") -> Parser:
    parser = Parser("train.py", description)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="cifar10",
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
    group.add_argument("--init", metavar="FILE", type=path, default=None,
                       help="start from the weights in FILE: a checkpoint of train.py, or a state dict with our names, "
                            "torchvision's or andreasveit's; the classifier is taken if it fits")
    add_network_flags(group, depth=100)
    group.add_argument("--dropRate", metavar="P", default=0.0,
                       type=number(float, 0, math.nextafter(1, 0), "from 0 to below 1"),
                       help="dropout after every convolution but the first; the paper: 0.2 with --no-augment "
                            "(default: %(default)s)")
    group.add_argument("--initChannels", metavar="C", type=number(int, 1, 65536), default=None,
                       help="channels of the first convolution (default: 2k)")
    group.add_argument("--efficient", choices=("auto", "yes", "no", "max"), default="auto",
                       help="how dense blocks are computed in training. yes: in a sixth of the memory; max: in a "
                            "twentieth, a little slower; no: by the textbook layers; auto: yes on a CPU in fp32, else "
                            "no, which is the fastest there (default: %(default)s)")

    group = parser.add_argument_group("training")
    group.add_argument("--batchSz", metavar="N", type=number(int, 1, 10**6), default=64,
                       help="images per training step, summed over all processes: a multiple of their number (default: "
                            "%(default)s)")
    group.add_argument("--nEpochs", metavar="N", type=number(int, 1, 10**6), default=None,
                       help="epochs to train (default: 300; svhn 40). With --resume it may be increased; the added "
                            "epochs use the last learning rate")
    group.add_argument("--opt", choices=tuple(LEARNING_RATE), default="sgd",
                       help="sgd: with momentum 0.9 (default: %(default)s)")
    group.add_argument("--lr", metavar="R", type=number(float, 1e-12, 1e6), default=None,
                       help="learning rate at the start (default: " +
                            ", ".join(f"{opt} {rate:g}" for opt, rate in LEARNING_RATE.items()) + ")")
    group.add_argument("--schedule", choices=("step", "cosine", "constant"), default=None,
                       help="step: the rate falls to a tenth at 1/2 and to a hundredth at 3/4 of the epochs, as in the "
                            "paper; cosine: from epoch to epoch along half a cosine towards 0 (default: step with sgd, "
                            "else constant)")
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
                       help="batch norm over the images of all GPUs (default: over each GPU's own images)")

    group = parser.add_argument_group("run")
    group.add_argument("--save", metavar="DIR", type=path, default=None,
                       help="run directory (default: work/<dataset>.base)")
    group.add_argument("--resume", action="store_true",
                       help="continue the run in --save with its flags, or start one; repeat it until the run ends")
    group.add_argument("--overwrite", action="store_true", help="replace the run in --save")
    group.add_argument("--evaluate", metavar="RUN", type=path, default=None,
                       help="only print the loss and error on the test images of a checkpoint, or of a run's directory")
    group.add_argument("--predictions", metavar="FILE.csv", type=new_file(".csv", may_exist=False), default=None,
                       help="with --evaluate: write image, label, prediction and probability of each test image")
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
    if args.evaluate:
        for name in explicit.keys() - {*WITH_EVALUATE}:
            raise ValueError(f"{flag(name, explicit[name])} has no effect with --evaluate; valid are "
                             + ", ".join(flag(name) for name in WITH_EVALUATE[1:]))
    elif args.predictions:
        raise ValueError("--predictions needs --evaluate")
    if args.resume and args.overwrite:
        raise ValueError("--resume continues the run that --overwrite would replace; give one of them")
    if args.no_cuda and args.device not in (None, "cpu"):
        raise ValueError(f"--no-cuda contradicts --device {args.device}; give one of them")
    if args.pretrained and (not args.arch or args.init):
        raise ValueError(f"--pretrained needs --arch {'|'.join(ARCHS)}, and no --init")
    for name in (*NETWORK_FLAGS, "initChannels"):
        if args.arch and name in explicit:
            raise ValueError(f"{flag(name, explicit[name])} contradicts --arch {args.arch}; give one of them")
    if args.dataset != "folder" and args.imageSize and not args.evaluate:
        raise ValueError(f"--imageSize {args.imageSize}: --dataset {args.dataset} has its own size; valid with folder")
    if args.dataset != "svhn" and args.extra:
        raise ValueError(f"--extra: --dataset {args.dataset} has no extra images; valid with svhn")
    if args.no_nesterov and args.opt != "sgd":
        raise ValueError(f"--no-nesterov with --opt {args.opt}; valid only with sgd")
    if "border" in explicit and (args.no_augment or args.dataset == "svhn"):
        raise ValueError(f"--border {args.border}: images that are not augmented have no border; leave it out")
    if args.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise ValueError("--overwrite would replace what was trained before torchrun's restart; restart with --resume")
    return fill_in_defaults(args), explicit


def fill_in_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Sets, in place, the defaults that depend on other flags."""
    if args.dataset == "folder":
        args.imageSize = args.imageSize or (224 if args.arch else 32)
    args.no_augment = args.no_augment or args.dataset == "svhn"
    args.nEpochs = args.nEpochs or EPOCHS.get(args.dataset, 300)
    args.lr = args.lr or LEARNING_RATE[args.opt]
    args.schedule = args.schedule or SCHEDULE[args.opt]
    args.save = args.save or f"work/{args.dataset}.base"
    return args


# --- of a run that is there already -----------------------------------------------------------------------------

NOT_SAVED = ("resume", "overwrite", "evaluate", "predictions")  # what to do with a run, not part of it
NOT_RESTORED = ("save", "no_plot", *NOT_SAVED)  # always from the command line, never from the saved run
MAY_CHANGE = ("device", "no_cuda", "no_graph", "data", *NOT_RESTORED)  # on --resume, where nEpochs may grow, too


def saved_flags(args: argparse.Namespace) -> dict[str, Any]:
    """-> the flags that a checkpoint holds"""
    return {name: value for name, value in vars(args).items() if name not in NOT_SAVED}


def restore(checkpoint: dict[str, Any], file: str) -> argparse.Namespace:
    """-> the flags of a checkpoint's run. Raises ValueError for flags that the command line would refuse."""
    flags = checkpoint.get("flags")
    if not isinstance(flags, dict):
        raise ValueError(f"{file} has no flags of train.py")
    words = []
    for name, value in flags.items():
        if isinstance(value, list):
            words += [flag(name), *map(str, value)]
        elif value is not None and value is not False and name != "compile":  # of 1.1: the same function, to rounding
            words.append(flag(name, value))
    try:
        return fill_in_defaults(get_args_parser().parse_args(words))
    except ValueError as error:
        raise ValueError(f"{file} was made with flags that this train.py does not know: {error}") from None


def resumed_args(args: argparse.Namespace, explicit: dict[str, Any], saved: dict[str, Any]) -> argparse.Namespace:
    """-> the saved run's flags, updated with the explicit ones; raises ValueError if these contradict the run"""
    of_run = restore(saved, f"the run in {args.save}")
    for name, value in explicit.items():
        before = getattr(of_run, name)
        if name == "nEpochs" and value < before:
            raise ValueError(f"--nEpochs {value} is less than the run in {args.save} has; valid are {before} or more")
        if name not in ("nEpochs", *MAY_CHANGE) and value != before:
            raise ValueError(f"{flag(name, value)} contradicts the run in {args.save}, which has "
                             f"{flag(name, before) or 'not set it'}; leave it out to continue that run, or name "
                             "another --save")
    merged = vars(of_run) | explicit | {name: getattr(args, name) for name in NOT_RESTORED}
    if "device" in explicit or "no_cuda" in explicit:  # each replaces the saved value of both
        merged |= {"device": args.device, "no_cuda": args.no_cuda}
    return argparse.Namespace(**merged)
