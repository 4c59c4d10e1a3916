"""Slide losses. `nan` is an unknown label: masked, never 0.

Shapes: K labels.
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
