"""AUROC and AUPRC of slides with case-clustered intervals, and paired differences of AUROC.

Both are computed from how often each slide is counted (`stats.bootstrap`): one sort by score, then
cumulative sums for all draws at once. 2000 draws of 200 slides cost about 30 ms a label on a core.

    auroc   chance that a positive outranks a negative; a tie counts one half
    auprc   average precision, sum over thresholds of (recall gained) x precision; tied scores are
            one threshold

A draw in which a label has only one class has no value for that label: it is left out of the
label's interval, and `Interval.draws` says how many remained. Macro is the mean over the labels
that have both classes among the slides; a draw that lacks a class of any of them is left out of
macro, so that every draw averages the same labels.

Source: definitions as scikit-learn's `roc_auc_score` and `average_precision_score`, ties included.

Shapes: N slides, K labels, B draws, G groups of tied scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from slides.errors import SettingsError
from tapfm.stats.bootstrap import (
    BLOCK,
    Interval,
    bootstrap_cases,
    interval,
    mean_of,
    mean_of_defined,
    once,
    percentiles,
    with_point,
)

__all__ = [
    "MACRO", "ONE_CLASS", "Interval", "auprc", "auroc", "auroc_draws", "bootstrap_cases",
    "evaluate", "interval_of", "macro_auroc", "paired_difference", "pairs_draws",
]  # fmt: skip

MACRO = "macro"
ONE_CLASS = "one class only"  # what tables say where an AUROC is undefined


def auroc(y_N: np.ndarray, p_N: np.ndarray) -> float:
    """Return the area under the ROC curve; nan if only one class is known.

    Args:
        y_N: 0, 1, or nan where unknown (left out).
        p_N: any increasing score.
    """
    return float(_metrics(y_N, p_N, once(y_N))[0][0])


def auprc(y_N: np.ndarray, p_N: np.ndarray) -> float:
    """Return the average precision; nan if only one class is known. Arguments as in `auroc`."""
    return float(_metrics(y_N, p_N, once(y_N))[1][0])


def macro_auroc(y_NK: np.ndarray, p_NK: np.ndarray) -> float:
    """Return the mean AUROC over the labels that have both classes; nan if none has."""
    each = [
        auroc(y_N, p_N) for y_N, p_N in zip(np.transpose(y_NK), np.transpose(p_NK), strict=True)
    ]
    defined = [value for value in each if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def auroc_draws(y_N: np.ndarray, p_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the AUROC of every draw (B,), nan where the draw has only one class."""
    return _metrics(y_N, p_N, times_BN)[0]


