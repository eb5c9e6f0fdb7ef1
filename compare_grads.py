#!/usr/bin/env python3
"""Compare two implementations layer by layer: ./compare_grads.py [--against WHAT]

Both get the same weights, images and labels. Every hidden state, running statistic and gradient is compared, in order
of computation. Prints a table; --csv writes a row for each tensor, --plot draws a figure. Exit status: 0 all agree, or
skipped since this machine lacks something; 1 a tensor differs, or the comparison could not be completed; 2 bad input.
"""

import argparse
import csv
import io
import math
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from lib.figures import COLOURS, STYLE, png_of  # must be imported before matplotlib, see lib/figures.py

# isort: split
import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display needed

import densenet
from densenet import DenseNet
from lib import cli, data
from lib.cli import EFFICIENT, NETWORK_FLAGS, Parser, add_network_flags, fail, flag, network_arguments, number
from lib.faults import FAULTS, add_inject_flag
from lib.files import new_file, replace_file
from lib.layers import COMPILED_PATHS, PATHS, describe, layers_of, settle_kinks
from lib.memory import has_cxx_compiler
from lib.recording import Record, Side, record
from lib.torchvision_net import check_torchvision_has

FACTOR = 4  # an error may be this many times the reference's own rounding error
LIMIT64 = 1e-10  # limit of the difference in float64, where rounding errors are about 1e-13
AGAINST = {
    "torchvision": "our network against torchvision's, an independent implementation",
    "plain": "the efficient dense block against the textbook's",
    "float64": "the rounding errors of float32 in our network against those in torchvision's",
    "cuda": "the GPU against the CPU",
    "cudnn-off": "the GPU with cuDNN against the GPU without",
    "channels_last": "the memory format channels_last against contiguous",
    "compile": "torch.compile against eager",
    "bf16": "bfloat16 autocast of our network against that of torchvision's",
}


class Key(NamedTuple):
    """A tensor that is compared."""
    layer: str
    kind: str  # "state", "statistic", "gradient" (with respect to a state), "parameter" (gradient with respect to it)
    name: str


class Row(NamedTuple):
    """The comparison of one tensor.

    A difference is the largest absolute difference of two elements, divided by the largest absolute element of the
    yardstick. The yardstick is a computation in float64, usually of the reference, see sides().
    """
    layer: str
    kind: str
    name: str
    norm: float
    difference: float  # between the tested implementation and the yardstick
    reference: float  # between the reference and the yardstick
    limit: float  # of ``difference``
    difference64: float  # between the tested implementation in float64 and the yardstick; 0 if not computed
    identical: bool  # tested and reference are equal bit for bit

    @property
    def share(self) -> float:
        """``difference`` or ``difference64`` divided by its limit, whichever is larger. Above 1 the tensor differs."""
        shares = self.difference / self.limit, self.difference64 / LIMIT64
        return max(math.inf if math.isnan(share) else share for share in shares)


# --- flags ------------------------------------------------------------------------------------------------------

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("compare_grads.py", __doc__)
    add = parser.add_argument
    add("--against", choices=tuple(AGAINST), default="torchvision", metavar="WHAT",
        help=", ".join(f"{name} ({text})" for name, text in AGAINST.items()) + "; default: %(default)s")
    add("--efficient", choices=tuple(EFFICIENT), default=None,
        help="the path of our dense blocks, as in train.py; with yes and max the gradients of the states inside a "
             "block are not compared (default: no; with plain: yes)")
    add("--compile", action="store_true", help="compile our efficient blocks, as train.py --compile")
    add("--checkpoint", metavar="FILE", type=cli.path, default=None,
        help="train.py's latest.pth: use its network and weights, in training mode; needs --data")
    add("--data", metavar="DIR", type=cli.path, default=None,
        help="CIFAR-10's folder or its parent (default: random images)")
    add("--batchSz", metavar="N", type=number(int, 2, 1024), default=8,
        help="number of images (default: %(default)s)")
    add("--csv", metavar="FILE", type=new_file(""), default=None, help="write a row for each tensor")
    add("--plot", metavar="FILE.png", type=new_file(".png"), default=None,
        help="draw each layer's largest difference")
    add("--seed", metavar="S", type=number(int, 0, 2**32 - 1), default=1,
        help="seed of the weights and images (default: %(default)s)")
    add_inject_flag(parser, FAULTS)
    add_network_flags(parser.add_argument_group("network"), depth=22, growth_rates=(2, 64))
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    args, explicit = get_args_parser().parse(argv)
    args.efficient = args.efficient or ("yes" if args.against == "plain" else "no")
    network = [flag(name) for name in NETWORK_FLAGS if name in explicit]
    if args.checkpoint and network:
        raise ValueError(f"{network[0]} contradicts --checkpoint {args.checkpoint}, which has a network of its own; "
                         "give one of them")
    if args.checkpoint and not args.data:
        raise ValueError(f"--checkpoint {args.checkpoint} needs real images; add --data DIR")
    if args.against == "plain" and args.efficient == "no":
        raise ValueError("--efficient no leaves nothing to compare with plain; valid are yes, max")
    if args.against == "compile" and args.efficient != "no":
        raise ValueError(f"--efficient {args.efficient}: torch.compile computes the textbook's layers; with --against "
                         "compile valid is no")
    if args.compile and args.efficient == "no":
        raise ValueError("--compile is for the efficient block; add --efficient yes or max")
    if args.against == "bf16" and args.inject:
        raise ValueError(f"--inject {args.inject} could be smaller than bfloat16's rounding errors; valid are the "
                         "other values of --against")
    return args


