#!/usr/bin/env python3
"""Check gradients by numerical differentiation: ./numcheck.py compares the backward pass with central differences.

Checks both kinds of dense layer, the transition, the efficient dense block and a whole network with its loss, in
float64. Prints a table; --plot draws error against step size. Exit status: 0 all agree, 1 a gradient differs or the
check could not be completed, 2 bad input.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from lib.figures import COLOURS, STYLE, png_of  # must be imported before matplotlib, see lib/figures.py

# isort: split
import matplotlib.style
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display needed

import densenet
from densenet import Bottleneck, DenseBlock, DenseNet, SingleLayer, Transition
from lib.cli import Parser, add_network_flags, fail, network_arguments, number
from lib.faults import WRONG_GRADIENTS, add_inject_flag, injected, target_of
from lib.files import new_file, replace_file
from lib.layers import COMPILED_PATHS, PATHS, check_path, describe, layers_of, set_path, settle_kinks

STEPS = (1e-6, 1e-5, 1e-7)  # larger steps have more truncation error, smaller steps more rounding error: see --plot
PLOTTED_STEPS = tuple(10 ** (-i / 2) for i in range(2, 21))
LIMIT = 1e-7  # error relative to the gradient's norm; correct gradients stay below 1e-8, injected faults exceed 1e-3
GOOD_ENOUGH = LIMIT / 10  # no other step is tried if the error is at most this
DIRECTIONS = 2  # random directions for each layer of a whole network; checking each element would take too long


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("numcheck.py", __doc__)
    parser.add_argument("--plot", metavar="FILE.png", type=new_file(".png"), default=None,
                        help="draw error against step size; for correct gradients it falls with the square of the "
                             "step until rounding error makes it rise")
    parser.add_argument("--seed", metavar="S", type=number(int, 0, 2**32 - 1), default=1,
                        help="seed of the weights and images (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the efficient block, as train.py --compile")
    add_inject_flag(parser, WRONG_GRADIENTS)
    add_network_flags(parser.add_argument_group("network"), depth=22, growth_rates=(2, 64))
    return parser


def make_net(args: argparse.Namespace, **more) -> DenseNet:
    """Raises ValueError if no network has these dimensions."""
    torch.manual_seed(args.seed)
    return DenseNet(**network_arguments(args), **more)


# --- differences ------------------------------------------------------------------------------------------------

class Group(NamedTuple):
    """Tensors and the directions along which their gradient is checked."""
    name: str
    tensors: list[torch.Tensor]
    directions: list[list[torch.Tensor]]  # each direction has one tensor for each of ``tensors``, of the same shape


class Case(NamedTuple):
    """A row of the table: a loss function, and the tensors for which its gradient is checked."""
    name: str
    loss: Callable[[], torch.Tensor]
    groups: list[Group]  # in order of the forward pass
    fault: contextlib.AbstractContextManager  # injects the fault of --inject; does nothing without one


class Result(NamedTuple):
    """The errors of a group's gradient."""
    group: str  # the group's name
    n_directions: int
    errors: dict[float, float]  # step -> the largest error of all directions, relative to the gradient's norm

    @property
    def step(self) -> float:
        """The step with the smallest error."""
        return min(self.errors, key=self.errors.get)

    @property
    def error(self) -> float:
        return self.errors[self.step]

    @property
    def differs(self) -> bool:
        return not self.error <= LIMIT  # also true for NaN


