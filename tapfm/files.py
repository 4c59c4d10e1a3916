"""Files that are whole or not there: text, JSON, CSV; the renaming itself is `slides.files`'."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path

from slides import files


class WriteError(OSError):
    """A file cannot be written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As that of `slides.files`; what goes wrong is the user's to mend.

    Raises:
        WriteError: no right to, no room, or something else of that name.
    """
    try:
        with files.replacing(path) as partial:
            yield partial
    except OSError as error:
        raise WriteError(
            f"{path}: cannot be written ({error.strerror or error}). Name another place, or mend "
            "that, and run the same command again."
        ) from error


def write_text(path: Path, text: str) -> None:
    """UTF-8; folders are made."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Dataclasses, such as intervals, as objects, and nan as null."""
    write_text(path, json.dumps(_plain(value), indent=1) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """A line a row, as many cells as the header has."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _plain(value: object) -> object:
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
