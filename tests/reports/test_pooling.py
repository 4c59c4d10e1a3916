"""Pooled figures equal scikit-learn's on all folds; within folds, pairs of one fold count.

For values, spreads around each fold's own mean; for times, pairs with a known order.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score

from tapfm.reports.pooling import pool
from tapfm.reports.rows import ResultRow
from tapfm.stats.bootstrap import with_point
from tapfm.stats.metrics import auroc_draws, paired_difference
from tapfm.tasks.multiclass import Multiclass
from tapfm.tasks.multilabel import Multilabel
from tapfm.tasks.regression import Regression
from tapfm.tasks.survival import Survival

LABELS = ["A", "B"]
TASK = Multilabel(("A", "B"))
DRAWS = 53


def runs(seeds=(0, 1), folds=3, slides=60, shift=0.0):
    """Return two rows; each fold's scores may have their own scale; two slides a case."""
    rng = np.random.default_rng(0)
    y = (rng.random((slides, 2)) < 0.4).astype(float)
    fold_of = np.arange(slides) // 2 % folds
    found, flat = {}, {}
    for title, skill in (("a", 1.5), ("b", 0.5)):
        for seed in seeds:
            p = skill * y + rng.standard_normal(y.shape) + shift * fold_of[:, None]
            flat[title, seed] = p
            for fold in range(folds):
                own = np.flatnonzero(fold_of == fold)[::-1]  # another order
                names = [f"s{n:02d}" for n in own], [f"c{n // 2}" for n in own]
                known = np.where((own % 7 == 0)[:, None], np.nan, y[own])
                each = ResultRow(title, True, *names, known, p[own])
                found.setdefault(title, {}).setdefault(seed, {})[fold] = each
    y[np.arange(slides) % 7 == 0] = np.nan
    return found, flat, y, fold_of, [f"c{n // 2}" for n in range(slides)]


def test_pooled_is_the_aurocs_of_the_seeds_averaged_not_of_their_mean_score():
    found, flat, y, _, _ = runs()
    known = ~np.isnan(y[:, 0])
    row = pool(TASK, found, 3, DRAWS).rows["a"]
    each = [roc_auc_score(y[known, 0], flat["a", seed][known, 0]) for seed in (0, 1)]
    assert row.figures["pooled"]["A"].value == pytest.approx(np.mean(each), abs=1e-12)
    ensemble = roc_auc_score(y[known, 0], (flat["a", 0] + flat["a", 1])[known, 0])
    assert abs(ensemble - np.mean(each)) > 1e-3
    macros = [np.mean([roc_auc_score(y[known, k], flat["a", s][known, k]) for k in range(2)])
              for s in (0, 1)]  # fmt: skip
    assert list(row.by_seed.values()) == pytest.approx(macros)
    assert row.deviation == pytest.approx(np.std(macros, ddof=1))


def test_within_folds_compares_pairs_of_one_fold():
    """A shift between the folds' scores lowers the pooled figure and not this one."""
    found, flat, y, fold_of, _ = runs(seeds=(0,))
    wins = pairs = 0
    p = flat["a", 0][:, 0]
    for i in np.flatnonzero(y[:, 0] == 1):
        for j in np.flatnonzero((y[:, 0] == 0) & (fold_of == fold_of[i])):
            wins, pairs = wins + (p[i] > p[j]), pairs + 1
    row = pool(TASK, found, 3, DRAWS).rows["a"]
    assert row.figures["within_folds"]["A"].value == pytest.approx(wins / pairs, abs=1e-12)
    shifted = pool(TASK, runs(seeds=(0,), shift=50)[0], 3, DRAWS).rows["a"]
    assert shifted.figures["within_folds"]["A"] == row.figures["within_folds"]["A"]
    assert shifted.figures["pooled"]["A"].value < row.figures["pooled"]["A"].value - 0.05


def test_differences_are_paired_on_the_same_draws():
    found, flat, y, _, cases = runs(seeds=(0,))
    pooled = pool(TASK, found, 3, DRAWS, seed=4)
    gain = pooled.rows["a"].minus(pooled.rows["b"])["pooled"]
    order = np.argsort([f"s{n:02d}" for n in range(60)])
    expected = paired_difference(
        LABELS, y[order], flat["a", 0][order], flat["b", 0][order],
        [cases[n] for n in order], DRAWS, 4,
    )  # fmt: skip
    for name in (*LABELS, "macro"):
        assert gain[name].value == pytest.approx(expected[name].value, abs=1e-12)
        assert gain[name].low == pytest.approx(expected[name].low, abs=1e-12)
    drawn = auroc_draws(y[order, 0], flat["a", 0][order, 0], with_point(cases, DRAWS, 4))
    np.testing.assert_allclose(pooled.rows["a"].drawn["pooled"]["A"], drawn, atol=1e-12)
    assert (pooled.slides, pooled.cases, pooled.averaged) == (60, 30, ("A", "B"))
    assert (pooled.head, pooled.groups) == ("macro", ("A", "B"))