def missing(against: str, compiles: bool) -> str | None:
    """-> what this machine lacks for the comparison, or None"""
    if against in ("cuda", "cudnn-off") and not torch.cuda.is_available():
        return "this machine has no GPU that PyTorch can use"
    if against == "cudnn-off" and not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    if compiles and not has_cxx_compiler():
        return f"there is no C++ compiler {os.environ.get('CXX', 'g++')}"
    return None


def sides(args: argparse.Namespace) -> list[Side | None]:
    """-> the tested side, the reference, the yardstick, and the tested side in float64 or None

    In float64, rounding errors are too small to hide a fault. It is None where the rounding errors are themselves
    compared (float64, bf16), or where another dtype would compile another program (compile).
    """
    ours = Side("ours", path=(COMPILED_PATHS if args.compile else PATHS)[EFFICIENT[args.efficient]])
    theirs = Side("torchvision", torchvision=True)
    gpu = ours._replace(name="GPU", device="cuda")
    tested, reference = {
        "torchvision": (ours, theirs),
        "plain": (ours._replace(name=PATHS[EFFICIENT[args.efficient]]), Side("textbook")),
        "float64": (ours, theirs),
        "cuda": (gpu, ours._replace(name="CPU")),
        "cudnn-off": (gpu._replace(name="cuDNN"), gpu._replace(name="no cuDNN", cudnn=False)),
        "channels_last": (ours._replace(name="ch. last", memory_format=torch.channels_last),
                          ours._replace(name="contiguous")),
        "compile": (ours._replace(name="compiled", compiled=True), ours._replace(name="eager")),
        "bf16": (ours._replace(autocast=True), theirs._replace(autocast=True)),
    }[args.against]
    yardstick = (ours if args.against == "float64" else reference)._replace(dtype=torch.float64, autocast=False)
    tested64 = None if args.against in ("float64", "compile", "bf16") else tested._replace(dtype=torch.float64)
    return [tested, reference, yardstick, tested64]


def load(args: argparse.Namespace) -> tuple[DenseNet, torch.Tensor, torch.Tensor]:
    """-> the network, with efficient=False; images, float32 (N, C, H, W), normalised; labels, int64 (N,)

    Raises:
        ValueError: for impossible dimensions of the network, and for files that are damaged or do not fit.
        OSError: for files that cannot be read.
    """
    trained = densenet.load(args.checkpoint) if args.checkpoint else None
    if trained:
        arguments = trained.arguments | {"dropRate": 0.0}  # two networks would drop different values
        net = DenseNet(**arguments, efficient=False)
        net.load_state_dict(trained.state_dict())
    else:
        torch.manual_seed(args.seed)
        net = DenseNet(**network_arguments(args), efficient=False)
    torch.manual_seed(args.seed)
    n, a = args.batchSz, net.arguments
    if not args.data:
        return net, torch.randn(n, a["inChannels"], 32, 32), torch.randint(a["nClasses"], (n,))
    images, labels, classes = data.load("cifar10", args.data)[0]
    if (a["inChannels"], a["nClasses"]) != (images.shape[1], len(classes)) or not a["smallInputs"]:
        raise ValueError(f"--checkpoint {args.checkpoint} is for {a['nClasses']} classes and {a['inChannels']} channels"
                         f"{'' if a['smallInputs'] else ' of large images'}, not for the images of --data {args.data}")
    if n > len(images):
        raise ValueError(f"--batchSz {n} is more than the {len(images)} training images; give at most {len(images)}")
    mean, std = (trained.mean, trained.std) if trained else torch.tensor(data.mean_and_std(images))[..., None, None]
    batch = torch.randperm(len(images))[:n]
    return net, (images[batch] / 255 - mean) / std, labels[batch]


