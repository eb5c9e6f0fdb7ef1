#!/usr/bin/env python3
"""Draw a network: ./make_graph.py --graph {modules,autograd,block,reuse} [flags]

modules: its layers, their connections and the shapes of their outputs. autograd: every operation of its backward pass.
Both write graph-<kind>.dot and, where Graphviz is installed, .svg and .png. block: one dense block, as .svg and .png.
reuse: how much each layer of a trained network reads from the layers before it (paper, figure 5), as .svg and .png.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

from lib.figures import COLOURS, Figure, style  # before matplotlib's other modules, see there

# isort: split
import matplotlib
import torch
import torch.nn as nn
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.path import Path as Curve
from torch.autograd.graph import Node, get_gradient_edge

import densenet
from densenet import DenseNet, Transition
from lib import cli
from lib.cli import NETWORK_FLAGS, Parser, add_network_flags, exit_status, flag, network_arguments, number
from lib.compare import describe, file, operations

IMAGE = (1, 3, 32, 32)  # one image of CIFAR
PALE_BLUE, SAND, PALE_GREEN, GREY, INK = "#DCEBF5", "#FBE3B9", "#CDE9DF", "#555555", "#333333"
CENTRED = {"ha": "center", "va": "center"}
CMAP = matplotlib.colormaps["YlGnBu"]
MAX_NUMBERED = 9  # rows of a map of reuse whose cells show numbers; the cells of larger maps are too small
MAX_TICKS = 9  # layer numbers along an axis of such a map
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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("make_graph.py", __doc__)
    add = parser.add_argument
    add("--graph", choices=("autograd", "modules", "block", "reuse"), default="modules", help="default: %(default)s")
    add("--efficient", choices=("no", "yes"), default="no",
        help="autograd only. no: the textbook's dense block, layer by layer; yes: the efficient dense block, which is "
             "one operation (default: no)")
    add("--layers", metavar="N", type=number(int, 3, len(COLOURS)), default=5,
        help=f"block only: x0 to x(N-1) are drawn, N from 3 to {len(COLOURS)} (default: %(default)s)")
    add("--checkpoint", metavar="FILE", type=file,
        help="reuse only: the trained network, as train.py saves it, in place of the flags of the network")
    add("--untrained", action="store_true",
        help="reuse only: the checkpoint's network at its first weights instead, as a control")
    add("--out", metavar="FILE", default=".",
        help="an existing directory, or the path of the files without suffix (default: ./graph-<kind>)")
    add_network_flags(parser.add_argument_group("network (block takes --layers instead of --depth)"), depth=100)
    args, explicit = parser.parse(argv)
    if args.graph == "reuse" and not args.checkpoint:
        raise ValueError("--graph reuse needs a trained network; give --checkpoint FILE, the latest.pth of a run")
    of_reuse = [flag(name) for name in ("untrained", "checkpoint") if name in explicit]
    if of_reuse and args.graph != "reuse":
        raise ValueError(f"{of_reuse[0]} belongs to --graph reuse; --graph {args.graph} draws the network of the other "
                         "flags")
    of_network = [flag(name) for name in NETWORK_FLAGS if name in explicit]
    if of_network and args.graph == "reuse":
        raise ValueError(f"{of_network[0]} contradicts --checkpoint {args.checkpoint}, which has a network of its own")
    return args


def stem_of(out: str, kind: str) -> str:
    """-> the path of the files without suffix. Raises ValueError if they cannot be written."""
    stem = Path(out, f"graph-{kind}") if os.path.isdir(out) or out.endswith("/") else Path(out)
    stem = stem.with_suffix("") if stem.suffix in (".dot", ".svg", ".png") else stem
    if not os.access(stem.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {stem.parent} is no directory that can be written to")
    return str(stem)


def load(args: argparse.Namespace) -> tuple[DenseNet, str]:
    """-> the network and its description

    Raises:
        ValueError: for impossible dimensions or a damaged checkpoint.
    """
    if args.graph == "reuse":
        net, checkpoint = densenet.load(args.checkpoint), densenet.read_checkpoint(args.checkpoint)
        which = f", after epoch {checkpoint['epoch']}"
        if args.untrained:
            seed = checkpoint["flags"]["seed"]
            torch.manual_seed(seed)  # as train.py does before it builds the network
            net, which = DenseNet(**net.arguments), f", before training (seed {seed})"
    else:
        arguments, which = network_arguments(args), ""
        if args.graph == "block":
            arguments["depth"] = 4 + (args.layers - 1) * (3 if args.no_bottleneck else 6)
        efficient = args.graph == "autograd" and args.efficient == "yes"
        with torch.device("cpu" if efficient else "meta"):  # meta: the same operations and shapes without values
            net = DenseNet(**arguments, efficient=efficient)
    return net, f"{describe(net)}, {sum(p.numel() for p in net.parameters()):,} parameters{which}"


# --- .dot -------------------------------------------------------------------------------------------------------

def quote(text: object) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def statement(*names: str, **attributes: object) -> str:
    """-> the .dot statement for a node (one name) or an edge (two names)"""
    values = ", ".join(f"{name}={quote(value)}" for name, value in attributes.items())
    return f"{' -> '.join(map(quote, names))} [{values}];"


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
        self.maker[get_gradient_edge(output).node] = name

    def source(self, tensor: torch.Tensor) -> str:
        """-> the node that made the tensor. Adds a node for operations outside of layers (ReLU, mean)."""
        operation, outside_layers = get_gradient_edge(tensor).node, []
        while operation not in self.maker:
            outside_layers.insert(0, name_of(operation))
            operation = operation.next_functions[0][0]
        if not outside_layers:
            return self.maker[operation]
        name = ", ".join(outside_layers)
        self.statements.append(statement(self.maker[operation], name))
        self.add(name, name, tensor)
        return name

    def add_plain(self, name: str, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        source = self.source(inputs[0])
        if isinstance(layer, Transition):  # starts a column; written backwards, since dot draws edges downwards
            self.statements.append(statement(name, source, dir="back", tailport="w", headport="e", weight=0))
        else:
            self.statements.append(statement(source, name))
        if isinstance(layer, Transition) or not self.heads:
            self.heads.append(name)
        self.add(name, caption(name, layer), output, fillcolor=SAND)

    def add_dense(self, name: str, layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Adds two nodes: the layer, and a joint, where the new channels meet the layer's input.

        The width of the line from the input to the joint is proportional to the number of channels.
        """
        source, joint = self.source(inputs[0]), f"{name} cat"
        self.blocks.setdefault(name.split(".")[0], []).extend((name, joint))
        width = 0.5 + inputs[0].shape[1] / self.channels_per_point
        self.statements += [
            statement(name, label=caption(name, layer), fillcolor=PALE_BLUE),
            statement(source, name, tailport="sw"),
            statement(source, joint, color=COLOURS[0], arrowhead="none", weight=20, penwidth=width),
            statement(name, joint)]
        self.add(joint, "", output, fontsize=9, color=COLOURS[0], height=0.15, margin="0.04,0.01")

    def arrangement(self) -> list[str]:
        """-> statements that draw a frame around each block and put the columns side by side"""
        look = 'labeljust=l; labelloc=b; style="filled,rounded"; color="#F3F3F3"'
        frames = [f"subgraph {quote(f'cluster {block}')} {{ {look}; label={quote(block)}; "
                  f"{'; '.join(map(quote, members))}; }}" for block, members in self.blocks.items()]
        return [*frames, f"{{ rank=same; {' -> '.join(map(quote, self.heads))} [style=invis]; }}"]


