"""How well tiles are classified, and how sure we may be: F1, balanced accuracy, one-vs-rest AUROC.

A patient's tiles are not independent, so whole cases are resampled (`tapfm.metrics`). Every draw
has a confusion table of its own, from which its figures follow. Macro is the mean over the classes
that the tiles are of; a draw that lacks one of them is left out, so that every draw averages the
same classes, and `Interval.draws` says how many remained.

Source: definitions as scikit-learn's `f1_score` (macro), `balanced_accuracy_score` and
    `roc_auc_score` (one-vs-rest, macro).
Differs: a class that was said and that no tile is of does not enter macro F1.

Shapes: N tiles, K classes, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tapfm.bootstrap import Interval, percentiles, with_point
from tapfm.metrics import BLOCK, evaluate, paired_difference

FIGURES = ("f1", "balanced_accuracy")


def confusion(y_N: np.ndarray, said_N: np.ndarray, classes: int) -> np.ndarray:
    """Counts (K, K): a row a true class, a column a predicted one."""
    return confusions(y_N, said_N, classes, np.ones((1, len(y_N)), np.uint16))[0].astype(int)


def confusions(
    y_N: np.ndarray, said_N: np.ndarray, classes: int, times_BN: np.ndarray
) -> np.ndarray:
    """Counts (B, K, K) of every draw."""
    cell_N = np.asarray(y_N) * classes + np.asarray(said_N)
    one_hot_NC = np.eye(classes * classes)[cell_N]
    step = max(1, BLOCK // max(1, len(cell_N)))
    parts = [
        times_BN[start : start + step].astype(float) @ one_hot_NC
        for start in range(0, len(times_BN), step)
    ]
    return np.concatenate(parts).reshape(-1, classes, classes)


def macro_f1(y_N: np.ndarray, said_N: np.ndarray, classes: int) -> float:
    """Mean F1 over the classes that there are tiles of."""
    return float(figures_of(confusion(y_N, said_N, classes)[None])["f1"][0])


def balanced_accuracy(y_N: np.ndarray, said_N: np.ndarray, classes: int) -> float:
    """Mean recall over the classes that there are tiles of."""
    return float(figures_of(confusion(y_N, said_N, classes)[None])["balanced_accuracy"][0])


def evaluate_tiles(
    classes: Sequence[str],
    y_N: np.ndarray,
    p_NK: np.ndarray,
    cases_N: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> dict:
    """All figures of a model's probabilities.

    Args:
        classes: K names.
        y_N: true classes, 0 to K - 1.
        p_NK: probabilities, or any scores whose largest is the class said.
        cases_N: each tile's case.
        draws: bootstrap draws.
        seed: of the draws; the same seed and cases give the same draws.

    Returns:
        f1, balanced_accuracy, auroc: Interval each; confusion, (K, K) as lists; classes: name to
        {precision, recall, f1, auroc (Interval), tiles}; averaged: names of the classes in macro.
    """
    y_N, p_NK = np.asarray(y_N), np.asarray(p_NK, float)
    times_BN = with_point(cases_N, draws, seed)
    tables_BKK = confusions(y_N, p_NK.argmax(1), len(classes), times_BN)
    found = {name: percentiles(each_B) for name, each_B in figures_of(tables_BKK).items()}
    ranked = evaluate(list(classes), np.eye(len(classes))[y_N], p_NK, cases_N, draws, seed)
    table_KK = tables_BKK[0]
    hits_K, true_K, said_K = np.diag(table_KK), table_KK.sum(1), table_KK.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = hits_K / said_K, hits_K / true_K, 2 * hits_K / (true_K + said_K)
    return {
        **found,
        "auroc": ranked["macro"]["auroc"],
        "confusion": table_KK.astype(int).tolist(),
        "classes": {
            name: {
                "precision": float(each[0][k]),
                "recall": float(each[1][k]),
                "f1": float(each[2][k]),
                "auroc": ranked[name]["auroc"],
                "tiles": int(true_K[k]),
            }
            for k, name in enumerate(classes)
        },
        "averaged": [name for name, count in zip(classes, true_K, strict=True) if count],
    }


def difference(
    classes: Sequence[str],
    y_N: np.ndarray,
    pa_NK: np.ndarray,
    pb_NK: np.ndarray,
    cases_N: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Figures of a less those of b, on the same tiles in the same draws."""
    y_N = np.asarray(y_N)
    times_BN = with_point(cases_N, draws, seed)
    a, b = (
        figures_of(confusions(y_N, np.asarray(p_NK).argmax(1), len(classes), times_BN))
        for p_NK in (pa_NK, pb_NK)
    )
    gains = {name: percentiles(a[name] - b[name]) for name in FIGURES}
    one_hot_NK = np.eye(len(classes))[y_N]
    ranked = paired_difference(list(classes), one_hot_NK, pa_NK, pb_NK, cases_N, draws, seed)
    return {**gains, "auroc": ranked["macro"]}


def figures_of(tables_BKK: np.ndarray) -> dict[str, np.ndarray]:
    """Macro F1 and balanced accuracy of each table (B,); row 0 says which classes are averaged.

    nan where a draw lacks one of them.
    """
    there_K = tables_BKK[0].sum(1) > 0
    hits_BK = np.diagonal(tables_BKK, axis1=1, axis2=2)
    true_BK, said_BK = tables_BKK.sum(2), tables_BKK.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1_BK = np.where(true_BK > 0, 2 * hits_BK / (true_BK + said_BK), np.nan)
        recall_BK = hits_BK / true_BK
    return {"f1": f1_BK[:, there_K].mean(1), "balanced_accuracy": recall_BK[:, there_K].mean(1)}
