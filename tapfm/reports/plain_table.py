"""Tables as text: a metric with its interval as one cell, Markdown, aligned columns.

A table is a list of rows of cells, the header first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap

from tapfm.stats.bootstrap import Interval

FEW_DRAWS = 0.9  # an interval from a smaller share of the draws is marked
Table = Sequence[Sequence[str]]


def span(
    figure: Interval | None, draws: int = 0, sign: str = "", undefined: str = "undefined"
) -> str:
    """Return `0.900 [0.848, 0.945]`; blank for None.

    Args:
        figure: the metric.
        draws: bootstrap draws; an interval from much fewer is marked.
        sign: "+" for a difference.
        undefined: text for nan.
    """
    if figure is None:
        return ""
    if math.isnan(figure.value):
        return undefined
    if not figure.draws:
        return f"{figure.value:{sign}.3f} [no interval]"
    few = " †" if figure.draws < FEW_DRAWS * draws else ""
    numbers = (f"{x:{sign}.3f}" for x in (figure.value, figure.low, figure.high))
    return "{} [{}, {}]".format(*numbers) + few


def markdown(table: Table) -> str:
    """Return the table as Markdown."""
    rows = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in table]
    return "\n".join([rows[0], "|---" * len(table[0]) + "|", *rows[1:]])


def aligned(table: Table) -> list[str]:
    """Return a line a row, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def ruled(table: Table) -> list[str]:
    """Return `aligned` lines, with a rule above every row whose first cell is not blank."""
    lines = aligned(table)
    rule = "-" * max(map(len, lines))
    return [
        part
        for n, (row, line) in enumerate(zip(table, lines, strict=True))
        for part in ([rule, line] if n and row[0] else [line])
    ]


def as_text(table: Table, notes: Sequence[str], above: Sequence[str] = ()) -> str:
    """Return the ruled table, what stands above it and its notes, wrapped at 100 characters."""
    head = [line for each in above for line in (*wrapped(each), "")]
    foot = [line for note in notes for line in wrapped(note)]
    return "\n".join([*head, *ruled(table), "", *foot])


def wrapped(text: str) -> list[str]:
    """Return lines of at most 100 characters, the first further out."""
    return wrap(text, 100, subsequent_indent="  ")
