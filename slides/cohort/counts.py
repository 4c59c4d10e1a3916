"""Counts of a cohort by split: cases, slides and label values.

What is counted of a label depends on the task's columns (`slides.cohort.targets`): 1, 0 and unknown
of a binary one, each class, known numbers, events and censored cases. Only what the table says is
counted: a value that nobody has is 0, and an unknown one is never taken for 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Tally = dict[str, int]
"""Numbers of cases, slides or values, by name."""
UNKNOWN = "unknown"


def label_tally(names: Sequence[str], _classes: Sequence[str], rows: Sequence[Any]) -> Tally:
    """Return 1, 0 and unknown of each binary label."""
    tally = {}
    for place, name in enumerate(names):
        values = [row.labels[place] for row in rows]
        tally |= {f"{name} 1": values.count(1.0), f"{name} 0": values.count(0.0)}
        tally[f"{name} {UNKNOWN}"] = _unknown(values)
    return tally


def class_tally(names: Sequence[str], classes: Sequence[str], rows: Sequence[Any]) -> Tally:
    """Return the slides of each class, and those of an unknown one."""
    values = [row.labels[0] for row in rows]
    tally = {f"{names[0]} {each}": values.count(n) for n, each in enumerate(classes)}
    return tally | {f"{names[0]} {UNKNOWN}": _unknown(values)}


def number_tally(names: Sequence[str], _classes: Sequence[str], rows: Sequence[Any]) -> Tally:
    """Return known and unknown numbers of each column."""
    tally = {}
    for place, name in enumerate(names):
        lost = _unknown([row.labels[place] for row in rows])
        tally |= {f"{name} known": len(rows) - lost, f"{name} {UNKNOWN}": lost}
    return tally


def time_tally(names: Sequence[str], _classes: Sequence[str], rows: Sequence[Any]) -> Tally:
    """Return slides with the event, censored ones, and those of which it is unknown."""
    events = [row.labels[1] for row in rows]
    return {
        f"{names[1]} 1 (event)": events.count(1.0),
        f"{names[1]} 0 (censored)": events.count(0.0),
        f"{names[1]} {UNKNOWN}": _unknown(events),
    }


def count_table(cohort: Any) -> list[list[str]]:
    """Return cases, slides and label values of a cohort's splits as a table, header first.

    Splits without slides have no column; of unknown values a row is left out where there are none.
    """
    splits = [name for name in ("train", "val", "test") if cohort.split(name)]
    rows = {name: cohort.split(name) for name in splits}
    tallies = [cohort.tally(rows[name]) for name in splits]
    lines = [
        ["", *splits],
        ["cases", *(str(len({row.case_id for row in rows[name]})) for name in splits)],
        ["slides", *(str(len(rows[name])) for name in splits)],
    ]
    for key in tallies[0] if tallies else ():
        numbers = [tally[key] for tally in tallies]
        if any(numbers) or not key.endswith(f" {UNKNOWN}"):
            lines.append([key, *map(str, numbers)])
    return lines


def _unknown(values: Sequence[float]) -> int:
    return sum(map(math.isnan, values))
