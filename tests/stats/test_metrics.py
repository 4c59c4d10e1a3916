"""`tapfm.stats.metrics` must give scikit-learn's figures, and the intervals of the loop below.

The loop draws cases one by one, gathers their slides and asks scikit-learn: read it first. The
vectorised bootstrap is a way to skip its work, never a different answer.
"""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from tapfm.stats import metrics
from tapfm.stats.bootstrap import interval, mean_of_defined, percentiles
from tapfm.stats.metrics import (
    Interval,
    auprc,
    auroc,
    bootstrap_cases,
    evaluate,
    macro_auroc,
    paired_difference,
)

DRAWS, SEED = 97, 3


def cohort(slides=53, labels=2, cases=31, seed=0, levels=11, unknown=0.2):
    """Random labels, some unknown; scores on few levels, so that many are tied."""
    rng = np.random.default_rng(seed)
    y = (rng.random((slides, labels)) < 0.4).astype(float)
    p = np.round((0.3 * y + rng.random((slides, labels))) * levels) / levels
    y[rng.random(y.shape) < unknown] = np.nan
    return y, p, [f"case{c}" for c in rng.integers(0, cases, slides)]


def reference_draws(y, p, cases, score):
    """Return AUROC draws made case by case; nan for a draw of one class."""
    cases = np.asarray(cases)
    found = []
    for times in bootstrap_cases(cases, DRAWS, SEED):
        rows = [row for row, count in enumerate(times) for _ in range(count)]
        rows = [row for row in rows if not math.isnan(y[row])]
        defined = len(set(y[rows])) == 2
        found.append(score(y[rows], p[rows]) if defined else math.nan)
    return np.array(found)


def test_point_values_are_scikit_learns_with_ties_and_unknowns():
    y, p, _ = cohort()
    for k in range(2):
        known = ~np.isnan(y[:, k])
        assert len(set(p[known, k])) < known.sum() / 2  # the ties are real
        expected = roc_auc_score(y[known, k], p[known, k])
        assert auroc(y[:, k], p[:, k]) == pytest.approx(expected, abs=1e-12)
        expected = average_precision_score(y[known, k], p[known, k])
        assert auprc(y[:, k], p[:, k]) == pytest.approx(expected, abs=1e-12)


def test_known_values():
    """Positives at .8 and .4, negatives at .4 and .1: 3.5 of 4 pairs; 1/2 + 1/2 * 2/3."""
    y, p = np.array([1, 1, 0, 0, np.nan]), np.array([0.8, 0.4, 0.4, 0.1, 0.9])
    assert auroc(y, p) == 3.5 / 4
    assert auprc(y, p) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_infinite_scores_are_tied_with_each_other():
    y, p = np.array([1, 0, 1, 0.0]), np.array([np.inf, np.inf, -np.inf, -np.inf])
    assert auroc(y, p) == 0.5


@pytest.mark.parametrize("y", [[1, 1, 1], [0, 0, np.nan], [np.nan] * 3, []])
def test_one_class_only_is_nan_not_a_number_made_up(y):
    y = np.array(y, float)
    assert math.isnan(auroc(y, np.arange(len(y))))
    assert math.isnan(auprc(y, np.arange(len(y))))


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=23))
def test_any_ranking_agrees_with_scikit_learn(pairs):
    y, p = (np.array(column, float) for column in zip(*pairs, strict=True))
    assume(0 < y.sum() < len(y))
    assert auroc(y, p) == pytest.approx(roc_auc_score(y, p), abs=1e-12)
    assert auprc(y, p) == pytest.approx(average_precision_score(y, p), abs=1e-12)
    assert auroc(y, p) + auroc(1 - y, p) == pytest.approx(1, abs=1e-12)
    assert auroc(y, p) + auroc(y, -p) == pytest.approx(1, abs=1e-12)
    assert auroc(y, np.exp(p)) == auroc(y, p)  # the order alone counts
    both = [np.concatenate([part, part]) for part in (y, p)]
    assert auroc(*both) == pytest.approx(auroc(y, p), abs=1e-12)
    assert auprc(*both) == pytest.approx(auprc(y, p), abs=1e-12)


