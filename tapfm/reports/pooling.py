"""Pools many runs into one metric: folds joined by case, seeds averaged, differences paired.

In a cross-validation each case is tested once, so the out-of-fold predictions of one seed cover the
whole cohort: pooled, they give the task's metric (AUROC, R², concordance), and resampling the cases
gives its interval. Runs of other seeds predict the same cases again; their metrics are averaged
within every draw, because averaging their predictions would make another model, an ensemble. A
difference is that of two such means, on the same draws.

    pooled         every slide against every other, across folds
    within folds   AUROC and concordance of pairs within a fold, (sum of wins) / (sum of pairs), R²
                   of spreads around the folds' means: models of two folds need not share a scale,
                   which lowers the pooled metric

Condition: draws of cases give the uncertainty of these models, not of training anew; the deviation
    over the seeds is given for that. A row is averaged over the seeds that have every fold.
Source: Bradley 1997 (Pattern Recognition 30:1145), pooling; Parker et al. 2007 (BMC Bioinformatics
    8:326), its bias, and pairs within folds.

Shapes: N slides, Y numbers of a target, P predicted numbers, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tapfm.stats.bootstrap import Interval, mean_of, percentiles, with_point
from tapfm.stats.metrics import interval_of

if TYPE_CHECKING:
    from tapfm.reports.rows import ResultRow
    from tapfm.tasks import Task

KINDS = ("pooled", "within_folds")


@dataclass(frozen=True)
class PooledRow:
    """A model of the table: its metrics, and their values in every draw."""

    seeds: tuple[int, ...]
    """Seeds that have every fold; they are averaged."""
    figures: dict[str, dict[str, Interval]]
    """By kind, then by group of `Task.measure`: a label, "macro"."""
    by_seed: dict[int, float]
    """Pooled metric of the first group, by seed."""
    drawn: dict[str, dict[str, np.ndarray]]
    """By kind, then group: (1 + B,), the value first."""

    @property
    def deviation(self) -> float:
        """Return the standard deviation of the pooled metric over seeds; nan for one seed."""
        values = list(self.by_seed.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

    def minus(self, other: PooledRow) -> dict[str, dict[str, Interval]]:
        """Return this row's metric minus the other's, by kind and group."""
        return {
            kind: {name: percentiles(a - other.drawn[kind][name]) for name, a in each.items()}
            for kind, each in self.drawn.items()
        }


@dataclass(frozen=True)
class Pool:
    """Every row, on the slides that all of them predicted."""

    rows: dict[str, PooledRow]
    slides: int
    cases: int
    head: str
    """The group that models are compared by: "macro", or the only one."""
    groups: tuple[str, ...]
    """The other groups."""
    averaged: tuple[str, ...]
    """Groups whose metric is defined; "macro" is their mean."""


def pool(
    task: Task,
    runs: Mapping[str, Mapping[int, Mapping[int, ResultRow]]],
    folds: int,
    draws: int = 2000,
    seed: int = 0,
) -> Pool:
    """Return pooled rows from predictions by title, seed and fold.

    Args:
        task: what was predicted; its `monitor` names the metric.
        runs: title to seed to fold to predictions; titles without a complete seed are left out.
        folds: number of folds of a complete seed.
        draws: bootstrap draws.
        seed: seed of the draws.

    Raises:
        ValueError: no row is complete, a slide is in two folds, or rows disagree on a slide.
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
        for slide, (fold, case, y_Y, _) in zip(slides, facts, strict=True):
            other = joined[slide]
            if other[:2] != (fold, case) or not np.array_equal(other[2], y_Y, equal_nan=True):
                raise ValueError(
                    f"{slide}: fold, case or labels differ between runs. Run them on one table."
                )
    fold_N = np.array([fold for fold, *_ in facts])
    cases, y_NY = [case for _, case, *_ in facts], np.stack([y_Y for *_, y_Y, _ in facts])
    times_BN = with_point(cases, draws, seed).astype(float)
    rows = {
        title: _pooled_row(task, y_NY, fold_N, times_BN, {
            s: np.stack([joined[slide][3] for slide in slides]) for s, joined in seeds.items()
        })
        for title, seeds in whole.items()
    }  # fmt: skip
    pooled = next(iter(rows.values())).figures["pooled"]
    head, *groups = pooled
    averaged = tuple(group for group in groups if not math.isnan(pooled[group].value))
    return Pool(rows, len(slides), len(set(cases)), head, tuple(groups), averaged)


def _joined(name: str, folds: Mapping[int, ResultRow]) -> dict[str, tuple]:
    """Return fold, case, target and prediction of each slide."""
    found: dict[str, tuple] = {}
    for number, fold in folds.items():
        for slide, *facts in zip(fold.slide_ids, fold.case_ids, fold.y_NK, fold.p_NK, strict=True):
            if slide in found:
                raise ValueError(f"{name}: {slide} is tested in folds {found[slide][0]}, {number}")
            found[slide] = (number, *facts)
    return found


def _pooled_row(task: Task, y_NY, fold_N, times_BN, of_seed: Mapping[int, np.ndarray]) -> PooledRow:
    draws = len(times_BN)
    pooled = {s: _pooled(task, y_NY, p_NP, times_BN) for s, p_NP in of_seed.items()}
    within = {s: _within_folds(task, y_NY, p_NP, fold_N, times_BN) for s, p_NP in of_seed.items()}
    drawn = {
        kind: {
            group: mean_of([each[group] for each in seeds.values()], draws)
            for group in next(iter(seeds.values()))
        }
        for kind, seeds in zip(KINDS, (pooled, within), strict=True)
    }
    head, *groups = drawn["pooled"]
    if groups:  # the first group is the mean of these
        averaged = [group for group in groups if not math.isnan(drawn["pooled"][group][0])]
        each = drawn["within_folds"]
        each[head] = mean_of([each[group] for group in averaged], draws)
    figures = {
        kind: {group: interval_of(task.monitor, value_B) for group, value_B in each.items()}
        for kind, each in drawn.items()
    }
    by_seed = {s: float(each[head][0]) for s, each in pooled.items()}
    return PooledRow(tuple(of_seed), figures, by_seed, drawn)


def _pooled(task: Task, y_NY, p_NP, times_BN) -> dict[str, np.ndarray]:
    measured = task.measure(y_NY, p_NP, times_BN)
    return {group: figures[task.monitor] for group, figures in measured.items()}


def _within_folds(task: Task, y_NY, p_NP, fold_N, times_BN) -> dict[str, np.ndarray]:
    """Return the metric within folds; a fold without a comparable pair in a draw is left out."""
    above: dict[str, np.ndarray] = {}
    below: dict[str, np.ndarray] = {}
    for fold in np.unique(fold_N):
        own = fold_N == fold
        figures = _pooled(task, y_NY[own], p_NP[own], times_BN[:, own])
        for group, share_B in task.fold_weights(y_NY[own], times_BN[:, own]).items():
            above[group] = above.get(group, 0) + np.nan_to_num(figures[group]) * share_B
            below[group] = below.get(group, 0) + share_B
    with np.errstate(invalid="ignore"):
        return {group: above[group] / below[group] for group in above}
