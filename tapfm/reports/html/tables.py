"""Tables of the page: HTML from rows of cells, and the tables of a metrics_<split>.json.

A metric with an interval (an object with `value`, `low`, `high`) is one cell. The first two metrics
of each row make the table of results, with their differences; everything else, at any depth, is a
line of a second table, which has a column for each row of the first.

Text is escaped unless it is `Html`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from tapfm.reports import plain_table
from tapfm.stats.bootstrap import Interval
from tapfm.stats.metrics import MACRO

NAMES = {"auroc": "AUROC", "auprc": "AUPRC", "ece": "ECE", "delong": "DeLong", "f1": "F1",
         "r2": "R²", "sha256": "SHA-256"}  # fmt: skip
INTERVAL = {"value", "low", "high", "draws"}
COUNTS = {"positives", "known", "labels"}  # shown in the table of results already
SPLIT_KEYS = {"split", "task", "slides", "cases", "draws", "seed", "reference", "arms", "skipped",
              "notes", "verdicts"}  # fmt: skip
HEADLINE = 2  # metrics in the table of results: AUROC and AUPRC for labels of 0 or 1
LISTED = 6  # longest list that is written out; longer ones are curves, and stay in the JSON
ORDER = ("auroc", "auprc", "accuracy", "f1", "r²", "concordance", "sensitivity", "specificity",
         "operating points", "threshold", "ece", "brier", "calibration", "slope", "intercept",
         "delong", "difference", "by site", "by stain")  # fmt: skip
"""Kinds of further figures: how well cases are ranked, called, calibrated, then comparisons."""
UNBROKEN = 60  # characters of a cell that stay on one line


class Html(str):
    """Text that is HTML already."""


class GroupRow(str):
    """A row that names the group of the rows below it."""


def html(value: object) -> str:
    """Return a value as HTML: floats to four digits, None as nothing."""
    if isinstance(value, Html):
        return value
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))


def table(
    header: Sequence[object],
    rows: Iterable[Iterable[object] | GroupRow],
    caption: object = "",
    first: int = 1,
) -> Html:
    """Return rows under a header, in a frame that scrolls on a narrow page.

    Args:
        header: names of the columns.
        rows: lists of cells, or a `GroupRow`.
        caption: text above the table.
        first: number of cells at the left that are row headings.
    """
    body = []
    for row in rows:
        if isinstance(row, GroupRow):
            body.append(f'<tr><th class="group" colspan="{len(header)}">{html(row)}</th></tr>')
            continue
        cells = [
            f'<th scope="row">{html(cell)}</th>' if column < first else _cell(html(cell))
            for column, cell in enumerate(row)
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{html(cell)}</th>' for cell in header)
    above = f'<p class="caption">{html(caption)}</p>' if caption else ""
    return Html(
        f'{above}<div class="scroll" tabindex="0"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>'
        + "\n".join(body)
        + "</tbody></table></div>"
    )


def pairs(facts: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield nested facts as lines: their path in words, and the value."""
    for key, value in facts.items():
        rest = value
        if _is_interval(value):
            yield heading(key), value
            rest = {name: each for name, each in value.items() if name not in INTERVAL}
        if isinstance(value, Mapping):
            for path, each in pairs(rest):
                yield f"{heading(key)} {path}", each
        else:
            yield heading(key), value


def heading(key: object) -> str:
    """Return a key as words."""
    return " ".join(NAMES.get(word, word) for word in str(key).split("_"))


def results_table(metrics: Mapping) -> Html:
    """Return the main metrics of every label and row, with their differences."""
    rows, draws, head = metrics["arms"], metrics.get("draws") or 0, headline(metrics)
    differences = [key for key in _labelled(rows) if any(name in key for name in head)]
    header = ["model", *(f"{heading(key)} [95 %]" for key in head)]
    header += [f"{heading(key)} to *" for key in differences]
    lines: list[list[str] | GroupRow] = []
    for label in _labels(rows):
        first = next((row["figures"][label] for row in rows.values() if _has(row, label)), {})
        counted = label != MACRO and {"positives", "known"} <= first.keys()
        lines.append(
            GroupRow(
                label + (f", {first['positives']} of {first['known']} positive" if counted else "")
            )
        )
        for title, row in rows.items():
            found = row["figures"][label] if _has(row, label) else {}
            mark = " *" if title == metrics.get("reference") else ""
            cells = [interval_cell(found.get(key), draws) for key in head]
            cells += [
                interval_cell((row.get(key) or {}).get(label), draws, "+") for key in differences
            ]
            lines.append([title + mark, *cells])
    return table(header, lines)


