"""Metrics of predicted values and times (regression, survival), for many draws at once.

    r2                   share of the variance that is explained; below 0 is worse than the mean
    pearson, spearman    correlation of values, of midranks
    concordance          Harrell's C: of two cases that can be compared, the chance that the one
                         with the earlier event has the higher risk
    time_auc             AUROC of an event before a horizon against follow-up beyond it, cases
                         weighted by the inverse chance of not being censored before

A draw is a vector of how often each slide is counted, from `stats.bootstrap`. Every metric is
computed from such weights and has a value for each draw; nan where it is undefined (nothing varies,
nothing can be compared). In a comparison, tied predictions count one half.

Two cases can be compared if the earlier time is an event's; of two equal times, if one is an event
and the other is not, whose event then lies later.

Source: Harrell et al. 1996 (Stat Med 15:361); Uno et al. 2007 (JASA 102:527) for the weights of
    `time_auc`; definitions as scikit-learn's, scipy's and scikit-survival's, ties included.

Shapes: N slides, B draws, G groups of equal values, U times.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tapfm.stats.bootstrap import BLOCK

FLAT = 1e-24  # share of the sum of squares below which a spread is rounding error


def r2(y_N: np.ndarray, predicted_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return 1 - squared error / squared distance from the mean of the draw, (B,)."""
    spread_B = spread(y_N, times_BN)
    y_N, predicted_N, times_BN = _known(y_N, predicted_N, times_BN)
    return 1 - _ratio(times_BN @ np.square(y_N - predicted_N), spread_B)


