"""`tapfm.stats.delong` must give DeLong's variance as its definition has it, every pair compared.

The reference below is the definition: kernels of all pairs, placements as their row and column
means, the sample covariances of 1988 for independent slides; Obuchowski's sums for cases.
"""

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from tapfm.stats.delong import covariance, delong, delong_difference


def cohort(slides=61, scores=2, seed=0, levels=9):
    """Tied scores, some labels unknown, cases of several slides that may be of both classes."""
    rng = np.random.default_rng(seed)
    y = (rng.random(slides) < 0.4).astype(float)
    p = np.round((0.4 * y + rng.random((scores, slides))) * levels) / levels
    y[rng.random(slides) < 0.1] = np.nan
    return y, p, np.array([f"c{n}" for n in rng.integers(0, slides // 2, slides)])


def placements(y, p):
    """Return means of psi(x, y) = 1, 1/2, 0 over all pairs, by definition."""
    x, z = p[y == 1], p[y == 0]
    psi = np.array([[1.0 if a > b else 0.5 if a == b else 0.0 for b in z] for a in x])
    return psi.mean(1), psi.mean(0), psi.mean()


def delong_1988(y, p):
    v10, v01 = (np.array([placements(y, row)[n] for row in p]) for n in (0, 1))
    return np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]


def obuchowski_1997(y, p, cases):
    """Return one score's S10, S01 and S11, case by case."""
    v10, v01, value = placements(y, p)
    positive, negative = cases[y == 1], cases[y == 0]
    names = sorted(set(positive) | set(negative))
    over = {n: (v10[positive == n] - value).sum() for n in names}
    under = {n: (v01[negative == n] - value).sum() for n in names}
    i10, i01, i = len(set(positive)), len(set(negative)), len(names)
    m, n = len(v10), len(v01)
    s10 = i10 / ((i10 - 1) * m) * sum(each**2 for each in over.values())
    s01 = i01 / ((i01 - 1) * n) * sum(each**2 for each in under.values())
    s11 = i / (i - 1) * sum(over[name] * under[name] for name in names)
    return s10 / m + s01 / n + 2 * s11 / (m * n)


@pytest.mark.parametrize("seed", range(5))
def test_slides_of_their_own_give_the_definition(seed):
    y, p, _ = cohort(seed=seed)
    known = ~np.isnan(y)
    assert len(np.unique(p[0])) < 20  # the ties are real
    auroc, found = covariance(y, p)
    np.testing.assert_allclose(found, delong_1988(y[known], p[:, known]), rtol=0, atol=1e-12)
    expected = [roc_auc_score(y[known], row[known]) for row in p]
    np.testing.assert_allclose(auroc, expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_cases_of_several_slides_give_the_clustered_definition(seed):
    y, p, cases = cohort(seed=seed)
    known = ~np.isnan(y)
    found = delong(y, p[0], cases)
    expected = obuchowski_1997(y[known], p[0, known], cases[known])
    assert found.se**2 == pytest.approx(expected, abs=1e-12)
    assert found.se != pytest.approx(delong(y, p[0]).se, rel=1e-3)  # the cases matter


def test_a_case_with_both_classes_is_counted_once():
    y, p = np.array([1, 0, 1, 0, 1, 0.0]), np.array([0.9, 0.8, 0.6, 0.7, 0.4, 0.2])
    cases = np.array(["a", "a", "b", "b", "c", "d"])
    assert delong(y, p, cases).se ** 2 == pytest.approx(obuchowski_1997(y, p, cases), abs=1e-12)


def test_interval_and_test_are_walds():
    y, p, _ = cohort()
    known = ~np.isnan(y)
    c = delong_1988(y[known], p[:, known])
    found = delong_difference(y, *p)
    se = math.sqrt(c[0, 0] + c[1, 1] - 2 * c[0, 1])
    assert found.se == pytest.approx(se, abs=1e-12)
    assert found.p == pytest.approx(2 * norm.sf(abs(found.value) / se), rel=1e-9)
    own = delong(y, p[0])
    assert (own.low, own.high) == pytest.approx(norm.interval(0.95, own.value, own.se), abs=1e-12)
    assert own.p == pytest.approx(2 * norm.sf(abs(own.value - 0.5) / own.se), rel=1e-9)
    assert found.value == pytest.approx(own.value - delong(y, p[1]).value, abs=1e-12)
    back = delong_difference(y, p[1], p[0])
    assert (back.value, back.p) == pytest.approx((-found.value, found.p))


def test_an_interval_of_an_auroc_ends_at_0_and_1_and_of_a_difference_does_not():
    y, p = np.array([1, 1, 0, 0.0]), np.array([0.9, 0.1, 0.5, 0.6])
    found = delong(y, p)
    assert (found.low, found.high) == (0, 1)
    assert delong_difference(y, p, -p).low < -0.5


def test_a_score_does_not_differ_from_itself_nor_from_its_like():
    y, p, cases = cohort()
    for other in (p[0], np.exp(3 * p[0])):
        same = delong_difference(y, p[0], other, cases)
        assert same.value == pytest.approx(0, abs=1e-12)
        assert same.se == pytest.approx(0, abs=1e-7)
        assert same.p == 1


@pytest.mark.parametrize("y", [[1, 1, 1, 1], [0, 0, 0, np.nan], [1, 0, 0, 0], [np.nan] * 4])
def test_too_few_of_a_class_have_no_variance(y):
    found = delong(np.array(y), np.array([0.1, 0.3, 0.3, 0.2]))
    assert math.isnan(found.se)
    assert math.isnan(found.low)
    assert math.isnan(found.p)


def test_the_price_is_a_sort():
    """200,000 slides: every pair compared would be 10^10 of them."""
    rng = np.random.default_rng(0)
    y = (np.arange(200_000) % 2).astype(float)
    found = delong(y, y + rng.standard_normal(len(y)))
    assert found.value == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=4 * found.se)
    assert 0 < found.se < 0.002
