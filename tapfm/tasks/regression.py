"""Any number of continuous targets, each standardised by the training split.

The model's logits are in standard deviations from the training mean; what is predicted is in the
target's own unit. Expression is usually given as log2(1 + x): the table holds what is to be
predicted.

Shapes: N slides, K targets, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from tapfm.stats.outcomes import pearson, r2, spearman, spread
from tapfm.tasks.columns import ColumnTask
from tapfm.tasks.losses import MaskedMSE

QUARTERS = 4


@dataclass(frozen=True)
class Regression(ColumnTask):
    """See `tapfm.tasks.Task`."""

    labels: tuple[str, ...]
    """Names of the targets."""
    mean: tuple[float, ...]
    """Of each target in the training split."""
    std: tuple[float, ...]
    """Likewise, of the slides as a population."""

    options: ClassVar = ()
    selects: ClassVar = "r2"
    title: ClassVar = "R² (mean over targets)"
    figures: ClassVar = {"r2": r2, "pearson": pearson, "spearman": spearman}
    share_of: ClassVar = spread

    @classmethod
    def learn(cls, names, classes, target_NY):
        """See `tapfm.tasks.learn_task`."""
        known = [y_N[~np.isnan(y_N)] for y_N in target_NY.T]
        for name, y_N in zip(names, known, strict=True):
            if not len(y_N) or not y_N.std() > 0:
                raise ValueError(f"{name} does not vary among the training slides: leave it out")
        return cls(
            names, tuple(float(y.mean()) for y in known), tuple(float(y.std()) for y in known)
        )

    @property
    def said(self):
        """A value a target."""
        return tuple(f"predicted_{name}" for name in self.labels)

    def loss(self) -> nn.Module:
        """Squared error, in standard deviations."""
        return MaskedMSE(self.mean, self.std)

    def predict(self, logits_NK: Tensor) -> Tensor:
        """In the target's own unit."""
        mean_K, std_K = logits_NK.new_tensor(self.mean), logits_NK.new_tensor(self.std)
        return logits_NK * std_K + mean_K

    def spell(self, target_Y):
        """The number, or blank."""
        return ["" if np.isnan(value) else f"{value:.7g}" for value in target_Y]

    def unweighted(self):
        """Nothing is weighted."""
        return self

    def strata(self, target_NY):
        """The quarters of each target."""
        families = []
        for y_N in target_NY.T:
            known = np.flatnonzero(~np.isnan(y_N))
            rising = known[np.argsort(y_N[known], kind="stable")]
            families.append((1.0, np.array_split(rising, QUARTERS)))
        return families
