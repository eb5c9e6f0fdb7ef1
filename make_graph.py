#!/usr/bin/env python3
"""Draw the network: ./make_graph.py --graph {modules,autograd,block}

modules: the layers, how they connect and what shapes pass. autograd: every operation that the backward pass goes
through. Both write graph-<kind>.dot and, with Graphviz, .svg and .png. block: one dense block, as .svg and .png.
"""

import argparse
import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, NoReturn

import matplotlib.style
import torch
import torch.nn as nn
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from matplotlib.path import Path as Curve
from torch.autograd.graph import Node, get_gradient_edge

from densenet import DenseBlock, DenseNet, Transition

IMAGE = (1, 3, 32, 32)  # one of CIFAR's
DOT_SECONDS = 120  # an autograd graph of depth 250 takes 10
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe-Ito: colour-blind-safe
FILL = {"leaf": "#DCEBF5", "layer": "#DCEBF5", "other": "#FBE3B9", "Convolution": "#FBE3B9", "Cat": "#CDE9DF", "EfficientBlock": "#FBE3B9"}


# --- flags ------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def whole(minimum: int, maximum: int):
    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if minimum <= int(text) <= maximum:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}; valid are whole numbers from {minimum} to {maximum}")
    return parse


def share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}; valid is above 0 and at most 1")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="make_graph.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graph", choices=("autograd", "modules", "block"), default="modules",
                        help="default: %(default)s")
    parser.add_argument("--growthRate", metavar="K", type=whole(1, 4096), default=12,
                        help="k, the channels that each layer adds (default: %(default)s)")
    parser.add_argument("--depth", metavar="L", type=whole(1, 4096), default=100,
                        help="layers: 6n + 4 with bottleneck, 3n + 4 without; block has --layers instead "
                             "(default: %(default)s)")
    parser.add_argument("--reduction", metavar="R", type=share, default=0.5,
                        help="share of the channels that a transition keeps (default: %(default)s)")
    parser.add_argument("--no-bottleneck", action="store_true", help="the original layer: one 3x3 convolution")
    parser.add_argument("--efficient", choices=("no", "yes"), default="no",
                        help="autograd only. no: the textbook's operations; yes: the efficient block, one operation "
                             "(default: %(default)s)")
    parser.add_argument("--layers", metavar="N", type=whole(2, 12), default=5,
                        help="block only: x0 to x(N-1) are drawn (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", default=".",
                        help="an existing directory, or the files' path without suffix (default: graph-<kind> here)")
    return parser


