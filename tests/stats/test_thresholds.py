"""Thresholds are those a search over all of them finds; figures at them are scikit-learn's."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score

from tapfm.stats.bootstrap import bootstrap_cases, once
from tapfm.stats.thresholds import FIGURES, RULES, choose_threshold, figures_at


def cohort(slides=47, seed=0, levels=13):
    rng = np.random.default_rng(seed)
    y = (rng.random(slides) < 0.35).astype(float)
    p = np.round((0.5 * y + rng.random(slides)) * levels) / levels / 1.5
    y[rng.random(slides) < 0.1] = np.nan
    return y, p


def by_scikit_learn(y, p, threshold):
    known = ~np.isnan(y)
    y, called = y[known], (p[known] >= threshold).astype(float)
    return {
        "balanced_accuracy": balanced_accuracy_score(y, called),
        "sensitivity": recall_score(y, called),
        "specificity": recall_score(y, called, pos_label=0),
        "f1": f1_score(y, called, zero_division=0),
    }


@pytest.mark.parametrize("seed", range(3))
def test_no_threshold_is_better_than_the_chosen_one(seed):
    y, p = cohort(seed=seed)
    every = np.append(np.unique(p), 2)  # a call changes at a score, nowhere else
    searched = [by_scikit_learn(y, p, t) for t in every]
    for rule, name in (("balanced", "balanced_accuracy"), ("f1", "f1")):
        chosen = by_scikit_learn(y, p, choose_threshold(y, p, rule))
        assert chosen[name] == pytest.approx(max(each[name] for each in searched), abs=1e-12)
    chosen = by_scikit_learn(y, p, choose_threshold(y, p, "specificity_90"))
    assert chosen["specificity"] >= 0.9
    held = [each["sensitivity"] for each in searched if each["specificity"] >= 0.9]
    assert chosen["sensitivity"] == pytest.approx(max(held), abs=1e-12)


def test_known_thresholds():
    y, p = np.array([0, 0, 1, 0, 1, 1]), np.array([0.1, 0.2, 0.4, 0.5, 0.8, 0.9])
    assert choose_threshold(y, p, "specificity_90") == pytest.approx(0.65)
    assert choose_threshold(y, p, "f1") == pytest.approx(0.3)
    assert choose_threshold(y, p, "balanced") == pytest.approx(0.65)  # as good as 0.3, and higher
    never = choose_threshold(1 - y, p, "specificity_90")  # the highest score is a negative's
    assert 0.9 < never < 0.9001
    with pytest.raises(ValueError, match="rule 'best' is none of balanced, f1, specificity_90"):
        choose_threshold(y, p, "best")


@pytest.mark.parametrize("rule", RULES)
def test_one_class_only_has_no_threshold_and_no_figures(rule):
    threshold = choose_threshold(np.array([1, 1, np.nan]), np.arange(3), rule)
    assert math.isnan(threshold)
    y, p = cohort()
    assert np.isnan(figures_at(threshold, y, p, once(y))["f1"]).all()
    assert np.isnan(figures_at(0.5, np.ones(3), np.arange(3), once(y[:3]))["f1"]).all()


def test_figures_of_every_draw_are_scikit_learns_on_its_slides():
    y, p = cohort()
    times = bootstrap_cases([str(n // 2) for n in range(len(y))], 31, 5)
    found = figures_at(0.4, y, p, times)
    for b, times_N in enumerate(times):
        rows = np.repeat(np.arange(len(y)), times_N)
        expected = by_scikit_learn(y[rows], p[rows], 0.4)
        for name in FIGURES:
            assert found[name][b] == pytest.approx(expected[name], abs=1e-12)
