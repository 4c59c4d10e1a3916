"""How well tiles are classified, and how sure we may be: F1, balanced accuracy, one-vs-rest AUROC.

A patient's tiles are not independent, so whole cases are resampled (`stats.bootstrap`). Averages
are those of `stats.confusions`: a draw that lacks a class is left out, and `Interval.draws` says
how many remained. AUROC is one-vs-rest, macro, as scikit-learn's `roc_auc_score`.

Shapes: N tiles, K classes, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tapfm.stats.bootstrap import Interval, percentiles, with_point
from tapfm.stats.confusions import averages, confusions, f1s, recalls
from tapfm.stats.metrics import evaluate, paired_difference

FIGURES = ("f1", "balanced_accuracy")


def evaluate_tiles(
    classes: Sequence[str],
    y_N: np.ndarray,
    p_NK: np.ndarray,
    cases_N: Sequence[str],
    draws: int = 2000,
    seed: int = 0,
) -> dict:
    """Return all figures of probabilities.

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
    drawn = averages(tables_BKK)
    ranked = evaluate(list(classes), np.eye(len(classes))[y_N], p_NK, cases_N, draws, seed)
    own_1KK = tables_BKK[:1]
    precision_K, recall_K, f1_K = (
        each_1K[0].tolist()
        for each_1K in (recalls(own_1KK.swapaxes(1, 2)), recalls(own_1KK), f1s(own_1KK))
    )
    true_K = own_1KK[0].sum(1)
    return {
        **{name: percentiles(drawn[name]) for name in FIGURES},
        "auroc": ranked["macro"]["auroc"],
        "confusion": own_1KK[0].astype(int).tolist(),
        "classes": {
            name: {
                "precision": precision_K[k],
                "recall": recall_K[k],
                "f1": f1_K[k],
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
    """Return figures of a minus those of b, on the same tiles and draws."""
    y_N = np.asarray(y_N)
    times_BN = with_point(cases_N, draws, seed)
    a, b = (
        averages(confusions(y_N, np.asarray(p_NK).argmax(1), len(classes), times_BN))
        for p_NK in (pa_NK, pb_NK)
    )
    gains = {name: percentiles(a[name] - b[name]) for name in FIGURES}
    one_hot_NK = np.eye(len(classes))[y_N]
    ranked = paired_difference(list(classes), one_hot_NK, pa_NK, pb_NK, cases_N, draws, seed)
    return {**gains, "auroc": ranked["macro"]}
