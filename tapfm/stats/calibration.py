"""Calibration of probabilities, and two rescalings that are fitted on the validation split.

    reliability   slides in 10 bins of equal width: mean predicted probability, observed frequency
    ece           mean over the bins of |predicted - observed|, weighted by slides
    brier         mean of (p - y)^2
    temperature   p' = sigmoid(a logit p): changes confidence, never the side of 0.5
    platt         p' = sigmoid(a logit p + b)

Losses here weigh positives by negatives over positives, so a model's outputs are shifted from the
frequency's logit by the log of that weight: a temperature cannot correct that, Platt's shift can.
Both keep the ranking, and so the AUROC, and both are fitted on validation alone.

Condition: the ECE of few slides is not 0 even with perfect calibration, since a bin's frequency is
    noisy; it has no interval, because resampling adds that noise once more. Brier has one.
Source: Guo et al. 2017 (ICML, arXiv 1706.04599), bins and temperature; Platt 1999, with his targets
    (N+ + 1) / (N+ + 2) and 1 / (N- + 2), which keep a perfect validation ranking finite.

Shapes: N slides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit

BINS = 10
SLOPES = (0.05, 20.0)  # allowed slopes: few validation slides may fit any value
CLIP = 1e-6  # predictions_<split>.csv resolves probabilities near 0 or 1 no finer


@dataclass(frozen=True)
class Scaling:
    """A rescaling of probabilities: p' = sigmoid(slope * logit p + shift)."""

    slope: float = 1.0
    """1 over the temperature."""
    shift: float = 0.0

    def __call__(self, p_N: np.ndarray) -> np.ndarray:
        """Return the rescaled probabilities."""
        return p_N if self == Scaling() else expit(self.slope * _logits(p_N) + self.shift)


@dataclass(frozen=True)
class Bin:
    """Slides whose probability lies in (low, high]; the first bin includes 0."""

    low: float
    high: float
    slides: int
    predicted: float
    """Mean probability of these slides."""
    observed: float
    """Share of these slides that is positive."""


def reliability(y_N: np.ndarray, p_N: np.ndarray) -> list[Bin]:
    """Return the bins that have a slide; unknown labels (nan) are left out."""
    known_N = ~np.isnan(y_N)
    y_N, p_N = y_N[known_N], np.asarray(p_N, float)[known_N]
    edges = np.linspace(0, 1, BINS + 1)
    place_N = np.searchsorted(edges[1:-1], p_N, side="left")
    found = []
    for n in np.unique(place_N):
        own = place_N == n
        low, high = float(edges[n]), float(edges[n + 1])
        found.append(Bin(low, high, int(own.sum()), float(p_N[own].mean()), float(y_N[own].mean())))
    return found


def ece(bins: list[Bin]) -> float:
    """Return the expected calibration error of bins; nan without a slide."""
    slides = sum(each.slides for each in bins)
    gaps = sum(each.slides * abs(each.predicted - each.observed) for each in bins)
    return gaps / slides if slides else math.nan


def brier(y_N: np.ndarray, p_N: np.ndarray, times_BN: np.ndarray) -> np.ndarray:
    """Return the Brier score of every draw (B,)."""
    known_N = ~np.isnan(y_N)
    times_BN = times_BN[:, known_N].astype(float)
    off_N = (p_N[known_N] - y_N[known_N]) ** 2
    with np.errstate(invalid="ignore"):
        return times_BN @ off_N / times_BN.sum(1)


def fit_temperature(y_N: np.ndarray, p_N: np.ndarray) -> Scaling | None:
    """Return the slope that fits validation labels best; None if only one class is known."""
    return _fit(y_N, p_N, shift=False)


def fit_platt(y_N: np.ndarray, p_N: np.ndarray) -> Scaling | None:
    """Return the slope and shift that fit best; None if only one class is known."""
    return _fit(y_N, p_N, shift=True)


def _fit(y_N: np.ndarray, p_N: np.ndarray, *, shift: bool) -> Scaling | None:
    known_N = ~np.isnan(y_N)
    positive_N, x_N = y_N[known_N] == 1, _logits(np.asarray(p_N, float)[known_N])
    positives, negatives = int(positive_N.sum()), int((~positive_N).sum())
    if not positives or not negatives:
        return None
    target_N = np.where(positive_N, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(ab: np.ndarray) -> tuple[float, np.ndarray]:
        u_N = ab[0] * x_N + ab[1]
        off_N = expit(u_N) - target_N
        return float(np.mean(np.logaddexp(0, u_N) - target_N * u_N)), np.array(
            [np.mean(off_N * x_N), np.mean(off_N)]
        )

    bounds = [SLOPES, (None, None) if shift else (0.0, 0.0)]
    exact = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    found = minimize(loss, [1.0, 0.0], jac=True, bounds=bounds, method="L-BFGS-B", options=exact)
    return Scaling(float(found.x[0]), float(found.x[1]))


def _logits(p_N: np.ndarray) -> np.ndarray:
    return logit(np.clip(p_N, CLIP, 1 - CLIP))
