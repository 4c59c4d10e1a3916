"""Any number of labels of 1, 0 or unknown, one sigmoid each. With one label: binary.

Shapes: N slides, K labels, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from tapfm.bootstrap import mean_of_defined
from tapfm.losses import MaskedBCE
from tapfm.metrics import auroc_draws


@dataclass(frozen=True)
class Multilabel:
    """See `tapfm.tasks.Task`."""

    labels: tuple[str, ...]
    pos_weight: tuple[float, ...] = ()
    """Negatives over positives of each label, in the training split."""

    options: ClassVar = ()
    selects: ClassVar = "auroc"
    title: ClassVar = "macro AUROC"

    @classmethod
    def learn(cls, names, classes, target_NY):
        """See `tapfm.tasks.learn_task`."""
        return cls(names, positive_weights(target_NY, names))

    @property
    def truth(self):
        """The labels."""
        return self.labels

    @property
    def width(self):
        """A number a label."""
        return len(self.labels)

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

    def measure(self, target_NY, said_NP, times_BN):
        """AUROC of each label, and their mean."""
        each = {
            label: auroc_draws(target_NY[:, k], said_NP[:, k], times_BN)
            for k, label in enumerate(self.labels)
        }
        macro = {"auroc": mean_of_defined(list(each.values()), len(times_BN))}
        return {"macro": macro, **{label: {"auroc": figure} for label, figure in each.items()}}


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