def stem_of(out: str, kind: str) -> Path:
    """Refuses before anything is drawn what could not be written afterwards."""
    directory = out.endswith(("/", os.sep)) or Path(out).is_dir()
    stem = Path(out, f"graph-{kind}") if directory else Path(out)
    if stem.suffix in (".dot", ".svg", ".png"):
        stem = stem.with_suffix("")
    if not stem.parent.is_dir():
        raise ValueError(f"--out {out}: there is no directory {stem.parent}; valid are paths in an existing one")
    if not os.access(stem.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: no permission to write into {stem.parent}; choose another directory")
    for path in map(Path, (f"{stem}.dot", f"{stem}.svg", f"{stem}.png")):
        if path.is_dir():
            raise ValueError(f"--out {out}: {path} is a directory; choose another name")
    return stem


# --- .dot files -------------------------------------------------------------------------------------------------

def quote(text: object) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def statement(subject: str, **attributes: object) -> str:
    return f"{subject} [{', '.join(f'{name}={quote(value)}' for name, value in attributes.items())}];"


def node(name: str, **attributes: object) -> str:
    return statement(quote(name), **attributes)


def edge(source: str, target: str, **attributes: object) -> str:
    return statement(f"{quote(source)} -> {quote(target)}", **attributes)


def document(title: str, statements: list[str]) -> str:
    font = {"fontname": "Helvetica,Arial,sans-serif"}
    return "\n".join([
        "digraph {",
        statement("graph", **font, fontsize=13, label=title, labelloc="t", newrank="true", nodesep=0.12, ranksep=0.1),
        statement("node", **font, fontsize=10, shape="box", style="filled,rounded", color="#666666",
                  fillcolor="white", height=0.2, margin="0.06,0.03"),
        statement("edge", **font, fontsize=9, color="#444444", arrowsize=0.5),
        *statements, "}", ""])


def describe(net: DenseNet) -> str:
    a = net.arguments
    kind = "DenseNet" + ("-BC" if a["bottleneck"] and a["reduction"] < 1 else
                         "-B" if a["bottleneck"] else "-C" if a["reduction"] < 1 else "")
    return f"{kind}, L={a['depth']}, k={a['growthRate']}, {sum(p.numel() for p in net.parameters()):,} parameters"


# --- the backward graph -----------------------------------------------------------------------------------------

def operations(output: torch.Tensor) -> list[Node]:
    """Every node of the backward graph once, the output's first."""
    found = [output.grad_fn]
    seen = set(found)
    for operation in found:  # grows on the way: no recursion, whatever the depth
        new = dict.fromkeys(n for n, _ in operation.next_functions if n is not None and n not in seen)
        seen.update(new)
        found.extend(new)
    return found


def autograd_graph(net: DenseNet) -> list[str]:
    """Statements for each operation, named as in ``grad_fn``, and each parameter; edges run towards the output."""
    image = torch.zeros(IMAGE, device=net.fc.weight.device, requires_grad=True)
    output = net(image)
    leaves = {image: "image"} | {parameter: name for name, parameter in net.named_parameters()}
    names, statements = {}, [node("output", label=f"output\n{tuple(output.shape)}")]
    for i, operation in enumerate(operations(output)):
        if hasattr(operation, "variable"):  # AccumulateGrad
            names[operation] = name = leaves[operation.variable]
            statements.append(node(name, label=f"{name}\n{tuple(operation.variable.shape)}", fillcolor=FILL["leaf"]))
        else:
            names[operation] = name = f"operation{i}"
            fill = FILL.get(operation_name(operation), "white")
            statements.append(node(name, label=operation.name(), fillcolor=fill, group="operations"))
    for operation, name in names.items():
        statements += [edge(names[source], name) for source, _ in operation.next_functions if source is not None]
    return [*statements, edge(names[output.grad_fn], "output")]


def operation_name(operation: Node) -> str:
    return re.sub(r"Backward\d*$", "", operation.name())


# --- layers and shapes ------------------------------------------------------------------------------------------

class Step(NamedTuple):
    """What one layer got and gave in a forward pass."""
    name: str
    layer: nn.Module
    input: torch.Tensor
    output: torch.Tensor


def trace(net: DenseNet, image: torch.Tensor) -> tuple[list[Step], torch.Tensor]:
    """-> steps, output"""
    steps = []

    def record(name: str, layer: nn.Module) -> None:
        layer.register_forward_hook(lambda layer, inputs, output: steps.append(Step(name, layer, inputs[0], output)))

    for name, child in net.named_children():
        if isinstance(child, DenseBlock):
            for i, layer in child.named_children():
                record(f"{name}.{i}", layer)
        else:
            record(name, child)
    return steps, net(image)


def origin(tensor: torch.Tensor) -> Node:
    return get_gradient_edge(tensor).node


def shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape[1:]))


def caption(step: Step) -> str:
    parts = [f"{c.kernel_size[0]}×{c.kernel_size[1]} {c.in_channels}→{c.out_channels}"
             for c in step.layer.modules() if isinstance(c, nn.Conv2d)]
    if parts and step.output.shape[2] < step.input.shape[2]:
        parts.append("pool")
    return f"{step.name}  {', '.join(parts or [type(step.layer).__name__])}"


