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


def rows_there(path: Path, header: Sequence[str]) -> list[list[str]]:
    """Rows of a CSV that others are to join; none where there is no such file, or it is empty.

    Raises:
        WriteError: it has other columns, or cannot be read.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel writes a BOM
            first, *rows = [*csv.reader(file)] or [[*header]]
    except (OSError, ValueError, csv.Error) as error:
        raise WriteError(f"{path}: cannot be read ({error}). Move it elsewhere.") from error
    if first != [*header]:
        raise WriteError(
            f"{path}: has the columns {', '.join(first)}, and rows of {', '.join(header)} are to "
            "join it. Name another place, or move it elsewhere."
        )
    return [row for row in rows if row]


def join_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """As `write_csv`; rows that are there stay, but those whose first cell is that of a new one.

    Raises:
        WriteError: the file there has other columns.
    """
    rows = list(rows)
    named = {row[0] for row in rows}
    older = [row for row in rows_there(path, header) if row[0] not in named]
    write_csv(path, header, older + rows)


def _plain(value: object) -> object:
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