def spread(y_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the squared distance from the mean of the draw, (B,): the denominator of `r2`."""
    y_N, times_BN = _known(y_N, times_BN)
    return _centred(np.broadcast_to(y_N, times_BN.shape), times_BN)[1]


def pearson(y_N: np.ndarray, predicted_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the correlation of values, (B,)."""
    y_N, predicted_N, times_BN = _known(y_N, predicted_N, times_BN)
    shape = times_BN.shape
    return _correlation(np.broadcast_to(y_N, shape), np.broadcast_to(predicted_N, shape), times_BN)


def spearman(y_N: np.ndarray, predicted_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the correlation of midranks within the draw, (B,)."""
    y_N, predicted_N, times_BN = _known(y_N, predicted_N, times_BN)
    return _correlation(_midranks(y_N, times_BN), _midranks(predicted_N, times_BN), times_BN)


def concordance(
    time_N: np.ndarray, event_N: np.ndarray, risk_N: np.ndarray, times_BN: np.ndarray
) -> np.ndarray:
    """Return Harrell's C, (B,).

    Args:
        time_N: time of the event or of the last follow-up without it; nan where unknown.
        event_N: 1 for an event, 0 if censored.
        risk_N: higher means an earlier event is predicted.
        times_BN: the draws.
    """
    time_N, event_N, risk_N, times_BN = _known(time_N, event_N, risk_N, times_BN)
    wins_B = np.zeros(len(times_BN))
    for n, later_nN in _later(time_N, event_N):
        higher_nN = (risk_N[n, None] > risk_N) + 0.5 * (risk_N[n, None] == risk_N)
        wins_B += ((times_BN[:, n] @ (later_nN * higher_nN)) * times_BN).sum(1)
    return _ratio(wins_B, comparable(time_N, event_N, times_BN))


def comparable(time_N: np.ndarray, event_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the number of pairs that `concordance` compares, (B,)."""
    time_N, event_N, times_BN = _known(time_N, event_N, times_BN)
    pairs_B = np.zeros(len(times_BN))
    for n, later_nN in _later(time_N, event_N):
        pairs_B += ((times_BN[:, n] @ later_nN.astype(float)) * times_BN).sum(1)
    return pairs_B


def time_auc(
    time_N: np.ndarray,
    event_N: np.ndarray,
    risk_N: np.ndarray,
    horizon: float,
    times_BN: np.ndarray,
) -> np.ndarray:
    """Return the AUROC of an event up to `horizon` against follow-up beyond it, (B,)."""
    time_N, event_N, risk_N, times_BN = _known(time_N, event_N, risk_N, times_BN)
    early_BN = times_BN * ((time_N <= horizon) & (event_N == 1))
    weight_BN = early_BN / np.maximum(_uncensored(time_N, event_N, times_BN), 1e-300)
    return _outranks(risk_N, weight_BN, times_BN * (time_N > horizon))


def _later(time_N: np.ndarray, event_N: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield blocks of cases, and for each case which others are known to have come later."""
    step = max(1, BLOCK // max(1, len(time_N)))
    for start in range(0, len(time_N), step):
        n = slice(start, start + step)
        later_nN = time_N > time_N[n, None]
        later_nN |= (time_N == time_N[n, None]) & (event_N == 0)
        yield n, later_nN & (event_N[n] == 1)[:, None]


def _known(*arrays: np.ndarray) -> list[np.ndarray]:
    """Return the arrays without slides whose first array is nan; the last array is the draws."""
    known_N = ~np.isnan(arrays[0])
    return [np.asarray(array, float)[..., known_N] for array in arrays]


def _outranks(p_N: np.ndarray, one_BN: np.ndarray, other_BN: np.ndarray) -> np.ndarray:
    """Return the chance that a slide drawn by `one` has a higher p than one drawn by `other`."""
    draws = len(one_BN)
    if not len(p_N):
        return np.full(draws, np.nan)
    order, starts = _groups(p_N)
    one_BG, other_BG = (np.add.reduceat(x[:, order], starts, axis=1) for x in (one_BN, other_BN))
    wins_B = (one_BG * (other_BG.cumsum(1) - other_BG / 2)).sum(1)
    return _ratio(wins_B, one_BG.sum(1) * other_BG.sum(1))


def _midranks(x_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the rank of each slide's value in each draw; equal values share their mean rank."""
    if not len(x_N):
        return np.zeros_like(times_BN)
    order, starts = _groups(x_N)
    times_BG = np.add.reduceat(times_BN[:, order], starts, axis=1)
    rank_BG = times_BG.cumsum(1) - times_BG / 2 + 0.5
    group_N = np.empty(len(x_N), int)
    group_N[order] = np.repeat(np.arange(len(starts)), np.diff([*starts, len(x_N)]))
    return rank_BG[:, group_N]


def _correlation(x_BN: np.ndarray, y_BN: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    (x_BN, x_B), (y_BN, y_B) = _centred(x_BN, times_BN), _centred(y_BN, times_BN)
    return _ratio((times_BN * x_BN * y_BN).sum(1), np.sqrt(x_B * y_B))


def _centred(x_BN: np.ndarray, times_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return distances from each draw's mean, and the sum of squares: 0 if nothing varies."""
    away_BN = x_BN - _ratio((times_BN * x_BN).sum(1), times_BN.sum(1))[:, None]
    spread_B, size_B = ((times_BN * np.square(each)).sum(1) for each in (away_BN, x_BN))
    return away_BN, np.where(spread_B > FLAT * size_B, spread_B, 0)


def _uncensored(time_N: np.ndarray, event_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the Kaplan-Meier chance of not being censored before each slide's time (B, N).

    Of equal times, events come first: these cases were no longer at risk of being censored.
    """
    if not len(time_N):
        return times_BN
    order, starts = _groups(time_N)
    at_BU, censored_BU = (
        np.add.reduceat(x[:, order], starts, axis=1) for x in (times_BN, times_BN * (event_N == 0))
    )
    after_BU = at_BU[:, ::-1].cumsum(1)[:, ::-1] - at_BU
    at_risk_BU = np.maximum(after_BU + censored_BU, 1)  # 0 only where none was censored
    stayed_BU = np.cumprod(1 - censored_BU / at_risk_BU, axis=1)
    return stayed_BU[:, np.searchsorted(time_N[order][starts], time_N)]


def _groups(x_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an order from low to high, and where in it each distinct value starts."""
    order = np.argsort(x_N, kind="stable")
    sorted_N = x_N[order]
    return order, np.flatnonzero(np.append(True, sorted_N[1:] != sorted_N[:-1]))


def _ratio(above_B: np.ndarray, below_B: np.ndarray) -> np.ndarray:
    """Return above / below, nan where below is 0."""
    return np.divide(above_B, below_B, out=np.full(len(above_B), np.nan), where=below_B > 0)
