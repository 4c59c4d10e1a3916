"""Any number of labels of 1, 0 or unknown, one sigmoid each. With one label: binary.

Shapes: N slides, K labels, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from tapfm.stats.metrics import auroc_draws, pairs_draws
from tapfm.tasks.columns import ColumnTask
from tapfm.tasks.losses import MaskedBCE


@dataclass(frozen=True)
class Multilabel(ColumnTask):
    """See `tapfm.tasks.Task`."""

    labels: tuple[str, ...]
    pos_weight: tuple[float, ...] = ()
    """Negatives over positives of each label, in the training split."""

    options: ClassVar = ()
    selects: ClassVar = "auroc"
    title: ClassVar = "macro AUROC"
    figures: ClassVar = {"auroc": auroc_draws}
    share_of: ClassVar = pairs_draws

    @classmethod
    def learn(cls, names, classes, target_NY):
        """See `tapfm.tasks.learn_task`."""
        return cls(names, positive_weights(target_NY, names))

    @property
    def said(self):
        """A probability a label."""
        return tuple(f"p_{label}" for label in self.labels)

    def loss(self) -> nn.Module:
        """Weighted binary cross-entropy."""
        return MaskedBCE(self.pos_weight or [1.0] * len(self.labels))

    def predict(self, logits_NK: Tensor) -> Tensor:
        """One sigmoid a label."""
        return logits_NK.sigmoid()

    def spell(self, target_Y):
        """1, 0 or blank."""
        return ["" if np.isnan(value) else str(int(value)) for value in target_Y]

    def unweighted(self):
        """Positives count as negatives do."""
        return replace(self, pos_weight=())

    def strata(self, target_NY):
        """Positives and negatives of each label; the chance of a label falls with its positives."""
        return [
            (max((y_N == 1).sum(), 1) ** -0.5, [np.flatnonzero(y_N == side) for side in (1, 0)])
            for y_N in target_NY.T
        ]


def positive_weights(target_NK: np.ndarray, labels: Sequence[str]) -> tuple[float, ...]:
    """Negatives per positive of each label, on known labels.

    Raises:
        ValueError: a label has no known positive or no known negative among these slides.
    """
    weights = []
    for label, y_N in zip(labels, np.transpose(target_NK), strict=True):
        positives, negatives = int((y_N == 1).sum()), int((y_N == 0).sum())
        if not positives or not negatives:
            raise ValueError(
                f"{label} has {positives} known positive and {negatives} known negative training "
                "slides, and its loss cannot be weighted: training needs both. Leave the label "
                "out, or add slides."
            )
        weights.append(negatives / positives)
    return tuple(weights)
