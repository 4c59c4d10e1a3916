"""Bins, ECE and Brier equal the libraries'; temperature and Platt undo a known distortion."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import binary_calibration_error

from tapfm.stats.bootstrap import once
from tapfm.stats.calibration import (
    SLOPES,
    Scaling,
    brier,
    ece,
    fit_platt,
    fit_temperature,
    reliability,
)


def drawn(slides=997, seed=0, slope=1.0, shift=0.0):
    """Return labels of true probabilities, and predictions distorted by slope and shift."""
    rng = np.random.default_rng(seed)
    u = 1.5 * rng.standard_normal(slides)
    y = (rng.random(slides) < expit(u)).astype(float)
    return y, expit(slope * u + shift)


def test_bins_ece_and_brier_are_the_libraries():
    y, p = drawn(slope=2.0)
    bins = reliability(y, p)
    observed, predicted = calibration_curve(y, p, n_bins=10, strategy="uniform")
    np.testing.assert_allclose([each.observed for each in bins], observed, atol=1e-12)
    np.testing.assert_allclose([each.predicted for each in bins], predicted, atol=1e-12)
    assert sum(each.slides for each in bins) == len(y)
    expected = binary_calibration_error(torch.tensor(p), torch.tensor(y).long(), n_bins=10)
    assert ece(bins) == pytest.approx(float(expected), abs=1e-9)
    assert brier(y, p, once(y))[0] == pytest.approx(brier_score_loss(y, p), abs=1e-12)


def test_bins_by_hand():
    """0, .1 in the first; .1000001 in the second; 1 in the last; empty ones are not listed."""
    y, p = np.array([0, 1, 0, 1, np.nan]), np.array([0, 0.1, 0.1000001, 1, 0.5])
    bins = reliability(y, p)
    assert [(each.low, each.slides) for each in bins] == [(0, 2), (0.1, 1), (0.9, 1)]
    assert [each.observed for each in bins] == [0.5, 0, 1]
    assert ece(bins) == pytest.approx((2 * 0.45 + 0.1000001 + 0) / 4)
    assert math.isnan(ece(reliability(np.array([np.nan]), np.array([0.5]))))


def test_draws_weigh_slides():
    y, p = drawn(5)
    times = np.array([[1, 1, 1, 1, 1], [2, 0, 0, 3, 0]], np.uint16)
    rows = [0, 0, 3, 3, 3]
    assert brier(y, p, times)[1] == pytest.approx(np.mean((p[rows] - y[rows]) ** 2))


def test_platt_undoes_slope_and_shift_and_agrees_with_logistic_regression():
    y, p = drawn(20_011, slope=2.0, shift=1.5)
    found = fit_platt(y, p)
    assert (found.slope, found.shift) == pytest.approx((0.5, -0.75), abs=0.03)
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    reference.fit(logit(p)[:, None], y)
    assert found.slope == pytest.approx(reference.coef_[0, 0], abs=1e-3)  # targets differ by 1/N
    assert found.shift == pytest.approx(reference.intercept_[0], abs=1e-3)
    assert ece(reliability(y, found(p))) < 0.02 < ece(reliability(y, p))


def test_temperature_undoes_overconfidence_and_no_shift():
    y, p = drawn(20_011, slope=3.0)
    found = fit_temperature(y, p)
    assert found.slope == pytest.approx(1 / 3, abs=0.01)
    assert found.shift == 0
    y, p = drawn(20_011, shift=2.0)  # what a loss with weighted positives does
    assert ece(reliability(y, fit_temperature(y, p)(p))) > 0.1
    assert ece(reliability(y, fit_platt(y, p)(p))) < 0.02


def test_the_minimum_is_one():
    """No neighbour fits better, on the loss as it is defined."""
    y, p = drawn(41, slope=2.0)

    def loss(slope, shift):
        q, n = Scaling(slope, shift)(p), int(y.sum())
        t = np.where(y == 1, (n + 1) / (n + 2), 1 / (41 - n + 2))
        return -np.mean(t * np.log(q) + (1 - t) * np.log(1 - q))

    best = fit_platt(y, p)
    at = loss(best.slope, best.shift)
    for a, b in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert loss(best.slope + a, best.shift + b) > at
    alone = fit_temperature(y, p)
    assert loss(alone.slope + 1e-3, 0) > loss(alone.slope, 0) < loss(alone.slope - 1e-3, 0)
    assert loss(alone.slope, 0) > at


def test_perfect_constant_and_one_sided_validation_stay_finite():
    y = np.array([0, 0, 1, 1.0])
    for fit in (fit_temperature, fit_platt):
        found = fit(y, np.array([0.0, 0.1, 0.9, 1.0]))
        assert SLOPES[0] <= found.slope <= SLOPES[1]
        assert np.isfinite(found(np.array([0.0, 0.5, 1.0]))).all()
        assert np.isfinite(fit(y, np.full(4, 0.3)).shift)
        assert fit(np.array([1, 1, np.nan, 1]), np.full(4, 0.3)) is None
        order = fit(1 - y, np.array([0.0, 0.1, 0.9, 1.0]))(np.array([0.2, 0.8]))
        assert order[0] < order[1]  # the ranking is never turned over
