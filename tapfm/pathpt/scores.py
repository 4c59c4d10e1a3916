"""How well slides are named: balanced accuracy and weighted F1, with case-clustered intervals.

    balanced accuracy    mean over the subtypes of the share that is named right
    weighted F1          F1 of each subtype, weighted by how many slides have it

Few-shot figures are means over the draws of training slides, taken within each bootstrap draw of
the test cases: an interval says how sure the test set makes us of that mean. A bootstrap draw that
lacks a subtype is left out, so that all average the same subtypes.

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


def evaluate(
    truth_S: np.ndarray, called_RS: np.ndarray, cases_S: Sequence[str], seed: int = 0
) -> dict[str, Interval]:
    """Both figures; means over the R draws.

    Args:
        truth_S: subtypes, 0 to C - 1.
        called_RS: what each draw's model says.
        cases_S: each slide's case.
        seed: of the bootstrap.
    """
    found = _figures(truth_S, called_RS, cases_S, seed)
    return {m: percentiles(each_B) for m, each_B in found.items()}


def difference(
    truth_S: np.ndarray,
    one_RS: np.ndarray,
    other_RS: np.ndarray,
    cases_S: Sequence[str],
    seed: int = 0,
) -> dict[str, Interval]:
    """One's figures less the other's, in the same bootstrap draws."""
    one, other = (_figures(truth_S, each, cases_S, seed) for each in (one_RS, other_RS))
    return {m: percentiles(one[m] - other[m]) for m in METRICS}


def _figures(truth_S, called_RS, cases_S, seed: int) -> dict[str, np.ndarray]:
    """Of the slides as they are, then of every bootstrap draw (1 + B,)."""
    times_BS = with_point(cases_S, DRAWS, seed)
    classes = int(max(np.max(truth_S), np.max(called_RS))) + 1
    each = [
        averages(confusions(truth_S, called_S, classes, times_BS))
        for called_S in np.atleast_2d(called_RS)
    ]
    return {m: np.mean([found[m] for found in each], axis=0) for m in METRICS}
