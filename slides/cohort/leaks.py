"""Finds one patient or one picture in two parts of a split, under one name or two."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from slides.cohort.spelling import case_key
from slides.errors import some, some_rows
from slides.files import file_fingerprint

GLIMPSE = 1024  # bytes of the middle of a file, by which most files of one size differ
Row = TypeVar("Row", bound=Hashable)


def repeated_values(name: str, values: Mapping[int, str]) -> list[str]:
    """Return a fault for each value of column `name` that several rows have."""
    rows = defaultdict(list)
    for number, value in values.items():
        rows[value].append(number)
    return [
        f"{some_rows(where)}: {name} {value} appears {len(where)} times: keep one row"
        for value, where in rows.items()
        if value and len(where) > 1
    ]


def cases_in_two_splits(rows: Mapping[int, tuple[str, str]]) -> list[str]:
    """Return a fault for each case in two splits, under one name or several that look like one.

    Args:
        rows: row number -> case_id and split.
    """
    cases = defaultdict(lambda: defaultdict(list))
    for number, (case, split) in rows.items():
        cases[case_key(case)][split].append(number)
    faults = []
    for splits in cases.values():
        if len(splits) > 1:
            numbers = sorted(number for where in splits.values() for number in where)
            names = dict.fromkeys(rows[number][0] for number in numbers)
            faults.append(
                _called(names)
                + (" is in " if len(names) == 1 else ", and it is in ")
                + " and ".join(f"{split} ({some_rows(where)})" for split, where in splits.items())
                + ": put all slides of a case in one split"
                + ", and spell it one way" * (len(names) > 1)
            )
    return faults


def cases_spelled_twice(case_ids: Mapping[int, str]) -> list[str]:
    """Return a fault for each case under several names that look like one; row number -> name."""
    cases = defaultdict(list)
    for number, case in case_ids.items():
        cases[case_key(case)].append(number)
    return [
        f"{some_rows(numbers)}: {_called(names)}: spell it one way"
        for numbers in cases.values()
        if len(names := dict.fromkeys(case_ids[number] for number in numbers)) > 1
    ]


def same_pictures(files: Mapping[Row, tuple[Path, str]]) -> list[tuple[list[Row], list[str]]]:
    """Return rows in two parts whose files have the same bytes, and the parts, a pair a picture.

    Only files of one size are read: a few bytes, and three places if those are the same
    (`slides.files.file_fingerprint`). Files that cannot be read, empty ones and folders do not
    count.

    Args:
        files: row -> its file and part.
    """
    groups = [list(files)]
    for look in (_size, _glimpse, file_fingerprint):
        alike = defaultdict(list)
        for number, rows in enumerate(groups):
            for row in rows:
                with suppress(OSError):
                    if (seen := look(files[row][0])) is not None:
                        alike[number, seen].append(row)
        groups = [rows for rows in alike.values() if len({files[row][1] for row in rows}) > 1]
    return [(rows, list(dict.fromkeys(files[row][1] for row in rows))) for rows in groups]


def _size(path: Path) -> int | None:
    return path.stat().st_size or None if path.is_file() else None


def _glimpse(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(path.stat().st_size // 2)
        return file.read(GLIMPSE)


def _called(names: Mapping[str, None]) -> str:
    if len(names) == 1:
        return f"case {next(iter(names))}"
    return f"{some([repr(name) for name in names])} look like one case"
