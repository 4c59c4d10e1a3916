"""Slide losses. `nan` is an unknown label: masked, never 0.

Each takes one slide or a batch of them, and gives 0, still with a graph, where nothing is known.
The Cox loss is in `tapfm.tasks.cox`.

Shapes: K logits; N slides, in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedBCE(nn.Module):
    """Binary cross-entropy, one sigmoid a label, averaged over the labels that are known.

    Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184), multi-label loss.
    Differs: the paper's weights are one cohort's; ours come from the training split given, and
        unknown labels are masked.

    Args:
        pos_weight: negatives over positives of each label (K values), from the training split.
    """

    def __init__(self, pos_weight: Sequence[float]):
        super().__init__()
        weight_K = torch.as_tensor(pos_weight, dtype=torch.float32)
        self.register_buffer("pos_weight_K", weight_K, persistent=False)

    def forward(self, logits_K: Tensor, labels_K: Tensor) -> Tensor:
        """One number; 0, still with a graph, where every label is unknown.

        Args:
            logits_K: logits, any float dtype.
            labels_K: 0, 1 or nan.
        """
        known_K = ~labels_K.isnan()
        each_K = F.binary_cross_entropy_with_logits(
            logits_K,
            labels_K.nan_to_num(0.0).to(logits_K.dtype),
            pos_weight=self.pos_weight_K.to(logits_K.dtype),
            reduction="none",
        )
        return (each_K * known_K).sum() / known_K.sum().clamp(min=1)


class MaskedCrossEntropy(nn.Module):
    """Cross-entropy of one class among K, averaged over the slides whose class is known.

    Differs: torch's own divides by the weights of the batch, so that with one slide a step a weight
        would cancel; here a slide of a class of weight 3 counts three times, whatever is beside it.

    Args:
        weight: of each class, from the training split.
    """

    def __init__(self, weight: Sequence[float]):
        super().__init__()
        self.register_buffer("weight_K", torch.as_tensor(weight), persistent=False)

    def forward(self, logits_NK: Tensor, class_N1: Tensor) -> Tensor:
        """One number.

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


class MaskedMSE(nn.Module):
    """Squared error of standardised targets, averaged over those that are known.

    Args:
        mean: of each target, from the training split.
        std: of each target, likewise.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean_K", torch.as_tensor(mean), persistent=False)
        self.register_buffer("std_K", torch.as_tensor(std), persistent=False)

    def forward(self, logits_NK: Tensor, y_NK: Tensor) -> Tensor:
        """One number.

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

    Of an event in bin k: not in any bin before, then in k. Of a case last seen in bin k: in no bin
    up to k, that one included, as is usual in this field.

    Source: Gensheimer and Narasimhan 2019 (nnet-survival, arXiv 1805.00917); Chen et al. 2021
        (Patch-GCN, arXiv 2107.13048) for its use on bags of tiles.
    Differs: from `logsigmoid`, not from products of clamped probabilities.

    Args:
        edges: of the bins, K - 1 rising times; bin k begins at edge k - 1, which belongs to it.
    """

    def __init__(self, edges: Sequence[float]):
        super().__init__()
        edges = torch.as_tensor(edges, dtype=torch.float32)
        self.register_buffer("edges", edges, persistent=False)

    def forward(self, logits_NK: Tensor, y_N3: Tensor) -> Tensor:
        """One number, averaged over the slides whose time is known.

        Args:
            logits_NK: (K,) or (N, K), logits of the hazards.
            y_N3: time, event (1 or 0) and what else there is; nan where unknown.
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
