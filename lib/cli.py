"""What the command lines of all scripts share: their parser, the network's flags, and messages of one line."""

import argparse
import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from lib import distributed
from lib.device import is_out_of_memory
from lib.distributed import WrongEnvironment, is_peer_failure

NETWORK_FLAGS = ("growthRate", "depth", "reduction", "no_bottleneck")


class Failure(RuntimeError):
    """Ends a script with exit status 1. The message is one line."""


class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong flags, so that every script reports them in one line."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse(self, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """-> all flags, and those given on the command line, even if equal to the default"""
        args, unset = self.parse_args(argv), object()
        # argparse cannot tell a default from a given value: parse again with a marker as every default
        explicit = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
        return args, {name: value for name, value in explicit.items() if value is not unset}


def number(kind: type, minimum: float, maximum: float, valid: str = ""):
    """-> an argparse type: numbers of this kind from minimum to maximum, both included; ``valid`` tells the range"""
    valid = valid or (f"a whole number from {minimum} to {maximum}" if kind is int else f"from {minimum} to {maximum}")

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # fails every comparison
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is {valid}")
        return value
    return parse


def path(text: str) -> str:
    """An argparse type: a path. An empty one, of an unset shell variable, would be taken for a flag not given."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path")
    return text


def new_file(suffix: str, may_exist: bool = True):
    """-> an argparse type: the path of a file that can be written. Refusing it later would lose the script's work."""
    def parse(text: str) -> str:
        is_free = not (os.path.isdir(text) if may_exist else os.path.lexists(text))
        if not (is_free and text.endswith(suffix) and os.access(os.path.dirname(text) or ".", os.W_OK)):
            kind = "file" if may_exist else "new file"
            raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is a {kind} that ends in {suffix}, in an existing, "
                                             "writable directory")
        return text
    return parse


def add_network_flags(group, depth: int, growth_rates: tuple[int, int] = (1, 4096)) -> None:
    """Adds --growthRate, --depth, --reduction and --no-bottleneck; ``depth`` is the default."""
    group.add_argument("--growthRate", metavar="K", type=number(int, *growth_rates), default=12,
                       help="k, the channels that each layer adds (default: %(default)s)")
    group.add_argument("--depth", metavar="L", type=number(int, 1, 4096), default=depth,
                       help="layers: 6n + 4 with bottleneck, 3n + 4 without (default: %(default)s)")
    group.add_argument("--reduction", metavar="R", default=0.5,
                       type=number(float, math.nextafter(0, 1), 1, "above 0 and at most 1"),
                       help="share of the channels that a transition keeps (default: %(default)s)")
    group.add_argument("--no-bottleneck", action="store_true", help="the original layer: one 3x3 convolution")


def network_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """-> DenseNet's arguments for the flags of add_network_flags"""
    return dict(growthRate=args.growthRate, depth=args.depth, reduction=args.reduction,
                bottleneck=not args.no_bottleneck)


def flag(name: str, value: Any = True) -> str:
    """-> the flag as it stands on a command line: --depth=40, --no-cuda, --classes cat dog; "" if it is not set"""
    if value is None or value is False:
        return ""
    name = f"--{name.replace('_', '-')}"
    if isinstance(value, list):
        return " ".join([name, *map(str, value)])
    return name if value is True else f"{name}={value}"


# --- messages ---------------------------------------------------------------------------------------------------

def first_line(error: BaseException) -> str:
    """-> the first line of the error's message, or its type's name if there is no message"""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """-> text with control characters escaped: the name of a file or class could hold commands for a terminal"""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(message: str) -> None:
    print(printable(message), flush=True)


def tell(message: str, program: str = "train.py") -> None:
    """Prints one line on stderr. A closed stderr or a full disk must not stop a training."""
    with contextlib.suppress(OSError):
        # one write: several ranks may share stderr
        sys.stderr.write(f"{program}: {printable(' '.join(message.split()))}\n")
        sys.stderr.flush()


def warn(message: str) -> None:
    tell(f"warning: {message}")


def fail(error: Exception | str, status: int, program: str) -> int:
    """Prints the error in one line. -> ``status``, the exit status"""
    tell(f"error: {error}", program)
    return status


def exit_status(main: Callable[[list[str] | None], int | None]) -> Callable[[list[str] | None], int]:
    """Makes a script's main return its exit status. What a user can cause or mend becomes one line on stderr: bad input
    (ValueError) with status 2, a run that failed later with status 1. Any other error is a defect and is raised."""
    program = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv) or 0
        except SystemExit as stop:  # argparse's, after --help
            return stop.code or 0
        except Exception as error:
            status, message = 1, first_line(error)
            if is_out_of_memory(error):
                message = "out of memory; --efficient yes, --efficient max or a smaller --batchSz needs less"
            elif isinstance(error, ValueError):
                status, message = 2, str(error)
            elif isinstance(error, OSError) and error.filename:
                message = f"{error.filename}: {error.strerror}"
            elif is_peer_failure(error):
                message = "another process has ended"
            elif not isinstance(error, (Failure, OSError, FloatingPointError, torch.AcceleratorError)):
                raise
            rank = os.environ.get("RANK", "0") if "MASTER_ADDR" in os.environ else "0"  # or another program's
            if rank == "0" or isinstance(error, WrongEnvironment):
                fail(message, status, program)
            elif not is_peer_failure(error) and (status == 1 or os.environ.get("LOCAL_RANK") == "0"):
                fail(f"rank {rank}: {message}", status, program)  # bad input once on each machine
            return status
        finally:
            distributed.end()
    return run