def pairs_draws(y_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the number of pairs of a positive and a negative in every draw (B,)."""
    y_N, times_BN = np.asarray(y_N, float), np.asarray(times_BN, float)
    return (times_BN @ (y_N == 1)) * (times_BN @ (y_N == 0))


def interval_of(name: str, figure_B: np.ndarray) -> Interval:
    """Return the interval of a named metric: on the logit scale for AUROC, else percentiles."""
    return interval(figure_B) if name == "auroc" else percentiles(figure_B)


def evaluate(
    labels: Sequence[str],
    y_NK: np.ndarray,
    p_NK: np.ndarray,
    cases_N: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, dict]:
    """Return AUROC and AUPRC of every label and their macro mean, with intervals.

    Args:
        labels: K names.
        y_NK: 0, 1, or nan where unknown.
        p_NK: scores.
        cases_N: each slide's case.
        draws: bootstrap draws.
        seed: seed of the draws; the same seed and cases give the same draws.

    Returns:
        label or "macro" to {"auroc": Interval, "auprc": Interval, "positives": int, "known": int};
        "macro" has "labels" too, those it averages.

    Raises:
        ValueError: shapes disagree, a label is neither 0, 1 nor nan, or a score is nan.
    """
    y_NK, p_NK = _checked(labels, y_NK, cases_N, p_NK)
    times_BN = with_point(cases_N, draws, seed)
    figures_KMB = [_metrics(y_NK[:, k], p_NK[:, k], times_BN) for k in range(len(labels))]
    found: dict[str, dict] = {}
    for k, label in enumerate(labels):
        roc_B, pr_B = figures_KMB[k]
        known_N = ~np.isnan(y_NK[:, k])
        found[label] = {
            "auroc": interval(roc_B),
            "auprc": interval(pr_B),
            "positives": int(y_NK[known_N, k].sum()),
            "known": int(known_N.sum()),
        }
    averaged = [k for k in range(len(labels)) if not math.isnan(found[labels[k]]["auroc"].value)]
    roc_B, pr_B = (mean_of([figures_KMB[k][m] for k in averaged], len(times_BN)) for m in (0, 1))
    found[MACRO] = {
        "auroc": interval(roc_B),
        "auprc": interval(pr_B),
        "positives": sum(found[label]["positives"] for label in labels),
        "known": sum(found[label]["known"] for label in labels),
        "labels": [labels[k] for k in averaged],
    }
    return found


def paired_difference(
    labels: Sequence[str],
    y_NK: np.ndarray,
    pa_NK: np.ndarray,
    pb_NK: np.ndarray,
    cases_N: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return AUROC of scores a minus that of scores b, on the same slides and draws.

    Returns:
        label or "macro" to the difference. Arguments as in `evaluate`.
    """
    y_NK, pa_NK, pb_NK = _checked(labels, y_NK, cases_N, pa_NK, pb_NK)
    times_BN = with_point(cases_N, draws, seed)
    gain_KB = [
        auroc_draws(y_NK[:, k], pa_NK[:, k], times_BN)
        - auroc_draws(y_NK[:, k], pb_NK[:, k], times_BN)
        for k in range(len(labels))
    ]
    gains = dict(zip(labels, gain_KB, strict=True))
    gains[MACRO] = mean_of_defined(gain_KB, len(times_BN))
    return {name: percentiles(gain_B) for name, gain_B in gains.items()}


def _metrics(
    y_N: np.ndarray, p_N: np.ndarray, times_BN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC and AUPRC of every draw (B,), nan where the draw has only one class."""
    y_N, p_N = np.asarray(y_N, float), np.asarray(p_N, float)
    known_N = ~np.isnan(y_N)
    rows_N = np.flatnonzero(known_N)[np.argsort(p_N[known_N], kind="stable")]
    draws = len(times_BN)
    roc_B, pr_B = np.full(draws, np.nan), np.full(draws, np.nan)
    if not len(rows_N):
        return roc_B, pr_B
    sorted_N = p_N[rows_N]
    ties = np.flatnonzero(np.append(True, sorted_N[1:] != sorted_N[:-1]))  # where a group starts
    positive_N = y_N[rows_N] == 1
    step = max(1, BLOCK // len(rows_N))
    for start in range(0, draws, step):
        block = slice(start, start + step)
        times_bN = times_BN[block][:, rows_N].astype(float)
        pos_bG = np.add.reduceat(times_bN * positive_N, ties, axis=1)
        neg_bG = np.add.reduceat(times_bN * ~positive_N, ties, axis=1)
        roc_B[block], pr_B[block] = _areas(pos_bG, neg_bG)
    return roc_B, pr_B


def _areas(pos_BG: np.ndarray, neg_BG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC and AUPRC from the counts at each distinct score, lowest score first."""
    below_BG = neg_BG.cumsum(1)
    wins_B = (pos_BG * (below_BG - neg_BG / 2)).sum(1)
    negatives_B, positives_B = below_BG[:, -1], pos_BG.sum(1)
    called_BG = (pos_BG + neg_BG)[:, ::-1].cumsum(1)[:, ::-1]  # slides at this score or above
    hits_BG = pos_BG[:, ::-1].cumsum(1)[:, ::-1]
    precision_BG = hits_BG / np.maximum(called_BG, 1)
    both_B = (negatives_B > 0) & (positives_B > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        roc_B = np.where(both_B, wins_B / (positives_B * negatives_B), np.nan)
        pr_B = np.where(both_B, (pos_BG * precision_BG).sum(1) / positives_B, np.nan)
    return roc_B, pr_B


def _checked(labels, y_NK, cases_N, *scores) -> list[np.ndarray]:
    y_NK = np.asarray(y_NK, float)
    shape = (len(cases_N), len(labels))
    if MACRO in labels:
        raise SettingsError(f"labels: one may not be named {MACRO!r}, which reports use: rename it")
    for kind, array in [("labels", y_NK), *(("scores", np.asarray(p)) for p in scores)]:
        if array.shape != shape:
            raise ValueError(
                f"{kind} have shape {array.shape}, but there are {shape[0]} slides with a case and "
                f"{shape[1]} label names: {shape} is needed"
            )
    strange = y_NK[~np.isnan(y_NK) & (y_NK != 0) & (y_NK != 1)]
    if len(strange):
        raise ValueError(f"labels must be 0, 1 or nan (unknown), found {strange[0]:g}")
    scores = [np.asarray(p_NK, float) for p_NK in scores]
    for p_NK in scores:
        if np.isnan(p_NK).any():
            row, column = np.argwhere(np.isnan(p_NK))[0]
            raise ValueError(
                f"the score of {labels[column]} is nan in row {row}: the model diverged, or the "
                "prediction failed; leave that slide out"
            )
    return [y_NK, *scores]
