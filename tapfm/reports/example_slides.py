"""Example slides for the report: confident right and wrong predictions, by kind of report.

    labels     for each label: true and false positives and negatives
    classes    for each class against the rest: right, wrong and missed
    values     for each target: nearest in either half, most too high and too low
    times      an event up to the horizon against longer follow-up, at the median risk

Shapes: N slides, L labels, classes or targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tapfm.reports.rows import ResultRow
from tapfm.tasks import Task

DEFAULT_THRESHOLD = 0.5  # probability from which a slide is called positive, without a chosen one
POINT = "balanced"  # the operating point used
LABEL = {  # kind: (target, whether it is called positive)
    "true positive": (1, 1),
    "true negative": (0, 0),
    "false positive": (0, 1),
    "false negative": (1, 0),
}
CLASS = {"right": (1, 1), "wrong": (0, 1), "missed": (1, 0)}
TIME = {
    "early, high risk": (1, 1),
    "late, low risk": (0, 0),
    "late, high risk": (0, 1),
    "early, low risk": (1, 0),
}
VALUE = ("near, low half", "near, high half", "most too high", "most too low")


@dataclass(frozen=True)
class ExampleSlide:
    """An example slide of one label."""

    label: str
    kind: str
    """Kind of example, such as true positive."""
    slide_id: str
    value: float
    """Predicted probability, value or risk."""


@dataclass(frozen=True)
class Examples:
    """A model's example slides, and the targets and predictions shown with them."""

    about: str
    kinds: tuple[str, ...]
    thresholds: Mapping[str, float]
    """Label to the value from which it is called positive; empty for tasks without."""
    slides: list[ExampleSlide]
    labels: tuple[str, ...]
    targets_NL: Sequence[Sequence[str]]
    predicted_NL: np.ndarray
    quantity: str = "probability"
    """Kind of the predicted values."""

    def format_value(self, value: float) -> str:
        """Return a predicted value as the page shows it."""
        return f"{value:.3f}" if self.quantity == "probability" else f"{value:.6g}"


def row_thresholds(facts: Mapping, labels: Sequence[str]) -> list[float]:
    """Return the probability from which each label is called positive.

    Args:
        facts: a row of metrics_<split>.json.
        labels: K names.
    """
    points = facts.get("operating_points") or {}
    chosen = (((points.get(label) or {}).get(POINT) or {}).get("threshold") for label in labels)
    return [DEFAULT_THRESHOLD if value is None else value for value in chosen]


def choose_by_label(task: Task, row: ResultRow, facts: Mapping) -> Examples:
    """Return, for each label, its most confident true and false positives and negatives."""
    thresholds = dict(zip(task.labels, row_thresholds(facts, task.labels), strict=True))
    slides = [
        slide
        for k, label in enumerate(task.labels)
        for slide in _most_confident(
            label, LABEL, row, k, row.y_NK[:, k], row.p_NK[:, k] >= thresholds[label]
        )
    ]
    about = (
        "For each label, the most confident true positive, true negative, false positive and false "
        "negative. A tile's weight is the same for all labels."
    )
    return Examples(
        about, tuple(LABEL), thresholds, slides, task.labels, _one_or_zero(row.y_NK), row.p_NK
    )


def choose_by_class(task: Task, row: ResultRow, facts: Mapping) -> Examples:
    """Return, for each class, its most confident right and wrong predictions, and one missed."""
    predicted_N, rest = row.p_NK.argmax(1), task.one_vs_rest(row.y_NK)
    slides = [
        slide
        for k, (name, is_N) in enumerate(rest.items())
        for slide in _most_confident(name, CLASS, row, k, is_N, predicted_N == k)
    ]
    about = (
        "For each class, the most confident right and wrong prediction of it, and the slide of "
        "the class that was predicted as another with the lowest probability."
    )
    targets_NL = _one_or_zero(np.stack(list(rest.values()), axis=1))
    return Examples(about, tuple(CLASS), {}, slides, task.classes, targets_NL, row.p_NK)


def choose_by_value(task: Task, row: ResultRow, facts: Mapping) -> Examples:
    """Return, for each target, the slides predicted nearest, most too high and most too low."""
    slides = []
    for k, label in enumerate(task.labels):
        y_N, p_N = row.y_NK[:, k], row.p_NK[:, k]
        known, off_N = np.flatnonzero(~np.isnan(y_N)), p_N - y_N
        high_N = y_N > np.median(y_N[known]) if len(known) else y_N > 0
        picks = (
            (known[~high_N[known]], -np.abs(off_N)), (known[high_N[known]], -np.abs(off_N)),
            (known[off_N[known] > 0], off_N), (known[off_N[known] < 0], -off_N),
        )  # fmt: skip
        for kind, (candidates, merit_N) in zip(VALUE, picks, strict=True):
            if len(candidates):
                best = candidates[np.argmax(merit_N[candidates])]
                slides.append(ExampleSlide(label, kind, row.slide_ids[best], float(p_N[best])))
    about = (
        "For each target, the slides predicted nearest to their value, in the lower and the upper "
        "half of values, and those predicted most too high and most too low."
    )
    targets_NL = [["unknown" if np.isnan(y) else f"{y:.6g}" for y in y_K] for y_K in row.y_NK]
    return Examples(about, VALUE, {}, slides, task.labels, targets_NL, row.p_NK, "predicted")


def choose_by_time(task: Task, row: ResultRow, facts: Mapping) -> Examples:
    """Return slides of early and late events with the most extreme risks."""
    time_N, event_N, risk_N = row.y_NK[:, 0], row.y_NK[:, 1], row.p_NK[:, 0]
    early_N = np.where((time_N <= task.horizon) & (event_N == 1), 1.0, np.nan)
    early_N[time_N > task.horizon] = 0
    middle = float(np.median(risk_N)) if len(risk_N) else 0.0
    slides = _most_confident("risk", TIME, row, 0, early_N, risk_N >= middle)
    about = (
        f"Early: with the event up to {task.time} = {task.horizon:g}, the training split's median; "
        "late: followed up for longer. High risk: from the median of this split on. Of each pair, "
        "the most extreme risk."
    )
    targets_NL = [
        ["unknown" if np.isnan(time) else f"{'event' if event else 'no event'} at {time:.6g}"]
        for time, event in row.y_NK[:, :2]
    ]
    thresholds = {"risk": middle}
    return Examples(
        about, tuple(TIME), thresholds, slides, ("risk",), targets_NL, row.p_NK[:, :1], "risk"
    )


def _most_confident(
    label: str, kinds: Mapping[str, tuple[int, int]], row: ResultRow, k: int, y_N, called_N
) -> list[ExampleSlide]:
    """Return, for each kind that occurs, the slide with the most extreme prediction of number k."""
    p_N, found = row.p_NK[:, k], []
    for kind, (target, call) in kinds.items():
        n = np.flatnonzero((y_N == target) & (called_N == call))
        if len(n):
            best = n[np.argmax(p_N[n]) if call else np.argmin(p_N[n])]
            found.append(ExampleSlide(label, kind, row.slide_ids[best], float(p_N[best])))
    return found


def _one_or_zero(y_NL: np.ndarray) -> list[list[str]]:
    return [["unknown" if np.isnan(y) else str(int(y)) for y in y_L] for y_L in y_NL]