@pytest.mark.parametrize("block", [metrics.BLOCK, 101])
def test_intervals_are_those_of_the_loop(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)  # 101 elements: a draw or two at a time
    y, p, cases = cohort()
    found = evaluate(["A", "B"], y, p, cases, DRAWS, SEED)
    for name, score in [("auroc", roc_auc_score), ("auprc", average_precision_score)]:
        drawn = [reference_draws(y[:, k], p[:, k], cases, score) for k in range(2)]
        for label, figures in zip(["A", "B", "macro"], [*drawn, np.mean(drawn, 0)], strict=True):
            each = found[label][name]
            reach = norm.ppf(0.975) * np.std(figures, ddof=1) / (each.value * (1 - each.value))
            expected = expit(logit(each.value) + reach * np.array([-1, 1]))
            np.testing.assert_allclose((each.low, each.high), expected, atol=1e-12)
            assert each.draws == DRAWS
    assert found["macro"]["auroc"].value == pytest.approx(macro_auroc(y, p))
    assert found["A"]["known"] == int((~np.isnan(y[:, 0])).sum())
    assert found["A"]["positives"] == int((y[:, 0] == 1).sum())


def test_the_loop_can_disagree():
    """Slides resampled without regard to their case give another interval."""
    y, p, cases = cohort()
    clustered = evaluate(["A", "B"], y, p, cases, DRAWS, SEED)
    alone = evaluate(["A", "B"], y, p, [str(n) for n in range(len(cases))], DRAWS, SEED)
    assert clustered["A"]["auroc"].low != alone["A"]["auroc"].low


def test_copies_of_a_slide_add_no_certainty():
    """Five copies of every slide within its case: the same interval. As cases of their own: no."""
    y, p, cases = cohort(slides=61, cases=61)
    cases = [f"case{n}" for n in range(61)]
    names = ["A", "B"]
    once = evaluate(names, y, p, cases, 500)["macro"]["auroc"]
    copies = [np.tile(part, (5, 1)) for part in (y, p)]
    grouped = evaluate(names, *copies, cases * 5, 500)["macro"]["auroc"]
    loose = evaluate(names, *copies, [str(n) for n in range(305)], 500)["macro"]["auroc"]
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high), abs=1e-12)
    assert loose.high - loose.low < 0.6 * (once.high - once.low)


def test_every_draw_takes_whole_cases_and_as_many_as_there_are():
    cases = ["b", "a", "b", "c", "a", "b", "d"]
    times = bootstrap_cases(cases, DRAWS, SEED).astype(int)
    assert times.shape == (DRAWS, 7)
    for case in "abcd":
        columns = times[:, [n for n, name in enumerate(cases) if name == case]]
        assert (columns == columns[:, :1]).all()
    first = [cases.index(case) for case in "abcd"]
    assert (times[:, first].sum(1) == 4).all()
    assert times[:, first].mean() == pytest.approx(1)
    assert (times == bootstrap_cases(cases, DRAWS, SEED)).all()
    assert (times != bootstrap_cases(cases, DRAWS, SEED + 1)).any()


def test_draws_of_one_class_are_left_out_and_counted():
    """With one positive case of seven, about a third of the draws miss it."""
    y = np.array([[1, 0]] + [[0, n % 2] for n in range(6)], float)
    p = np.random.default_rng(0).random(y.shape)
    cases = [str(n) for n in range(7)]
    found = evaluate(["rare", "common"], y, p, cases, 1000)
    expected = 1 - (6 / 7) ** 7
    assert found["rare"]["auroc"].draws / 1000 == pytest.approx(expected, abs=0.05)
    assert found["common"]["auroc"].draws > 950
    assert found["macro"]["auroc"].draws <= found["rare"]["auroc"].draws
    assert 0 <= found["rare"]["auroc"].low <= found["rare"]["auroc"].high <= 1


def test_percentiles_are_of_the_draws_that_have_the_figure():
    y, p = np.array([0.0, 0, 1, 1]), np.array([0.1, 0.3, 0.2, 0.9])
    times = np.array([[1, 1, 1, 1], [4, 0, 0, 0], [1, 1, 2, 0], [0, 2, 1, 1]])
    drawn = metrics.auroc_draws(y, p, times)
    assert percentiles(drawn) == Interval(0.75, 0.5, 0.5, 2)
    never = np.full(4, np.nan)
    assert mean_of_defined([drawn, never], 4) == pytest.approx(drawn, nan_ok=True)
    assert np.isnan(mean_of_defined([never], 4)).all()


