"""Base of tasks in which every column of the table is a target with a logit of its own.

Shapes: N slides, K targets, B draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from tapfm.stats.bootstrap import mean_of_defined
from tapfm.stats.metrics import MACRO
from tapfm.tasks.contract import Task


class ColumnTask(Task):
    """A task of independent columns: one logit, one prediction, one set of figures each."""

    figures: ClassVar[Mapping[str, Callable[..., np.ndarray]]]
    """Name -> function of targets (N,), predictions (N,) and draws (B, N), to values (B,)."""
    weight_in_fold: ClassVar[Callable[..., np.ndarray]]
    """Function of targets (N,) and draws (B, N) to the weight (B,) of a fold, of one column."""

    @property
    def targets(self):
        """Return the columns, which are the labels."""
        return self.labels

    @property
    def width(self):
        """Return the number of columns."""
        return len(self.labels)

    def parse(self, texts):
        """Return numbers, nan where blank."""
        return [float(text or "nan") for text in texts]

    def measure(self, target_NY, predicted_NP, times_BN):
        """Return every figure of each column, and first their means."""
        each = {
            label: {
                name: figure(target_NY[:, k], predicted_NP[:, k], times_BN)
                for name, figure in self.figures.items()
            }
            for k, label in enumerate(self.labels)
        }
        macro = {
            name: mean_of_defined([found[name] for found in each.values()], len(times_BN))
            for name in self.figures
        }
        return {MACRO: macro, **each}

    def fold_weights(self, target_NY, times_BN):
        """Return the weight of a fold for each column."""
        return {
            label: type(self).weight_in_fold(target_NY[:, k], times_BN)
            for k, label in enumerate(self.labels)
        }
