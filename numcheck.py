#!/usr/bin/env python3
"""Check gradients by numerical differentiation: ./numcheck.py [--plot numcheck.png]

In float64, by torch.autograd.gradcheck: every element of both kinds of dense layer, the transition and small networks
of efficient blocks; and a whole network with its loss, along random directions. Prints a table; --plot draws error
against step size. Exit status: 0 all agree, 1 a gradient differs or the check could not be completed, 2 bad input.
"""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.gradcheck import GradcheckError, gradcheck

from densenet import Bottleneck, DenseNet, SingleLayer, Transition
from lib.cli import Parser, add_network_flags, exit_status, network_arguments, new_file, number
from lib.compare import check_efficient, describe, layers_of, settle_kinks
from lib.figures import COLOURS, GRID, Figure, style

STEP = 1e-6  # larger steps have more truncation error, smaller steps more rounding error: see --plot
PLOTTED_STEPS = tuple(10 ** (-i / 2) for i in range(2, 21))
DIRECTIONS = 4
LIMIT = 1e-7  # of the error along a direction; correct gradients stay below 1e-8 in the default network


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("numcheck.py", __doc__)
    parser.add_argument("--plot", metavar="FILE.png", type=new_file(".png"), default=None,
                        help="draw error against step size; for correct gradients it falls with the square of the "
                             "step until rounding error makes it rise")
    parser.add_argument("--seed", metavar="S", type=number(int, 0, 2**32 - 1), default=1,
                        help="seed of the weights and images (default: %(default)s)")
    add_network_flags(parser.add_argument_group("network"), depth=22, growth_rates=(2, 64))
    return parser


class Case(NamedTuple):
    """A row of the table."""
    name: str
    function: Callable[[], torch.Tensor]
    inputs: dict[str, list[torch.Tensor]]  # of the function, by name, in order of the backward pass
    by_element: bool  # otherwise along random directions


def make_case(name: str, module: nn.Module, images: torch.Tensor, device: str, by_element: bool = True) -> Case:
    """-> the module's output, of a network the loss, as a function of its parameters and ``images``, (N, C, H, W)"""
    module, x = module.double().to(device), images.double().to(device)
    settle_kinks(module, x)
    x.requires_grad_()

    def loss() -> torch.Tensor:
        output = module(x)
        check_efficient(module, output)
        return F.nll_loss(output, torch.arange(len(x), device=device))

    if by_element:
        inputs = [("input", [x]), *((name, [p]) for name, p in module.named_parameters())]
    else:
        inputs = [("input", [x]), *((name, [*layer.parameters()]) for name, layer in layers_of(module))]
    function = loss if isinstance(module, DenseNet) else lambda: module(x)
    return Case(name, function, dict(reversed(inputs)), by_element)


def cases(args: argparse.Namespace, device: str) -> Iterator[Case]:
    torch.manual_seed(args.seed)
    for layer in (SingleLayer(4, 2), Bottleneck(4, 2), Transition(4, 3)):
        yield make_case(type(layer).__name__, layer, torch.randn(2, 4, 4, 4), device)
    for name, bottleneck, efficient in (
            ("SingleLayer", False, True), ("Bottleneck", True, True), ("Bottleneck, max", True, "max")):
        blocks = DenseNet(2, blockConfig=(2, 1), nClasses=2, bottleneck=bottleneck, initChannels=2, inChannels=2,
                          bnSize=2, efficient=efficient)
        yield make_case(f"efficient blocks of {name}", blocks, torch.randn(2, 2, 4, 4), device)
    for name, efficient in (("textbook", False), ("efficient", True), ("max", "max")):
        torch.manual_seed(args.seed)  # the same network three times
        net = DenseNet(**network_arguments(args), efficient=efficient)
        yield make_case(f"network, {name}", net, torch.randn(4, 3, 8, 8), device, by_element=False)


def check_case(case: Case) -> tuple[str | None, float]:
    """-> the first wrong gradient of the backward pass, or None; the largest error along the directions"""
    if not case.by_element:
        errors = {name: error_at(case.function, tensors, STEP) for name, tensors in case.inputs.items()}
        return next((name for name, error in errors.items() if not error <= LIMIT), None), max(errors.values())
    tensors, wrong = [t for [t] in case.inputs.values()], None
    try:
        gradcheck(lambda *_: case.function(), tensors, atol=1e-6, rtol=1e-5, nondet_tol=1e-10)
    except GradcheckError as error:
        found = re.search(r"with respect to input (\d+)", str(error))
        wrong = [*case.inputs][int(found[1])] if found else str(error).splitlines()[0]
    return wrong, error_at(case.function, tensors, STEP)


