"""Says where in the configs a key stands, so that an error names file and line.

A fault begins with its key. A key may stand in several configs; the one that is meant is the last
whose value the fault quotes, or else the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from slides.errors import SettingsError
from tapfm.config_paths import config_files, find_config
from tapfm.yaml_files import compose, read_text


def with_lines(
    faults: Iterable[str], configs: Sequence[Path], words: Sequence[str] = ()
) -> list[str]:
    """Return faults, each with file and line of the key that it begins with, where it has them.

    Args:
        faults: such as "model.chunk: 'four' is not a whole number".
        configs: later ones take precedence.
        words: of the command line, whose flags take precedence over configs and have no line.
    """
    faults = list(faults)
    stand = [each for name in configs for each in _keys(find_config(name))] if faults else []
    for word, following in pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            stand.append((flag.removeprefix("--"), value if equals else following, ""))
    return [fault + _place(fault, stand) for fault in faults]


def with_lines_of(faults: Iterable[str], arguments: Sequence[str]) -> list[str]:
    """Return faults as `with_lines` does, of the configs and flags of a command line."""
    return with_lines(faults, config_files(arguments), arguments)


def _place(fault: str, stand: Sequence[tuple[str, str, str]]) -> str:
    """Return " (FILE, line N)" for the key that a fault begins with, or "" for a flag's."""
    key = re.match(r"[\w.]*", fault)[0].rstrip(".")
    inner = re.match(r"[\w.]+: unknown (\w+)", fault)
    found = []
    for name in ((f"{key}.{inner[1]}",) if inner else ()) + (key,):
        found = found or [each for each in stand if each[0] == name]
    quoted = [each for each in found if each[1] and repr(each[1]) in fault]
    place = (quoted or found)[-1][2] if found else ""
    return f" ({place})" if place else ""


def _keys(config: Path) -> Iterator[tuple[str, str, str]]:
    """Yield each dotted key of a config with its value as it is written, and where it stands."""
    try:
        node = compose(read_text(config), config)
    except SettingsError:
        return  # whoever reads it says what is wrong
    yield from _below(node, "", config)


def _below(node: yaml.Node | None, above: str, config: Path) -> Iterator[tuple[str, str, str]]:
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{above}{name.value}"
        text = value.value if isinstance(value, yaml.ScalarNode) else ""
        yield key, text, f"{config}, line {name.start_mark.line + 1}"
        yield from _below(value, f"{key}.", config)
