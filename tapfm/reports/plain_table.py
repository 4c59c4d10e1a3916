"""Tables as text: a figure with its interval as one cell, Markdown, columns in line.

A table is rows of cells, the header first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tapfm.stats.bootstrap import Interval

FEW_DRAWS = 0.9  # an interval on a smaller share of the draws is marked
Table = Sequence[Sequence[str]]


def span(
    figure: Interval | None, draws: int = 0, sign: str = "", undefined: str = "undefined"
) -> str:
    """`0.900 [0.848, 0.945]`; blank for None.

    Args:
        figure: what is said.
        draws: of the bootstrap; an interval that stands on few of them is marked.
        sign: "+" for a difference.
        undefined: said of nan.
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
    """As a table of Markdown."""
    rows = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in table]
    return "\n".join([rows[0], "|---" * len(table[0]) + "|", *rows[1:]])


def aligned(table: Table) -> list[str]:
    """A line a row, columns in line."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def ruled(table: Table) -> list[str]:
    """`aligned`, with a rule above every row whose first cell says something."""
    lines = aligned(table)
    rule = "-" * max(map(len, lines))
    return [
        part
        for n, (row, line) in enumerate(zip(table, lines, strict=True))
        for part in ([rule, line] if n and row[0] else [line])
    ]
