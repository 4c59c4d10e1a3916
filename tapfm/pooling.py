"""One figure from many runs: folds put together by case, seeds averaged, differences paired.

In a cross-validation each case is tested once, so the out-of-fold predictions of one seed are those
of a whole cohort: pooled, they give an AUROC whose interval comes from resampling its cases. Runs
of other seeds predict the same cases again; their AUROCs are averaged within every draw, since a
mean of their probabilities would be another model, an ensemble. A difference is that of two such
means, on the same draws.

    pooled         every positive against every negative, whatever their folds
    within folds   only pairs of one fold, (sum of wins) / (sum of pairs): two folds' models need
                   not share a scale, which the pooled figure holds against them

Condition: draws of cases say how sure the figure is of these models, not of training anew; the
    deviation over the seeds stands beside it. A row counts with the seeds that have every fold.
Source: Bradley 1997 (Pattern Recognition 30:1145), pooling; Parker et al. 2007 (BMC Bioinformatics
    8:326), what it hides, and pairs within folds.

Shapes: N slides, K labels, B draws, F folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tapfm.bootstrap import Interval, interval, mean_of, percentiles, with_point
from tapfm.metrics import MACRO, auroc_draws

KINDS = ("pooled", "within_folds")


@dataclass(frozen=True)
class Fold:
    """What one model said of the slides of its test fold."""

    slide_ids: Sequence[str]
    case_ids: Sequence[str]
    y_NK: np.ndarray
    """0, 1, or nan where unknown."""
    p_NK: np.ndarray


@dataclass(frozen=True)
class Row:
    """A model of the table: its figures, and those of every draw behind them."""

    seeds: tuple[int, ...]
    """Those with every fold, which are averaged."""
    figures: dict[str, dict[str, Interval]]
    """Kind, then label or "macro"."""
    by_seed: dict[int, float]
    """Pooled macro AUROC of each seed."""
    drawn: dict[str, dict[str, np.ndarray]]
    """Kind, then label or "macro": (1 + B,), the value first."""

    @property
    def deviation(self) -> float:
        """Of the pooled macro AUROC over the seeds; nan for one seed."""
        values = list(self.by_seed.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def minus(self, other: Row) -> dict[str, dict[str, Interval]]:
        """Kind, then label or "macro": this row's AUROC less the other's."""
        return {
            kind: {name: percentiles(a - other.drawn[kind][name]) for name, a in each.items()}
            for kind, each in self.drawn.items()
        }


@dataclass(frozen=True)
class Pool:
    """Every row on the slides that all of them predicted."""

    rows: dict[str, Row]
    slides: int
    cases: int
    averaged: tuple[str, ...]
    """Labels with both classes, whose mean macro is."""


def pool(
    labels: Sequence[str],
    runs: Mapping[str, Mapping[int, Mapping[int, Fold]]],
    folds: int,
    draws: int = 2000,
    seed: int = 0,
) -> Pool:
    """Rows from title -> seed -> fold -> predictions.

    Args:
        labels: K names.
        runs: a row without a seed that has every fold is left out.
        folds: how many there should be.
        draws: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: no row is whole, a slide is in two folds, or rows disagree on a slide.
    """
    whole = {
        title: {s: _joined(f"{title}, seed {s}", each) for s, each in seeds.items()
                if len(each) == folds}
        for title, seeds in runs.items()
    }  # fmt: skip
    whole = {title: seeds for title, seeds in whole.items() if seeds}
    if not whole:
        raise ValueError(f"no row has all of its {folds} folds for any seed")
    every = [joined for seeds in whole.values() for joined in seeds.values()]
    slides = sorted(set.intersection(*(set(joined) for joined in every)))
    if not slides:
        raise ValueError("no slide was predicted by every row")
    facts = [every[0][slide] for slide in slides]
    for joined in every[1:]:
        for slide, (fold, case, y_K, _) in zip(slides, facts, strict=True):
            other = joined[slide]
            if other[:2] != (fold, case) or not np.array_equal(other[2], y_K, equal_nan=True):
                raise ValueError(f"{slide}: fold, case or labels differ between runs")
    fold_N = np.array([fold for fold, *_ in facts])
    cases, y_NK = [case for _, case, *_ in facts], np.stack([y_K for *_, y_K, _ in facts])
    times_BN = with_point(cases, draws, seed)
    averaged = [k for k in range(len(labels)) if len(set(y_NK[~np.isnan(y_NK[:, k]), k])) == 2]
    rows = {
        title: _row(labels, averaged, y_NK, fold_N, times_BN, {
            s: np.stack([joined[slide][3] for slide in slides]) for s, joined in seeds.items()
        })
        for title, seeds in whole.items()
    }  # fmt: skip
    return Pool(rows, len(slides), len(set(cases)), tuple(labels[k] for k in averaged))


def _joined(name: str, folds: Mapping[int, Fold]) -> dict[str, tuple]:
    """Slide -> fold, case, labels, probabilities."""
    found: dict[str, tuple] = {}
    for number, fold in folds.items():
        for slide, *facts in zip(fold.slide_ids, fold.case_ids, fold.y_NK, fold.p_NK, strict=True):
            if slide in found:
                raise ValueError(f"{name}: {slide} is tested in folds {found[slide][0]}, {number}")
            found[slide] = (number, *facts)
    return found


def _row(labels, averaged, y_NK, fold_N, times_BN, of_seed: Mapping[int, np.ndarray]) -> Row:
    drawn: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    each_seed = {
        kind: {
            s: [area(y_NK[:, k], p_NK[:, k], fold_N, times_BN) for k in range(len(labels))]
            for s, p_NK in of_seed.items()
        }
        for kind, area in (("pooled", _pooled), ("within_folds", _within_folds))
    }
    for kind, seeds in each_seed.items():
        for k, label in enumerate(labels):
            drawn[kind][label] = mean_of([each[k] for each in seeds.values()], len(times_BN))
        drawn[kind][MACRO] = mean_of([drawn[kind][labels[k]] for k in averaged], len(times_BN))
    figures = {
        kind: {name: interval(value_B) for name, value_B in each.items()}
        for kind, each in drawn.items()
    }
    by_seed = {
        s: float(np.mean([each[k][0] for k in averaged])) if averaged else math.nan
        for s, each in each_seed["pooled"].items()
    }
    return Row(tuple(of_seed), figures, by_seed, drawn)


def _pooled(y_N, p_N, fold_N, times_BN) -> np.ndarray:
    return auroc_draws(y_N, p_N, times_BN)


def _within_folds(y_N, p_N, fold_N, times_BN) -> np.ndarray:
    """A fold without both classes in a draw has no pairs there, and takes no part."""
    wins_B, pairs_B = np.zeros(len(times_BN)), np.zeros(len(times_BN))
    for fold in np.unique(fold_N):
        own = fold_N == fold
        times_Bn, y_n = times_BN[:, own].astype(float), y_N[own]
        of_fold_B = (times_Bn @ (y_n == 1)) * (times_Bn @ (y_n == 0))
        wins_B += np.nan_to_num(auroc_draws(y_n, p_N[own], times_BN[:, own])) * of_fold_B
        pairs_B += of_fold_B
    with np.errstate(invalid="ignore"):
        return wins_B / pairs_B
