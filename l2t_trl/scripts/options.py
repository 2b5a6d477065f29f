"""Options that several commands share, and the readers of their values."""

import argparse
import ast
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..fields import read_fields


def add_trainer_options(parser: argparse.ArgumentParser, names: Sequence[str], **defaults: Any) -> None:
    """
    Declare options with the trainer's names, defaults and help texts.

    Args:
        parser (`argparse.ArgumentParser`):
            The command's.
        names (`Sequence[str]`):
            Fields of [`L2TConfig`].
        defaults:
            Defaults that differ from the trainer's, by name.
    """
    declared = {one.name: one for one in read_fields(Path(__file__).parent.parent / "l2t_config.py", "L2TConfig")}
    for name in names:
        option = declared[name]
        default = defaults.get(name, ast.literal_eval(option.default))
        # As a shell would take it, so that the line can be copied.
        shown = f"${default!r}" if isinstance(default, str) and "\n" in default else str(default)
        help_text = f"{option.help} (default: {shown})".replace("%", "%%")
        if name in READERS:
            metavar = "TEXT" if isinstance(default, str) else "NUMBER"
            parser.add_argument(f"--{name}", type=READERS[name], default=default, metavar=metavar, help=help_text)
        else:
            parser.add_argument(f"--{name}", choices=option.type.split("|"), default=default, help=help_text)


def text(value: str) -> str:
    """Read a text that is not empty."""
    if not value:
        raise argparse.ArgumentTypeError("must be a text that elicits the answer, not empty")
    return value


def count(value: str) -> int:
    """Read a whole number from 1."""
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or larger, got {value!r}")
    return int(value)


def whole_number(value: str) -> int:
    """Read a whole number from 0."""
    if not value.isascii() or not value.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or larger, got {value!r}")
    return int(value)


def share(value: str) -> float:
    """Read a number above 0, at most 1."""
    return _number(value, lambda number: 0 < number <= 1, "above 0 and at most 1")


def coefficient(value: str) -> float:
    """Read a finite number from 0."""
    return _number(value, lambda number: math.isfinite(number) and number >= 0, "a finite number, 0 or larger")


def _number(value: str, is_valid: Callable[[float], bool], instead: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not is_valid(number):
        raise argparse.ArgumentTypeError(f"must be {instead}, got {value!r}")
    return number


READERS = {
    "answer_probe": text,
    "answer_probe_end": str,
    "max_episodes": count,
    "proxy_rank_ratio": share,
    "fisher_damping": coefficient,
    "process_reward_coef": coefficient,
    "compression_coef": coefficient,
}
