#!/usr/bin/env python3
"""Compare two implementations layer by layer: ./compare_grads.py [--against WHAT] computes the same through both.

Every hidden state, running statistic and gradient in order of computation, for the same weights, images and labels.
Prints a table; --csv writes every tensor's row, --plot a figure. Exit status: 0 all agree, 1 one differs, 2 refused.
"""

import argparse
import copy
import csv
import io
import math
import os
import shutil
import sys
from collections.abc import Iterator
from typing import NamedTuple

import matplotlib.style
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display needed

import densenet
from densenet import Bottleneck, DenseBlock, DenseNet, SingleLayer, Transition, torchvision_name
from lib import data
from lib.cli import EFFICIENT, NETWORK_FLAGS, Parser, add_network_flags, fail, flag, network_arguments, number
from lib.faults import FAULTS, add_inject_flag, injected, target_of
from lib.figures import COLOURS, STYLE, png_of
from lib.files import new_file, replace_file
from lib.layers import PATHS, check_path, describe, layers_of, operations, parts_of, settle_kinks

FACTOR = 4  # how much larger than the reference's own an error may be
LIMIT64 = 1e-10  # between the two in float64, whose rounding comes to 1e-13 here
AGAINST = {
    "torchvision": "our network against torchvision's, an independent implementation",
    "plain": "the efficient dense block against the textbook's",
    "float64": "float32 against float64, beside what float32 costs torchvision",
    "cuda": "the GPU against the CPU",
    "cudnn-off": "the GPU with cuDNN against the GPU without",
    "channels_last": "the memory format channels_last against contiguous",
    "compile": "torch.compile against eager",
    "bf16": "bfloat16 autocast of our network against that of torchvision's",
}


class Side(NamedTuple):
    """A way to compute the network."""
    name: str
    torchvision: bool = False
    path: bool | str = False  # DenseNet's efficient
    dtype: torch.dtype = torch.float32
    autocast: bool = False  # to bfloat16
    device: str = "cpu"
    cudnn: bool = True
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False


class Key(NamedTuple):
    """A tensor that two implementations have in common."""
    layer: str
    kind: str  # state, statistic, gradient (of a state) or parameter (that is, its gradient)
    name: str


class Row(NamedTuple):
    """A comparison. Differences are the largest of a tensor's elements, relative to its largest element."""
    layer: str
    kind: str
    name: str
    norm: float
    difference: float  # of the tested from the yardstick, the reference in float64
    reference: float  # of the reference from the yardstick
    limit: float
    difference64: float  # of the tested in float64 from the yardstick; 0 where that says nothing
    identical: bool  # tested and reference, bit for bit

    @property
    def share(self) -> float:
        """Of the limit: above 1 they differ."""
        shares = self.difference / self.limit, self.difference64 / LIMIT64
        return max(math.inf if math.isnan(share) else share for share in shares)


# --- flags ------------------------------------------------------------------------------------------------------

def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("compare_grads.py", __doc__)
    add = parser.add_argument
    add("--against", choices=tuple(AGAINST), default="torchvision", metavar="WHAT",
        help=", ".join(f"{name} ({text})" for name, text in AGAINST.items()) + "; default: %(default)s")
    add("--efficient", choices=tuple(EFFICIENT), default=None,
        help="the path of our dense blocks. yes, max: nothing is hooked, so no gradients of states within a block "
             "(default: no; with plain: yes)")
    add("--checkpoint", metavar="FILE", default=None,
        help="train.py's latest.pth: its network and weights, in training mode, for a batch of --data")
    add("--data", metavar="DIR", default=None, help="CIFAR-10's folder or its parent (default: random images)")
    add("--batchSz", metavar="N", type=number(int, 2, 1024), default=8, help="images (default: %(default)s)")
    add("--csv", metavar="FILE", type=new_file(""), default=None, help="write a row for every tensor")
    add("--plot", metavar="FILE.png", type=new_file(".png"), default=None, help="draw difference against depth")
    add("--seed", metavar="S", type=number(int, 0, 2**32 - 1), default=1,
        help="of weights and images (default: %(default)s)")
    add_inject_flag(parser, FAULTS)
    add_network_flags(parser.add_argument_group("network"), depth=22, growth_rates=(2, 64))
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    args, explicit = get_args_parser().parse(argv)
    args.efficient = args.efficient or ("yes" if args.against == "plain" else "no")
    network = [flag(name) for name in NETWORK_FLAGS if name in explicit]
    if args.checkpoint and network:
        raise ValueError(f"{network[0]} contradicts --checkpoint {args.checkpoint}, which has its own; give one of "
                         "them")
    if args.checkpoint and not args.data:
        raise ValueError(f"--checkpoint {args.checkpoint} takes real images; valid with it is --data DIR")
    if args.against == "plain" and args.efficient == "no":
        raise ValueError("--efficient no leaves nothing to compare with plain; valid are yes, max")
    if args.against == "compile" and args.efficient != "no":
        raise ValueError(f"--efficient {args.efficient}: torch.compile takes the textbook layers; valid is no")
    if args.against == "bf16" and args.inject:
        raise ValueError(f"--inject {args.inject} could hide in bfloat16's rounding; valid are the other --against")
    return args


