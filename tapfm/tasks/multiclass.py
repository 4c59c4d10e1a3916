"""One class of several, by name. With two classes: binary, with names.

Shapes: N slides, K classes, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from tapfm.stats.bootstrap import mean_of_defined
from tapfm.stats.confusions import averages, confusions
from tapfm.stats.metrics import auroc_draws, pairs_draws
from tapfm.tasks.losses import MaskedCrossEntropy


@dataclass(frozen=True)
class Multiclass:
    """See `tapfm.tasks.Task`."""

    labels: tuple[str, ...]
    """Names of the classes."""
    column: str
    """Of the table."""
    weight: tuple[float, ...]
    """Of each class: slides of the training split over K times those of the class."""

    options: ClassVar = ()
    selects: ClassVar = "auroc"
    title: ClassVar = "macro AUROC, one against the rest"

    @classmethod
    def learn(cls, names, classes, target_NY):
        """See `tapfm.tasks.learn_task`."""
        count_K = [int((target_NY[:, 0] == k).sum()) for k in range(len(classes))]
        lacking = [name for name, count in zip(classes, count_K, strict=True) if not count]
        if lacking:
            raise ValueError(
                f"{names[0]} has no training slide of class {', '.join(lacking)}: were they "
                "skipped? Add slides, or merge classes."
            )
        total = sum(count_K)
        return cls(classes, names[0], tuple(total / (len(classes) * count) for count in count_K))

    @property
    def truth(self):
        """One column."""
        return (self.column,)

    @property
    def width(self):
        """The number of the class."""
        return 1

    @property
    def said(self):
        """A probability a class."""
        return tuple(f"p_{name}" for name in self.labels)

    def loss(self) -> nn.Module:
        """Weighted cross-entropy."""
        return MaskedCrossEntropy(self.weight)

    def predict(self, logits_NK: Tensor) -> Tensor:
        """Softmax over classes."""
        return logits_NK.softmax(-1)

    def spell(self, target_Y):
        """Name of the class, or blank."""
        return ["" if np.isnan(target_Y[0]) else self.labels[int(target_Y[0])]]

    def parse(self, texts):
        """The number of the class, or nan."""
        return [float(self.labels.index(text)) if text else np.nan for text in texts]

    def unweighted(self):
        """All classes count the same."""
        return replace(self, weight=(1.0,) * len(self.labels))

    def strata(self, target_NY):
        """The classes."""
        return [(1.0, [np.flatnonzero(target_NY[:, 0] == k) for k in range(len(self.labels))])]

    def measure(self, target_NY, said_NP, times_BN):
        """AUROC of each class, their mean, and how often the likeliest class is right."""
        class_N, draws = target_NY[:, 0], len(times_BN)
        each = {
            name: {"auroc": auroc_draws(is_N, said_NP[:, k], times_BN)}
            for k, (name, is_N) in enumerate(self.one_vs_rest(target_NY).items())
        }
        known_N = ~np.isnan(class_N)
        said = averages(
            confusions(
                class_N[known_N], said_NP[known_N].argmax(1), len(self.labels), times_BN[:, known_N]
            )
        )
        macro = {
            "auroc": mean_of_defined([figures["auroc"] for figures in each.values()], draws),
            "balanced_accuracy": said["balanced_accuracy"],
            "accuracy": said["accuracy"],
        }
        return {"macro": macro, **each}

    def one_vs_rest(self, target_NY: np.ndarray) -> dict[str, np.ndarray]:
        """Of each class: 1 for its slides, 0 for those of others, nan where that is unknown."""
        class_N = target_NY[:, 0]
        unknown_N = np.isnan(class_N)
        return {
            name: np.where(unknown_N, np.nan, class_N == k) for k, name in enumerate(self.labels)
        }

    def compared(self, target_NY, times_BN):
        """Pairs of a class and the rest."""
        return {
            name: pairs_draws(is_N, times_BN) for name, is_N in self.one_vs_rest(target_NY).items()
        }
