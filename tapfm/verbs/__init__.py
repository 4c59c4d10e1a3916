"""The verbs of the command line: each function adds a verb's flags and returns its action.

    cohorts.py    demo, labels, split
    fit_help.py   the first screen of `tapfm fit --help`
    reading.py    index, predict, heatmap, features, embed, histaug, export, view
    launched.py   index, features and predict as jobs
    training.py   check, plan, probe, test, study, report, compare, pathpt, doctor

An action takes the flags by name, imports what it needs, and returns the exit code. Nothing heavy
is imported before it runs.
"""

from __future__ import annotations

import argparse
import gc
import re
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

Do = Callable[..., int]


class Parser(ArgumentParser):
    """Reads flags, and raises one error for all that is wrong with them, without the usage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.faults: list[str] = []
        self.typed: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        """Read what is known; refuse the rest, as `parse_args` does.

        Raises:
            SettingsError: all unknown flags, wrong types and unknown choices.
        """
        self.typed = [word for word in args or () if word.startswith("--")]
        namespace, unknown = super().parse_known_args(args, namespace)
        flags = [word for word in unknown if word.startswith("-")]
        for word in flags or unknown:
            self.faults.append(f"unrecognized argument {word}.{self._near(word)}")
        self._refuse(self.faults)
        return namespace, []

    def error(self, message: str):
        """Raise a settings error in place of the usage; a misspelt flag is named beside it."""
        known = self._option_string_actions
        odd = [word for word in self.typed if word.partition("=")[0] not in known]
        wrong = [f"unrecognized argument {word}.{self._near(word)}" for word in odd]
        self._refuse([*self.faults, *wrong, message])

    def _get_value(self, action, arg_string):
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            self.faults.append(str(error))
            return None

    def _check_value(self, action, value) -> None:
        try:
            if value is not None:
                super()._check_value(action, value)
        except argparse.ArgumentError as error:
            self.faults.append(f"{error}.{self._near(value, action.choices)}")
            if action.nargs == argparse.PARSER:  # no verb, no flags
                self._refuse(self.faults)

    def _near(self, word: str, known=None) -> str:
        from tapfm.settings import did_you_mean

        return did_you_mean(word.partition("=")[0], known or self._option_string_actions)

    def _refuse(self, faults: list[str]) -> None:
        from tapfm.settings import refuse

        refuse(faults, self.prog)


def later(where: str) -> Do:
    """Return the function `module:name`, imported when it is called."""

    def do(**flags) -> int:
        collects = gc.isenabled()
        gc.disable()  # torch's modules are many objects and no garbage: .6 s of an import's 3
        try:
            found = resolve_name(where)
        finally:
            if collects:
                gc.freeze()  # nor is it looked through again while the verb runs
                gc.enable()
        try:
            return found(**flags)
        finally:
            gc.unfreeze()  # or libraries report it as leaked at the end

    return do


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers that refuses numbers below `least`."""

    def read(text: str) -> int:
        if (number := int(text)) < least:
            raise ArgumentTypeError(f"{number} is less than {least}: give {least} or more")
        return number

    read.__name__ = "whole number"  # argparse: invalid whole number value: 'x'
    return read


def device(text: str) -> str:
    """Return the name of a device of this machine: cpu, cuda or cuda:1."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise ArgumentTypeError(f"{text!r} is no device: give cpu, cuda or cuda:1")
    if text.startswith("cuda"):
        import torch

        if int(text.partition(":")[2] or 0) >= torch.cuda.device_count():
            raise ArgumentTypeError(
                f"PyTorch finds {torch.cuda.device_count()} GPUs here, and {text} is none of them: "
                "leave it out, or give cpu"
            )
    return text


def config_flag(verb: ArgumentParser, dest: str = "config", required: bool = False) -> None:
    """Add `--config`, which may be repeated; later files take precedence."""
    verb.add_argument("--config", type=Path, action="append", dest=dest, required=required,
                      metavar="YAML", help="with a data part, as of fit")  # fmt: skip


def device_flags(verb: ArgumentParser) -> None:
    """Add the flags of the device and the number of tiles at once."""
    verb.add_argument("--chunk", type=at_least(1), default=16, help="tiles at once (%(default)s)")
    verb.add_argument("--device", type=device, help="cuda or cpu; cuda where there is one")