def missing(against: str) -> str | None:
    """What this machine lacks for a comparison."""
    if against in ("cuda", "cudnn-off") and not torch.cuda.is_available():
        return "this machine has no GPU that PyTorch can use"
    if against == "cudnn-off" and not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    if against == "compile" and not shutil.which(compiler := os.environ.get("CXX", "g++")):
        return f"there is no C++ compiler {compiler}"
    return None


def sides(args: argparse.Namespace) -> list[Side | None]:
    """-> the tested, the reference, the yardstick and, where that says more, the tested in float64"""
    ours = Side("ours", path=EFFICIENT[args.efficient])
    theirs = Side("torchvision", torchvision=True)
    gpu = ours._replace(name="GPU", device="cuda")
    tested, reference = {
        "torchvision": (ours, theirs),
        "plain": (ours._replace(name=PATHS[ours.path]), Side("textbook")),
        "float64": (ours, theirs),
        "cuda": (gpu, ours._replace(name="CPU")),
        "cudnn-off": (gpu._replace(name="cuDNN"), gpu._replace(name="no cuDNN", cudnn=False)),
        "channels_last": (ours._replace(name="ch. last", memory_format=torch.channels_last),
                          ours._replace(name="contiguous")),
        "compile": (ours._replace(name="compiled", compiled=True), ours._replace(name="eager")),
        "bf16": (ours._replace(autocast=True), theirs._replace(autocast=True)),
    }[args.against]
    yardstick = (ours if args.against == "float64" else reference)._replace(dtype=torch.float64, autocast=False)
    says_more = args.against not in ("float64", "compile", "bf16")
    return [tested, reference, yardstick, tested._replace(dtype=torch.float64) if says_more else None]


def load(args: argparse.Namespace) -> tuple[DenseNet, torch.Tensor, torch.Tensor]:
    """-> the network, on the textbook path, images and labels

    Raises:
        ValueError, OSError: if they cannot be had.
    """
    trained = densenet.load(args.checkpoint) if args.checkpoint else None
    if trained:
        net = DenseNet(**trained.arguments | {"dropRate": 0.0}, efficient=False)  # no two would drop the same
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
        raise ValueError(f"--checkpoint {args.checkpoint} is for other images than those of --data {args.data}")
    if n > len(images):
        raise ValueError(f"--batchSz {n} is more than the {len(images)} training images; valid is at most that")
    mean, std = (trained.mean, trained.std) if trained else torch.tensor(data.mean_and_std(images))[..., None, None]
    batch = torch.randperm(len(images))[:n]
    return net, (images[batch] / 255 - mean) / std, labels[batch]


# --- the network in two implementations -------------------------------------------------------------------------

