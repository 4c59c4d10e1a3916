"""How well slides are named: balanced accuracy and weighted F1, with case-clustered intervals.

    balanced accuracy    mean over the subtypes of the share that is named right
    weighted F1          F1 of each subtype, weighted by how many slides have it

Few-shot figures are means over the draws of training slides, taken within each bootstrap draw of
the test cases: an interval says how sure the test set makes us of that mean. A bootstrap draw that
lacks a subtype is left out, so that all average the same subtypes.

Source: definitions as scikit-learn's `balanced_accuracy_score` and `f1_score(average="weighted")`;
    the bootstrap is that of `tapfm.bootstrap`.

Shapes: S test slides, R draws of training slides, B bootstrap draws, C subtypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tapfm.bootstrap import Interval, percentiles, with_point

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
    figures_MB = _figures(truth_S, called_RS, cases_S, seed)
    return {m: percentiles(each_B) for m, each_B in zip(METRICS, figures_MB, strict=True)}


def difference(
    truth_S: np.ndarray,
    one_RS: np.ndarray,
    other_RS: np.ndarray,
    cases_S: Sequence[str],
    seed: int = 0,
) -> dict[str, Interval]:
    """One's figures less the other's, in the same bootstrap draws."""
    one_MB, other_MB = (_figures(truth_S, each, cases_S, seed) for each in (one_RS, other_RS))
    return {m: percentiles(each_B) for m, each_B in zip(METRICS, one_MB - other_MB, strict=True)}


def _figures(truth_S, called_RS, cases_S, seed: int) -> np.ndarray:
    """(2, B + 1), the slides as they are first; nan where a draw lacks a subtype."""
    times_BS = with_point(cases_S, DRAWS, seed)
    subtypes = np.unique(truth_S)
    each_RMB = []
    for called_S in np.atleast_2d(called_RS):
        is_SC, said_SC = (np.asarray(each)[:, None] == subtypes for each in (truth_S, called_S))
        there_BC, called_BC = times_BS @ is_SC, times_BS @ said_SC
        right_BC = times_BS @ (is_SC & said_SC)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall_B = (right_BC / there_BC).mean(1)
            f1_BC = 2 * right_BC / (there_BC + called_BC)
        f1_B = (f1_BC * there_BC).sum(1) / there_BC.sum(1)
        f1_B[(there_BC == 0).any(1)] = math.nan
        each_RMB.append([recall_B, f1_B])
    return np.mean(each_RMB, axis=0)
