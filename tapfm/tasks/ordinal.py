"""One of several ordered classes, such as a grade: K classes, a logit for each step between them.

    corn         sigmoid(l_j) = P(y > j given y >= j):  P(y > j) = prod_{i <= j} sigmoid(l_i)
    cumulative   sigmoid(l_j) = P(y > j), made falling by a running minimum

A class's probability is the difference of two of these; a slide is called the median class, the
number of steps that are more likely than not. The loss of `corn` is minus the logarithm of the true
class's probability, that of `cumulative` a binary cross-entropy a step.

Source: Shi et al. 2023 (CORN, arXiv 2111.08851); Frank and Hall 2001 (ECML) for `cumulative`.
Differs: the loss is the mean over slides, where the authors divide by the number of conditional
    pairs, which in a step of one slide weighs its class; classes are weighted as in `multiclass`.

Shapes: N slides, K classes, J = K - 1 steps, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapfm.settings import SettingsError
from tapfm.stats.confusions import averages, confusions
from tapfm.stats.metrics import MACRO
from tapfm.stats.outcomes import spread
from tapfm.tasks.multiclass import Multiclass, class_weights

LOSSES = ("corn", "cumulative")


@dataclass(frozen=True)
class Ordinal(Multiclass):
    """One of several ordered classes; the target is the number of the class, from low to high."""

    order: tuple[str, ...] = ()
    """Names of the classes, from low to high."""
    with_loss: str = "corn"

    mixes_slides: ClassVar = False
    monitor: ClassVar = "kappa"
    title: ClassVar = "quadratic kappa"
    chance: ClassVar = 0.0

    @classmethod
    def learn(cls, names, classes, target_NY, *, order=(), loss="corn"):
        """Return the task; `order` was taken by the reader of the column."""
        if loss not in LOSSES:
            raise SettingsError(f"loss {loss!r} is none of {', '.join(LOSSES)}")
        steps = tuple(f"above_{name}" for name in classes[:-1])
        weight = class_weights(names[0], classes, target_NY)
        return cls(steps, names[0], weight, tuple(classes), loss)

    @property
    def classes(self):
        """Return the names of the classes, from low to high."""
        return self.order

    def loss(self) -> nn.Module:
        """Return the loss of the steps, a slide weighted by its class."""
        return StepLoss(self.weight, conditional=self.with_loss == "corn")

    def predict(self, logits_NK: Tensor) -> Tensor:
        """Return a probability a class."""
        above = logits_NK.sigmoid()
        above = above.cumprod(-1) if self.with_loss == "corn" else above.cummin(-1).values
        ends = torch.ones_like(above[..., :1])
        return -torch.cat([ends, above, 0 * ends], -1).diff(dim=-1)

    def measure(self, target_NY, predicted_NP, times_BN):
        """Return quadratic kappa, mean distance in classes, accuracy and its balanced form."""
        known_N = ~np.isnan(target_NY[:, 0])
        above_NJ = 1 - predicted_NP[known_N].cumsum(1)[:, :-1]
        called_N = (above_NJ > 0.5).sum(1)
        counts_BKK = confusions(
            target_NY[known_N, 0], called_N, len(self.order), times_BN[:, known_N]
        )
        found = averages(counts_BKK)
        return {
            MACRO: {
                "kappa": quadratic_kappa(counts_BKK),
                "class_distance": class_distance(counts_BKK),
                "accuracy": found["accuracy"],
                "balanced_accuracy": found["balanced_accuracy"],
            }
        }

    def fold_weights(self, target_NY, times_BN):
        """Return the squared distance of classes from their mean."""
        return {MACRO: spread(target_NY[:, 0], times_BN)}


class StepLoss(nn.Module):
    """Binary cross-entropy of the steps between classes, averaged over slides that are known.

    Args:
        weight: (K,) weight of each class.
        conditional: whether a step counts only for slides that took the step before it.
    """

    def __init__(self, weight: tuple[float, ...], *, conditional: bool):
        super().__init__()
        self.conditional = conditional
        self.register_buffer("weight_K", torch.as_tensor(weight), persistent=False)

    def forward(self, logits_NJ: Tensor, class_N1: Tensor) -> Tensor:
        """Return the loss, one number, of logits (J,) or (N, J) and classes (1,) or (N, 1)."""
        class_N = class_N1[..., 0].reshape(-1)
        known_N = ~class_N.isnan()
        class_N = class_N.nan_to_num(0.0).long()
        logits_NJ = logits_NJ.reshape(len(class_N), -1)
        step_J = torch.arange(logits_NJ.shape[1], device=logits_NJ.device)
        above_NJ = (class_N[:, None] > step_J).to(logits_NJ.dtype)
        each_NJ = F.binary_cross_entropy_with_logits(logits_NJ, above_NJ, reduction="none")
        if self.conditional:
            each_NJ = each_NJ * (class_N[:, None] >= step_J)
        weight_N = self.weight_K.to(logits_NJ.dtype)[class_N] * known_N
        return (each_NJ.sum(1) * weight_N).sum() / known_N.sum().clamp(min=1)


def quadratic_kappa(counts_BKK: np.ndarray) -> np.ndarray:
    """Return Cohen's kappa with quadratic weights (B,); nan where all slides are of one class."""
    apart_KK = _apart(counts_BKK) ** 2
    total_B = counts_BKK.sum((1, 2))
    chance_BKK = counts_BKK.sum(2)[:, :, None] * counts_BKK.sum(1)[:, None]
    by_chance_B = (chance_BKK * apart_KK).sum((1, 2))
    varies_B = (counts_BKK.sum(2) > 0).sum(1) > 1
    ratio_B = np.divide(
        (counts_BKK * apart_KK).sum((1, 2)) * total_B, by_chance_B,
        out=np.full(len(counts_BKK), np.nan), where=varies_B & (by_chance_B > 0),
    )  # fmt: skip
    return 1 - ratio_B


def class_distance(counts_BKK: np.ndarray) -> np.ndarray:
    """Return the mean number of classes between true and called (B,); 0 is best."""
    total_B = counts_BKK.sum((1, 2))
    apart_B = (counts_BKK * _apart(counts_BKK)).sum((1, 2))
    return np.divide(apart_B, total_B, out=np.full(len(total_B), np.nan), where=total_B > 0)


def _apart(counts_BKK: np.ndarray) -> np.ndarray:
    place_K = np.arange(counts_BKK.shape[1])
    return np.abs(place_K[:, None] - place_K)
