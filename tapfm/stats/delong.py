"""DeLong's variance of an AUROC, and his test of two, in closed form and by case.

    V10_i   share of the negatives that positive i outranks, a tie one half: its placement
    V01_j   share of the positives that outrank negative j
    var     sum over cases of (their summed V minus its mean)^2, for each class, and the covariance
            of the two classes within a case

Placements are differences of midranks, so the price is a sort: O(n log n). If every slide is its
own case this is DeLong's variance exactly; slides that share a case are not independent, so their
placements are summed before they are squared. The test of a difference is paired: the same
slides under two scores.

Condition: two cases of each class at least. The interval is Wald's, as published, cut at 0
    and 1; with few cases it is too narrow (benchmarks/coverage.py), so reports use the bootstrap.
Source: DeLong et al. 1988 (Biometrics 44:837); Sun and Xu 2014 (IEEE SPL 21:1389), midranks;
    Obuchowski 1997 (Biometrics 53:567), clusters.

Shapes: N slides, S scores, C cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

LEVEL = 0.95


@dataclass(frozen=True)
class DeLong:
    """An AUROC or a difference of two; all but the value is nan if the variance is undefined."""

    value: float
    se: float
    """Standard error."""
    low: float
    high: float
    p: float
    """Two-sided p value against 0.5; of a difference, against 0."""


def delong(y_N: np.ndarray, p_N: np.ndarray, cases_N: Sequence[str] | None = None) -> DeLong:
    """Return the AUROC with its standard error, interval and p value.

    Args:
        y_N: 0, 1, or nan where unknown (left out).
        p_N: any increasing score.
        cases_N: each slide's case; None: every slide is its own case.
    """
    auroc_S, covariance_SS = covariance(y_N, np.asarray(p_N)[None], cases_N)
    found = _wald(auroc_S[0], covariance_SS[0, 0], null=0.5)
    return replace(
        found, low=float(np.maximum(found.low, 0)), high=float(np.minimum(found.high, 1))
    )


def delong_difference(
    y_N: np.ndarray, pa_N: np.ndarray, pb_N: np.ndarray, cases_N: Sequence[str] | None = None
) -> DeLong:
    """Return AUROC of scores a minus that of scores b on the same slides, as `delong`."""
    auroc_S, c_SS = covariance(y_N, np.stack([pa_N, pb_N]), cases_N)
    return _wald(auroc_S[0] - auroc_S[1], c_SS[0, 0] + c_SS[1, 1] - 2 * c_SS[0, 1], null=0.0)


def covariance(
    y_N: np.ndarray, p_SN: np.ndarray, cases_N: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROCs (S,) and their covariance (S, S); nan where a class has too few cases."""
    y_N, p_SN = np.asarray(y_N, float), np.asarray(p_SN, float)
    known_N = ~np.isnan(y_N)
    cases = np.arange(len(y_N)) if cases_N is None else np.asarray(cases_N)
    case_N = np.unique(cases[known_N], return_inverse=True)[1].ravel()
    positive_N, p_SN = y_N[known_N] == 1, p_SN[:, known_N]
    scores, classes = len(p_SN), (positive_N, ~positive_N)
    if not positive_N.any() or positive_N.all():
        return np.full(scores, np.nan), np.full((scores, scores), np.nan)
    auroc_S = np.empty(scores)
    summed = np.zeros((2, scores, case_N.max() + 1))  # by class, score and case: V minus its mean
    for s, p_N in enumerate(p_SN):
        ranks_N = rankdata(p_N)
        for kind, (own_N, sign) in enumerate(zip(classes, (1, -1), strict=True)):
            lower = (ranks_N[own_N] - rankdata(p_N[own_N])) / (~own_N).sum()
            placement = lower if sign > 0 else 1 - lower
            auroc_S[s] = placement.mean()
            np.add.at(summed[kind, s], case_N[own_N], placement - auroc_S[s])
    found = np.zeros((scores, scores))
    for own_N, v_SC in zip(classes, summed, strict=True):
        found += _bessel(len(set(case_N[own_N]))) * v_SC @ v_SC.T / own_N.sum() ** 2
    both_SS = summed[0] @ summed[1].T  # 0 where no case has slides of both classes
    if both_SS.any():
        pairs = positive_N.sum() * (~positive_N).sum()
        found += _bessel(summed.shape[2]) * (both_SS + both_SS.T) / pairs
    return auroc_S, found


def _bessel(cases: int) -> float:
    return cases / (cases - 1) if cases > 1 else math.nan


def _wald(value: float, variance: float, null: float) -> DeLong:
    se = math.sqrt(max(variance, 0.0)) if not math.isnan(variance) else math.nan
    reach = float(ndtri((1 + LEVEL) / 2)) * se
    away = abs(value - null)
    if math.isnan(se) or away < 1e-12:  # 0 up to rounding; the se may be 0 too
        p = math.nan if math.isnan(se) else 1.0
    else:
        p = float(2 * ndtr(-away / se)) if se else 0.0
    return DeLong(float(value), se, float(value - reach), float(value + reach), p)
