"""One class of several, by name; with two classes, binary.

Shapes: N slides, K classes, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from tapfm.settings import SettingsError
from tapfm.stats.bootstrap import mean_of_defined
from tapfm.stats.confusions import averages, confusions
from tapfm.stats.metrics import MACRO, ONE_CLASS, auroc_draws, pairs_draws
from tapfm.tasks.contract import Task
from tapfm.tasks.losses import MaskedCrossEntropy


@dataclass(frozen=True)
class Multiclass(Task):
    """One class of several; the target is the number of the class."""

    labels: tuple[str, ...]
    """Names of the classes."""
    column: str
    """Column of the table."""
    weight: tuple[float, ...]
    """Weight of each class: slides of the training split over K times those of the class."""

    monitor: ClassVar = "auroc"
    title: ClassVar = "macro AUROC, one against the rest"
    report: ClassVar = "classes"
    undefined: ClassVar = ONE_CLASS

    @classmethod
    def learn(cls, names, classes, target_NY):
        """Return the task, with the weights of the classes."""
        count_K = [int((target_NY[:, 0] == k).sum()) for k in range(len(classes))]
        lacking = [name for name, count in zip(classes, count_K, strict=True) if not count]
        if lacking:
            raise SettingsError(
                f"{names[0]} has no training slide of class {', '.join(lacking)}: were they "
                "skipped? Add slides, or merge classes."
            )
        total = sum(count_K)
        return cls(classes, names[0], tuple(total / (len(classes) * count) for count in count_K))

    @property
    def targets(self):
        """Return the one column."""
        return (self.column,)

    @property
    def width(self):
        """Return 1: a target is the number of its class."""
        return 1

    @property
    def predictions(self):
        """Return a name of a probability a class."""
        return tuple(f"p_{name}" for name in self.labels)

    def loss(self) -> nn.Module:
        """Return weighted cross-entropy."""
        return MaskedCrossEntropy(self.weight)

    def predict(self, logits_NK: Tensor) -> Tensor:
        """Return the softmax over classes."""
        return logits_NK.softmax(-1)

    def format_target(self, target_Y):
        """Return the name of the class, or blank."""
        return ["" if np.isnan(target_Y[0]) else self.labels[int(target_Y[0])]]

    def parse(self, texts):
        """Return the number of the class, or nan."""
        return [float(self.labels.index(text)) if text else np.nan for text in texts]

    def unweighted(self):
        """Return the task with classes weighted alike."""
        return replace(self, weight=(1.0,) * len(self.labels))

    def strata(self, target_NY):
        """Return the slides of each class."""
        return [(1.0, [np.flatnonzero(target_NY[:, 0] == k) for k in range(len(self.labels))])]

    def measure(self, target_NY, predicted_NP, times_BN):
        """Return AUROC of each class and their mean, accuracy and balanced accuracy."""
        class_N, draws = target_NY[:, 0], len(times_BN)
        each = {
            name: {"auroc": auroc_draws(is_N, predicted_NP[:, k], times_BN)}
            for k, (name, is_N) in enumerate(self.one_vs_rest(target_NY).items())
        }
        known_N = ~np.isnan(class_N)
        called_N = predicted_NP[known_N].argmax(1)
        counts = confusions(class_N[known_N], called_N, len(self.labels), times_BN[:, known_N])
        found = averages(counts)
        macro = {
            "auroc": mean_of_defined([figures["auroc"] for figures in each.values()], draws),
            "balanced_accuracy": found["balanced_accuracy"],
            "accuracy": found["accuracy"],
        }
        return {MACRO: macro, **each}

    def one_vs_rest(self, target_NY: np.ndarray) -> dict[str, np.ndarray]:
        """Return class -> (N,): 1 for its slides, 0 for those of others, nan where unknown."""
        class_N = target_NY[:, 0]
        unknown_N = np.isnan(class_N)
        return {
            name: np.where(unknown_N, np.nan, class_N == k) for k, name in enumerate(self.labels)
        }

    def fold_weights(self, target_NY, times_BN):
        """Return the number of pairs of a slide of the class and one of another."""
        return {
            name: pairs_draws(is_N, times_BN) for name, is_N in self.one_vs_rest(target_NY).items()
        }
