"""Figures of tiles are scikit-learn's, and their intervals those of a loop that resamples cases."""

import math

import numpy as np
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from tapfm.stats.bootstrap import bootstrap_cases
from tapfm.tile_training.metrics import difference, evaluate_tiles

CLASSES = ["fat", "mucus", "stroma"]


def example(tiles=61, seed=0):
    rng = np.random.default_rng(seed)
    y_N = np.arange(tiles) % 3
    p_NK = rng.dirichlet(np.ones(3), tiles) + 0.4 * np.eye(3)[y_N]
    return y_N, p_NK / p_NK.sum(1, keepdims=True), [f"c{n // 7}" for n in range(tiles)]


def test_as_scikit_learn():
    y_N, p_NK, cases = example()
    found, said_N = evaluate_tiles(CLASSES, y_N, p_NK, cases, draws=10), p_NK.argmax(1)
    assert 0.4 < found["f1"].value < 0.95, "a figure that says something"
    assert found["f1"].value == pytest.approx(f1_score(y_N, said_N, average="macro"))
    assert found["balanced_accuracy"].value == pytest.approx(balanced_accuracy_score(y_N, said_N))
    auroc = roc_auc_score(y_N, p_NK, multi_class="ovr", average="macro")
    assert found["auroc"].value == pytest.approx(auroc)
    assert found["confusion"] == confusion_matrix(y_N, said_N).tolist()
    each = precision_recall_fscore_support(y_N, said_N)
    for k, name in enumerate(CLASSES):
        mine = [found["classes"][name][key] for key in ("precision", "recall", "f1", "tiles")]
        assert mine == pytest.approx([figure[k] for figure in each])
        one = roc_auc_score(y_N == k, p_NK[:, k])
        assert found["classes"][name]["auroc"].value == pytest.approx(one)


def test_intervals_are_those_of_the_loop():
    y_N, p_NK, cases = example()
    q_NK = example(seed=1)[1]
    found = evaluate_tiles(CLASSES, y_N, p_NK, cases, draws=40, seed=5)
    gain = difference(CLASSES, y_N, p_NK, q_NK, cases, draws=40, seed=5)
    f1, balanced, gains = [], [], []
    for times_N in bootstrap_cases(cases, 40, 5):
        rows = np.repeat(np.arange(len(y_N)), times_N)
        y, a, b = y_N[rows], p_NK[rows].argmax(1), q_NK[rows].argmax(1)
        f1.append(f1_score(y, a, average="macro"))
        balanced.append(balanced_accuracy_score(y, a))
        gains.append(f1[-1] - f1_score(y, b, average="macro"))
    for interval, drawn in ((found["f1"], f1), (found["balanced_accuracy"], balanced),
                            (gain["f1"], gains)):  # fmt: skip
        assert (interval.low, interval.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
        assert interval.draws == 40


def test_whole_cases_are_drawn():
    """Seven copies of a tile in one case say no more than one: the interval is as wide."""
    y_N, p_NK, _ = example(30)
    cases = np.array([f"c{n}" for n in range(30)])
    single = evaluate_tiles(CLASSES, y_N, p_NK, cases, draws=200)["f1"]
    rows = np.repeat(np.arange(30), 7)
    copied = evaluate_tiles(CLASSES, y_N[rows], p_NK[rows], cases[rows], draws=200)["f1"]
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high))
    own = evaluate_tiles(CLASSES, y_N[rows], p_NK[rows], range(210), draws=200)["f1"]
    assert own.high - own.low < 0.7 * (copied.high - copied.low)


def test_a_draw_that_lacks_a_class_is_left_out_and_counted():
    y_N, p_NK = np.array([0, 0, 1, 1, 2]), np.eye(3)[[0, 1, 1, 1, 2]]
    cases = ["a", "b", "a", "b", "c"]
    found = evaluate_tiles(CLASSES, y_N, p_NK, cases, draws=500, seed=2)
    times = bootstrap_cases(cases, 500, 2)
    whole = sum(all((t * (y_N == k)).sum() > 0 for k in range(3)) for t in times)
    assert found["f1"].draws == found["auroc"].draws == whole < 500


def test_a_class_without_tiles_is_not_averaged():
    y_N, p_NK, cases = example()
    rows = y_N < 2
    found = evaluate_tiles(CLASSES, y_N[rows], p_NK[rows], np.array(cases)[rows], draws=20)
    assert found["averaged"] == ["fat", "mucus"]
    expected = f1_score(y_N[rows], p_NK[rows].argmax(1), average="macro", labels=[0, 1])
    assert found["f1"].value == pytest.approx(expected)
    assert math.isnan(found["classes"]["stroma"]["auroc"].value)


def test_a_model_against_itself():
    y_N, p_NK, cases = example()
    for gain in difference(CLASSES, y_N, p_NK, p_NK, cases, draws=30).values():
        assert (gain.value, gain.low, gain.high) == (0, 0, 0)
