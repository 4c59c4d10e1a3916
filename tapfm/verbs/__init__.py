"""The verbs: each a function that adds its flags to a parser and returns what is done with them.

    cohorts.py    demo, labels, split
    reading.py    index, predict, heatmap, features, export
    training.py   plan, probe, test, study, report, pathpt, doctor

What is done takes the flags by name, imports what it needs, and returns the exit code. Nothing
heavy is imported before.
"""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

Do = Callable[..., int]


def later(where: str) -> Do:
    """A function `module:name` of the flags, imported when it is called."""
    return lambda **flags: resolve_name(where)(**flags)


def at_least(least: int) -> Callable[[str], int]:
    """What reads a flag's whole number, and refuses a smaller one."""

    def read(text: str) -> int:
        if (number := int(text)) < least:
            raise ArgumentTypeError(f"{number} is less than {least}")
        return number

    read.__name__ = "whole number"  # argparse: invalid whole number value: 'x'
    return read


def config_flag(verb: ArgumentParser, dest: str = "config", required: bool = False) -> None:
    """`--config`, as often as liked; later files win."""
    verb.add_argument("--config", type=Path, action="append", dest=dest, required=required,
                      metavar="YAML", help="with a data part, as of fit")  # fmt: skip


def device_flags(verb: ArgumentParser) -> None:
    """Where tiles are encoded, and how many at once."""
    verb.add_argument("--chunk", type=at_least(1), default=16, help="tiles at once (%(default)s)")
    verb.add_argument("--device", help="cuda or cpu; cuda where there is one")
