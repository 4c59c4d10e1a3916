"""Tables of the page: HTML from rows, and the rows of a metrics_<split>.json, whatever is in it.

A figure with an interval (an object with `value`, `low`, `high`) is one cell. Of a row's figures
the first two make the table of results, with the differences that are told of them; all that
is left, at any depth, is a line each of a second table that has a column a row of the first.

Text is escaped unless it is `Html`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from tapfm.reports import plain_table
from tapfm.stats.bootstrap import Interval
from tapfm.stats.metrics import MACRO

NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "ece": "ECE",
    "delong": "DeLong",
    "f1": "F1",
    "r2": "R²",
    "sha256": "SHA-256",
}
INTERVAL = {"value", "low", "high", "draws"}
SAID = {"positives", "known", "labels"}  # beside the table of results
OF_ALL = {
    "split",
    "task",
    "slides",
    "cases",
    "draws",
    "seed",
    "reference",
    "arms",
    "skipped",
    "notes",
}
HEADLINE = 2  # figures of the table of results: AUROC and AUPRC, for labels that are 0 or 1
LISTED = 6  # numbers of a list that are written out; longer ones are curves, and stay in the JSON
UNBROKEN = 60  # characters of a cell that stay on one line


class Html(str):
    """Text that is HTML already."""


class Group(str):
    """A row that says what those below it are of."""


def html(value: object) -> str:
    """A value as HTML: numbers to four digits, None as nothing."""
    if isinstance(value, Html):
        return value
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))


def table(
    header: Sequence[object],
    rows: Iterable[Iterable[object] | Group],
    caption: object = "",
    first: int = 1,
) -> Html:
    """Rows under a header, in a frame that scrolls where the page is narrow.

    Args:
        header: names of the columns.
        rows: as many cells each, or a `Group`.
        caption: above it.
        first: how many cells at the left of a row say what it is.
    """
    body = []
    for row in rows:
        if isinstance(row, Group):
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
    """Nested facts as lines: their path, spelled out, and what is there."""
    for key, value in facts.items():
        rest = value
        if _is_interval(value):
            yield spoken(key), value
            rest = {name: each for name, each in value.items() if name not in INTERVAL}
        if isinstance(value, Mapping):
            for path, each in pairs(rest):
                yield f"{spoken(key)} {path}", each
        else:
            yield spoken(key), value


def spoken(key: object) -> str:
    """A key as a heading."""
    return " ".join(NAMES.get(word, word) for word in str(key).split("_"))


def results_table(metrics: Mapping) -> Html:
    """The figures that decide, of every label and arm, and each difference that is told of them."""
    arms, draws, head = metrics["arms"], metrics.get("draws") or 0, headline(metrics)
    told = [key for key in _labelled(arms) if any(name in key for name in head)]
    header = ["model", *(f"{spoken(key)} [95 %]" for key in head)]
    header += [f"{spoken(key)} to *" for key in told]
    rows: list[list[str] | Group] = []
    for label in _labels(arms):
        first = next((arm["figures"][label] for arm in arms.values() if _has(arm, label)), {})
        counted = label != MACRO and {"positives", "known"} <= first.keys()
        rows.append(
            Group(
                label + (f", {first['positives']} of {first['known']} positive" if counted else "")
            )
        )
        for title, arm in arms.items():
            found = arm["figures"][label] if _has(arm, label) else {}
            mark = " *" if title == metrics.get("reference") else ""
            cells = [interval(found.get(key), draws) for key in head]
            cells += [interval((arm.get(key) or {}).get(label), draws, "+") for key in told]
            rows.append([title + mark, *cells])
    return table(header, rows)


def further_table(metrics: Mapping) -> Html | None:
    """All other figures, a line each, an arm a column; None where there are none."""
    arms, head = metrics["arms"], headline(metrics)
    shown = {key for key in _labelled(arms) if any(name in key for name in head)}
    lines: dict[tuple[str, str], dict[str, object]] = {}
    for title, arm in arms.items():
        for label, figures in (arm.get("figures") or {}).items():
            rest = {k: v for k, v in figures.items() if k not in {*head, *SAID}}
            _collect(lines, title, label, rest)
        for key, value in arm.items():
            if key in ("figures", "end_to_end", *shown) or value is None:
                continue
            if key in _labelled(arms):
                for label, each in value.items():
                    _collect(lines, title, label, {key: each})
            else:
                _collect(lines, title, "", {key: value})
    if not lines:
        return None
    draws, order = metrics.get("draws") or 0, _labels(arms)
    rows = [
        [label, name, *(_said(found.get(title), draws) for title in arms)]
        for (label, name), found in sorted(
            lines.items(), key=lambda line: order.index(line[0][0]) if line[0][0] else len(order)
        )
    ]
    return table(["label", "figure", *arms], rows, first=2)


def split_table(metrics: Mapping) -> Html | None:
    """What is told of the split beside its arms; None where nothing is."""
    beside = {key: metrics[key] for key in metrics if key not in OF_ALL}
    draws = metrics.get("draws") or 0
    rows = [[name, _said(value, draws)] for name, value in pairs(beside)]
    return table(["of the split", ""], rows) if rows else None


def headline(metrics: Mapping) -> list[str]:
    """Names of the first figures with an interval."""
    found: dict[str, None] = {}
    for arm in metrics["arms"].values():
        for figures in (arm.get("figures") or {}).values():
            found |= {key: None for key, value in figures.items() if _is_interval(value)}
    return list(found)[:HEADLINE]


def interval(found: Mapping | None, draws: int = 0, sign: str = "") -> str:
    """`0.900 [0.848, 0.945]`; marked where it stands on few draws."""
    if not found:
        return ""
    ends = (math.nan if found.get(key) is None else found[key] for key in ("value", "low", "high"))
    counted = 0 if found.get("low") is None else found.get("draws", math.inf)
    return plain_table.span(Interval(*ends, counted), draws, sign, "not defined")


def _cell(text: str) -> str:
    """Sentences may be broken into lines, numbers and names not."""
    return f'<td class="text">{text}</td>' if len(text) > UNBROKEN else f"<td>{text}</td>"


def _is_interval(value: object) -> bool:
    return isinstance(value, Mapping) and INTERVAL - {"draws"} <= value.keys()


def _labels(arms: Mapping) -> list[str]:
    """Of all arms, their mean first."""
    found = {label: None for arm in arms.values() for label in arm.get("figures") or {}}
    return sorted(found, key=lambda label: label != MACRO)


def _has(arm: Mapping, label: str) -> bool:
    return bool((arm.get("figures") or {}).get(label))


def _labelled(arms: Mapping) -> list[str]:
    """What is told of an arm label by label, beside its figures."""
    labels = set(_labels(arms))
    return list(
        {
            key: None
            for arm in arms.values()
            for key, value in arm.items()
            if key != "figures" and isinstance(value, Mapping) and value and value.keys() <= labels
        }
    )


def _collect(lines: dict, title: str, label: str, facts: Mapping) -> None:
    for name, value in pairs(facts):
        lines.setdefault((label, name), {})[title] = value


def _said(value: object, draws: int) -> object:
    """A figure of any kind in a cell."""
    if _is_interval(value):
        return interval(value, draws)
    if isinstance(value, list):
        if len(value) > LISTED or any(isinstance(each, (list, Mapping)) for each in value):
            return f"{len(value)} entries, in the JSON"
        return ", ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in value)
    return value
