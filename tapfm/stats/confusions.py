"""Confusion matrices of slides or tiles, and the metrics that follow from their counts.

    recall               share of a class that is predicted as it
    f1                   2 hits / (members of the class + predicted as it); its average is macro
    weighted_f1          F1 of each class, weighted by its number of members
    balanced_accuracy    mean recall
    accuracy             share predicted right

Every draw (`stats.bootstrap`) has its own matrix. Averages are over the classes that occur in any
draw, and nan in a draw that lacks one of them (except accuracy), so that every draw averages the
same classes.

Source: definitions as scikit-learn's `f1_score`, `balanced_accuracy_score`, `accuracy_score`.
Differs: a class that was predicted but has no member does not enter an average.

Shapes: N slides or tiles, K classes, B draws.
"""

from __future__ import annotations

import numpy as np

from tapfm.stats.bootstrap import BLOCK


def confusions(
    y_N: np.ndarray, predicted_N: np.ndarray, classes: int, times_BN: np.ndarray
) -> np.ndarray:
    """Return counts (B, K, K) of every draw: rows are true classes, columns predicted ones.

    Args:
        y_N: true classes, 0 to K - 1; unknown ones must be left out.
        predicted_N: predicted classes.
        classes: K.
        times_BN: how often each is counted in each draw.
    """
    cell_N = np.asarray(y_N, int) * classes + np.asarray(predicted_N, int)
    one_hot_NC = np.eye(classes * classes)[cell_N]
    step = max(1, BLOCK // max(1, len(cell_N)))
    parts = [
        times_BN[start : start + step].astype(float) @ one_hot_NC
        for start in range(0, len(times_BN), step)
    ]
    return np.concatenate(parts).reshape(-1, classes, classes)


def recalls(counts_BKK: np.ndarray) -> np.ndarray:
    """Return the recall of each class (B, K), nan without members; of swapped axes, precision."""
    with np.errstate(invalid="ignore"):
        return _hits(counts_BKK) / counts_BKK.sum(2)


def f1s(counts_BKK: np.ndarray) -> np.ndarray:
    """Return the F1 of each class (B, K); nan if it has no member and is never predicted."""
    with np.errstate(invalid="ignore"):
        return 2 * _hits(counts_BKK) / (counts_BKK.sum(2) + counts_BKK.sum(1))


def averages(counts_BKK: np.ndarray) -> dict[str, np.ndarray]:
    """Return accuracy, balanced_accuracy, f1 and weighted_f1 of each draw (B,)."""
    true_BK = counts_BKK.sum(2)
    present_K = true_BK.any(0)
    if not present_K.any():
        nothing_B = np.full(len(counts_BKK), np.nan)
        return dict.fromkeys(("accuracy", "balanced_accuracy", "f1", "weighted_f1"), nothing_B)
    true_BK, recall_BK, f1_BK = (
        each_BK[:, present_K] for each_BK in (true_BK, recalls(counts_BKK), f1s(counts_BKK))
    )
    f1_BK = np.where(true_BK > 0, f1_BK, np.nan)
    with np.errstate(invalid="ignore"):
        return {
            "accuracy": _hits(counts_BKK).sum(1) / true_BK.sum(1),
            "balanced_accuracy": recall_BK.mean(1),
            "f1": f1_BK.mean(1),
            "weighted_f1": (f1_BK * true_BK).sum(1) / true_BK.sum(1),
        }


def _hits(counts_BKK: np.ndarray) -> np.ndarray:
    return np.diagonal(counts_BKK, axis1=1, axis2=2)
