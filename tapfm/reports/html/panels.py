"""The page's panels: one small figure each, as SVG inside the page.

Panels are small, so that a narrow window shows them one below the other at the size they were drawn
for. Text stays text, also a $ in it, and can be copied; black, white and greys become the page's
own colours, so that a dark page has light axes.

    ROC, precision and recall, reliability     a panel a label, with all rows
    training                                   loss, validation, effective tiles
    cost                                       tiles per second, peak memory

Shapes: N slides, K labels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from tapfm.reports.figures import read_curves, roc_axis, row_styles, smoothed_curve
from tapfm.reports.html.tables import Html

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tapfm.reports.rows import ResultRow

ACROSS = 3  # entries of a legend in a row
SIZE = 3.7, 4.1  # inches of a square panel; 1 pt is drawn about 1.3 px wide
WIDE = 3.7, 2.7
BINS = 5  # of reliability: a tenth of a small split is a handful of slides
THEME = {  # colours of matplotlib, and those of the page
    "#000000": "currentColor",
    "#4d4d4d": "currentColor",
    "#b3b3b3": "var(--rule)",
    "#b2b2b2": "var(--rule)",
    "#cccccc": "var(--rule)",
    "#e6e6e6": "var(--grid)",
    "#e5e5e5": "var(--grid)",
    "#ffffff": "var(--paper)",
    "#0072b2": "var(--blue)",
}
CURVES = (  # columns of a metrics.csv
    ("loss (marked: validation; thin: training, smoothed)", ("train/loss", "val/loss")),
    ("validation macro AUROC", ("val/auroc",)),
    ("effective tiles of a slide, 1 / sum w² (smoothed)", ("train/effective_tiles",)),
)
DASH_ARRAYS = {"-": "none", "--": "7 3", "-.": "7 3 2 3", ":": "2 3"}


def label_panels(labels: Sequence[str], rows: Sequence[ResultRow]) -> dict[str, list[Html]]:
    """Return the panels of all labels, by kind."""
    styles = row_styles(rows)
    drawn: dict[str, list[Html]] = {"ROC": [], "Precision and recall": [], "Calibration": []}
    for k, label in enumerate(labels):
        for (kind, panels), draw in zip(
            drawn.items(), (_roc_axis, pr_axis, reliability_axis), strict=True
        ):
            alt = f"{kind} of {label}"
            panels.append(panel(lambda axis: draw(axis, k, label, rows, styles), alt))  # noqa: B023
    return drawn


def _roc_axis(
    axis: Axes, k: int, label: str, rows: Sequence[ResultRow], styles: Sequence[dict]
) -> None:
    roc_axis(axis, k, label, rows, styles)
    axis.set_ylabel("true positive rate")


def pr_axis(
    axis: Axes, k: int, label: str, rows: Sequence[ResultRow], styles: Sequence[dict]
) -> None:
    """Draw precision against recall, as steps like those that AUPRC sums."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    for (y_N, p_N), style in _known(rows, k, styles):
        precision, recall, _ = precision_recall_curve(y_N, p_N)
        value = average_precision_score(y_N, p_N)
        axis.plot(recall, precision, drawstyle="steps-post", label=f"{value:.3f}", **style)
    if axis.lines:
        axis.axhline(np.nanmean(rows[0].y_NK[:, k]), color="0.7", linewidth=1)
    _finish(axis, f"{label}; grey: share of positives", "AUPRC", "lower left")
    axis.set(xlabel="recall", ylabel="precision")


def reliability_axis(
    axis: Axes, k: int, label: str, rows: Sequence[ResultRow], styles: Sequence[dict]
) -> None:
    """Draw observed frequency against mean probability, in bins of equal numbers of slides."""
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for (y_N, p_N), style in _known(rows, k, styles):
        if p_N.min() < 0 or p_N.max() > 1:
            continue
        share, mean = calibration_curve(y_N, p_N, n_bins=BINS, strategy="quantile")
        value = brier_score_loss(y_N, p_N)
        axis.plot(mean, share, label=f"{value:.3f}", **style | {"markersize": 5})
    _finish(axis, f"{label}; grey: calibrated", "Brier score", "upper left")
    axis.set(xlabel="mean probability", ylabel="share of positives")


def training_panels(rows: Sequence[ResultRow]) -> list[Html]:
    """Return panels of loss, validation metrics and effective tiles; none without metrics.csv."""
    pairs = zip(rows, row_styles(rows), strict=True)
    curves = [(read_curves(row.metrics_csv), style) for row, style in pairs if row.metrics_csv]
    columns = {column for found, _ in curves for column in found}
    known = {column for _, group in CURVES for column in group}
    further = [  # a mean, not its labels
        (f"validation {column[4:]}", (column,))
        for column in sorted(columns - known)
        if column.startswith("val/") and not any(column.startswith(f"{c}_") for c in columns)
    ]

    def draw(axis: Axes, title: str, group: Sequence[str]) -> None:
        for found, style in curves:
            for column in (column for column in group if column in found):
                if column.startswith("train/"):
                    thin = {"linewidth": 1, "alpha": 0.6} if len(group) > 1 else {"linewidth": 1.4}
                    axis.plot(*smoothed_curve(*found[column]), **style | thin)
                else:
                    axis.plot(*found[column], **style | {"markersize": 4.5})
        axis.set_title(title)
        axis.set_xlabel("slides seen")

    return [
        panel(lambda axis: draw(axis, title, group), title, WIDE)  # noqa: B023
        for title, group in (*CURVES, *further)
        if columns & set(group)
    ]


