"""Balanced accuracy and weighted F1 of predicted subtypes, with case-clustered intervals.

    balanced accuracy    mean over the subtypes of the share that is predicted right
    weighted F1          F1 of each subtype, weighted by how many slides have it

Few-shot figures are means over the draws of training slides, taken within each bootstrap draw of
the test cases: an interval is the uncertainty of that mean due to the test set. A bootstrap draw
that lacks a subtype is left out, so that all average the same subtypes.

The figures are those of `stats.confusions`, the bootstrap that of `stats.bootstrap`.

Source: PathPT (arXiv 2508.15904): these two figures.
Differs: the intervals are ours.

Shapes: S test slides, R draws of training slides, B bootstrap draws, C subtypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tapfm.stats.bootstrap import Interval, percentiles, with_point
from tapfm.stats.confusions import averages, confusions

METRICS = ("balanced_accuracy", "weighted_f1")
DRAWS = 2000


def score_subtypes(
    subtype_S: np.ndarray, called_RS: np.ndarray, cases_S: Sequence[str], seed: int = 0
) -> dict[str, Interval]:
    """Return both metrics with intervals; means over the R draws.

    Args:
        subtype_S: true subtypes, 0 to C - 1.
        called_RS: predictions of each draw's model.
        cases_S: each slide's case.
        seed: seed of the bootstrap.
    """
    found = _figures(subtype_S, called_RS, cases_S, seed)
    return {m: percentiles(each_B) for m, each_B in found.items()}


def score_difference(
    subtype_S: np.ndarray,
    one_RS: np.ndarray,
    other_RS: np.ndarray,
    cases_S: Sequence[str],
    seed: int = 0,
) -> dict[str, Interval]:
    """Return one model's metrics minus the other's, in the same bootstrap draws."""
    one, other = (_figures(subtype_S, each, cases_S, seed) for each in (one_RS, other_RS))
    return {m: percentiles(one[m] - other[m]) for m in METRICS}


def _figures(subtype_S, called_RS, cases_S, seed: int) -> dict[str, np.ndarray]:
    """Return both metrics of the slides, then of every bootstrap draw (1 + B,)."""
    times_BS = with_point(cases_S, DRAWS, seed)
    classes = int(max(np.max(subtype_S), np.max(called_RS))) + 1
    each = [
        averages(confusions(subtype_S, called_S, classes, times_BS))
        for called_S in np.atleast_2d(called_RS)
    ]
    return {m: np.mean([found[m] for found in each], axis=0) for m in METRICS}