def modules_graph(net: DenseNet) -> list[str]:
    image = torch.zeros(IMAGE, device=net.fc.weight.device, requires_grad=True)
    layers = Layers(image, max(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d)))
    for name, layer in net.named_modules():
        if re.fullmatch(r"\w+\.\d+", name):  # dense1.0
            layer.register_forward_hook(partial(layers.add_dense, name))
        elif re.fullmatch(r"\w+", name) and not name.startswith("dense"):  # conv1, trans1, bn1, fc
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
    reads, channels = channels_of(readers_of(net)["trans1"])
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


# --- how layers reuse features ---------------------------------------------------------------------------------

def readers_of(net: DenseNet) -> dict[str, list[tuple[nn.BatchNorm2d, nn.Module]]]:
    """-> for each dense block, under the name of the module that follows it ("trans1", ..., "fc"), what reads its
    feature maps: batch norm and convolution of each layer and of the transition, or the last batch norm and classifier
    """
    readers = {}
    for b in range(1, net.nBlocks + 1):
        is_last = b == net.nBlocks
        follower = "fc" if is_last else f"trans{b}"
        after = net if is_last else net.get_submodule(follower)
        readers[follower] = [(layer.bn1, layer.conv1) for layer in net.get_submodule(f"dense{b}")]
        readers[follower].append((after.bn1, net.fc if is_last else after.conv1))
    return readers


def channels_of(readers: list[tuple[nn.BatchNorm2d, nn.Module]]) -> tuple[list[int], list[int]]:
    """-> the channels that each reader of a block reads; the channels of each source: the block's input, its layers"""
    reads = [norm.num_features for norm, _ in readers]
    return reads, [reads[0], *(after - before for before, after in pairwise(reads))]


def reuse_map(readers: list[tuple[nn.BatchNorm2d, nn.Module]], with_gamma: bool) -> torch.Tensor:
    """-> how much each reader of a block of n layers takes from each source, float64 (n + 1, n + 1)

    Row 0 is the block's input, row s the output of layer s; a column is a reader. Cells are mean |w|, as in the paper,
    or mean |gamma w|, relative to the largest of the column; nan without a connection.

    A ReLU is between gamma and the weight w: w relu(gamma x + beta) = |gamma| w relu(sign(gamma) x + beta / |gamma|).
    So |gamma w| is the weight of a normalised feature map x. The scale of |w| alone is arbitrary: doubling gamma and
    beta and halving w gives the same network.
    """
    _, sizes = channels_of(readers)
    values = torch.full((len(readers), len(readers)), torch.nan, dtype=torch.float64)
    for i, (norm, reader) in enumerate(readers):
        w = reader.weight.detach().double().abs().transpose(0, 1).flatten(1).mean(1)  # (input channels,)
        w = norm.weight.detach().double().abs() * w if with_gamma else w
        means = torch.stack([part.mean() for part in w.split(sizes[:i + 1])])
        values[:i + 1, i] = means / means.max()
    return values