def elements(name: str, tensor: torch.Tensor) -> Group:
    """-> a group with one direction for each element of the tensor"""
    unit = torch.eye(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return Group(name, [tensor], [[row.view_as(tensor)] for row in unit])


def random_directions(name: str, tensors: list[torch.Tensor], n: int = DIRECTIONS) -> Group:
    """-> a group with n random directions, each of which moves all tensors together"""
    return Group(name, tensors, [[torch.randn_like(t) for t in tensors] for _ in range(n)])


@torch.no_grad()
def slope(loss: Callable[[], torch.Tensor], tensors: list[torch.Tensor], direction: list[torch.Tensor],
          step: float) -> float:
    """-> (loss(t + step d) - loss(t - step d)) / (2 step), the central difference along the direction d"""
    before = [t.clone() for t in tensors]
    values = []
    for signed_step in (step, -step):
        torch._foreach_copy_(tensors, torch._foreach_add(before, direction, alpha=signed_step))
        values.append(loss().item())
    torch._foreach_copy_(tensors, before)
    return (values[0] - values[1]) / (2 * step)


def check_group(loss: Callable[[], torch.Tensor], group: Group, steps: Iterable[float], good_enough: float) -> Result:
    """Tries the steps one after another until the error is at most ``good_enough``."""
    grad = torch.autograd.grad(loss(), group.tensors)
    norm = max(math.sqrt(sum(g.square().sum().item() for g in grad)), 1e-300)
    slopes = []  # of each direction, by the backward pass
    for direction in group.directions:
        slopes.append(sum((g * d).sum().item() for g, d in zip(grad, direction, strict=True)))
    errors = {}
    for step in steps:
        errors[step] = max(abs(slope(loss, group.tensors, direction, step) - from_backward) / norm
                           for direction, from_backward in zip(group.directions, slopes, strict=True))
        if errors[step] <= good_enough:
            break
    return Result(group.name, len(group.directions), errors)


def check(case: Case, plotted: bool) -> tuple[list[Result], dict[float, float]]:
    """-> a result for each group, in order of the backward pass; the curve of the figure, or {} if not ``plotted``

    The curve gives at each step the error of all tensors together, in random directions.
    """
    with case.fault:
        results = [check_group(case.loss, group, STEPS, GOOD_ENOUGH) for group in reversed(case.groups)]
        if not plotted:
            return results, {}
        everything = random_directions("all", [t for group in case.groups for t in group.tensors], n=4)
        return results, check_group(case.loss, everything, PLOTTED_STEPS, good_enough=0).errors


# --- cases ------------------------------------------------------------------------------------------------------

def prepare(module: nn.Module, x: torch.Tensor, device: str) -> tuple[nn.Module, torch.Tensor]:
    """-> the module and its input x in float64 on the device; no ReLU in the module has an input near zero"""
    module, x = module.double().to(device), x.double().to(device)
    settle_kinks(module, x)
    return module, x.requires_grad_()


def module_case(module: nn.Module, fault: str | None, device: str) -> Case:
    """A dense layer or a transition: every element of its input and parameters."""
    module, x = prepare(module, torch.randn(2, module.bn1.num_features, 4, 4), device)
    weights = torch.randn_like(module(x))
    groups = [elements("input", x), *(elements(name, p) for name, p in module.named_parameters())]
    return Case(type(module).__name__, lambda: (module(x) * weights).sum(), groups, injected(fault, module))


def block_case(layer: type, path: str, fault: str | None, device: str) -> Case:
    """The efficient block with the batch norm and pooling that follow it: every element of its input and parameters."""
    block, norm = DenseBlock(layer(3, 2), layer(5, 2)), nn.BatchNorm2d(7)
    _, x = prepare(nn.Sequential(block, norm), torch.randn(2, 3, 4, 4), device)  # changes the modules in place
    weights = torch.randn(2, 7, 2, 2, dtype=x.dtype, device=device)
    groups = [elements("input", x), *(elements(f"layer {name}", p) for name, p in block.named_parameters()),
              *(elements(f"last norm's {name}", p) for name, p in norm.named_parameters())]
    return Case(f"efficient block of {layer.__name__}{', max' if 'max' in path else ''}",
                lambda: (densenet.efficient_block(block, norm, x, (2, 2), path) * weights).sum(), groups,
                injected(fault, block[1], efficient=True))


def network_case(args: argparse.Namespace, path: str, device: str) -> Case:
    """A whole network with its loss: random directions for the input and for each layer's parameters."""
    net, x = prepare(make_net(args), torch.randn(4, 3, 8, 8), device)
    set_path(net, path)
    labels = torch.randint(10, (4,), device=device)

    def loss() -> torch.Tensor:
        value = F.nll_loss(net(x), labels)
        check_path(net, path)
        return value

    groups = [random_directions("input", [x])]
    groups += [random_directions(name, list(module.parameters())) for name, module in layers_of(net)]
    return Case(f"network, {path}", loss, groups, injected(args.inject, target_of(net), path != PATHS[False]))


def cases(args: argparse.Namespace, device: str) -> Iterator[Case]:
    torch.manual_seed(args.seed)
    for module in (SingleLayer(4, 2), Bottleneck(4, 2), Transition(4, 3)):
        yield module_case(module, args.inject, device)
    paths = COMPILED_PATHS if args.compile else PATHS
    set_path(make_net(args).double().to(device), paths[True])  # raises CompileFailed if they cannot be compiled
    for layer, path in ((SingleLayer, paths[True]), (Bottleneck, paths[True]), (Bottleneck, paths["max"])):
        yield block_case(layer, path, args.inject, device)
    for path in (PATHS[False], paths[True], paths["max"]):
        yield network_case(args, path, device)


def backends() -> Iterator[tuple[str, str, contextlib.AbstractContextManager]]:
    """-> names, devices, contexts. A GPU is checked with and without cuDNN: see pytorch pull request 708."""
    yield "CPU", "cpu", contextlib.nullcontext()
    if torch.cuda.is_available():
        yield "CUDA, cuDNN on", "cuda", torch.backends.cudnn.flags(enabled=True)
        yield "CUDA, cuDNN off", "cuda", torch.backends.cudnn.flags(enabled=False)
    else:
        print("\nskipped CUDA with cuDNN on and off: this machine has no GPU that PyTorch can use")


# --- results ----------------------------------------------------------------------------------------------------

def print_case(name: str, results: list[Result]) -> None:
    shown = next((r for r in results if r.differs), max(results, key=lambda r: r.error))
    print(f"{name:36}{sum(r.n_directions for r in results):6}  {shown.error:7.1e}  {shown.step:5.0e}  "
          f"{'DIFFERS' if shown.differs else 'ok':7}  {shown.group}", flush=True)


def run(args: argparse.Namespace) -> tuple[list[tuple[str, Result]], dict[str, dict[float, float]]]:
    """Prints a table for each backend. -> (case name, result) pairs; the CPU's curves by case name, see check()"""
    found, curves = [], {}
    for backend, device, context in backends():
        print(f"\n{backend:36}checks    error   step  verdict  first gradient that differs, or largest error")
        with context:
            for case in cases(args, device):
                results, errors = check(case, plotted=bool(args.plot) and device == "cpu")
                print_case(case.name, results)
                found += [(case.name, result) for result in results]
                curves.setdefault(case.name, errors)
    return found, curves


def verdict(found: list[tuple[str, Result]]) -> tuple[str, bool]:
    """-> the last line of the output; whether all gradients agree"""
    for case, result in found:
        if result.differs:
            return (f"first difference: {case}, gradient of {result.group}: error {result.error:.1e}, "
                    f"limit {LIMIT:.0e}"), False
    return (f"all {sum(result.n_directions for _, result in found)} checks agree: the largest error is "
            f"{max(result.error for _, result in found):.1e} of the gradient's norm, limit {LIMIT:.0e}"), True


def draw(axes: Axes, title: str, curves: dict[str, dict[float, float]]) -> None:
    axes.axhline(LIMIT, color="0.3", linewidth=0.9, linestyle="--")
    axes.annotate("limit", (PLOTTED_STEPS[0], LIMIT), (0, 3), textcoords="offset points", fontsize=8.5, ha="right")
    for (name, errors), colour, width in zip(curves.items(), COLOURS, (4, 2.4, 1), strict=False):  # curves may coincide
        axes.plot(errors.keys(), errors.values(), color=colour, label=name, linewidth=width, marker="o",
                  markersize=1.3 * width)
    # the slopes of rounding error and truncation error
    for x, y, name in (((1e-10, 1e-7), (1e-9, 1e-12), "1 / step"), ((1e-5, 10**-3.5), (1e-13, 1e-10), "step²")):
        axes.plot(x, y, color="0.6", linewidth=0.9)
        axes.annotate(name, (x[1], y[1]), (3, -3), textcoords="offset points", color="0.4", fontsize=8.5)
    axes.set(xscale="log", yscale="log", title=title, xlabel="Step", ylim=(3e-14, 30))
    axes.legend(loc="upper left")


def render(net: DenseNet, curves: dict[str, dict[float, float]]) -> bytes:
    by_label = [(name.removeprefix("efficient block of ").removeprefix("network, "), errors)
                for name, errors in curves.items()]  # three cases for each panel, see cases()
    with matplotlib.style.context(STYLE | {"text.parse_math": True}, after_reset=True):
        figure = Figure(figsize=(12, 4), dpi=150, layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for i, title in enumerate(("Layers", "Efficient block", describe(net))):
            draw(panels[i], title, dict(by_label[3 * i:3 * i + 3]))
        panels[0].set_ylabel("Error, relative to the gradient's norm")
        return png_of(figure)


def main(argv: list[str] | None = None) -> int:
    """-> exit status"""
    try:
        args = get_args_parser().parse_args(argv)
        net = make_net(args)
    except (ValueError, RuntimeError) as error:  # RuntimeError: not enough memory for the weights
        return fail(error, 2, "numcheck.py")
    injected_fault = f"; injected: {args.inject}" if args.inject else ""
    print(f"central differences in float64 against the backward pass; network: {describe(net)}, seed {args.seed}"
          f"{injected_fault}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: more threads would only add overhead
    try:
        found, curves = run(args)
        print()
        if args.plot:
            replace_file(args.plot, render(net, curves))
    except RuntimeError as error:
        return fail(error, 1, "numcheck.py")
    finally:
        torch.set_num_threads(threads)
    text, all_agree = verdict(found)
    print(text)
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
