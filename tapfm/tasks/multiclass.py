"""One class of several, by name; with two classes, binary.

Shapes: N slides, K classes, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
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

    mixes_slides: ClassVar = True
    monitor: ClassVar = "auroc"
    title: ClassVar = "macro AUROC, one against the rest"
    report: ClassVar = "classes"
    undefined: ClassVar = ONE_CLASS

    @classmethod
    def learn(cls, names, classes, target_NY):
        """Return the task, with the weights of the classes."""
        return cls(classes, names[0], class_weights(names[0], classes, target_NY))

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of the classes, by number."""
        return self.labels

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
        return tuple(f"p_{name}" for name in self.classes)

    def loss(self) -> nn.Module:
        """Return weighted cross-entropy."""
        return MaskedCrossEntropy(self.weight)

    def mixed_loss(self, logits_K: Tensor, target_NY: Tensor) -> Tensor:
        """Return binary cross-entropy of each class, 1 for those of the slides; see `Task`."""
        class_N = target_NY[:, 0]
        if class_N.isnan().any():
            return 0 * logits_K.sum()
        present_K = torch.zeros_like(logits_K).index_fill(0, class_N.long(), 1.0)
        return F.binary_cross_entropy_with_logits(logits_K, present_K)

    def predict(self, logits_NK: Tensor) -> Tensor:
        """Return the softmax over classes."""
        return logits_NK.softmax(-1)

    def format_target(self, target_Y):
        """Return the name of the class, or blank."""
        return ["" if np.isnan(target_Y[0]) else self.classes[int(target_Y[0])]]

    def parse(self, texts):
        """Return the number of the class, or nan."""
        return [float(self.classes.index(text)) if text else np.nan for text in texts]

    def unweighted(self):
        """Return the task with classes weighted alike."""
        return replace(self, weight=(1.0,) * len(self.classes))

    def strata(self, target_NY):
        """Return the slides of each class."""
        return [(1.0, [np.flatnonzero(target_NY[:, 0] == k) for k in range(len(self.classes))])]

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
            name: np.where(unknown_N, np.nan, class_N == k) for k, name in enumerate(self.classes)
        }

    def fold_weights(self, target_NY, times_BN):
        """Return the number of pairs of a slide of the class and one of another."""
        return {
            name: pairs_draws(is_N, times_BN) for name, is_N in self.one_vs_rest(target_NY).items()
        }


def class_weights(column: str, classes: Sequence[str], target_NY: np.ndarray) -> tuple[float, ...]:
    """Return slides over K times those of each class.

    Raises:
        SettingsError: a class has no slide.
    """
    count_K = [int((target_NY[:, 0] == k).sum()) for k in range(len(classes))]
    lacking = [name for name, count in zip(classes, count_K, strict=True) if not count]
    if lacking:
        raise SettingsError(
            f"{column} has no training slide of class {', '.join(lacking)}: were they "
            "skipped? Add slides, or merge classes."
        )
    total = sum(count_K)
    return tuple(total / (len(classes) * count) for count in count_K)
