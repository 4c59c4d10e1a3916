"""What cases are stratified over, for every task: labels of 1, 0 or unknown, made of its columns.

    multilabel    the labels themselves
    multiclass    a label a class
    regression    of each target, above the first third of the cases and above the second
    survival      the event, and a time above the median of the events'

Where a case has slides that say different things, a label is 1 if it is for any of them.

Shapes: N slides, Y numbers of a target, C cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Strata = dict[str, np.ndarray]
"""Label -> (N,) 1.0, 0.0 or nan."""


def stratify(
    task: str,
    names: Sequence[str],
    classes: Sequence[str],
    case_ids: Sequence[str],
    values_NY: np.ndarray,
) -> Strata:
    """The labels to deal cases by.

    Args:
        task: a key of `slides.cohort.targets.COLUMNS`.
        names: of its columns.
        classes: that a multi-class column counts.
        case_ids: of each slide.
        values_NY: what `slides.cohort.targets` read.
    """
    _, case_N = np.unique(np.asarray(case_ids), return_inverse=True)
    largest_CY = np.full((case_N.max(initial=-1) + 1, values_NY.shape[1]), np.nan)
    np.fmax.at(largest_CY, case_N, values_NY)
    return STRATA[task](names, classes, values_NY, largest_CY)


def _labels(names, classes, values_NY, largest_CY) -> Strata:
    return dict(zip(names, values_NY.T, strict=True))


def _classes(names, classes, values_NY, largest_CY) -> Strata:
    number_N = values_NY[:, 0]
    return {
        name: np.where(np.isnan(number_N), np.nan, number_N == k) for k, name in enumerate(classes)
    }


def _numbers(names, classes, values_NY, largest_CY) -> Strata:
    found: Strata = {}
    for name, y_N, y_C in zip(names, values_NY.T, largest_CY.T, strict=True):
        found |= _above(name, y_N, y_C, 3)
    return found


def _times(names, classes, values_NY, largest_CY) -> Strata:
    seen_C = largest_CY[largest_CY[:, 1] == 1, 0]
    return {names[1]: values_NY[:, 1]} | _above(names[0], values_NY[:, 0], seen_C, 2)


def _above(name: str, y_N: np.ndarray, y_C: np.ndarray, parts: int) -> Strata:
    """Above each cut of the cases that are known into parts; one label where two cuts are equal.

    A cut is a case's own value, so that ties fall on one side whatever floats do.
    """
    rising = np.sort(y_C[~np.isnan(y_C)])
    cuts = {
        rising[(len(rising) - 1) * part // parts]: f"{name} above {part}/{parts}"
        for part in range(1, parts)
        if len(rising)
    }
    return {said: np.where(np.isnan(y_N), np.nan, y_N > cut) for cut, said in cuts.items()}


STRATA: dict[str, Callable[..., Strata]] = {
    "multilabel": _labels,
    "multiclass": _classes,
    "regression": _numbers,
    "survival": _times,
}
