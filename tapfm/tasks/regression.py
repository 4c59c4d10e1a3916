"""Any number of continuous targets, each standardised by the training split.

Logits are in standard deviations from the training mean, predictions in the target's own unit.
The table holds what is to be predicted: for gene expression usually log2(1 + x).

Shapes: N slides, K targets, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from tapfm.settings import SettingsError
from tapfm.stats.outcomes import pearson, r2, spearman, spread
from tapfm.tasks.columns import ColumnTask
from tapfm.tasks.losses import MaskedMSE

QUARTERS = 4


@dataclass(frozen=True)
class Regression(ColumnTask):
    """Numbers, each by itself."""

    labels: tuple[str, ...]
    """Names of the targets."""
    mean: tuple[float, ...]
    """Mean of each target over the training split."""
    std: tuple[float, ...]
    """Standard deviation of each target over the training split, as of a population."""

    monitor: ClassVar = "r2"
    title: ClassVar = "R² (mean over targets)"
    report: ClassVar = "values"
    chance: ClassVar = float("nan")
    figures: ClassVar = {"r2": r2, "pearson": pearson, "spearman": spearman}
    weight_in_fold: ClassVar = spread

    @classmethod
    def learn(cls, names, classes, target_NY):
        """Return the task, with means and deviations."""
        known = [y_N[~np.isnan(y_N)] for y_N in target_NY.T]
        for name, y_N in zip(names, known, strict=True):
            if not len(y_N) or not y_N.std() > 0:
                raise SettingsError(f"{name} does not vary among the training slides: leave it out")
        return cls(
            names, tuple(float(y.mean()) for y in known), tuple(float(y.std()) for y in known)
        )

    @property
    def predictions(self):
        """Return a name of a value a target."""
        return tuple(f"predicted_{name}" for name in self.labels)

    def loss(self) -> nn.Module:
        """Return squared error, in standard deviations."""
        return MaskedMSE(self.mean, self.std)

    def predict(self, logits_NK: Tensor) -> Tensor:
        """Return values in the target's own unit."""
        mean_K, std_K = logits_NK.new_tensor(self.mean), logits_NK.new_tensor(self.std)
        return logits_NK * std_K + mean_K

    def format_target(self, target_Y):
        """Return the numbers, blank where unknown."""
        return ["" if np.isnan(value) else f"{value:.7g}" for value in target_Y]

    def strata(self, target_NY):
        """Return the quarters of each target."""
        families = []
        for y_N in target_NY.T:
            known = np.flatnonzero(~np.isnan(y_N))
            rising = known[np.argsort(y_N[known], kind="stable")]
            families.append((1.0, np.array_split(rising, QUARTERS)))
        return families