# --- the comparison ---------------------------------------------------------------------------------------------

def keys(net: DenseNet) -> Iterator[Key]:
    """-> all tensors that can be compared, in order of computation: forward pass, then backward pass"""
    for name, module in layers_of(net):
        if name == "fc":
            yield Key("features", "state", "features")
        yield from (Key(name, "statistic", f"{name}.{buffer}") for buffer, _ in module.named_buffers())
        yield Key(name, "state", name)
    yield from (Key("loss", "state", "output"), Key("loss", "state", "loss"))
    for name, module in reversed(layers_of(net)):
        yield Key(name, "gradient", name)
        yield from (Key(name, "parameter", f"{name}.{p}") for p, _ in reversed([*module.named_parameters()]))
        if name == "fc":
            yield Key("features", "gradient", "features")
    yield Key("images", "gradient", "images")


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """-> the largest |a - b|, divided by the largest |b|"""
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def compare(net: DenseNet, records: list[Record | None], floor: float) -> list[Row]:
    """-> a row for each tensor that tested and reference have recorded, in order of computation

    Rounding errors accumulate from layer to layer. So the limit of a tensor is FACTOR times the largest error that the
    reference has had up to there in tensors of the same kind, and at least FACTOR * ``floor``.
    """
    tested, reference, yardstick, tested64 = records
    largest, rows = {}, []  # kind -> the reference's largest error up to here
    for layer, kind, name in keys(net):
        key = kind, name
        if key in tested and key in reference:
            error = difference(reference[key], yardstick[key])
            largest[kind] = max(largest.get(kind, floor), error)
            rows.append(Row(layer, kind, name, norm=yardstick[key].double().norm().item(),
                            difference=difference(tested[key], yardstick[key]),
                            reference=error, limit=FACTOR * largest[kind],
                            difference64=difference(tested64[key], yardstick[key]) if tested64 else 0.0,
                            identical=torch.equal(tested[key], reference[key])))
    return rows


def compare_sides(args: argparse.Namespace, net: DenseNet, images: torch.Tensor, labels: torch.Tensor) -> list[Row]:
    settle_kinks(net.double(), images.double())
    net.float()  # round the weights, so that they are the same in float32 and float64
    tested, reference, yardstick, tested64 = sides(args)
    records = [record(tested, net, images, labels, args.inject), record(reference, net, images, labels, None),
               record(yardstick, net, images, labels, None),
               record(tested64, net, images, labels, args.inject) if tested64 else None]
    if tested.autocast:
        return compare(net, records, torch.finfo(torch.bfloat16).eps)
    m = images.numel() / images.shape[1]  # values per channel; the rounding error of their sum grows with sqrt(m)
    return compare(net, records, torch.finfo(torch.float32).eps * math.sqrt(m))


# --- results ----------------------------------------------------------------------------------------------------

def by_layer(net: DenseNet, rows: list[Row]) -> dict[str, tuple[list[Row], list[Row]]]:
    """-> the layer's name -> its rows of the forward pass, its rows of the backward pass"""
    layers = {layer: ([], []) for layer in ["images", *(key.layer for key in keys(net))]}
    for row in rows:
        forward, backward = layers[row.layer]
        (backward if row.kind in ("gradient", "parameter") else forward).append(row)
    return {layer: passes for layer, passes in layers.items() if any(passes)}


def print_table(layers: dict[str, tuple[list[Row], list[Row]]], tested: str, reference: str) -> None:
    print(f"{'':12}{'norm of':>9}{'forward:':>11}{'':13}{'backward:':>11}{'':13}{'both in':>10}{'share of':>10}\n"
          f"{'layer':12}{'output':>9}{2 * f'{tested:>11}{reference:>13}'}{'float64':>10}{'limit':>10}")
    for layer, passes in layers.items():
        rows = passes[0] + passes[1]
        line = f"{layer:12}" + next((f"{row.norm:9.3g}" for row in rows if row.kind == "state"), " " * 9)
        for part in passes:
            line += (f"{max(r.difference for r in part):11.1e}{max(r.reference for r in part):13.1e}" if part
                     else " " * 24)
        share = max(row.share for row in rows)
        print(f"{line}{max(row.difference64 for row in rows):10.1e}{share:10.2f}  {'ok' if share <= 1 else 'DIFFERS'}")