def test_a_label_of_one_class_is_undefined_and_macro_says_it_left_it_out():
    y, p, cases = cohort(unknown=0)
    y[:, 1] = 0
    found = evaluate(["A", "B"], y, p, cases, DRAWS)
    assert math.isnan(found["B"]["auroc"].value)
    assert math.isnan(found["B"]["auroc"].low)
    assert found["B"]["auroc"].draws == 0
    assert found["macro"]["labels"] == ["A"]
    assert found["macro"]["auroc"] == found["A"]["auroc"]
    gains = paired_difference(["A", "B"], y, p, p[::-1], cases, DRAWS)
    assert math.isnan(gains["B"].value)
    assert gains["macro"] == gains["A"]
    assert gains["A"].draws == DRAWS


def test_paired_difference_uses_the_same_draws():
    y, a, cases = cohort()
    b = np.random.default_rng(9).random(a.shape)
    found = paired_difference(["A", "B"], y, a, b, cases, DRAWS, SEED)
    loops = [
        reference_draws(y[:, k], a[:, k], cases, roc_auc_score)
        - reference_draws(y[:, k], b[:, k], cases, roc_auc_score)
        for k in range(2)
    ]
    for label, figures in zip(["A", "B", "macro"], [*loops, np.mean(loops, 0)], strict=True):
        low, high = np.quantile(figures, [0.025, 0.975])
        assert (found[label].low, found[label].high) == pytest.approx((low, high), abs=1e-12)
    assert found["A"].value == pytest.approx(auroc(y[:, 0], a[:, 0]) - auroc(y[:, 0], b[:, 0]))


def test_a_model_differs_from_itself_by_nothing_and_from_its_twin_by_the_negative():
    y, a, cases = cohort()
    b = np.random.default_rng(9).random(a.shape)
    names = ["A", "B"]
    assert paired_difference(names, y, a, a, cases, DRAWS)["macro"] == Interval(0, 0, 0, DRAWS)
    there = paired_difference(names, y, a, b, cases, DRAWS)["macro"]
    back = paired_difference(names, y, b, a, cases, DRAWS)["macro"]
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-12)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """250 cohorts of 40 cases from a known ranker; percentiles of the draws would hold it less."""
    truth = 0.9214  # P(N(2, 1) > N(0, 1)) = Phi(2 / sqrt 2)
    held, by_percentiles = 0, 0
    for seed in range(250):
        rng = np.random.default_rng(seed)
        y = (np.arange(40) < 10).astype(float)
        p = 2 * y + rng.standard_normal(40)
        drawn = metrics.auroc_draws(y, p, bootstrap_cases([str(n) for n in range(40)], 300, seed))
        found = interval(np.append(auroc(y, p), drawn))
        held += found.low <= truth <= found.high
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        by_percentiles += low <= truth <= high
    assert 0.92 <= held / 250 <= 0.98
    assert by_percentiles < held


def test_an_interval_stays_between_0_and_1_and_turns_over_with_its_figure():
    rng = np.random.default_rng(0)
    for value in (0.004, 0.3, 0.97, 0.999):
        drawn = np.append(value, np.clip(value + 0.02 * rng.standard_normal(200), 0, 1))
        found, turned = interval(drawn), interval(1 - drawn)
        assert 0 < found.low < value < found.high < 1
        assert (turned.low, turned.high) == pytest.approx((1 - found.high, 1 - found.low), rel=1e-9)
    assert interval(np.ones(50)) == Interval(1, 1, 1, 49)
    assert math.isnan(interval(np.full(50, np.nan)).low)


def test_bad_input_is_named():
    y, p, cases = cohort()
    with pytest.raises(ValueError, match=r"labels must be 0, 1 or nan \(unknown\), found 2"):
        evaluate(["A", "B"], np.where(y == 1, 2, y), p, cases)
    with pytest.raises(ValueError, match=r"scores have shape \(53, 1\).*\(53, 2\) is needed"):
        evaluate(["A", "B"], y, p[:, :1], cases)
    with pytest.raises(ValueError, match="may not be named 'macro'"):
        evaluate(["A", "macro"], y, p, cases)
    p[7, 1] = np.nan
    with pytest.raises(ValueError, match="score of B is nan in row 7"):
        evaluate(["A", "B"], y, p, cases)
