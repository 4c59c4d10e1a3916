"""Losses of a slide, or of a batch of slides. A target of nan is unknown: masked, never 0.

Where no target is known, a loss is 0 and still has a graph. Cox's loss is in `tapfm.tasks.cox`.

Shapes: K logits; N slides, in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedBCE(nn.Module):
    """Binary cross-entropy, one sigmoid a label, averaged over the known labels.

    Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184), multi-label loss.
    Differs: the paper's weights are those of one cohort; these come from the training split given,
        and unknown labels are masked.

    Args:
        pos_weight: (K,) negatives over positives of each label in the training split.
    """

    def __init__(self, pos_weight: Sequence[float]):
        super().__init__()
        weight_K = torch.as_tensor(pos_weight, dtype=torch.float32)
        self.register_buffer("pos_weight_K", weight_K, persistent=False)

    def forward(self, logits_K: Tensor, labels_K: Tensor) -> Tensor:
        """Return the loss, one number.

        Args:
            logits_K: (K,) or (N, K), any float dtype.
            labels_K: of the same shape; 0, 1 or nan.
        """
        known_K = ~labels_K.isnan()
        each_K = F.binary_cross_entropy_with_logits(
            logits_K,
            labels_K.nan_to_num(0.0).to(logits_K.dtype),
            pos_weight=self.pos_weight_K.to(logits_K.dtype),
            reduction="none",
        )
        return (each_K * known_K).sum() / known_K.sum().clamp(min=1)

    def positives(self, labels_K: Tensor) -> Tensor:
        """Return which labels a slide has, (K,): 1, 0, or nan where unknown."""
        return labels_K


class MaskedCrossEntropy(nn.Module):
    """Cross-entropy of one class among K, averaged over the slides whose class is known.

    Differs: torch divides by the sum of the batch's weights, which cancels the weight when a step
        has one slide; here a slide of a class of weight 3 counts three times in any batch.

    Args:
        weight: (K,) weight of each class.
    """

    def __init__(self, weight: Sequence[float]):
        super().__init__()
        self.register_buffer("weight_K", torch.as_tensor(weight), persistent=False)

    def forward(self, logits_NK: Tensor, class_N1: Tensor) -> Tensor:
        """Return the loss, one number.

        Args:
            logits_NK: (K,) or (N, K).
            class_N1: (1,) or (N, 1), number of the class, or nan.
        """
        class_N = class_N1[..., 0].reshape(-1)
        known_N = ~class_N.isnan()
        each_N = F.cross_entropy(
            logits_NK.reshape(len(class_N), -1),
            class_N.nan_to_num(0.0).long(),
            weight=self.weight_K.to(logits_NK.dtype),
            reduction="none",
        )
        return (each_N * known_N).sum() / known_N.sum().clamp(min=1)

    def positives(self, class_1: Tensor) -> Tensor:
        """Return which class a slide has, (K,): 1 and else 0; nan where unknown."""
        numbers_K = torch.arange(len(self.weight_K), device=class_1.device)
        return torch.where(class_1.isnan(), class_1, (numbers_K == class_1).to(class_1))


class MaskedMSE(nn.Module):
    """Squared error of standardised targets, averaged over the known targets.

    Args:
        mean: (K,) mean of each target over the training split.
        std: (K,) its standard deviation there.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean_K", torch.as_tensor(mean), persistent=False)
        self.register_buffer("std_K", torch.as_tensor(std), persistent=False)

    def forward(self, logits_NK: Tensor, y_NK: Tensor) -> Tensor:
        """Return the loss, one number.

        Args:
            logits_NK: (K,) or (N, K), in standard deviations from the mean.
            y_NK: targets in their own unit, or nan.
        """
        wanted_NK = ((y_NK - self.mean_K) / self.std_K).to(logits_NK.dtype)
        known_NK = ~wanted_NK.isnan()
        error_NK = (logits_NK - wanted_NK.nan_to_num(0.0)) * known_NK
        return error_NK.square().sum() / known_NK.sum().clamp(min=1)


class HazardNLL(nn.Module):
    """Negative log-likelihood of discrete-time survival: one hazard a bin of time.

    An event in bin k survived every bin before k. A case censored in bin k survived every bin up to
    and including k, as is usual in this field.

    Source: Gensheimer and Narasimhan 2019 (nnet-survival, arXiv 1805.00917); Chen et al. 2021
        (Patch-GCN, arXiv 2107.13048) for its use on bags of tiles.
    Differs: computed from `logsigmoid`, not from products of clamped probabilities.

    Args:
        edges: K - 1 rising times between the bins; an edge belongs to the bin that it begins.
    """

    def __init__(self, edges: Sequence[float]):
        super().__init__()
        edges = torch.as_tensor(edges, dtype=torch.float32)
        self.register_buffer("edges", edges, persistent=False)

    def forward(self, logits_NK: Tensor, y_N3: Tensor) -> Tensor:
        """Return the loss, one number, averaged over the slides whose time is known.

        Args:
            logits_NK: (K,) or (N, K), logits of the hazards.
            y_N3: time, event (1 or 0) and number of the slide; nan where unknown.
        """
        time_N, event_N = y_N3[..., 0].reshape(-1), y_N3[..., 1].reshape(-1)
        logits_NK = logits_NK.reshape(len(time_N), -1)
        known_N = ~time_N.isnan()
        bin_N = torch.bucketize(time_N.nan_to_num(0.0), self.edges, right=True)
        place_K = torch.arange(logits_NK.shape[1], device=logits_NK.device)
        in_bin_NK = place_K == bin_N[:, None]
        died_NK = in_bin_NK & (event_N == 1)[:, None]
        survived_NK = (place_K <= bin_N[:, None]) & ~died_NK
        each_NK = died_NK * F.logsigmoid(logits_NK) + survived_NK * F.logsigmoid(-logits_NK)
        return -(each_NK.sum(1) * known_N).sum() / known_N.sum().clamp(min=1)