def draw_reuse(net: DenseNet, title: str) -> Figure:
    """Draws two panels for each block: mean |w| above, mean |gamma w| below."""
    blocks = readers_of(net)
    figure = Figure(figsize=(2.9 * len(blocks) + 1.3, 6.5), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    figure.suptitle(title, fontsize=11, color=INK)
    panels = figure.subplots(2, len(blocks), squeeze=False)
    for b, (follower, readers) in enumerate(blocks.items()):
        for row, with_gamma in enumerate((False, True)):
            draw_map(panels[row, b], reuse_map(readers, with_gamma), follower)
        panels[0, b].set_title(f"Dense block {b + 1}", fontsize=12, color=INK, pad=8)
        panels[1, b].set_xlabel(r"Target layer $\ell$", fontsize=11, color=INK)
    for row, name in enumerate((r"mean $|w|$, as in the paper", r"mean $|\gamma w|$, with batch norm's $\gamma$")):
        panels[row, 0].set_ylabel(f"{name}\n" + r"Source layer $s$", fontsize=11, color=INK, linespacing=1.8)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), CMAP), ax=panels, aspect=45, fraction=0.03, pad=0.02)
    bar.set_label("relative to the largest value of the column", fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9, colors=INK)
    bar.outline.set_visible(False)
    return figure


def draw_map(axes: Axes, values: torch.Tensor, follower: str) -> None:
    """Draws the result of reuse_map, with a frame around the last column, the module that follows the block."""
    n = len(values)
    lines = {"edgecolor": "white", "linewidth": 1.2} if n <= 20 else {"edgecolor": "face", "linewidth": 0.1}
    axes.pcolormesh(range(n + 1), range(n + 1), values.numpy(), cmap=CMAP, vmin=0, vmax=1, **lines)
    axes.add_patch(Rectangle((n - 1, 0), 1, n, fill=False, edgecolor=INK, linewidth=1.4 if n <= 20 else 0.8,
                             clip_on=False, zorder=3))
    axes.set(xlim=(0, n), ylim=(n, 0), aspect="equal")
    step = 1 + (n - 2) // MAX_TICKS
    layers = range(step, n, step)
    labelled = [layer for layer in layers if n - layer >= n / 7]  # leaves space for the follower's name
    axes.set_xticks([layer - 0.5 for layer in labelled] + [n - 0.5], [*map(str, labelled), follower])
    axes.set_yticks([0.5] + [layer + 0.5 for layer in layers], ["input", *map(str, layers)])
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.tick_params(axis="x", pad=11)
    for label in axes.get_xticklabels():
        label.set_verticalalignment("baseline")
    axes.spines[:].set_visible(False)
    if n <= MAX_NUMBERED:
        for s, i in (~values.isnan()).nonzero().tolist():
            value = float(values[s, i])
            axes.text(i + 0.5, s + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                      color="white" if value > 0.55 else INK)


# --- files ------------------------------------------------------------------------------------------------------

def write_figure(figure: Figure, stem: str) -> None:
    """Writes .png and .svg."""
    for suffix in ("png", "svg"):
        figure.savefig(f"{stem}.{suffix}", metadata={"Date": None} if suffix == "svg" else {})
        print(f"{stem}.{suffix}")


def write_graph(statements: list[str], title: str, stem: str) -> None:
    """Writes .dot and, if Graphviz is installed, .svg and .png. Raises Failure if Graphviz fails."""
    text = "\n".join([f"{DOT}label={quote(title)};", *statements, "}", ""])
    Path(f"{stem}.dot").write_text(text, encoding="utf-8")
    print(f"{stem}.dot")
    if not shutil.which("dot"):
        cli.tell("Graphviz's dot was not found, so no .svg and .png were written; install graphviz (with apt, brew or "
                 "conda)", "make_graph.py")
        return
    for suffix, dpi in (("svg", 72), ("png", 150)):
        dot = subprocess.run(["dot", f"-T{suffix}", f"-Gdpi={dpi}", f"-o{stem}.{suffix}"], input=text.encode(),
                             capture_output=True)
        if dot.returncode:
            raise cli.Failure(f"dot failed for {stem}.{suffix} ({dot.stderr.decode(errors='replace').strip()[:200]})")
        print(f"{stem}.{suffix}")


@exit_status
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    stem = stem_of(args.out, f"{args.graph}-untrained" if args.untrained else args.graph)
    net, title = load(args)
    with style(STYLE):
        if args.graph == "block":
            write_figure(draw_block(net), stem)
        elif args.graph == "reuse":
            write_figure(draw_reuse(net, title), stem)
        else:
            statements = autograd_graph(net) if args.graph == "autograd" else modules_graph(net)
            write_graph(statements, f"{title}\n{NOTE[args.graph]}", stem)


if __name__ == "__main__":
    sys.exit(main())