class Layers:
    """Statements for the layers, joined where the backward graph leads from one's input to another's output."""

    def __init__(self, image: torch.Tensor):
        self.made = {origin(image): ("image", image)}  # the node of the picture that a tensor comes from
        self.heads = ["image"]  # one for each column: the block, what leads to it and, at last, the classifier
        self.blocks: dict[str, list[str]] = {}
        self.statements = [node("image", group=0)]

    def add(self, step: Step) -> None:
        block, _, i = step.name.partition(".")
        if i:
            self.statements.append(node(step.name, label=caption(step), fillcolor=FILL["layer"]))
            self.connect(step.input, step.name)
            self.concatenate(step, block)
            return
        if head := isinstance(step.layer, Transition):
            self.heads.append(step.name)
        self.statements.append(node(step.name, label=caption(step), fillcolor=FILL["other"], group=len(self.heads)))
        self.connect(step.input, step.name, label=shape(step.input), constraint=not head)  # heads stand side by side
        self.made[origin(step.output)] = step.name, step.output

    def concatenate(self, step: Step, block: str) -> None:
        """The layer's input passes by it, as a line that widens with the channels; its own channels join there."""
        joint = f"{step.name}.cat"
        self.statements.append(node(joint, shape="point", width=0.08, color=COLOURS[0], group=len(self.heads)))
        self.blocks.setdefault(block, []).extend((step.name, joint))
        for operand, _ in step.output.grad_fn.next_functions:
            if operand in self.made:
                name, tensor = self.made[operand]
                self.statements.append(edge(name, joint, label=shape(tensor), color=COLOURS[0], arrowhead="none",
                                            weight=20, penwidth=0.5 + tensor.shape[1] / 60))
            else:
                self.statements.append(edge(step.name, joint, label=f"+{step.output.shape[1] - step.input.shape[1]}"))
        self.made[origin(step.output)] = joint, step.output

    def connect(self, tensor: torch.Tensor, target: str, **attributes: object) -> None:
        operation, functions = origin(tensor), []
        while operation not in self.made:
            functions.insert(0, operation_name(operation))
            operation = operation.next_functions[0][0]
        source, made = self.made[operation]
        if functions:
            name = ", ".join(functions)
            self.statements += [node(name, group=len(self.heads)), edge(source, name, label=shape(made))]
            self.made[origin(tensor)] = source, _ = name, tensor
        self.statements.append(edge(source, target, **attributes))


def modules_graph(net: DenseNet) -> list[str]:
    image = torch.zeros(IMAGE, device=net.fc.weight.device, requires_grad=True)
    steps, output = trace(net, image)
    layers = Layers(image)
    for step in steps:
        layers.add(step)
    layers.connect(output, "output", label=shape(output))
    clusters = [f"subgraph {quote(f'cluster_{block}')} {{ " + statement("graph", label=f"{block}: {len(members) // 2} layers", labeljust="l", style="filled,rounded", color="#F3F3F3", fontsize=11)
                + " ".join(f"{quote(member)};" for member in members) + " }" for block, members in layers.blocks.items()]
    heads = "{ rank=same; " + " -> ".join(map(quote, layers.heads)) + " [style=invis]; }"
    return [*layers.statements, *clusters, heads]


# --- the picture of a block -------------------------------------------------------------------------------------


# --- files ------------------------------------------------------------------------------------------------------

def run_dot(text: str, suffix: str) -> bytes:
    """Raises RuntimeError if dot fails."""
    try:
        done = subprocess.run(["dot", f"-T{suffix}", "-Gdpi=150" if suffix == "png" else "-Gdpi=72"], input=text.encode(),
                              capture_output=True, timeout=DOT_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"dot took more than {DOT_SECONDS} s for the .{suffix}") from None
    if done.returncode:
        raise RuntimeError(f"dot failed with status {done.returncode}: {done.stderr.decode(errors='replace')[:200]}")
    return done.stdout


def replace_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:  # unlike tempfile's, with the permissions that the umask gives
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(path)

def make_net(args):
    with torch.device("meta"):
        return DenseNet(args.growthRate, args.depth, args.reduction, bottleneck=not args.no_bottleneck, efficient=args.efficient=="yes")

def main(argv=None):
    args = get_args_parser().parse_args(argv)
    stem = stem_of(args.out, args.graph)
    net = make_net(args)
    text = document(describe(net), {"autograd": autograd_graph, "modules": modules_graph}[args.graph](net))
    replace_file(Path(f"{stem}.dot"), text.encode())
    for s in ("svg", "png"):
        replace_file(Path(f"{stem}.{s}"), run_dot(text, s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
