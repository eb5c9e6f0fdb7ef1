#!/usr/bin/env python3
"""Compare two implementations layer by layer: ./compare_grads.py [--against WHAT]

Both get the same weights, images and labels. Every hidden state, running statistic and gradient is compared, in order
of computation. Prints a table; --csv writes a row for each tensor, --plot draws a figure. Exit status: 0 all agree, or
skipped since this machine lacks something; 1 a tensor differs, or the comparison could not be completed; 2 bad input.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Iterator

import pandas as pd
import torch

import densenet
from densenet import DenseNet
from lib import data
from lib.cli import (
    NETWORK_FLAGS,
    Parser,
    add_network_flags,
    exit_status,
    flag,
    network_arguments,
    new_file,
    number,
)
from lib.compare import EFFICIENT, Side, describe, file, layers_of, record, settle_kinks, torchvision_net
from lib.figures import COLOURS, GRID, Figure, style

FACTOR = 4  # an error may be this many times the reference's own rounding error
LIMIT64 = 1e-10  # limit of the difference in float64, where rounding errors are about 1e-13
BACKWARD = ("gradient", "parameter")  # kinds of tensors that the backward pass makes
AGAINST = {
    "torchvision": "our network against torchvision's, an independent implementation",
    "plain": "the efficient dense block against the textbook's",
    "cuda": "the GPU against the CPU",
    "cudnn-off": "the GPU with cuDNN against the GPU without",
}


# --- flags and input --------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("compare_grads.py", __doc__)
    add = parser.add_argument
    add("--against", choices=tuple(AGAINST), default="torchvision", metavar="WHAT",
        help=", ".join(f"{name} ({text})" for name, text in AGAINST.items()) + "; default: %(default)s")
    add("--efficient", choices=tuple(EFFICIENT), default=None,
        help="how our dense blocks are computed, as in train.py (default: no; with plain: yes)")
    add("--checkpoint", metavar="FILE", type=file, default=None,
        help="train.py's latest.pth: use its network, weights and training images (default: random ones)")
    add("--data", metavar="DIR", default=None,
        help="where the checkpoint's data set is now (default: where the run had it)")
    add("--batchSz", metavar="N", type=number(int, 2, 1024), default=8,
        help="number of images (default: %(default)s)")
    add("--csv", metavar="FILE.csv", type=new_file(".csv"), default=None, help="write a row for each tensor")
    add("--plot", metavar="FILE.png", type=new_file(".png"), default=None,
        help="draw each layer's largest difference")
    add("--seed", metavar="S", type=number(int, 0, 2**32 - 1), default=1,
        help="seed of the weights and images (default: %(default)s)")
    add_network_flags(parser.add_argument_group("network"), depth=22, growth_rates=(2, 64))
    args, explicit = parser.parse(argv)
    args.efficient = args.efficient or ("yes" if args.against == "plain" else "no")
    network = [flag(name) for name in NETWORK_FLAGS if name in explicit]
    if args.checkpoint and network:
        raise ValueError(f"{network[0]} contradicts --checkpoint {args.checkpoint}, which has a network of its own; "
                         "give one of them")
    if args.data and not args.checkpoint:
        raise ValueError(f"--data {args.data} is for a checkpoint's own images; add --checkpoint FILE")
    if args.against == "plain" and args.efficient == "no":
        raise ValueError("--efficient no leaves nothing to compare with plain; valid are yes, max")
    return args


def sides(args: argparse.Namespace) -> tuple[Side, Side]:
    """-> the tested side, the reference"""
    ours = Side("ours", efficient=EFFICIENT[args.efficient])
    gpu = ours._replace(name="GPU", device="cuda")
    return {
        "torchvision": (ours, Side("torchvision", torchvision=True)),
        "plain": (ours._replace(name="max" if args.efficient == "max" else "efficient"), Side("textbook")),
        "cuda": (gpu, ours._replace(name="CPU")),
        "cudnn-off": (gpu._replace(name="cuDNN"), gpu._replace(name="no cuDNN", cudnn=False)),
    }[args.against]


def load(args: argparse.Namespace) -> tuple[DenseNet, torch.Tensor, torch.Tensor]:
    """-> the network, without dropout; images, float32 (N, C, H, W), normalised; labels, int64 (N,)

    Raises:
        ValueError: for impossible dimensions of the network, and for files that are damaged or do not fit.
    """
    torch.manual_seed(args.seed)
    if not args.checkpoint:
        net = DenseNet(**network_arguments(args))
        return net, torch.randn(args.batchSz, 3, 32, 32), torch.randint(10, (args.batchSz,))
    trained, flags = densenet.load(args.checkpoint), densenet.read_checkpoint(args.checkpoint)["flags"]
    net = DenseNet(**trained.arguments | {"dropRate": 0.0})  # two networks would drop different values
    net.load_state_dict(trained.state_dict())
    [images] = data.load(flags["dataset"], args.data or flags["data"], ("train",), imageSize=flags["imageSize"] or 32,
                         classes=flags["classes"])
    images = images.with_channels(net.arguments["inChannels"])
    if images.classes != trained.classes:
        raise ValueError(f"the images of {args.data or flags['data']} have other classes than --checkpoint "
                         f"{args.checkpoint}: {', '.join(images.classes)}")
    batch = torch.randperm(len(images.pixels))[:args.batchSz]
    return net, (images.pixels[batch] / 255 - trained.mean) / trained.std, images.labels[batch]


# --- the comparison ---------------------------------------------------------------------------------------------

def keys(net: DenseNet) -> Iterator[tuple[str, str, str]]:
    """-> layer, kind and name of all tensors, in order of computation: forward pass, then backward pass

    Kinds are "state", "statistic", "gradient" (of a state) and "parameter" (its gradient).
    """
    for name, module in layers_of(net):
        if name == "fc":
            yield "features", "state", "features"
        yield from ((name, "statistic", f"{name}.{buffer}") for buffer, _ in module.named_buffers())
        yield name, "state", name
    yield from (("loss", "state", "output"), ("loss", "state", "loss"))
    for name, module in reversed(layers_of(net)):
        yield name, "gradient", name
        yield from ((name, "parameter", f"{name}.{p}") for p, _ in reversed([*module.named_parameters()]))
        if name == "fc":
            yield "features", "gradient", "features"
    yield "images", "gradient", "images"


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """-> the largest |a - b|, divided by the largest |b|"""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def compare(tested: Side, reference: Side, net: DenseNet, images: torch.Tensor, labels: torch.Tensor) -> pd.DataFrame:
    """-> a row for each tensor that both sides have, in order of computation

    A difference is the largest absolute difference of two elements, divided by the largest absolute element of the
    reference in float64. Columns:
        layer, kind, name: as in keys()
        norm: of the reference in float64
        difference: between the tested side in float32 and the reference in float64
        reference: between the reference in float32 and in float64, its rounding error
        limit: of ``difference``. Rounding errors accumulate from layer to layer, so it is FACTOR times the largest
            error that the reference has had up to there in tensors of the same kind, and at least FACTOR * epsilon *
            sqrt(m), where m is the number of values per channel: the rounding error of their sum
        difference64: between the two sides in float64, where rounding is too small to hide a fault; limit: LIMIT64
        identical: whether both sides are equal bit for bit in float32
        share: ``difference`` or ``difference64`` divided by its limit, whichever is larger. Above 1 the tensor differs
    """
    settle_kinks(net.double(), images.double())
    net.float()  # round the weights, so that they are the same in float32 and float64
    tested32, tested64, reference32, reference64 = (
        record(side, net, images, labels, dtype) for side in (tested, reference)
        for dtype in (torch.float32, torch.float64))
    floor = torch.finfo(torch.float32).eps * math.sqrt(images.numel() / images.shape[1])
    largest, rows = {}, []  # kind -> the reference's largest error up to here
    for layer, kind, name in keys(net):
        key = kind, name
        if key in tested32 and key in reference32:
            error = difference(reference32[key], reference64[key])
            largest[kind] = max(largest.get(kind, floor), error)
            rows.append({"layer": layer, "kind": kind, "name": name, "norm": reference64[key].norm().item(),
                         "difference": difference(tested32[key], reference64[key]), "reference": error,
                         "limit": FACTOR * largest[kind], "difference64": difference(tested64[key], reference64[key]),
                         "identical": torch.equal(tested32[key], reference32[key])})
    frame = pd.DataFrame(rows)
    frame["layer"] = pd.Categorical(frame.layer, dict.fromkeys(["images", *frame.layer]))
    shares = pd.DataFrame({32: frame.difference / frame.limit, 64: frame.difference64 / LIMIT64})
    frame["share"] = shares.fillna(math.inf).max(axis=1)
    return frame


# --- results ----------------------------------------------------------------------------------------------------

def table(frame: pd.DataFrame, tested: str, reference: str) -> str:
    """-> the largest values of each layer, as text"""
    is_backward = frame.kind.isin(BACKWARD)
    columns = {"norm": frame.norm.where(frame.kind == "state")}
    for part, rows in (("forward", ~is_backward), ("backward", is_backward)):
        columns[f"{part}: {tested}"] = frame.difference.where(rows)
        columns[f"{part}: {reference}"] = frame.reference.where(rows)
    columns |= {"both in float64": frame.difference64, "share of limit": frame.share}
    layers = pd.DataFrame(columns).groupby(frame.layer, observed=True).max()
    layers[""] = layers["share of limit"].map(lambda share: "ok" if share <= 1 else "DIFFERS")
    one_decimal = {"norm": "{:.3g}".format, "share of limit": "{:.2f}".format}
    return layers.rename_axis(None).to_string(float_format="{:.1e}".format, formatters=one_decimal, na_rep="")


def verdict(frame: pd.DataFrame) -> str:
    for row in frame[frame.share > 1].itertuples():
        what = {"state": "output of", "statistic": "statistic", "gradient": "gradient of the output of",
                "parameter": "gradient of"}[row.kind]
        in_float32 = not row.difference <= row.limit
        value, limit = (row.difference, row.limit) if in_float32 else (row.difference64, LIMIT64)
        return f"first difference: {what} {row.name}: {value:.1e}, limit {limit:.1e}"
    worst = frame.loc[frame.share.idxmax()]
    return (f"all {len(frame)} tensors agree, {frame.identical.sum()} of them bit for bit; nearest to its limit is "
            f"{worst.kind} {worst['name']}, at {worst.share:.2f} of it")


def draw(axes, frame: pd.DataFrame, tested: str, reference: str) -> None:
    """Draws of each layer the tensor that is nearest to its limit."""
    by_layer = (frame.difference / frame.limit).fillna(math.inf).groupby(frame.layer, observed=True)
    worst = frame.loc[by_layer.idxmax()]
    x, names = worst.layer.cat.codes, list(frame.layer.cat.categories)
    axes.plot(x, worst.limit, label="limit", color="0.3", linestyle="--", linewidth=0.9)
    axes.plot(x, worst.reference, label=reference, color=COLOURS[5], linewidth=4)
    axes.plot(x, worst.difference, label=tested, color=COLOURS[0], linewidth=1.4)
    in_float64 = frame.groupby("layer", observed=True).difference64.max().replace(0, math.nan)  # a log scale has no 0
    axes.plot(x, in_float64, label="between the two in float64", color=COLOURS[2], linewidth=1.4, marker="o",
              markersize=2.5)
    spans = defaultdict(list)  # block -> the positions of its layers
    for i, name in enumerate(names):
        if "." in name:
            spans[name.partition(".")[0]].append(i)
    for span in spans.values():
        axes.axvspan(span[0] - 0.5, span[-1] + 0.5, color="0.95", zorder=0)
    axes.set_xticks([(span[0] + span[-1]) / 2 for span in spans.values()], list(spans))
    axes.grid(False, axis="x")
    axes.set(yscale="log", xlim=(-0.5, len(names) - 0.5), xlabel="Layers, in order of computation")


def write_figure(path: str, title: str, frame: pd.DataFrame, tested: str, reference: str) -> None:
    is_backward = frame.kind.isin(BACKWARD)
    with style(GRID):
        figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained")
        forward, backward = figure.subplots(1, 2, sharey=True)
        draw(forward, frame[~is_backward], tested, reference)
        draw(backward, frame[is_backward], tested, reference)
        forward.set(title="Outputs and running statistics", ylabel="Largest relative error")
        backward.set(title="Gradients")
        figure.legend(*forward.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title)
        figure.savefig(path)


@exit_status
def main(argv: list[str] | None = None) -> int:
    """-> exit status"""
    args = parse_args(argv)
    tested, reference = sides(args)
    if tested.device == "cuda" and not torch.cuda.is_available():
        print(f"skipped {args.against}: this machine has no GPU that PyTorch can use")
        return 0
    net, images, labels = load(args)
    if reference.torchvision:
        torchvision_net(net)  # raises ValueError if there is none
    title = f"{describe(net)}: {AGAINST[args.against]}"
    print(title)
    frame = compare(tested, reference, net, images, labels)
    print(table(frame, tested.name, reference.name))
    if args.csv:
        frame.to_csv(args.csv, index=False)
    if args.plot:
        write_figure(args.plot, title, frame, tested.name, reference.name)
    print(verdict(frame))
    return 1 if (frame.share > 1).any() else 0


if __name__ == "__main__":
    sys.exit(main())