def cost_panels(rows: Sequence[ResultRow], logs: Mapping[str, Path]) -> list[Html]:
    """Return panels of tiles per second and peak memory against slides seen.

    Args:
        rows: all rows of the table.
        logs: title of a row to its memory.csv.
    """
    costs = [read_curves(logs[row.title]) if row.title in logs else {} for row in rows]
    styles = row_styles(rows)
    device = "GPU" if any("encode_allocated_gib" in found for found in costs) else "process"
    unit = "allocated_gib" if device == "GPU" else "rss_gib"
    phases = tuple(f"{phase}_{unit}" for phase in ("encode", "aggregate", "adapt"))

    def speed(axis: Axes) -> None:
        for found, style in zip(costs, styles, strict=True):
            if "tiles_per_s" in found:
                axis.plot(*smoothed_curve(*found["tiles_per_s"]), **style | {"linewidth": 1.4})
        axis.set_title("tiles per second (smoothed)", fontsize=9)
        axis.set(xlabel="slides seen", ylim=(0, None))

    def memory(axis: Axes) -> None:
        for found, style in zip(costs, styles, strict=True):
            peaks: dict[float, float] = {}  # a phase may be missing in some steps
            for phase in phases:
                for step, gib in zip(*found.get(phase, ((), ())), strict=True):
                    peaks[step] = max(gib, peaks.get(step, 0))
            steps = sorted(peaks)
            axis.plot(steps, [peaks[step] for step in steps], **style | {"linewidth": 1.4})
        axis.set_title(f"GiB of the {device}, largest of the phases", fontsize=9)
        axis.set(xlabel="slides seen", ylim=(0, None))

    return [panel(speed, "tiles per second", WIDE), panel(memory, "memory", WIDE)]


def key(rows: Sequence[ResultRow], shown: Container[str] | None = None) -> Html:
    """Return the legend of the panels that follow.

    Args:
        rows: all rows of the table.
        shown: titles that the panels show; None is all.
    """
    lines = []
    for row, style in zip(rows, row_styles(rows), strict=True):
        if shown is not None and row.title not in shown:
            continue
        stroke = THEME.get(style["color"].lower(), style["color"])
        dashes = DASH_ARRAYS[style["linestyle"]]
        lines.append(
            '<li><svg width="34" height="10" aria-hidden="true"><line x1="1" y1="5" x2="33" y2="5" '
            f'style="stroke:{stroke};stroke-width:{style["linewidth"] * 1.3:.1f};'
            f'stroke-dasharray:{dashes}"/></svg> {escape(row.title)}</li>'
        )
    return Html(f'<ul class="key">{"".join(lines)}</ul>')


def panel(draw: Callable[[Axes], None], alt: str, size: tuple[float, float] = SIZE) -> Html:
    """Return one drawn axis as a figure of the page.

    Args:
        draw: draws on the axis.
        alt: description of the picture, for screen readers.
        size: width and height in inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    text = io.StringIO()
    how = {"svg.fonttype": "none", "svg.hashsalt": alt, "text.parse_math": False}
    with mpl.rc_context(how):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axis = figure.subplots()
        axis.set_facecolor("none")
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis)
        _legend_below(figure, axis)
        title = axis.get_title()
        axis.set_title("")  # the page shows it as text, which may have any length
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = inline(text.getvalue(), alt)
    return Html(f'<figure class="panel"><figcaption>{escape(title)}</figcaption>{drawn}</figure>')


def _legend_below(figure: Figure, axis: Axes) -> None:
    """Move an axis's legend below it, where it covers no data."""
    legend = axis.get_legend()
    if legend is None:
        return
    lines, names = axis.get_legend_handles_labels()
    title = legend.get_title().get_text()
    legend.remove()
    figure.legend(
        lines, names, title=title, loc="outside lower center", ncols=min(ACROSS, len(names)),
        frameon=False, handlelength=2.4, columnspacing=1.2,
    )  # fmt: skip


def inline(svg: str, alt: str) -> str:
    """Return an SVG file as an element of the page: no header or unused ids, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    used = set(re.findall(r'#([\w.-]+)[")]', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    for colour, ours in THEME.items():
        svg = svg.replace(colour, ours)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    head = f'<svg viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{escape(alt)}" xmlns'
    return re.sub(r"<svg.*?xmlns(?=[=])", head, svg, count=1, flags=re.S)


def _known(
    rows: Sequence[ResultRow], k: int, styles: Sequence[dict]
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], dict]]:
    """Yield labels and probabilities of known slides, and the style, for rows with both classes."""
    for row, style in zip(rows, styles, strict=True):
        known_N = ~np.isnan(row.y_NK[:, k])
        y_N, p_N = row.y_NK[known_N, k], row.p_NK[known_N, k]
        if len(np.unique(y_N)) == 2 and not math.isnan(p_N.sum()):
            yield (y_N, p_N), style


def _finish(axis: Axes, title: str, legend: str, place: str) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc=place, fontsize=9, title=legend, title_fontsize=9)
    else:
        axis.text(0.5, 0.5, "one class only", ha="center", color="0.3")
    axis.set_title(title, fontsize=10)
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect=1)
