"""Decision thresholds, and sensitivity, specificity, balanced accuracy and F1 at them.

A threshold is chosen on the validation split and then fixed: chosen on the split it is reported on,
its figures would be too good. There are three rules:

    balanced         the highest balanced accuracy (Youden's index)
    f1               the highest F1
    specificity_90   the lowest threshold at which nine in ten negatives are called negative

A slide is called positive if its score is the threshold or above. Thresholds lie half way between
neighbouring validation scores; of equally good ones the highest is taken (fewest positives).

Source: Youden 1950; definitions as scikit-learn's `balanced_accuracy_score`, `f1_score`.
Differs: a draw without a positive or a negative slide gives nan, where scikit-learn gives 0.

Shapes: N slides, B draws, G thresholds.
"""

from __future__ import annotations

import math

import numpy as np

from slides.errors import SettingsError
from tapfm.stats.confusions import confusions, f1s, recalls

RULES = ("balanced", "f1", "specificity_90")
FIGURES = ("balanced_accuracy", "sensitivity", "specificity", "f1")
SPECIFICITY = 0.90


def choose_threshold(y_N: np.ndarray, p_N: np.ndarray, rule: str) -> float:
    """Return the threshold that a rule chooses; nan if only one class is known.

    Args:
        y_N: labels of the validation split: 0, 1, or nan where unknown (left out).
        p_N: scores.
        rule: one of `RULES`.
    """
    if rule not in RULES:
        raise SettingsError(f"rule {rule!r} is none of {', '.join(RULES)}")
    y_N, p_N = _known(y_N, p_N)
    count_2 = np.bincount(y_N, minlength=2)
    if not count_2.all():
        return math.nan
    scores = np.unique(p_N)[::-1]
    between = (scores[1:] + scores[:-1]) / 2
    thresholds_G = np.concatenate([[np.nextafter(scores[0], np.inf)], between, scores[-1:]])
    below = [np.searchsorted(np.sort(p_N[y_N == k]), thresholds_G) for k in (0, 1)]
    below_G2 = np.stack(below, axis=1)
    found = _figures(np.stack([below_G2, count_2 - below_G2], axis=2))
    if rule == "specificity_90":
        passes_G = found["specificity"] >= SPECIFICITY - 1e-12
        return float(thresholds_G[passes_G][-1])  # calling no slide positive always passes
    value_G = found["f1" if rule == "f1" else "balanced_accuracy"]
    return float(thresholds_G[np.argmax(value_G >= value_G.max() - 1e-12)])


def figures_at(
    threshold: float, y_N: np.ndarray, p_N: np.ndarray, times_BN: np.ndarray
) -> dict[str, np.ndarray]:
    """Return each of `FIGURES` in every draw (B,); nan where a draw has only one class.

    Args:
        threshold: from `choose_threshold`; nan gives nan.
        y_N: labels of the split reported.
        p_N: scores.
        times_BN: how often each slide is counted in each draw, from `stats.bootstrap`.
    """
    y_N, p_N, times_BN = _known(y_N, p_N, times_BN)
    counts_B22 = confusions(y_N, p_N >= threshold, 2, times_BN)
    defined_B = counts_B22.any(2).all(1) & (not math.isnan(threshold))
    found = _figures(counts_B22)
    return {name: np.where(defined_B, value_B, np.nan) for name, value_B in found.items()}


def _known(y_N: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """Return labels as 0 and 1 and the other arrays, without slides of unknown label."""
    known_N = ~np.isnan(np.asarray(y_N, float))
    return [np.asarray(y_N)[known_N].astype(int), *(np.asarray(a)[..., known_N] for a in arrays)]


def _figures(counts_G22: np.ndarray) -> dict[str, np.ndarray]:
    specificity_G, sensitivity_G = recalls(counts_G22).T
    balanced_G = (sensitivity_G + specificity_G) / 2
    figures = balanced_G, sensitivity_G, specificity_G, f1s(counts_G22)[:, 1]
    return dict(zip(FIGURES, figures, strict=True))