def folds_of(y_NY, p_NP, folds=3):
    """Return one row of one seed, slides assigned in turn; each is its own case."""
    fold_N = np.arange(len(y_NY)) % folds
    arms = {}
    for fold in range(folds):
        own = np.flatnonzero(fold_N == fold)
        names = [f"s{n:02d}" for n in own]
        arms[fold] = ResultRow("a", True, names, names, y_NY[own], p_NP[own])
    return {"a": {0: arms}}, fold_N


def test_classes_are_each_against_the_rest():
    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 3, 50), rng.dirichlet(np.ones(3), 50)
    p[np.arange(50), y] += 0.3
    found, _ = folds_of(y[:, None].astype(float), p)
    pooled = pool(Multiclass(("x", "y", "z"), "kind", (1.0,) * 3), found, 3, DRAWS)
    each = [roc_auc_score(y == k, p[:, k]) for k in range(3)]
    figures = pooled.rows["a"].figures["pooled"]
    assert [figures[name].value for name in pooled.groups] == pytest.approx(each)
    assert figures[pooled.head].value == pytest.approx(np.mean(each))


def test_values_of_a_fold_are_explained_around_its_own_mean():
    """A fold whose values and predictions lie elsewhere helps the pooled R2, not that within."""
    rng = np.random.default_rng(2)
    y = rng.standard_normal(48)
    y += 5.0 * (np.arange(48) % 3)
    p = y + rng.standard_normal(48)
    found, fold_N = folds_of(y[:, None], p[:, None])
    pooled = pool(Regression(("v",), (0.0,), (1.0,)), found, 3, DRAWS)
    figures = pooled.rows["a"].figures
    left = sum(((y - p)[fold_N == f] ** 2).sum() for f in range(3))
    spread = sum(len(y[fold_N == f]) * y[fold_N == f].var() for f in range(3))
    assert figures["pooled"]["v"].value == pytest.approx(r2_score(y, p))
    assert figures["within_folds"]["v"].value == pytest.approx(1 - left / spread)
    assert figures["within_folds"]["macro"].value < figures["pooled"]["macro"].value - 0.1


def test_times_are_compared_by_pairs_of_one_fold():
    rng = np.random.default_rng(3)
    time, event = rng.integers(1, 12, 40).astype(float), (rng.random(40) < 0.7).astype(float)
    time[7] = event[7] = np.nan
    risk = -time + rng.standard_normal(40) * 4
    risk[7] = 0
    y = np.stack([time, event, np.full(40, np.nan)], axis=1)
    found, fold_N = folds_of(y, np.stack([risk, rng.random(40)], axis=1))
    task = Survival(("h1", "h2"), "months", "dead", (5.0,), 5.0)
    pooled = pool(task, found, 3, DRAWS)
    wins, pairs = {True: 0, False: 0}, {True: 0, False: 0}
    for i in np.flatnonzero(event == 1):
        for j in np.flatnonzero((time > time[i]) | ((time == time[i]) & (event == 0))):
            for same in {True: (True, False), False: (False,)}[bool(fold_N[i] == fold_N[j])]:
                wins[same] += (risk[i] > risk[j]) + 0.5 * (risk[i] == risk[j])
                pairs[same] += 1
    assert (pooled.head, pooled.groups) == ("all", ())
    row = pooled.rows["a"]
    assert row.figures["pooled"]["all"].value == pytest.approx(wins[False] / pairs[False])
    assert row.figures["within_folds"]["all"].value == pytest.approx(wins[True] / pairs[True])
    assert row.by_seed == {0: pytest.approx(wins[False] / pairs[False])}


def test_a_seed_that_lacks_a_fold_is_left_out():
    found = runs()[0]
    del found["a"][1][2]
    assert pool(TASK, found, 3, DRAWS).rows["a"].seeds == (0,)
    assert math.isnan(pool(TASK, found, 3, DRAWS).rows["a"].deviation)
    del found["a"][0][0]
    assert set(pool(TASK, found, 3, DRAWS).rows) == {"b"}
    with pytest.raises(ValueError, match="no row has all of its 4 folds"):
        pool(TASK, found, 4, DRAWS)


def test_a_slide_in_two_folds_and_labels_that_differ_are_refused():
    found = runs()[0]
    found["a"][0][1] = found["a"][0][0]
    with pytest.raises(ValueError, match=r"a, seed 0: s\d+ is tested in folds 0, 1"):
        pool(TASK, found, 3, DRAWS)
    found = runs()[0]
    first = found["b"][1][0]
    found["b"][1][0] = replace(first, y_NK=1 - first.y_NK)
    with pytest.raises(ValueError, match="fold, case or labels differ between runs"):
        pool(TASK, found, 3, DRAWS)
