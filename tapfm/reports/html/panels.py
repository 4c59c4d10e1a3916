"""The page's pictures: one panel a picture, as SVG that is part of the page.

Each is small, so that a narrow window shows one beside or below the other at the size it was drawn
for. Text stays text, a $ in it too, and can be copied; black, white and greys become the page's own
colours, so that a dark page has light axes.

    roc, precision and recall, reliability     a panel a label, all arms in it
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

from tapfm.reports.figures import arm_styles, read_curves, roc_axis, smoothed_curve
from tapfm.reports.html.tables import Html

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from tapfm.reports.rows import ResultRow

SIZE = 3.7, 3.3  # inches of a square panel; 1 pt is drawn about 1.3 px wide
WIDE = 3.7, 2.7
BINS = 5  # of reliability: a tenth of a small split is a handful of slides
THEME = {  # colours of matplotlib, and what they are on the page
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


def label_panels(labels: Sequence[str], arms: Sequence[ResultRow]) -> dict[str, list[Html]]:
    """Panels of each label, by what they show."""
    styles = arm_styles(arms)
    drawn: dict[str, list[Html]] = {"ROC": [], "Precision and recall": [], "Calibration": []}
    for k, label in enumerate(labels):
        for (kind, panels), draw in zip(
            drawn.items(), (roc_axis, pr_axis, reliability_axis), strict=True
        ):
            said = f"{kind} of {label}"
            panels.append(panel(lambda axis: draw(axis, k, label, arms, styles), said))  # noqa: B023
    return drawn


def pr_axis(
    axis: Axes, k: int, label: str, arms: Sequence[ResultRow], styles: Sequence[dict]
) -> None:
    """Precision against recall; a line from each threshold back to the one before, as AUPRC is."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    for (y_N, p_N), style in _known(arms, k, styles):
        precision, recall, _ = precision_recall_curve(y_N, p_N)
        value = average_precision_score(y_N, p_N)
        axis.plot(recall, precision, drawstyle="steps-post", label=f"{value:.3f}", **style)
    if axis.lines:
        axis.axhline(np.nanmean(arms[0].y_NK[:, k]), color="0.7", linewidth=1)
    _finish(axis, f"{label}; grey: share of positives", "AUPRC", "lower left")
    axis.set(xlabel="recall", ylabel="precision")


def reliability_axis(
    axis: Axes, k: int, label: str, arms: Sequence[ResultRow], styles: Sequence[dict]
) -> None:
    """Share of positives against mean probability, in bins of as many slides each."""
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for (y_N, p_N), style in _known(arms, k, styles):
        if p_N.min() < 0 or p_N.max() > 1:
            continue
        share, mean = calibration_curve(y_N, p_N, n_bins=BINS, strategy="quantile")
        value = brier_score_loss(y_N, p_N)
        axis.plot(mean, share, label=f"{value:.3f}", **style | {"markersize": 5})
    _finish(axis, f"{label}; grey: calibrated", "Brier score", "upper left")
    axis.set(xlabel="mean probability", ylabel="share of positives")


def training_panels(arms: Sequence[ResultRow]) -> list[Html]:
    """Loss, what was measured in validation, effective tiles; none without a metrics.csv."""
    rows = [row for row, arm in enumerate(arms) if arm.metrics_csv]
    curves, styles = {row: read_curves(arms[row].metrics_csv) for row in rows}, arm_styles(arms)
    columns = {column for found in curves.values() for column in found}
    known = {column for _, group in CURVES for column in group}
    further = [  # a mean, not its labels
        (f"validation {column[4:]}", (column,))
        for column in sorted(columns - known)
        if column.startswith("val/") and not any(column.startswith(f"{c}_") for c in columns)
    ]

    def draw(axis: Axes, title: str, group: Sequence[str]) -> None:
        for row, found in curves.items():
            for column in (column for column in group if column in found):
                if column.startswith("train/"):
                    thin = {"linewidth": 1, "alpha": 0.6} if len(group) > 1 else {"linewidth": 1.4}
                    axis.plot(*smoothed_curve(*found[column]), **styles[row] | thin)
                else:
                    axis.plot(*found[column], **styles[row] | {"markersize": 4.5})
        axis.set_title(title)
        axis.set_xlabel("slides seen")

    return [
        panel(lambda axis: draw(axis, title, group), title, WIDE)  # noqa: B023
        for title, group in (*CURVES, *further)
        if columns & set(group)
    ]


