"""PathPT's loss of the tiles of one slide.

    1.0  labelled tiles: cross-entropy, averaged by class, then over the classes present
    0.1  candidates: minus log of the probability that they are normal or the slide's subtype
    0.5  candidates, from a later epoch on: those predicted as one of the two, as if labelled

With true tile labels there are no candidates, and only the first line remains.

Source: PathPT (arXiv 2508.15904).
Differs: logits go in as they are. The release takes the softmax twice, which keeps the loss from
    falling to 0 and damps the gradient; `double_softmax` repeats that, for comparison only. Its
    threshold for the third line, computed and never applied there, is not here.

Shapes: N tiles, K classes of a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LABELLED, TRUSTED, CANDIDATE = 1.0, 0.5, 0.1


def tile_loss(
    logits_NK: Tensor,
    labels_N: Tensor,
    subtype: int,
    *,
    trust: bool,
    double_softmax: bool = False,
) -> Tensor:
    """Return the loss of a slide.

    Args:
        logits_NK: scaled cosines.
        labels_N: labels from `pseudo.tile_labels`; negative for candidates.
        subtype: the slide's subtype, 0 to C - 1.
        trust: whether the third term is used.
        double_softmax: use the loss of the release.
    """
    if double_softmax:
        logits_NK = logits_NK.softmax(1)
    log_p_NK = logits_NK.log_softmax(1)
    candidate_N = labels_N < 0
    loss = LABELLED * balanced_nll(log_p_NK[~candidate_N], labels_N[~candidate_N])
    if not candidate_N.any():
        return loss
    own = subtype + 1
    log_p_MK = log_p_NK[candidate_N]
    loss = loss - CANDIDATE * torch.logaddexp(log_p_MK[:, 0], log_p_MK[:, own]).mean()
    if trust:
        called_M = log_p_MK.detach().argmax(1)
        sure_M = (called_M == 0) | (called_M == own)
        loss = loss + TRUSTED * balanced_nll(log_p_MK[sure_M], called_M[sure_M])
    return loss


def balanced_nll(log_p_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Return the mean over present classes of the mean over their tiles; 0 without tiles."""
    if not len(labels_N):
        return log_p_NK.sum()
    each_N = F.nll_loss(log_p_NK, labels_N, reduction="none")
    count_K = torch.bincount(labels_N, minlength=log_p_NK.shape[1]).to(each_N.dtype)
    sum_K = torch.zeros_like(count_K).index_add(0, labels_N, each_N)
    return (sum_K[count_K > 0] / count_K[count_K > 0]).mean()