def torchvision_net(net: DenseNet) -> nn.Module:
    """torchvision's DenseNet, with CIFAR's first convolution and our weights."""
    a, width = net.arguments, net.conv1.out_channels
    blocks = tuple(len(block) for block in parts_of(net, DenseBlock).values())
    theirs = torchvision.models.DenseNet(a["growthRate"], blocks, width, a["bnSize"], num_classes=a["nClasses"])
    theirs.features.conv0 = nn.Conv2d(a["inChannels"], width, kernel_size=3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        setattr(theirs.features, name, nn.Identity())
    theirs.load_state_dict(net.torchvision_state_dict())
    return theirs


def check_torchvision_has(net: DenseNet, against: str) -> None:
    halves = all(t.conv1.out_channels == t.conv1.in_channels // 2 for t in parts_of(net, Transition).values())
    if not net.arguments["bottleneck"] or not halves:
        raise ValueError(f"--against {against}: torchvision's DenseNet has bottlenecks and reduction 0.5 only; valid "
                         "for this network are plain, cuda, cudnn-off, channels_last, compile")


def keys(net: DenseNet) -> Iterator[Key]:
    """All that could be compared, in order of computation."""
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


# --- one pass ---------------------------------------------------------------------------------------------------

class Record(dict):
    """(kind, name) -> what a forward and backward pass left, on the CPU"""

    def put(self, kind: str, name: str, value: torch.Tensor) -> None:
        self[kind, name] = value.detach().to("cpu", copy=True)

    def put_state(self, name: str, value: torch.Tensor, channels: slice = slice(None)) -> None:
        """These channels, now, and their gradient, when the backward pass comes to it."""
        self.put("state", name, value[:, channels])
        value.register_hook(lambda grad: self.put("gradient", name, grad[:, channels]))


def run(side: Side, net: DenseNet, images: torch.Tensor, labels: torch.Tensor, fault: str | None) -> Record:
    """Raises RuntimeError if a dense block took another path than asked for."""
    record, model = Record(), build(side, net)
    images = images.to(side.device, side.dtype, memory_format=side.memory_format).detach().requires_grad_()
    if not side.path and not side.compiled:
        watch(model, net, side, record)
    forward = torch.compile(model) if side.compiled else model
    target = target_of(model) if fault else None
    with (torch.backends.cudnn.flags(enabled=side.cudnn, allow_tf32=False),  # TF32's 10 bits would hide a difference
          injected(fault, target, bool(side.path))):
        with torch.autocast(side.device, torch.bfloat16, enabled=side.autocast):
            output = forward(images)
            output = F.log_softmax(output, 1) if side.torchvision else output
            loss = F.nll_loss(output, labels.to(side.device))
        if not side.torchvision and not side.compiled:
            check_path(model, side.path)
        if side.path:
            unfold(model, output, record)
        loss.backward()
    record.put("state", "output", output)
    record.put("state", "loss", loss)
    record.put("gradient", "images", images.grad)
    note_parameters_and_statistics(model, net, side, record)
    return record


def build(side: Side, net: DenseNet) -> nn.Module:
    model = torchvision_net(net) if side.torchvision else copy.deepcopy(net)
    model.efficient = side.path
    for buffer in model.buffers():
        buffer.zero_()  # so that one step leaves momentum times its own statistics
    return model.train().to(side.device, side.dtype).to(memory_format=side.memory_format)


def watch(model: nn.Module, net: DenseNet, side: Side, record: Record) -> None:
    """Hooks every layer. What a dense layer adds are its output's last k channels; torchvision's gives no others."""
    for name, module in layers_of(net):
        dense = isinstance(module, (Bottleneck, SingleLayer))
        channels = slice(-net.arguments["growthRate"], None) if dense else slice(None)

        def note(_, inputs: tuple[torch.Tensor], output: torch.Tensor, name=name, channels=channels) -> None:
            if name == "fc":
                record.put_state("features", inputs[0])
            record.put_state(name, output, channels)

        model.get_submodule(torchvision_name(name) if side.torchvision else name).register_forward_hook(note)


def unfold(model: DenseNet, output: torch.Tensor, record: Record) -> None:
    """The efficient path's states, rebuilt from what its blocks keep for the backward pass: x = xhat / rstd + mean."""
    nodes = [node for node in operations(output) if "EfficientBlock" in node.name()][::-1]
    transitions, k = parts_of(model, Transition), model.arguments["growthRate"]
    norms = [*(transition.bn1 for transition in transitions.values()), model.bn1]
    blocks = parts_of(model, DenseBlock).items()
    for (name, block), before, norm, node in zip(blocks, ["conv1", *transitions], norms, nodes, strict=True):
        xhat, rstd, *_ = node.saved_tensors[node.nParameters:]
        x = xhat / rstd[:, None, None] + (norm.running_mean / norm.momentum)[:, None, None]
        width = norm.num_features - k * len(block)
        record.put("state", before, x[:, :width])
        for i, new in enumerate(x[:, width:].split(k, 1)):
            record.put("state", f"{name}.{i}", new)
        node.register_hook(lambda grads, _, before=before: record.put("gradient", before, grads[0]))


def note_parameters_and_statistics(model: nn.Module, net: DenseNet, side: Side, record: Record) -> None:
    ours = {torchvision_name(name) if side.torchvision else name: name for name in net.state_dict()}
    for name, p in model.named_parameters():  # a lost gradient counts as zeros
        record.put("parameter", ours[name], torch.zeros_like(p) if p.grad is None else p.grad)
    for name, buffer in model.named_buffers():
        record.put("statistic", ours[name], buffer)


# --- the comparison ---------------------------------------------------------------------------------------------

def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-300)).item()