def verdict(rows: list[Row]) -> str:
    for row in rows:
        if row.share > 1:
            what = {"state": "output of", "statistic": "statistic", "gradient": "gradient of the output of",
                    "parameter": "gradient of"}[row.kind]
            value, limit = row.difference, row.limit
            if value <= limit:
                value, limit = row.difference64, LIMIT64
            return f"first difference: {what} {row.name}: {value:.1e}, limit {limit:.1e}"
    worst = max(rows, key=lambda row: row.share)
    return (f"all {len(rows)} tensors agree, {sum(row.identical for row in rows)} of them bit for bit; nearest to its "
            f"limit is {worst.kind} {worst.name}, at {worst.share:.2f} of it")


def csv_of(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*Row._fields, "share"])
    writer.writerows([*row, row.share] for row in rows)
    return text.getvalue().encode()


def draw(axes: Axes, layers: dict[str, list[Row]], tested: str, reference: str) -> None:
    names = list(layers)
    worst = [max(rows, key=lambda row: row.difference / row.limit, default=None) for rows in layers.values()]
    x = [i for i, row in enumerate(worst) if row]
    for label, field, style in (
            ("limit", "limit", {"color": "0.3", "linestyle": "--", "linewidth": 0.9}),
            (reference, "reference", {"color": COLOURS[5], "linewidth": 4}),
            (tested, "difference", {"color": COLOURS[0], "linewidth": 1.4})):
        axes.plot(x, [getattr(worst[i], field) for i in x], label=label, **style)
    in_float64 = {i: max(row.difference64 for row in layers[names[i]]) for i in x}
    above_zero = {i: value for i, value in in_float64.items() if value}  # a log scale has no 0
    if above_zero:
        axes.plot(above_zero.keys(), above_zero.values(), color=COLOURS[2], linewidth=1.4, marker="o", markersize=2.5,
                  label="between the two in float64")
    blocks = dict.fromkeys(name.partition(".")[0] for name in names if "." in name)
    spans = {block: [i for i, name in enumerate(names) if name.startswith(f"{block}.")] for block in blocks}
    for span in spans.values():
        axes.axvspan(span[0] - 0.5, span[-1] + 0.5, color="0.95", zorder=0)
    axes.set_xticks([(span[0] + span[-1]) / 2 for span in spans.values()], list(spans))
    axes.grid(False, axis="x")
    axes.set(yscale="log", xlim=(-0.5, len(names) - 0.5))


def render(title: str, layers: dict[str, tuple[list[Row], list[Row]]], tested: str, reference: str) -> bytes:
    with matplotlib.style.context(STYLE | {"text.parse_math": True}, after_reset=True):
        figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for i, part in enumerate(("Outputs and running statistics", "Gradients")):
            draw(panels[i], {layer: passes[i] for layer, passes in layers.items()}, tested, reference)
            panels[i].set(title=part, xlabel="Layers, in order of computation")
        panels[0].set_ylabel("Largest relative error")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title)
        return png_of(figure)


def main(argv: list[str] | None = None) -> int:
    """-> exit status"""
    try:
        args = parse_args(argv)
        reason = missing(args.against, args.compile or args.against == "compile")
        if reason:
            print(cli.printable(f"skipped {args.against}: {reason}"))
            return 0
        net, images, labels = load(args)
        tested, reference, *_ = sides(args)
        if reference.torchvision:
            check_torchvision_has(net, args.against)
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else error, 2, "compare_grads.py")
    except (ValueError, RuntimeError) as error:  # RuntimeError: not enough memory for the weights
        return fail(error, 2, "compare_grads.py")
    title = f"{describe(net)}: {AGAINST[args.against]}" + (f"; injected: {args.inject}" if args.inject else "")
    print(title)
    try:
        rows = compare_sides(args, net, images, labels)
        layers = by_layer(net, rows)
        print_table(layers, tested.name, reference.name)
        if args.csv:
            replace_file(args.csv, csv_of(rows))
        if args.plot:
            replace_file(args.plot, render(title, layers, tested.name, reference.name))
    except RuntimeError as error:
        return fail(error, 1, "compare_grads.py")
    print(verdict(rows))
    return 1 if any(row.share > 1 for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
