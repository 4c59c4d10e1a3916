"""Slides worth looking at: those a model is surest of, rightly and wrongly, by kind of report.

    labels     of each label true and false positives and negatives
    classes    of each class, one against the rest: rightly and wrongly said, and missed
    values     of each target the nearest of either half, the most too high and too low
    times      an event up to the horizon against being seen for longer, at the median risk

Shapes: N slides, L labels, classes or targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tapfm.reports.rows import ResultRow
from tapfm.tasks import Task

CALLED = 0.5  # probability from which a slide is called positive, where none was chosen
POINT = "balanced"  # operating point, of those that were
LABEL = {  # kind: (truth, call)
    "true positive": (1, 1),
    "true negative": (0, 0),
    "false positive": (0, 1),
    "false negative": (1, 0),
}
CLASS = {"rightly said": (1, 1), "wrongly said": (0, 1), "missed": (1, 0)}
TIME = {
    "early, high risk": (1, 1),
    "late, low risk": (0, 0),
    "late, high risk": (0, 1),
    "early, low risk": (1, 0),
}
VALUE = ("near, low half", "near, high half", "most too high", "most too low")


@dataclass(frozen=True)
class Case:
    """A slide of one label."""

    label: str
    kind: str
    """One of the task's."""
    slide_id: str
    said: float
    """Its probability, value or risk."""


@dataclass(frozen=True)
class Choice:
    """What of a model's slides is shown, and what is said of each."""

    about: str
    kinds: tuple[str, ...]
    called: Mapping[str, float]
    """From where on a label is called positive; empty where nothing is."""
    cases: list[Case]
    labels: tuple[str, ...]
    truth_NL: Sequence[Sequence[str]]
    said_NL: np.ndarray
    what: str = "probability"
    """That `said` is."""

    def spell(self, said: float) -> str:
        """As the page writes it."""
        return f"{said:.3f}" if self.what == "probability" else f"{said:.6g}"


def thresholds(facts: Mapping, labels: Sequence[str]) -> list[float]:
    """From which probability each label is called, as chosen on validation or else `CALLED`.

    Args:
        facts: of an arm, in metrics_<split>.json.
        labels: K names.
    """
    points = facts.get("operating_points") or {}
    chosen = (((points.get(label) or {}).get(POINT) or {}).get("threshold") for label in labels)
    return [CALLED if value is None else value for value in chosen]


def choose_by_label(task: Task, arm: ResultRow, facts: Mapping) -> Choice:
    """Return, for each label, its surest true and false positives and negatives."""
    called = dict(zip(task.labels, thresholds(facts, task.labels), strict=True))
    cases = [
        case
        for k, label in enumerate(task.labels)
        for case in _surest(label, LABEL, arm, k, arm.y_NK[:, k], arm.p_NK[:, k] >= called[label])
    ]
    about = (
        "Of each label, the surest true positive, true negative, false positive and false "
        "negative. A tile's weight is the same for all labels."
    )
    return Choice(about, tuple(LABEL), called, cases, task.labels, _one_or_zero(arm.y_NK), arm.p_NK)


def choose_by_class(task: Task, arm: ResultRow, facts: Mapping) -> Choice:
    """Return, for each class, the surest slides called so, rightly and wrongly, and missed."""
    said_N, rest = arm.p_NK.argmax(1), task.one_vs_rest(arm.y_NK)
    cases = [
        case
        for k, (name, is_N) in enumerate(rest.items())
        for case in _surest(name, CLASS, arm, k, is_N, said_N == k)
    ]
    about = (
        "Of each class, the slide that was most surely said to be of it and is, the one that is "
        "not, and the slide of it with the least probability of those said to be of another."
    )
    truth_NL = _one_or_zero(np.stack(list(rest.values()), axis=1))
    return Choice(about, tuple(CLASS), {}, cases, task.labels, truth_NL, arm.p_NK)


def choose_by_value(task: Task, arm: ResultRow, facts: Mapping) -> Choice:
    """Return, for each target, the slides predicted nearest, most too high and most too low."""
    cases = []
    for k, label in enumerate(task.labels):
        y_N, p_N = arm.y_NK[:, k], arm.p_NK[:, k]
        known, off_N = np.flatnonzero(~np.isnan(y_N)), p_N - y_N
        high_N = y_N > np.median(y_N[known]) if len(known) else y_N > 0
        picks = (
            (known[~high_N[known]], -np.abs(off_N)), (known[high_N[known]], -np.abs(off_N)),
            (known[off_N[known] > 0], off_N), (known[off_N[known] < 0], -off_N),
        )  # fmt: skip
        for kind, (rows, merit_N) in zip(VALUE, picks, strict=True):
            if len(rows):
                row = rows[np.argmax(merit_N[rows])]
                cases.append(Case(label, kind, arm.slide_ids[row], float(p_N[row])))
    about = (
        "Of each target, the slides predicted nearest to their value, of the lower and the upper "
        "half of values, and those predicted most too high and most too low."
    )
    truth_NL = [["unknown" if np.isnan(y) else f"{y:.6g}" for y in y_K] for y_K in arm.y_NK]
    return Choice(about, VALUE, {}, cases, task.labels, truth_NL, arm.p_NK, "predicted")


def choose_by_time(task: Task, arm: ResultRow, facts: Mapping) -> Choice:
    """Return slides of early and late events with the most extreme risks."""
    time_N, event_N, risk_N = arm.y_NK[:, 0], arm.y_NK[:, 1], arm.p_NK[:, 0]
    early_N = np.where((time_N <= task.horizon) & (event_N == 1), 1.0, np.nan)
    early_N[time_N > task.horizon] = 0
    middle = float(np.median(risk_N)) if len(risk_N) else 0.0
    cases = _surest("risk", TIME, arm, 0, early_N, risk_N >= middle)
    about = (
        f"Early: with the event up to {task.time} = {task.horizon:g}, the training split's median; "
        "late: seen for longer. High risk: from the median of this split on. Of each pair, the "
        "most extreme risk."
    )
    truth_NL = [
        ["unknown" if np.isnan(time) else f"{'event' if event else 'no event'} at {time:.6g}"]
        for time, event in arm.y_NK[:, :2]
    ]
    called = {"risk": middle}
    return Choice(about, tuple(TIME), called, cases, ("risk",), truth_NL, arm.p_NK[:, :1], "risk")


def _surest(
    label: str, kinds: Mapping[str, tuple[int, int]], arm: ResultRow, k: int, y_N, called_N
) -> list[Case]:
    """Of each kind the slide of the most extreme number k that the arm says, if there is any."""
    p_N, found = arm.p_NK[:, k], []
    for kind, (truth, call) in kinds.items():
        rows = np.flatnonzero((y_N == truth) & (called_N == call))
        if len(rows):
            row = rows[np.argmax(p_N[rows]) if call else np.argmin(p_N[rows])]
            found.append(Case(label, kind, arm.slide_ids[row], float(p_N[row])))
    return found


def _one_or_zero(y_NL: np.ndarray) -> list[list[str]]:
    return [["unknown" if np.isnan(y) else str(int(y)) for y in y_L] for y_L in y_NL]