def cost_panels(arms: Sequence[ResultRow], logs: Mapping[str, Path]) -> list[Html]:
    """Tiles per second and peak memory against slides seen.

    Args:
        arms: all of them.
        logs: title of an arm to its memory.csv.
    """
    costs = [read_curves(logs[arm.title]) if arm.title in logs else {} for arm in arms]
    styles = arm_styles(arms)
    whose = "GPU" if any("encode_allocated_gib" in found for found in costs) else "process"
    unit = "allocated_gib" if whose == "GPU" else "rss_gib"
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
        axis.set_title(f"GiB of the {whose}, largest of the phases", fontsize=9)
        axis.set(xlabel="slides seen", ylim=(0, None))

    return [panel(speed, "tiles per second", WIDE), panel(memory, "memory", WIDE)]


def key(arms: Sequence[ResultRow], shown: Container[str] | None = None) -> Html:
    """Which line is whose, for the panels that follow.

    Args:
        arms: all of them.
        shown: titles of those that the panels have; None is all.
    """
    lines = []
    for arm, style in zip(arms, arm_styles(arms), strict=True):
        if shown is not None and arm.title not in shown:
            continue
        stroke = THEME.get(style["color"].lower(), style["color"])
        dashes = DASH_ARRAYS[style["linestyle"]]
        lines.append(
            '<li><svg width="34" height="10" aria-hidden="true"><line x1="1" y1="5" x2="33" y2="5" '
            f'style="stroke:{stroke};stroke-width:{style["linewidth"] * 1.3:.1f};'
            f'stroke-dasharray:{dashes}"/></svg> {escape(arm.title)}</li>'
        )
    return Html(f'<ul class="key">{"".join(lines)}</ul>')


def panel(draw: Callable[[Axes], None], said: str, size: tuple[float, float] = SIZE) -> Html:
    """One axis, drawn and put into a figure of the page.

    Args:
        draw: puts lines and names on the axis.
        said: what the picture is, for those who cannot see it.
        size: inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    text = io.StringIO()
    how = {"svg.fonttype": "none", "svg.hashsalt": said, "text.parse_math": False}
    with mpl.rc_context(how):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axis = figure.subplots()
        axis.set_facecolor("none")
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis)
        title = axis.get_title()
        axis.set_title("")  # text of the page, which finds room for a name of any length
        figure.savefig(text, format="svg", metadata={"Date": None})
    drawn = inline(text.getvalue(), said)
    return Html(f'<figure class="panel"><figcaption>{escape(title)}</figcaption>{drawn}</figure>')


def inline(svg: str, said: str) -> str:
    """An SVG file as an element of a page: no header, no unused id, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    used = set(re.findall(r'#([\w.-]+)[")]', svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    for colour, ours in THEME.items():
        svg = svg.replace(colour, ours)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    head = f'<svg viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{escape(said)}" xmlns'
    return re.sub(r"<svg.*?xmlns(?=[=])", head, svg, count=1, flags=re.S)


def _known(
    arms: Sequence[ResultRow], k: int, styles: Sequence[dict]
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], dict]]:
    """Labels and probabilities of slides whose label is known, where there are both classes."""
    for arm, style in zip(arms, styles, strict=True):
        known_N = ~np.isnan(arm.y_NK[:, k])
        y_N, p_N = arm.y_NK[known_N, k], arm.p_NK[known_N, k]
        if len(np.unique(y_N)) == 2 and not math.isnan(p_N.sum()):
            yield (y_N, p_N), style


def _finish(axis: Axes, title: str, legend: str, place: str) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc=place, fontsize=8, title=legend, title_fontsize=8)
    else:
        axis.text(0.5, 0.5, "one class only", ha="center", color="0.3")
    axis.set_title(title, fontsize=10)
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect=1)
