"""The binary labels over which cases are stratified, for every task.

    labels of 1 and 0   the labels themselves
    class names         a label a class
    numbers             for each column, above the first third of the cases and above the second
    time and event      the event, and a time above the median time of events

Labels are 1, 0 or unknown. If slides of a case differ, the case's label is 1 if any slide's is.

Shapes: N slides, Y numbers of a target, C cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

Strata = dict[str, np.ndarray]
"""Label -> (N,) 1.0, 0.0 or nan."""


class Stratified(Protocol):
    """Label columns, which say how cases are stratified over them."""

    strata: Callable[..., Strata]


def stratify(
    columns: Stratified | type[Stratified],
    names: Sequence[str],
    classes: Sequence[str],
    case_ids: Sequence[str],
    values_NY: np.ndarray,
) -> Strata:
    """Return the labels to stratify over.

    Args:
        columns: the kind of columns, of `slides.cohort.targets`, which decides the labels.
        names: names of the label columns.
        classes: class names of a multi-class column.
        case_ids: case of each slide.
        values_NY: the numbers that `slides.cohort.targets` read.
    """
    _, case_N = np.unique(np.asarray(case_ids), return_inverse=True)
    largest_CY = np.full((case_N.max(initial=-1) + 1, values_NY.shape[1]), np.nan)
    np.fmax.at(largest_CY, case_N, values_NY)
    return columns.strata(names, classes, values_NY, largest_CY)


def label_strata(names, classes, values_NY, largest_CY) -> Strata:
    """Return the labels themselves."""
    return dict(zip(names, values_NY.T, strict=True))


def class_strata(names, classes, values_NY, largest_CY) -> Strata:
    """Return a label a class: 1 for its slides, 0 for those of others."""
    number_N = values_NY[:, 0]
    return {
        name: np.where(np.isnan(number_N), np.nan, number_N == k) for k, name in enumerate(classes)
    }


def number_strata(names, classes, values_NY, largest_CY) -> Strata:
    """Return two labels a column: above the first and above the second third of the cases."""
    found: Strata = {}
    for name, y_N, y_C in zip(names, values_NY.T, largest_CY.T, strict=True):
        found |= _above(name, y_N, y_C, 3)
    return found


def time_strata(names, classes, values_NY, largest_CY) -> Strata:
    """Return the event, and whether the time is above the median of the events' times."""
    seen_C = largest_CY[largest_CY[:, 1] == 1, 0]
    return {names[1]: values_NY[:, 1]} | _above(names[0], values_NY[:, 0], seen_C, 2)


def _above(name: str, y_N: np.ndarray, y_C: np.ndarray, parts: int) -> Strata:
    """Return labels "above k/parts": whether a number lies above that quantile of the cases.

    There is one label if two cuts are equal. A cut is a case's own value, so that ties fall on one
    side whatever the rounding.
    """
    rising = np.sort(y_C[~np.isnan(y_C)])
    cuts = {
        rising[(len(rising) - 1) * part // parts]: f"{name} above {part}/{parts}"
        for part in range(1, parts)
        if len(rising)
    }
    return {label: np.where(np.isnan(y_N), np.nan, y_N > cut) for cut, label in cuts.items()}
