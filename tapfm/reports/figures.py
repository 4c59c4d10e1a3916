"""The report's figures: ROC, reliability and training curves, one colour for each result row.

Rows trained end to end are solid and thick, the others thin and broken, so that a grey print still
tells them apart. Names are drawn literally: a $ in one starts no formula (`parse_math`).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tapfm.stats.calibration import ece, reliability
from tapfm.stats.metrics import auroc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tapfm.reports.rows import ResultRow

# Okabe and Ito's colours, safe for colour-blind readers; brown replaces their yellow, which is too
# faint on white.
TRAINED = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
FROZEN = ("#000000", "#E69F00", "#56B4E9", "#999999", "#A6611A")
DASHES = ("--", "-.", ":")
MARKERS = "os^D"


def roc_axis(
    axis: Axes, k: int, label: str, rows: Sequence[ResultRow], styles: Sequence[dict]
) -> None:
    """Draw the ROC curves of label k."""
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    values = []
    for row, style in zip(rows, styles, strict=True):
        y_N, p_N = row.y_NK[:, k], row.p_NK[:, k]
        value = auroc(y_N, p_N)
        if math.isnan(value):
            continue
        values.append(f"{value:.3f}")
        axis.plot(*_roc(y_N, p_N), label=f"{value:.3f}", **style)
    if values:
        axis.legend(loc="lower right", fontsize=9, title="AUROC", title_fontsize=9)
    else:
        axis.text(0.5, 0.5, "one class only", ha="center", color="0.3")
    known = int((~np.isnan(rows[0].y_NK[:, k])).sum())
    positives = int(np.nansum(rows[0].y_NK[:, k]))
    axis.set_title(f"{label}, {positives} of {known} positive", fontsize=10, parse_math=False)
    axis.set(xlabel="false positive rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect=1)


def roc_figure(labels: Sequence[str], rows: Sequence[ResultRow]) -> Figure:
    """Return ROC curves, a panel a label, a curve a row.

    Args:
        labels: K names.
        rows: predictions of the same slides.
    """
    figure, axes = panels(len(labels))
    styles = row_styles(rows)
    for k, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        roc_axis(axis, k, label, rows, styles)
    axes[0].set_ylabel("true positive rate")
    _legend(figure, [row.title for row in rows], styles)
    return figure


def reliability_figure(labels: Sequence[str], rows: Sequence[ResultRow]) -> Figure:
    """Return observed frequency against mean probability, a panel a label, a curve a row."""
    figure, axes = panels(len(labels))
    styles = [style | {"markersize": 4.5} for style in row_styles(rows)]
    for k, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for row, style in zip(rows, styles, strict=True):
            if bins := reliability(row.y_NK[:, k], row.p_NK[:, k]):
                points = [(each.predicted, each.observed) for each in bins]
                axis.plot(*zip(*points, strict=True), label=f"{ece(bins):.3f}", **style)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc="upper left", fontsize=9, title="ECE", title_fontsize=9)
        axis.set_title(label, fontsize=10, parse_math=False)
        axis.set(xlabel="mean probability", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect=1)
    axes[0].set_ylabel("share positive")
    _legend(figure, [row.title for row in rows], styles)
    return figure


def curves_figure(
    rows: Sequence[ResultRow],
    figure_name: str = "auroc",
    title: str = "macro AUROC",
    chance: float = 0.5,
) -> Figure:
    """Return training curves: loss, the validation metric and effective tiles."""
    pairs = zip(rows, row_styles(rows), strict=True)
    shown = [(row, style) for row, style in pairs if row.metrics_csv]
    figure, axes = panels(3)
    for row, style in shown:
        curves, dots = read_curves(row.metrics_csv), style | {"markersize": 4.5}
        line = style | {"linewidth": 1.4}
        thin = style | {"linewidth": 1, "alpha": 0.6}
        for axis, column, look in [
            (axes[0], "train/loss", thin),
            (axes[0], "val/loss", dots),
            (axes[1], f"val/{figure_name}", dots),
            (axes[2], "train/effective_tiles", line),
        ]:
            if column in curves:
                steps_values = curves[column]
                if column.startswith("train/"):
                    steps_values = smoothed_curve(*steps_values)
                axis.plot(*steps_values, **look)
    axes[0].set_title("loss (marked: validation; thin: training, smoothed)", fontsize=9)
    axes[1].set_title(f"validation {title}", fontsize=9)
    axes[2].set_title("effective tiles of a slide, 1 / sum w² (smoothed)", fontsize=9)
    axes[1].axhline(chance, color="0.7", linewidth=1)
    for axis in axes:
        axis.set_xlabel("slides seen")
    titles = [row.title for row, _ in shown]
    _legend(figure, titles, [style | {"markersize": 4.5} for _, style in shown])
    return figure


def read_curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the columns of a metrics.csv as (steps, values), without blank or nan cells."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("step")]
    found = {}
    for column in rows[0] if rows else ():
        pairs = [
            (float(row["step"]), value)
            for row in rows
            if (value := _number(row[column])) is not None
        ]
        if pairs:
            steps, values = (np.array(each) for each in zip(*pairs, strict=True))
            found[column] = (steps, values)
    return found


def _roc(y_N: np.ndarray, p_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return false and true positive rates at every threshold; ties make one slanted step."""
    known_N = ~np.isnan(y_N)
    order = np.argsort(-p_N[known_N], kind="stable")
    y_N, p_N = y_N[known_N][order], p_N[known_N][order]
    ends = np.append(p_N[1:] != p_N[:-1], True)
    rates = [np.append(0, np.cumsum(y_N == side)[ends] / (y_N == side).sum()) for side in (0, 1)]
    return rates[0], rates[1]


def smoothed_curve(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return running means over a twentieth of the run; one slide's loss is too noisy."""
    width = max(1, len(values) // 20)
    if width == 1:
        return steps, values
    kernel = np.full(width, 1 / width)
    return steps[width - 1 :], np.convolve(values, kernel, mode="valid")


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:  # a name, such as slide_id
        return None
    return None if math.isnan(value) else value


def row_styles(rows: Sequence[ResultRow]) -> list[dict]:
    """Return how each row is drawn, the same in every panel and figure."""
    styles = []
    for n, row in enumerate(rows):
        nth = sum(other.end_to_end == row.end_to_end for other in rows[:n])
        colours = TRAINED if row.end_to_end else FROZEN
        dash, width = ("-", 2.2) if row.end_to_end else (DASHES[nth % len(DASHES)], 1.5)
        colour, marker = colours[nth % len(colours)], MARKERS[nth % len(MARKERS)]
        look = {"color": colour, "linestyle": dash, "linewidth": width}
        styles.append(look | {"marker": marker, "markersize": 0})  # sized where points are few
    return styles


def panels(count: int, across: int = 4) -> tuple[Figure, list]:
    """Return a figure of so many axes, with room for one legend below, and the axes."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    columns = min(count, across)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(3.6 * columns, 5), 3.5 * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _legend(figure: Figure, titles: Sequence[str], styles: Sequence[dict]) -> None:
    """Draw one legend below all panels."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], **style) for style in styles]
    columns = max(1, int(figure.get_figwidth() / 3.4))
    legend = figure.legend(
        marks, titles, loc="outside lower center", ncols=columns, frameon=False, handlelength=3
    )
    lines = -(-len(titles) // columns)  # `panels` has room for one
    figure.set_figheight(figure.get_figheight() + 0.25 * (lines - 1))
    for text in legend.get_texts():
        text.set_parse_math(False)
