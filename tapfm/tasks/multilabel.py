"""Any number of labels of 1, 0 or unknown, one sigmoid each; with one label, binary.

Shapes: N slides, K labels, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tapfm.settings import SettingsError
from tapfm.stats.metrics import ONE_CLASS, auroc_draws, pairs_draws
from tapfm.tasks.columns import ColumnTask
from tapfm.tasks.losses import MaskedBCE


@dataclass(frozen=True)
class Multilabel(ColumnTask):
    """Labels of 0 and 1, each by itself."""

    labels: tuple[str, ...]
    pos_weight: tuple[float, ...] = ()
    """Negatives over positives of each label, in the training split; empty is 1 for each."""

    mixes_slides: ClassVar = True
    monitor: ClassVar = "auroc"
    title: ClassVar = "macro AUROC"
    report: ClassVar = "labels"
    undefined: ClassVar = ONE_CLASS
    figures: ClassVar = {"auroc": auroc_draws}
    weight_in_fold: ClassVar = pairs_draws

    @classmethod
    def learn(cls, names, classes, target_NY):
        """Return the task, with the weights of positives."""
        return cls(names, positive_weights(target_NY, names))

    @property
    def predictions(self):
        """Return a name of a probability a label."""
        return tuple(f"p_{label}" for label in self.labels)

    def loss(self) -> nn.Module:
        """Return weighted binary cross-entropy."""
        return MaskedBCE(self.pos_weight or [1.0] * len(self.labels))

    def mixed_loss(self, logits_K: Tensor, target_NY: Tensor) -> Tensor:
        """Return binary cross-entropy; see `Task`.

        A label is 1 if it is 1 in any slide, unknown if it is 1 in none and unknown in one.
        """
        unknown_K = target_NY.isnan().any(0)
        any_K = (target_NY == 1).any(0).to(logits_K)
        wanted_K = torch.where(unknown_K & (any_K == 0), torch.nan, any_K)
        return MaskedBCE([1.0] * len(self.labels)).to(logits_K)(logits_K, wanted_K)

    def predict(self, logits_NK: Tensor) -> Tensor:
        """Return a probability a label, the sigmoid of its logit."""
        return logits_NK.sigmoid()

    def format_target(self, target_Y):
        """Return 1, 0 or blank, a label."""
        return ["" if np.isnan(value) else str(int(value)) for value in target_Y]

    def unweighted(self):
        """Return the task with positives weighted as negatives."""
        return replace(self, pos_weight=())

    def strata(self, target_NY):
        """Return positives and negatives of each label; a label of few positives weighs more."""
        return [
            (max((y_N == 1).sum(), 1) ** -0.5, [np.flatnonzero(y_N == side) for side in (1, 0)])
            for y_N in target_NY.T
        ]


def positive_weights(target_NK: np.ndarray, labels: Sequence[str]) -> tuple[float, ...]:
    """Return negatives per positive of each label, counted on known labels.

    Raises:
        SettingsError: a label has no known positive or no known negative among these slides.
    """
    weights = []
    for label, y_N in zip(labels, np.transpose(target_NK), strict=True):
        positives, negatives = int((y_N == 1).sum()), int((y_N == 0).sum())
        if not positives or not negatives:
            raise SettingsError(
                f"{label} has {positives} known positive and {negatives} known negative training "
                "slides, and its loss cannot be weighted: training needs both. Leave the label "
                "out, or add slides."
            )
        weights.append(negatives / positives)
    return tuple(weights)
