"""What two tasks share: every column of the table is a target with a logit and figures of its own.

Shapes: N slides, K targets, B draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from tapfm.stats.bootstrap import mean_of_defined


class ColumnTask:
    """See `tapfm.tasks.Task`."""

    labels: tuple[str, ...]
    figures: ClassVar[Mapping[str, Callable[..., np.ndarray]]]
    """By name: of a target, what is said of it, and the draws."""
    share_of: ClassVar[Callable[..., np.ndarray]]
    """What the first figure is a share of, of a target and the draws."""

    @property
    def truth(self):
        """The columns."""
        return self.labels

    @property
    def width(self):
        """A number a column."""
        return len(self.labels)

    def parse(self, texts):
        """Numbers, nan where blank."""
        return [float(text or "nan") for text in texts]

    def measure(self, target_NY, said_NP, times_BN):
        """Every figure of each column, and their means."""
        each = {
            label: {
                name: figure(target_NY[:, k], said_NP[:, k], times_BN)
                for name, figure in self.figures.items()
            }
            for k, label in enumerate(self.labels)
        }
        macro = {
            name: mean_of_defined([found[name] for found in each.values()], len(times_BN))
            for name in self.figures
        }
        return {"macro": macro, **each}

    def compared(self, target_NY, times_BN):
        """Of each column."""
        return {
            label: type(self).share_of(target_NY[:, k], times_BN)
            for k, label in enumerate(self.labels)
        }
