"""The page's figures by kind of report, as `tapfm.reports.html.task_reports` lists them.

Source: curves and test as in scipy (`scipy.stats.ecdf`, `logrank`). They assume independent cases,
    so the slides of a case enter once, with their mean risk.

Shapes: N slides, K labels, C cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tapfm.reports.figures import TRAINED
from tapfm.reports.html.panels import BINS, key, label_panels, panel
from tapfm.reports.html.tables import Html, html, table
from tapfm.reports.rows import ResultRow
from tapfm.stats.outcomes import r2
from tapfm.tasks import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALVES = ("higher risk", "lower risk")
WHEN = 4  # times at which numbers at risk are given


def label_curves(task: Task, rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield ROC, precision and recall, and reliability of each label."""
    yield from _label_curves(task.labels, rows)


def _label_curves(names: Sequence[str], rows: Sequence[ResultRow]) -> Iterator[str]:
    for kind, panels in label_panels(names, rows).items():
        yield f"<h3>{kind}</h3>{key(rows)}{_side_by_side(panels)}"
    yield (
        f'<p class="soft">Calibration: slides in {BINS} bins of equal number by probability; few '
        "slides make a ragged line. Brier score: mean squared error of the probability, 0 is best."
        "</p>"
    )


def class_curves(task: Task, rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield the same of each class against the rest, then confusion matrices."""
    each = [np.stack(list(task.one_vs_rest(row.y_NK).values()), axis=1) for row in rows]
    rest = [replace(row, y_NK=y_NK) for row, y_NK in zip(rows, each, strict=True)]
    yield '<p class="soft">Each class against the rest.</p>'
    yield from _label_curves(task.classes, rest)
    yield "<h3>Confusions</h3>"
    for row in rows:
        lines = [
            [name, *map(str, counts), f"{counts[k] / sum(counts):.0%}" if sum(counts) else ""]
            for k, (name, counts) in enumerate(zip(task.classes, confusion(task, row), strict=True))
        ]
        yield table([f"{task.column} is \\ predicted", *task.classes, "right"], lines, row.title)


def confusion(task: Task, row: ResultRow) -> list[list[int]]:
    """Return numbers of slides by true class and most probable class."""
    from sklearn.metrics import confusion_matrix

    known_N = ~np.isnan(row.y_NK[:, 0])
    if not known_N.any():
        return np.zeros((len(task.classes),) * 2, int).tolist()
    y_N, predicted_N = row.y_NK[known_N, 0].astype(int), row.p_NK[known_N].argmax(1)
    return confusion_matrix(y_N, predicted_N, labels=range(len(task.classes))).tolist()


def value_curves(task: Task, rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield predicted against true values, a panel a row."""
    for k, label in enumerate(task.labels):
        ends = _ends([row.y_NK[:, k] for row in rows] + [row.p_NK[:, k] for row in rows])
        panels = [
            panel(
                partial(value_axis, k=k, row=row, ends=ends),
                f"predicted against true {label}, {row.title}",
            )
            for row in rows
        ]
        yield f"<h3>{html(label)}, predicted against true</h3>{_side_by_side(panels)}"
    yield '<p class="soft">A point a slide; grey: predicted equals true.</p>'


def value_axis(axis: Axes, k: int, row: ResultRow, ends: tuple[float, float]) -> None:
    """Draw a point for each slide with a known value, and the diagonal."""
    y_N, p_N = row.y_NK[:, k], row.p_NK[:, k]
    known_N = ~np.isnan(y_N)
    axis.plot(ends, ends, color="0.7", linewidth=1)
    value = float(r2(y_N, p_N, np.ones((1, len(y_N))))[0])
    look = {"color": TRAINED[0], "linestyle": "none", "marker": "o", "markersize": 4.5}
    axis.plot(y_N[known_N], p_N[known_N], label=f"R² {value:.3f}", alpha=0.7, **look)
    axis.legend(loc="upper left", fontsize=9)
    axis.set_title(row.title)
    axis.locator_params(nbins=5)
    axis.set(xlabel="true", ylabel="predicted", xlim=ends, ylim=ends, aspect=1)


def time_curves(task: Task, rows: Sequence[ResultRow]) -> Iterator[str]:
    """Yield Kaplan-Meier curves of two halves, a panel a row, and numbers at risk."""
    panels = [
        panel(partial(time_axis, task=task, row=row), f"survival by risk, {row.title}")
        for row in rows
    ]
    yield f"<h3>Survival by risk</h3>{_side_by_side(panels)}"
    time_C = risk_by_case(rows[0])[0]
    when = np.linspace(0, time_C.max(), WHEN + 2)[1:-1] if len(time_C) else np.empty(0)
    lines = []
    for row in rows:
        for half, (time_C, event_C) in zip(HALVES, halves(row), strict=True):
            still = (int((time_C >= t).sum()) for t in when)
            lines.append([row.title, half, len(time_C), int(event_C.sum()), *still])
    seen = (f"at risk at {t:.3g}" for t in when)
    yield table(["model", "half", "cases", "events", *seen], lines, first=2)
    yield (
        '<p class="soft">Cases halved at the median risk of this split, which was not chosen by '
        "their times; a case of several slides by their mean. Ticks: censored cases. "
        "p: log-rank test, not corrected for the number of comparisons.</p>"
    )


def risk_by_case(row: ResultRow) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return time, event and mean risk of each case whose time is known."""
    known_N = ~np.isnan(row.y_NK[:, 0])
    _, first, case_N = np.unique(
        np.asarray(row.case_ids, str)[known_N], return_index=True, return_inverse=True
    )
    risk_C = np.bincount(case_N, row.p_NK[known_N, 0]) / np.maximum(np.bincount(case_N), 1)
    return *row.y_NK[known_N][first, :2].T, risk_C


def halves(row: ResultRow) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return times and events of the cases from the median risk on, and of the others."""
    time_C, event_C, risk_C = risk_by_case(row)
    high_C = risk_C >= np.median(risk_C) if len(risk_C) else risk_C > 0
    return [(time_C[each], event_C[each]) for each in (high_C, ~high_C)]


def time_axis(axis: Axes, task: Task, row: ResultRow) -> None:
    """Draw the share without the event over time, and the p value of the difference."""
    from scipy.stats import CensoredData, ecdf, logrank

    groups = []
    for (time_C, event_C), half, colour, dash in zip(
        halves(row), HALVES, (TRAINED[1], TRAINED[0]), ("-", "--"), strict=True
    ):
        if not len(time_C):
            continue
        seen = CensoredData(uncensored=time_C[event_C == 1], right=time_C[event_C == 0])
        share = ecdf(seen).sf
        line = {"color": colour, "linestyle": dash, "linewidth": 1.8, "drawstyle": "steps-post"}
        x, y = np.append(0, share.quantiles), np.append(1, share.probabilities)
        axis.plot(x, y, label=f"{half}, {len(time_C)} cases", **line)
        left = time_C[event_C == 0]
        axis.plot(left, share.evaluate(left), "|", color=colour, markersize=6)
        groups.append(seen)
    tested = len(groups) == 2 and any(event_C.any() for _, event_C in halves(row))
    p = logrank(*groups).pvalue if tested else math.nan
    if groups:
        text = "log-rank p: undefined" if math.isnan(p) else f"log-rank p = {p:.2g}"
        axis.legend(loc="lower left", fontsize=9, title=text, title_fontsize=9)
    axis.set_title(row.title)
    axis.locator_params(axis="x", nbins=5)
    axis.set(xlabel=task.time, ylabel="share without the event", ylim=(-0.02, 1.04))


def _ends(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return axis limits that contain all values plus a 5 % margin."""
    values = np.concatenate(arrays)
    low, high = np.nanmin(values), np.nanmax(values)
    edge = 0.05 * (high - low) or 1.0
    return float(low - edge), float(high + edge)


def _side_by_side(panels: Sequence[Html]) -> str:
    return f'<div class="panels">{"".join(panels)}</div>'
