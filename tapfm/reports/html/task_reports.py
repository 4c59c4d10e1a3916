"""Functions that write, draw and show results, by the kind of report that `Task.report` names.

    labels   labels of 0 and 1: ROC, precision and recall, calibration, operating points
    classes  the same of each class against the rest, and confusions
    values   predicted against true values
    times    Kaplan-Meier curves of the halves of higher and lower risk, log-rank test

A kind's functions read from the task: `values` only the labels, `classes` the classes, the column
and `one_vs_rest`, `times` the column of times and the horizon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tapfm.reports import example_slides
from tapfm.reports.example_slides import Examples
from tapfm.reports.html import outcome_panels
from tapfm.reports.outcome_report import write_outcomes
from tapfm.reports.report import write_results
from tapfm.reports.rows import ResultRow
from tapfm.tasks import Task

Groups = Mapping[str, Mapping[str, str]]
"""Kind of group, such as site, to slide_id or case_id to its group."""


@dataclass(frozen=True)
class TaskReport:
    """The functions of one kind of report."""

    write: Callable[..., str]
    """Write a split's files and return its table: folder, split, task, rows, skipped, groups, and
    the slides of each bag where bags are cases."""
    curves: Callable[[Task, Sequence[ResultRow]], Iterator[str]]
    """Yield the curves of all rows, as parts of the page."""
    choose: Callable[[Task, ResultRow, Mapping], Examples]
    """Return the example slides of a row, given its facts of metrics_<split>.json."""


def _write_labels(folder, split, task, rows, skipped, groups, slides_of=None) -> str:
    how = {"groups": groups, "slides_of": slides_of}
    return write_results(folder, split, task.labels, rows, skipped, **how)


def _write_outcomes(folder, split, task, rows, skipped, groups, slides_of=None) -> str:
    # without tables by group
    return write_outcomes(folder, split, task, rows, skipped, slides_of=slides_of)


REPORTS = {
    "labels": TaskReport(
        _write_labels, outcome_panels.label_curves, example_slides.choose_by_label
    ),
    "classes": TaskReport(
        _write_outcomes, outcome_panels.class_curves, example_slides.choose_by_class
    ),
    "values": TaskReport(
        _write_outcomes, outcome_panels.value_curves, example_slides.choose_by_value
    ),
    "times": TaskReport(
        _write_outcomes, outcome_panels.time_curves, example_slides.choose_by_time
    ),
}  # fmt: skip
