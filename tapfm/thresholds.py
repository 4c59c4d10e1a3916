"""What a yes or no costs: sensitivity, specificity, balanced accuracy and F1 at a fixed threshold.

A threshold is chosen on the validation split and frozen: chosen on the split it is reported on, it
would flatter itself. Three rules, each for its own reader:

    balanced         the highest balanced accuracy (Youden's index)
    f1               the highest F1
    specificity_90   the lowest threshold at which nine in ten negatives are called negative

A slide is called positive if its score is the threshold or above. Thresholds lie half way between
neighbouring validation scores; of equally good ones the highest is taken, which calls the fewest.

Source: Youden 1950; definitions as scikit-learn's `balanced_accuracy_score`, `f1_score`.
Differs: a draw without a positive or a negative slide has no figure, where they would say 0.

Shapes: N slides, B draws, G thresholds.
"""

from __future__ import annotations

import math

import numpy as np

RULES = ("balanced", "f1", "specificity_90")
FIGURES = ("balanced_accuracy", "sensitivity", "specificity", "f1")
SPECIFICITY = 0.90


def choose_threshold(y_N: np.ndarray, p_N: np.ndarray, rule: str) -> float:
    """The threshold of a rule; nan if one class only is known.

    Args:
        y_N: 0, 1, or nan where unknown (left out); of the validation split.
        p_N: scores.
        rule: one of `RULES`.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is none of {', '.join(RULES)}")
    y_N, p_N = np.asarray(y_N, float), np.asarray(p_N, float)
    positive_N, negative_N = y_N == 1, y_N == 0
    if not positive_N.any() or not negative_N.any():
        return math.nan
    scores = np.unique(p_N[positive_N | negative_N])[::-1]
    between = (scores[1:] + scores[:-1]) / 2
    thresholds_G = np.concatenate([[np.nextafter(scores[0], np.inf)], between, scores[-1:]])
    called_GN = p_N >= thresholds_G[:, None]
    found = _figures(*((called_GN & own).sum(1) for own in (positive_N, negative_N)),
                     positive_N.sum(), negative_N.sum())  # fmt: skip
    if rule == "specificity_90":
        held_G = found["specificity"] >= SPECIFICITY - 1e-12
        return float(thresholds_G[held_G][-1])  # calling none holds it
    value_G = found["f1" if rule == "f1" else "balanced_accuracy"]
    return float(thresholds_G[np.argmax(value_G >= value_G.max() - 1e-12)])


def figures_at(
    threshold: float, y_N: np.ndarray, p_N: np.ndarray, times_BN: np.ndarray
) -> dict[str, np.ndarray]:
    """Each of `FIGURES` in every draw (B,); nan where a draw has one class only.

    Args:
        threshold: frozen; nan gives nan.
        y_N: labels of the split reported.
        p_N: scores.
        times_BN: how often each slide takes part in each draw, see `tapfm.bootstrap`.
    """
    y_N, called_N, times_BN = (
        np.asarray(y_N, float),
        np.asarray(p_N) >= threshold,
        times_BN.astype(float),
    )
    positive_N, negative_N = y_N == 1, y_N == 0
    count = [times_BN @ own for own in (positive_N & called_N, negative_N & called_N,
                                        positive_N, negative_N)]  # fmt: skip
    found = _figures(*count)
    defined_B = (count[2] > 0) & (count[3] > 0) & (not math.isnan(threshold))
    return {name: np.where(defined_B, value_B, np.nan) for name, value_B in found.items()}


def _figures(hits, false, positives, negatives) -> dict[str, np.ndarray]:
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, specificity = hits / positives, 1 - false / negatives
        f1 = 2 * hits / (positives + hits + false)
    balanced = (sensitivity + specificity) / 2
    return dict(zip(FIGURES, (balanced, sensitivity, specificity, f1), strict=True))
