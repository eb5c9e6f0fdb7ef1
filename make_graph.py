#!/usr/bin/env python3
"""Draw a network: ./make_graph.py --graph {modules,autograd,block,reuse} [flags]

modules: its layers, their connections and the shapes of their outputs. autograd: every operation of its backward pass.
Both write graph-<kind>.dot and, where Graphviz is installed, .svg and .png. block: one dense block, as .svg and .png.
reuse: how much each layer of a trained network reads from the layers before it (paper, figure 5), as .svg and .png.
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

from lib.figures import COLOURS  # must be imported before matplotlib, see lib/figures.py

# isort: split
import matplotlib.style
import torch
import torch.nn as nn
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure  # without pyplot: no display needed
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.path import Path as Curve
from torch.autograd.graph import Node, get_gradient_edge

from densenet import DenseBlock, DenseNet, Transition
from lib.cli import Parser, add_network_flags, fail, network_arguments, number, path, tell
from lib.files import replace_file
from lib.layers import operations
from lib.reuse import draw_reuse, load_network, reuse_maps

IMAGE = (1, 3, 32, 32)  # one image of CIFAR
DOT_SECONDS = 120  # time limit; a network of depth 250 takes 2 s
PALE_BLUE, SAND, PALE_GREEN, GREY, INK = "#DCEBF5", "#FBE3B9", "#CDE9DF", "#555555", "#333333"
CENTRED = {"ha": "center", "va": "center"}
STYLE = {"mathtext.fontset": "cm", "svg.hashsalt": "densenet"}  # a fixed salt makes the .svg the same in every run
TIMES = "\N{MULTIPLICATION SIGN}"
FILL = {"Convolution": SAND, "EfficientBlock": SAND, "Cat": PALE_GREEN}
NOTE = {"modules": "the blue line carries all channels so far: each layer reads them and adds its own",
        "autograd": "pale blue: image and parameters; other boxes: operations, by their gradients' names"}
DOT = """digraph {
graph [fontname="Helvetica,Arial,sans-serif", fontsize=13, labelloc=t, newrank=true, nodesep=0.08, ranksep=0.06];
node [fontname="Helvetica,Arial,sans-serif", fontsize=10, shape=box, style="filled,rounded", color="#666666",
      fillcolor=white, height=0.2, margin="0.06,0.03"];
edge [color="#444444", arrowsize=0.5];
"""


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("make_graph.py", __doc__)
    add = parser.add_argument
    add("--graph", choices=("autograd", "modules", "block", "reuse"), default="modules", help="default: %(default)s")
    add("--efficient", choices=("no", "yes"), default="no",
        help="autograd only. no: the textbook's dense block, layer by layer; yes: the efficient dense block, which is "
             "one operation (default: no)")
    add("--layers", metavar="N", type=number(int, 3, len(COLOURS)), default=5,
        help=f"block only: x0 to x(N-1) are drawn, N from 3 to {len(COLOURS)} (default: %(default)s)")
    add("--checkpoint", metavar="FILE", type=path,
        help="reuse only: the trained network, as train.py saves it; the flags of the network may be left out")
    add("--untrained", action="store_true",
        help="reuse only: the checkpoint's network at its first weights instead, as a control")
    add("--out", metavar="FILE", type=path, default=".",
        help="an existing directory, or the path of the files without suffix (default: ./graph-<kind>)")
    add_network_flags(parser.add_argument_group("network (block takes --layers instead of --depth)"), depth=100)
    return parser


def stem_of(out: str, kind: str) -> Path:
    """-> the path of the files without suffix. Raises ValueError if they cannot be written."""
    stem = Path(out, f"graph-{kind}") if os.path.isdir(out) or out.endswith("/") else Path(out)
    stem = stem.with_suffix("") if stem.suffix in (".dot", ".svg", ".png") else stem
    if not os.path.isdir(stem.parent):
        raise ValueError(f"--out {out}: there is no directory {stem.parent}; valid are paths in an existing one")
    if not os.access(stem.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: no permission to write into {stem.parent}; choose another directory")
    return stem


def make_net(args: argparse.Namespace) -> DenseNet:
    """Raises ValueError if no network has these dimensions."""
    arguments = network_arguments(args)
    efficient = args.graph == "autograd" and args.efficient == "yes"
    if args.graph == "block":
        arguments["depth"] = 4 + (args.layers - 1) * (3 if args.no_bottleneck else 6)
    with torch.device("cpu" if efficient else "meta"):  # meta: the same operations and shapes without values
        return DenseNet(**arguments, efficient=efficient)


# --- .dot -------------------------------------------------------------------------------------------------------

def quote(text: object) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def statement(*names: str, **attributes: object) -> str:
    """-> the .dot statement for a node (one name) or an edge (two names)"""
    values = ", ".join(f"{name}={quote(value)}" for name, value in attributes.items())
    return f"{' -> '.join(map(quote, names))} [{values}];"


def run_dot(text: str, suffix: str) -> bytes:
    """-> the drawing as .svg or .png. Raises RuntimeError, with a one-line message, if dot fails."""
    command = ["dot", f"-T{suffix}", f"-Gdpi={150 if suffix == 'png' else 72}"]
    try:
        dot = subprocess.run(command, input=text.encode(), capture_output=True, timeout=DOT_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"dot took more than {DOT_SECONDS} s for the .{suffix}; the .dot is written") from None
    except OSError as error:
        raise RuntimeError(f"dot cannot be run ({error.strerror}); the .dot is written") from None
    if dot.returncode:
        reason = dot.stderr.decode(errors="replace").strip()[:200] or "no message"
        raise RuntimeError(f"dot failed for the .{suffix} with status {dot.returncode} ({reason}); the .dot is written")
    return dot.stdout


# --- the backward pass ------------------------------------------------------------------------------------------

def name_of(operation: Node) -> str:
    return re.sub(r"Backward\d*$", "", operation.name())


def autograd_graph(net: DenseNet) -> list[str]:
    """-> .dot statements for parameters and operations, named by their backward functions. Edges lead to the output."""
    image = torch.zeros(IMAGE, device=net.fc.weight.device, requires_grad=True)
    leaves = {image: "image"} | {parameter: name for name, parameter in net.named_parameters()}
    output = net(image)
    names, statements = {}, [statement("output", label=f"output\n{tuple(output.shape)}")]
    for i, operation in enumerate(operations(output)):
        leaf = getattr(operation, "variable", None)  # only AccumulateGrad has one: a parameter or the image
        if leaf is None:
            name, label, fill = f"operation {i}", operation.name(), FILL.get(name_of(operation), "white")
        else:
            name, label, fill = leaves[leaf], f"{leaves[leaf]}\n{tuple(leaf.shape)}", PALE_BLUE
        names[operation] = name
        statements.append(statement(name, label=label, fillcolor=fill))
    statements.append(statement(names[output.grad_fn], "output"))
    if net.efficient:
        statements.append("rankdir=LR;")  # puts the many parameters of a block in a column, not in a row
    for operation, name in names.items():
        for i, (source, _) in enumerate(operation.next_functions):
            weight = 50 if i == 0 and name_of(operation) == "Cat" else 1  # keeps the bypass straight
            if source is not None:
                statements.append(statement(names[source], name, weight=weight))
    return statements


# --- layers and shapes ------------------------------------------------------------------------------------------

def origin(tensor: torch.Tensor) -> Node:
    """-> the backward node of the operation that made the tensor"""
    return get_gradient_edge(tensor).node


def caption(name: str, layer: nn.Module) -> str:
    """Such as "dense1.0  1x1→48, 3x3→12": kernel sizes and output channels of the layer's convolutions."""
    convolutions = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
    parts = [f"{TIMES.join(map(str, conv.kernel_size))}→{conv.out_channels}" for conv in convolutions]
    if isinstance(layer, Transition):
        parts.append("pool")
    return f"{name}  {', '.join(parts) or type(layer).__name__}"


class Layers:
    """The .dot statements of a network's layers, collected by forward hooks.

    Edges come from the backward graph of a real forward pass: a layer is connected to the one that made its input.
    """

    def __init__(self, image: torch.Tensor, most_channels: int):
        self.channels_per_point = most_channels / 6  # of line width
        self.maker: dict[Node, str] = {}  # backward node of a tensor -> name of the .dot node that made it
        self.heads: list[str] = []  # the first node of each column; a column holds one block
        self.blocks: dict[str, list[str]] = {}  # name of a block -> names of its nodes
        self.statements: list[str] = []
        self.add("image", "image", image)

    def add(self, name: str, label: str, output: torch.Tensor, **attributes: object) -> None:
        label = f"{label}\n{TIMES.join(map(str, output.shape[1:]))}".strip()
        self.statements.append(statement(name, label=label, group=max(1, len(self.heads)), **attributes))
        self.maker[origin(output)] = name

    def source(self, tensor: torch.Tensor) -> str:
        """-> the node that made the tensor. Adds a node for operations outside of layers (ReLU, mean)."""
        operation = origin(tensor)
        outside_layers = []
        while operation not in self.maker:
            outside_layers.insert(0, name_of(operation))
            operation = operation.next_functions[0][0]
        if outside_layers:
            name = ", ".join(outside_layers)
            self.statements.append(statement(self.maker[operation], name))
            self.add(name, name, tensor)
        return self.maker[origin(tensor)]

    def add_plain(self, name: str, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        source = self.source(inputs[0])
        if isinstance(layer, Transition):  # starts a column; written backwards, since dot draws edges downwards
            self.statements.append(statement(name, source, dir="back", tailport="w", headport="e", weight=0))
            self.heads.append(name)
        else:
            self.statements.append(statement(source, name))
            if not self.heads:
                self.heads.append(name)
        self.add(name, caption(name, layer), output, fillcolor=SAND)

    def add_dense(self, name: str, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Adds two nodes: the layer, and a joint, where the new channels meet the layer's input.

        The width of the line from the input to the joint is proportional to the number of channels.
        """
        joint = f"{name} cat"
        self.blocks.setdefault(name.split(".")[0], []).extend((name, joint))
        self.statements += [statement(name, label=caption(name, layer), fillcolor=PALE_BLUE),
                            statement(self.source(inputs[0]), name, tailport="sw")]
        bypass = dict(color=COLOURS[0], arrowhead="none", weight=20,
                      penwidth=0.5 + inputs[0].shape[1] / self.channels_per_point)
        for operand, _ in output.grad_fn.next_functions:  # of the concatenation: the input, the layer's new channels
            is_input = operand in self.maker
            edge = statement(self.maker[operand], joint, **bypass) if is_input else statement(name, joint)
            self.statements.append(edge)
        self.add(joint, "", output, fontsize=9, color=COLOURS[0], height=0.15, margin="0.04,0.01")

    def arrangement(self) -> list[str]:
        """-> statements that draw a frame around each block and put the columns side by side"""
        style = 'labeljust=l; labelloc=b; style="filled,rounded"; color="#F3F3F3"'
        frames = [f"subgraph {quote(f'cluster {block}')} {{ {style}; label={quote(block)}; "
                  f"{'; '.join(map(quote, members))}; }}" for block, members in self.blocks.items()]
        return [*frames, f"{{ rank=same; {' -> '.join(map(quote, self.heads))} [style=invis]; }}"]


def modules_graph(net: DenseNet) -> list[str]:
    image = torch.zeros(IMAGE, device=net.fc.weight.device, requires_grad=True)
    layers = Layers(image, max(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)))
    for name, layer in net.named_modules():
        if re.fullmatch(r"\w+\.\d+", name):  # dense1.0
            layer.register_forward_hook(partial(layers.add_dense, name))
        elif re.fullmatch(r"\w+", name) and not isinstance(layer, DenseBlock):  # conv1, trans1, bn1, fc
            layer.register_forward_hook(partial(layers.add_plain, name))
    layers.source(net(image))
    return layers.statements + layers.arrangement()


# --- one block, in pixels ---------------------------------------------------------------------------------------

def draw_stack(axes: Axes, i: int, channels: int, k: int) -> None:
    """Draws x_i as a stack of sheets: one for each channel, but at most 12 for every k channels."""
    sheets = min(channels, 12 * channels // k)
    middle = 110 + 300 * i
    step = 38 * channels / k / sheets
    for sheet in range(sheets):
        x = middle - (step * (sheets - 1) + 36) / 2 + step * sheet
        ink = 0.85 if sheet == sheets - 1 else 0.35
        axes.add_patch(Polygon([(x, 140), (x + 36, 168), (x + 36, 298), (x, 270)], joinstyle="round", zorder=3,
                               facecolor=[1 - ink * (1 - c) for c in to_rgb(COLOURS[i])], edgecolor=COLOURS[i],
                               linewidth=min(1.1, 0.2 + step / 6)))
    axes.text(middle, 114, f"$x_{{{i}}}$", fontsize=22, **CENTRED)
    axes.text(middle, 86, f"{channels} channels", fontsize=12.5, color=GREY, **CENTRED)


def draw_function(axes: Axes, i: int, name: str, fontsize: int, numbers: str) -> None:
    """Draws the box between x_i and x_(i+1), and the arrow from the box to x_(i+1)."""
    x = 214 + 300 * i
    axes.add_patch(FancyBboxPatch((x, 150), 108, 130, boxstyle="round,pad=0,rounding_size=12", facecolor="#F4F4F4",
                                  edgecolor=INK, linewidth=1.3))
    axes.text(x + 54, 223, name, fontsize=fontsize, **CENTRED)
    axes.text(x + 54, 181, numbers, fontsize=12.5, color=GREY, **CENTRED)
    axes.add_patch(FancyArrowPatch((x + 111, 215), (x + 156, 215), arrowstyle="-|>", mutation_scale=16, color=INK,
                                   linewidth=1.8, shrinkA=0, shrinkB=0))


def draw_connections(axes: Axes, i: int, channels: list[int], unit: float) -> None:
    """Draws the parts x_0 to x_i above the function that reads them, each ``unit`` wide per channel, with an arc."""
    n = len(channels)
    x = 268 + 300 * i + unit * sum(channels[:i + 1]) / 2
    for j in range(i + 1):
        x -= unit * channels[j]
        axes.add_patch(Rectangle((x, 287), unit * channels[j], 16, facecolor=COLOURS[j], edgecolor="white"))
        start = 122 + 300 * j + min(11, 44 / (n - 1)) * ((n - 1 + j) / 2 - i)
        end = x + unit * channels[j] / 2
        top = (70 + 245 * (i - j) / (n - 1)) / 0.75  # a cubic Bezier curve reaches 3/4 of its control points' height
        arc = Curve([(start, 260), (start, 260 + top), (end, 260 + top), (end, 306)], [1, 4, 4, 4])
        zorder = 1 + 0.1 * j - 0.01 * i  # the white line below separates the arc from those that it crosses
        axes.add_patch(FancyArrowPatch(path=arc, arrowstyle="-", color="white", linewidth=6, zorder=zorder))
        axes.add_patch(FancyArrowPatch(path=arc, arrowstyle="-|>,head_length=.42,head_width=.2", mutation_scale=16,
                                       color=COLOURS[j], linewidth=2.6, zorder=zorder + 0.005))


def draw_block(net: DenseNet) -> Figure:
    """Draws the first dense block and its transition, with a coordinate system in pixels."""
    k, last = net.arguments["growthRate"], net.trans1.conv1
    reads = [layer.bn1.num_features for layer in net.dense1] + [last.in_channels]  # input channels of each function
    channels = [reads[0], *(after - before for before, after in pairwise(reads))]  # of x_0, x_1, ...
    n, width = len(reads), 300 * len(reads) + 100
    figure = Figure(figsize=(width / 100, 6), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, 600))
    axes.axis("off")
    for i in range(n):
        draw_stack(axes, i, channels[i], k)
        if i < n - 1:
            draw_function(axes, i, f"$H_{{{i + 1}}}$", 24, f"{reads[i]} → {k}")
        else:
            draw_function(axes, i, "transition", 14, f"{reads[i]} → {last.out_channels}")
        draw_connections(axes, i, channels, 100 / last.in_channels)
    sizes = (1, 3) if net.arguments["bottleneck"] else (3,)
    steps = ", ".join(f"BN, ReLU, {size}{TIMES}{size} convolution" for size in sizes)
    axes.text(58, 34, r"$x_\ell = H_\ell([x_0, x_1, \ldots, x_{\ell-1}])$", fontsize=18, va="center")
    axes.text(width - 48, 34, rf"$H_\ell$:  {steps};  growth rate $k = {k}$", color=GREY, ha="right", va="center",
              fontsize=min(13.5, width / 100))
    return figure


def render(draw: Callable[[], Figure], suffix: str) -> bytes:
    content = io.BytesIO()
    with matplotlib.style.context(STYLE, after_reset=True):
        draw().savefig(content, format=suffix, metadata={"Date": None} if suffix == "svg" else {})
    return content.getvalue()


# --- files ------------------------------------------------------------------------------------------------------

def describe(net: DenseNet) -> str:
    """Such as "DenseNet-BC, L=100, k=12, 769,162 parameters"."""
    a, parameters = net.arguments, sum(p.numel() for p in net.parameters())
    letters = ("B" if a["bottleneck"] else "") + ("C" if a["reduction"] < 1 else "")
    name = f"DenseNet-{letters}" if letters else "DenseNet"
    size = f"L={a['depth']}" if a["depth"] else f"blocks of {', '.join(map(str, a['blockConfig']))} layers"
    return f"{name}, {size}, k={a['growthRate']}, {parameters:,} parameters"


def write_dot(graph: str, net: DenseNet, stem: Path) -> str:
    title = f"{describe(net)}\n{NOTE[graph]}"
    statements = autograd_graph(net) if graph == "autograd" else modules_graph(net)
    text = "\n".join([f"{DOT}label={quote(title)};", *statements, "}", ""])
    replace_file(Path(f"{stem}.dot"), text.encode())
    return text


def write_figure(draw: Callable[[], Figure], stem: Path) -> None:
    """Writes .svg and .png. Raises RuntimeError, with a one-line message, if that fails."""
    for suffix in ("svg", "png"):
        replace_file(Path(f"{stem}.{suffix}"), render(draw, suffix))


def write_graph(graph: str, net: DenseNet, stem: Path) -> None:
    """Writes .dot and, if Graphviz is installed, .svg and .png. Raises RuntimeError, with one line, if that fails."""
    text = write_dot(graph, net, stem)
    if not shutil.which("dot"):
        tell("Graphviz's dot was not found, so no .svg and .png were written; install graphviz (with apt, brew or "
             "conda)", "make_graph.py")
        return
    for suffix in ("svg", "png"):
        replace_file(Path(f"{stem}.{suffix}"), run_dot(text, suffix))


def prepare(args: argparse.Namespace, explicit: dict[str, object]) -> Callable[[Path], None]:
    """-> a function that writes the drawing, given the path without suffix. Raises ValueError for wrong flags."""
    if args.graph == "reuse":
        net, which = load_network(args.checkpoint, args.untrained, explicit)
        return partial(write_figure, partial(draw_reuse, reuse_maps(net), f"{describe(net)}, {which}"))
    if args.checkpoint is not None or args.untrained:
        flag = "--untrained" if args.untrained else "--checkpoint"
        raise ValueError(f"{flag} belongs to --graph reuse; --graph {args.graph} draws the network of the other flags")
    net = make_net(args)
    if args.graph == "block":
        return partial(write_figure, partial(draw_block, net))
    return partial(write_graph, args.graph, net)


def main(argv: list[str] | None = None) -> int:
    """-> exit status: 0 all files written, 1 failed while drawing or writing, 2 bad input and nothing written"""
    try:
        args, explicit = get_args_parser().parse(argv)
        stem = stem_of(args.out, f"{args.graph}-untrained" if args.untrained else args.graph)
        write = prepare(args, explicit)
    except (ValueError, RuntimeError) as error:  # RuntimeError: not enough memory for the parameters
        return fail(error, 2, "make_graph.py")
    try:
        write(stem)
    except RuntimeError as error:
        return fail(error, 1, "make_graph.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
