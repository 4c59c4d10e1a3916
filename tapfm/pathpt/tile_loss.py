"""What PathPT minimises on the tiles of one slide.

    1.0  labelled tiles: cross-entropy, the mean of each class averaged over the classes there are
    0.1  candidates: minus the log of the chance that they are normal or the slide's subtype
    0.5  candidates, once the model knows something: those it calls one of the two, as labelled

Given true tile labels, which leave no candidates, it is the first line alone.

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
    """The loss of a slide.

    Args:
        logits_NK: scaled cosines.
        labels_N: as `pseudo.tile_labels` gives them; negative for candidates.
        subtype: of the slide, 0 to C - 1.
        trust: whether the third line counts yet.
        double_softmax: as released.
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
    """Mean over the classes there are of the mean over their tiles; 0 where there is no tile."""
    if not len(labels_N):
        return log_p_NK.sum()
    each_N = F.nll_loss(log_p_NK, labels_N, reduction="none")
    count_K = torch.bincount(labels_N, minlength=log_p_NK.shape[1]).to(each_N.dtype)
    sum_K = torch.zeros_like(count_K).index_add(0, labels_N, each_N)
    return (sum_K[count_K > 0] / count_K[count_K > 0]).mean()