def error_at(function: Callable[[], torch.Tensor], tensors: list[torch.Tensor], step: float) -> float:
    """-> the largest difference between the backward pass and the central difference with this step, along random
    directions that move all tensors together, relative to the gradient's norm"""
    torch.manual_seed(0)  # the same directions at every step
    weights = torch.randn_like(function())
    gradient = torch.autograd.grad(function(), tensors, weights)
    norm = torch.stack([g.norm() for g in gradient]).norm()
    data = [t.data for t in tensors]  # can be written to: no graph records it
    before, errors = [t.clone() for t in data], []
    for _ in range(DIRECTIONS):
        direction = [torch.randn_like(t) for t in data]
        derivative = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        values = []
        for signed_step in (step, -step):
            torch._foreach_copy_(data, torch._foreach_add(before, direction, alpha=signed_step))
            values.append((function() * weights).sum().detach())
        errors.append(((values[0] - values[1]) / (2 * step) - derivative).abs() / norm)
    torch._foreach_copy_(data, before)
    return torch.stack(errors).max().item()  # NaN if one is


def backends() -> Iterator[tuple[str, str, contextlib.AbstractContextManager]]:
    """-> names, devices, contexts. A GPU is checked with and without cuDNN: see pytorch pull request 708."""
    yield "CPU", "cpu", contextlib.nullcontext()
    if torch.cuda.is_available():
        yield "CUDA, cuDNN on", "cuda", torch.backends.cudnn.flags(enabled=True)
        yield "CUDA, cuDNN off", "cuda", torch.backends.cudnn.flags(enabled=False)
    else:
        print("\nskipped CUDA with cuDNN on and off: this machine has no GPU that PyTorch can use")


def check(args: argparse.Namespace) -> tuple[str | None, float, dict[str, list[float]]]:
    """Prints a table for each backend. -> the first difference, or None; the largest error; with --plot the CPU's
    errors at PLOTTED_STEPS by case"""
    first, largest, curves = None, 0.0, {}
    for backend, device, context in backends():
        print(f"\n{backend:36}elements    error  verdict")
        with context:
            for case in cases(args, device):
                tensors = [t for group in case.inputs.values() for t in group]
                wrong, error = check_case(case)
                print(f"{case.name:36}{sum(t.numel() for t in tensors):8}  {error:7.1e}  "
                      f"{f'DIFFERS: gradient of {wrong}' if wrong else 'ok'}", flush=True)
                largest = max(largest, error)
                if wrong and not first:
                    first = f"{backend}, {case.name}, gradient of {wrong}"
                if args.plot and device == "cpu":
                    curves[case.name] = [error_at(case.function, tensors, step) for step in PLOTTED_STEPS]
    return first, largest, curves


def write_figure(file: str, network: str, curves: dict[str, list[float]]) -> None:
    """Draws a panel for each three cases, as in cases()."""
    with style(GRID):
        figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for i, (name, errors) in enumerate(curves.items()):
            width = (4, 2.4, 1)[i % 3]  # curves may coincide
            panels[i // 3].plot(PLOTTED_STEPS, errors, color=COLOURS[i % 3], linewidth=width, marker="o",
                                markersize=1.3 * width, label=re.sub("efficient blocks of |network, ", "", name))
        for axes, title in zip(panels, ("Layers", "Efficient blocks", network), strict=True):
            # the slopes of rounding error and truncation error
            for x, y, name in (((1e-10, 1e-7), (1e-9, 1e-12), "1 / step"), ((1e-5, 10**-3.5), (1e-13, 1e-10), "step²")):
                axes.plot(x, y, color="0.6", linewidth=0.9)
                axes.annotate(name, (x[1], y[1]), (3, -3), textcoords="offset points", color="0.4", fontsize=8.5)
            axes.set(xscale="log", yscale="log", title=title, xlabel="Step", ylim=(3e-14, 30))
            axes.legend(loc="upper left")
        panels[0].set_ylabel("Error, relative to the gradient's norm")
        figure.savefig(file)


@exit_status
def main(argv: list[str] | None = None) -> int:
    """-> exit status"""
    args = get_args_parser().parse_args(argv)
    network = describe(DenseNet(**network_arguments(args)))
    print(f"numerical differentiation in float64 against the backward pass; network: {network}, seed {args.seed}")
    torch.set_num_threads(1)  # the tensors are small: at two threads it takes minutes
    first, largest, curves = check(args)
    if args.plot:
        write_figure(args.plot, network, curves)
    print(f"\nfirst difference: {first}" if first else
          f"\nall gradients agree; the largest error is {largest:.1e} of the gradient's norm")
    return 1 if first else 0


if __name__ == "__main__":
    sys.exit(main())
