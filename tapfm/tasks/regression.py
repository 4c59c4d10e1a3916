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

from tapfm.bootstrap import mean_of_defined
from tapfm.losses import MaskedMSE
from tapfm.outcomes import pearson, r2, spearman

QUARTERS = 4
FIGURES = {"r2": r2, "pearson": pearson, "spearman": spearman}


@dataclass(frozen=True)
class Regression:
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
    def truth(self):
        """The targets."""
        return self.labels

    @property
    def width(self):
        """A number a target."""
        return len(self.labels)

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

    def measure(self, target_NY, said_NP, times_BN):
        """R², Pearson's and Spearman's correlation of each target, and their means."""
        each = {
            name: {
                figure: of(target_NY[:, k], said_NP[:, k], times_BN)
                for figure, of in FIGURES.items()
            }
            for k, name in enumerate(self.labels)
        }
        draws = len(times_BN)
        macro = {
            figure: mean_of_defined([found[figure] for found in each.values()], draws)
            for figure in FIGURES
        }
        return {"macro": macro, **each}