def further_table(metrics: Mapping) -> Html | None:
    """Return all other metrics, a line each, a column for each row; None without any."""
    rows, head = metrics["arms"], headline(metrics)
    shown = {key for key in _labelled(rows) if any(name in key for name in head)}
    lines: dict[tuple[str, str], dict[str, object]] = {}
    for title, row in rows.items():
        for label, figures in (row.get("figures") or {}).items():
            rest = {k: v for k, v in figures.items() if k not in {*head, *COUNTS}}
            _collect(lines, title, label, rest)
        for key, value in row.items():
            if key in ("figures", "end_to_end", *shown) or value is None:
                continue
            if key in _labelled(rows):
                for label, each in value.items():
                    _collect(lines, title, label, {key: each})
            else:
                _collect(lines, title, "", {key: value})
    if not lines:
        return None
    draws, cells = metrics.get("draws") or 0, []
    for label in [*_labels(rows), ""]:
        own = {name: found for (each, name), found in lines.items() if each == label}
        if own:
            cells.append(GroupRow(label or "of the whole row"))
        for name in sorted(own, key=_place):
            cells.append([name, *(_value_cell(own[name].get(title), draws) for title in rows)])
    return table(["figure", *rows], cells)


def split_table(metrics: Mapping) -> Html | None:
    """Return the facts of the split beside its rows; None without any."""
    beside = {key: metrics[key] for key in metrics if key not in SPLIT_KEYS}
    draws = metrics.get("draws") or 0
    rows = [[name, _value_cell(value, draws)] for name, value in pairs(beside)]
    return table(["of the split", ""], rows) if rows else None


def headline(metrics: Mapping) -> list[str]:
    """Return the names of the first metrics with an interval."""
    found: dict[str, None] = {}
    for row in metrics["arms"].values():
        for figures in (row.get("figures") or {}).values():
            found |= {key: None for key, value in figures.items() if _is_interval(value)}
    return list(found)[:HEADLINE]


def interval_cell(found: Mapping | None, draws: int = 0, sign: str = "") -> str:
    """Return `0.900 [0.848, 0.945]`; marked if it comes from few draws."""
    if not found:
        return ""
    ends = (math.nan if found.get(key) is None else found[key] for key in ("value", "low", "high"))
    counted = 0 if found.get("low") is None else found.get("draws", math.inf)
    return plain_table.span(Interval(*ends, counted), draws, sign, "not defined")


def _cell(text: str) -> str:
    """Return a cell; long text may wrap, numbers and names not."""
    return f'<td class="text">{text}</td>' if len(text) > UNBROKEN else f"<td>{text}</td>"


def _is_interval(value: object) -> bool:
    return isinstance(value, Mapping) and INTERVAL - {"draws"} <= value.keys()


def _labels(rows: Mapping) -> list[str]:
    """Return the labels of all rows, macro first."""
    found = {label: None for row in rows.values() for label in row.get("figures") or {}}
    return sorted(found, key=lambda label: label != MACRO)


def _has(row: Mapping, label: str) -> bool:
    return bool((row.get("figures") or {}).get(label))


def _labelled(rows: Mapping) -> list[str]:
    """Return the keys of rows, beside their figures, whose values are given by label."""
    labels = set(_labels(rows))
    return list(
        {
            key: None
            for row in rows.values()
            for key, value in row.items()
            if key != "figures" and isinstance(value, Mapping) and value and value.keys() <= labels
        }
    )


def _place(name: str) -> tuple[int, str]:
    """Return where a figure stands among others: by kind in the order of `ORDER`, then by name."""
    word = name.casefold()
    return next((n for n, each in enumerate(ORDER) if each in word), len(ORDER)), word


def _collect(lines: dict, title: str, label: str, facts: Mapping) -> None:
    for name, value in pairs(facts):
        lines.setdefault((label, name), {})[title] = value


def _value_cell(value: object, draws: int) -> object:
    """Return a value of any kind as a cell."""
    if _is_interval(value):
        return interval_cell(value, draws)
    if isinstance(value, list):
        if len(value) > LISTED or any(isinstance(each, (list, Mapping)) for each in value):
            return f"{len(value)} entries, in the JSON"
        return ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in value)
    return value
