"""The command line: argparse types, the network's flags that scripts share, and one-line messages."""

import argparse
import contextlib
import math
import sys
from typing import Any, NoReturn

EFFICIENT = {"yes": True, "no": False, "max": "max"}  # the value of --efficient -> DenseNet's argument


# --- parsing ----------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Raises ValueError for wrong flags, so that every script reports them in one line."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        flags, rest = super().parse_known_args(args, namespace)
        for name, value in vars(flags).items():
            if value == []:  # argparse drops the value of --depth=--
                self.error(f"argument {flag(name)}: expected one argument")
        return flags, rest

    def parse(self, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """-> all flags, and those given on the command line, even if equal to the default"""
        # argparse cannot tell a default from a given value: parse again with a marker as every default
        defaults = vars(self.parse_args([]))
        unset = object()
        explicit = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset))))
        explicit = {name: value for name, value in explicit.items() if value is not unset}
        return argparse.Namespace(**defaults | explicit), explicit

    def restore(self, saved: dict[str, Any]) -> argparse.Namespace:
        """-> the defaults, updated with the flags that a file holds

        Raises:
            ValueError: for a flag that is unknown, or a value that the command line would not accept.
        """
        actions = {action.dest: action for action in self._actions if action.default is not argparse.SUPPRESS}
        flags = {name: action.default for name, action in actions.items()}
        for name, value in saved.items():
            if name not in flags:
                raise ValueError(f"{name} is unknown")
            if value is not None or flags[name] is not None:
                self.check_value(actions[name], value)
            flags[name] = value
        return argparse.Namespace(**flags)

    def check_value(self, action: argparse.Action, value: Any) -> None:
        if action.nargs == 0:
            is_valid = isinstance(value, bool)
        elif action.nargs == "+":
            is_valid = isinstance(value, list) and value != [] and all(isinstance(v, str) for v in value)
        else:
            try:
                parsed = self._get_values(action, [str(value)])  # private, but it checks both type and choices
                is_valid = parsed == value and type(value) in (str, int, float)
            except argparse.ArgumentError:
                is_valid = False
        if not is_valid:
            raise ValueError(f"{action.option_strings[-1]} is {str(value)[:60]!r}")


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
    """An argparse type: a path of printable characters, since messages show it in one line."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text[:60]!r}; valid is a path of printable characters")
    return text


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


NETWORK_FLAGS = ("growthRate", "depth", "reduction", "no_bottleneck")


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

def first_line(error: Exception) -> str:
    """-> the first line of the error's message, or its type's name if there is no message"""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """-> text with control characters escaped: the name of a file or class could hold commands for a terminal"""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
