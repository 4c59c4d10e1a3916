"""Reads YAML that people write: text in UTF-8, no code, and nothing that grows without end.

Ten lines of anchors can stand for a billion values, and an anchor can hold itself: what is to be
read is counted as it would be written out, before anything is made of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slides.errors import SettingsError

MAX_BYTES, MAX_VALUES = 1 << 22, 100_000  # a config of 20,000 slides would name a table


def read_text(file: Path, what: str = "config") -> str:
    """Return the text of a file that a user wrote.

    Raises:
        SettingsError: there is no such file, or it is something else.
    """
    if not file.is_file():
        there = sorted(path.stem for path in file.parent.glob("*.yaml"))
        listed = f" There are: {', '.join(there)}." if there else ""
        raise SettingsError(f"{file}: there is no such {what}.{listed}")
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise SettingsError(f"{file}: has {size} bytes, and is no {what}. Give another file.")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{file}: not YAML: no text in UTF-8 ({error.reason} at byte {error.start}). Save it "
            "as UTF-8, or give another file."
        ) from error
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror}).") from error


def compose(text: str, where: object) -> yaml.Node | None:
    """Return the nodes of a YAML text, named `where` in errors; None if it is empty.

    Raises:
        SettingsError: it is no YAML, nested too deeply, or holds more than any config does.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None and _values(node, {}) > MAX_VALUES:
            raise SettingsError(
                f"{where}: its anchors (&) stand for more than {MAX_VALUES} values. Write it out."
            )
        return node
    except yaml.YAMLError as error:
        raise SettingsError(f"{where}: not YAML: {error}") from error
    except RecursionError as error:
        raise SettingsError(
            f"{where}: nested too deeply, or an anchor (&) that holds itself. Write it out."
        ) from error


def load(text: str, where: object) -> Any:
    """Return the values of a YAML text.

    Raises:
        SettingsError: as `compose`, or a value that cannot be.
    """
    node = compose(text, where)
    try:
        return None if node is None else yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise SettingsError(f"{where}: not YAML: {error}") from error


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node has when it is written out; a circle recurses too deeply."""
    if id(node) not in known:
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for each in below for part in (each if isinstance(each, tuple) else (each,)))
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]
