"""The verbs of the command line: each function adds a verb's flags and returns its action.

    cohorts.py    demo, labels, split
    reading.py    index, predict, heatmap, features, export
    training.py   plan, probe, test, study, report, pathpt, doctor

An action takes the flags by name, imports what it needs, and returns the exit code. Nothing heavy
is imported before it runs.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

Do = Callable[..., int]


def later(where: str) -> Do:
    """Return the function `module:name`, imported when it is called."""
    return lambda **flags: resolve_name(where)(**flags)


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers that refuses numbers below `least`."""

    def read(text: str) -> int:
        if (number := int(text)) < least:
            raise ArgumentTypeError(f"{number} is less than {least}")
        return number

    read.__name__ = "whole number"  # argparse: invalid whole number value: 'x'
    return read


def config_flag(verb: ArgumentParser, dest: str = "config", required: bool = False) -> None:
    """Add `--config`, which may be repeated; later files take precedence."""
    verb.add_argument("--config", type=Path, action="append", dest=dest, required=required,
                      metavar="YAML", help="with a data part, as of fit")  # fmt: skip


def device_flags(verb: ArgumentParser) -> None:
    """Add the flags of the device and the number of tiles at once."""
    verb.add_argument("--chunk", type=at_least(1), default=16, help="tiles at once (%(default)s)")
    verb.add_argument("--device", help="cuda or cpu; cuda where there is one")