def compare(net: DenseNet, records: list[Record | None], floor: float) -> list[Row]:
    """Rounding adds up on the way, so a limit is FACTOR times the reference's largest error of that kind so far."""
    tested, reference, yardstick, exact = records
    so_far, rows = {}, []
    for layer, kind, name in keys(net):
        at = kind, name
        if at in tested and at in reference:
            own = difference(reference[at], yardstick[at])
            so_far[kind] = max(so_far.get(kind, floor), own)
            rows.append(Row(layer, kind, name, yardstick[at].double().norm().item(),
                            difference(tested[at], yardstick[at]), own, FACTOR * so_far[kind],
                            difference(exact[at], yardstick[at]) if exact else 0.0,
                            torch.equal(tested[at], reference[at])))
    return rows


def compare_sides(args: argparse.Namespace, net: DenseNet, images: torch.Tensor, labels: torch.Tensor) -> list[Row]:
    settle_kinks(net.double(), images.double())
    net.float()  # the same weights for all: numbers that float32 has
    chosen = sides(args)
    records = [side and run(side, net, images, labels, args.inject if side in (chosen[0], chosen[3]) else None)
               for side in chosen]
    if chosen[0].autocast:
        return compare(net, records, torch.finfo(torch.bfloat16).eps)
    m = images.numel() / images.shape[1]  # what a statistic sums up: one by one, that may cost sqrt(m) roundings
    return compare(net, records, torch.finfo(torch.float32).eps * math.sqrt(m))


# --- results ----------------------------------------------------------------------------------------------------

def by_layer(net: DenseNet, rows: list[Row]) -> dict[str, tuple[list[Row], list[Row]]]:
    """Layer -> its rows of the forward and of the backward pass"""
    found = {layer: ([], []) for layer in ["images", *(key.layer for key in keys(net))]}
    for row in rows:
        found[row.layer][row.kind in ("gradient", "parameter")].append(row)
    return {layer: passes for layer, passes in found.items() if any(passes)}


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
            found, limit = ((row.difference64, LIMIT64) if row.difference <= row.limit
                            else (row.difference, row.limit))
            return f"first difference: {what} {row.name}: {found:.1e}, limit {limit:.1e}"
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
    apart = {i: max(row.difference64 for row in layers[names[i]]) for i in x}
    if any(apart.values()):
        axes.plot([i for i in x if apart[i]], [d for d in apart.values() if d], color=COLOURS[2], linewidth=1.4,
                  marker="o", markersize=2.5, label="between the two in float64")
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
        if reason := missing(args.against):
            print(f"skipped {args.against}: {reason}")
            return 0
        net, images, labels = load(args)
        tested, reference, *_ = sides(args)
        if reference.torchvision:
            check_torchvision_has(net, args.against)
    except (ValueError, OSError) as error:
        return fail(error, 2, "compare_grads.py")
    title = f"{describe(net)}: {AGAINST[args.against]}" + f"; injected: {args.inject}" * bool(args.inject)
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
