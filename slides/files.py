"""Files that are whole or not there: text, JSON, CSV, bytes; and what a damaged one raises."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path

from slides.errors import IndexFileError, SlideError

PLACE = 65_536  # bytes
DAMAGE = (  # what h5py, numpy and json raise, between them, where bytes are lost or changed
    OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile,
)  # fmt: skip


class WriteError(OSError):
    """A file cannot be written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, renamed to it if the block ends well, removed if not.

    Raises:
        WriteError: no right to, no room, or something else of that name.
    """
    try:
        with _renaming(path) as partial:
            yield partial
    except OSError as error:
        raise WriteError(
            f"{path}: cannot be written ({error.strerror or error}). Name another place, or mend "
            "that, and run the same command again."
        ) from error


@contextmanager
def _renaming(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, name: str) -> None:
    """All of `data` under `path`, or what was there before and an IndexFileError."""
    try:
        with _renaming(path) as partial, open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # some file systems tell of a full disk only here
    except OSError as error:
        raise IndexFileError(
            f"{name}: {len(data)} bytes could not be written to {path}: "
            f"{error.strerror or error}. Nothing half-written was left. Free some space or name "
            f"another index folder, then run the same command again: what is indexed is kept."
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


def file_fingerprint(path: Path) -> str:
    """By which a file that took another's place is noticed; a copy has the same.

    Its size, and a hash of its beginning, middle and end: a few milliseconds, not minutes; a file
    that has not changed since is not read again.
    """
    stat = path.stat()
    return _fingerprint(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _fingerprint(path: Path, size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in (0, size // 2, max(size - PLACE, 0)):
            file.seek(start)
            digest.update(file.read(PLACE))
    return f"{size}:{digest.hexdigest()[:16]}"


@contextmanager
def damage_as(fault: Callable[[str], SlideError]) -> Iterator[None]:
    """Whatever a damaged file makes its reader raise becomes the fault, told what it was."""
    try:
        yield
    except SlideError:
        raise
    except DAMAGE as error:
        raise fault(f"{type(error).__name__}: {error}") from error


def _plain(value: object) -> object:
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
