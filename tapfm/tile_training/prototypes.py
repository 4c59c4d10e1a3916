"""HiAdapter's prototype loss: pulls features to their class's prototype, away from others'.

With f a tile's feature, y its class, p_c the prototype of class c and s_c the cosine of f and p_c,
averaged over tiles:

    pull    log(1 + exp(-alpha (s_y - margin)))
    push    log(1 + max over c != y of exp(alpha (s_c + margin)))

Prototypes are no parameters. Before each loss `update` adds to every prototype the direction of its
class's features, those that the classifier is sure of, weighted by how sure.

Used where tiles have labels (`tapfm fit-tiles`, `model.loss: ppcl`); a slide's label says nothing
of one tile.

Source: Liu et al. 2026 (HiAdapter, IEEE TMI), the "pathology prototypical contrastive loss" in the
    form of its authors' published code, whose weights of 1e-5 and 1e-6 leave it no say.
Differs: weights that do, their ratio kept; a buffer, where the code makes a new parameter a step.

Shapes: C tiles, D features, K classes, 2 or more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrototypeLoss(nn.Module):
    """Loss added to the cross-entropy of labelled tiles.

    Args:
        classes: K.
        dim: D.
        alpha: steepness.
        margin: delta.
        pull: weight of the own prototype's term.
        push: weight of the nearest other prototype's term.
        sure: a tile moves its prototype if the classifier gives its class more than this.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        alpha: float = 8.0,
        margin: float = 0.0,
        pull: float = 0.1,
        push: float = 0.01,
        sure: float = 0.8,
    ):
        super().__init__()
        if classes < 2:
            raise ValueError(f"prototypes: classes must be 2 or more, got {classes}")
        self.alpha, self.margin, self.pull, self.push, self.sure = alpha, margin, pull, push, sure
        self.register_buffer("prototypes_KD", nn.init.kaiming_normal_(torch.empty(classes, dim)))

    def forward(self, features_CD: Tensor, labels_C: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            features_CD: features of the tiles.
            labels_C: their classes, 0 to K - 1.
        """
        cosine_CK = F.normalize(features_CD, dim=1) @ F.normalize(self.prototypes_KD, dim=1).T
        own_C1 = labels_C[:, None]
        own_C = cosine_CK.gather(1, own_C1).squeeze(1)
        other_C = cosine_CK.scatter(1, own_C1, -torch.inf).amax(1)
        pull = F.softplus(-self.alpha * (own_C - self.margin)).mean()
        push = F.softplus(self.alpha * (other_C + self.margin)).mean()
        return self.pull * pull + self.push * push

    @torch.no_grad()
    def update(self, features_CD: Tensor, logits_CK: Tensor, labels_C: Tensor) -> None:
        """Move each prototype by its class's tiles; one with no sure tile keeps its direction."""
        sure_C = logits_CK.softmax(1).gather(1, labels_C[:, None]).squeeze(1)
        weight_C = sure_C * (sure_C > self.sure)
        weight_CK = F.one_hot(labels_C, len(self.prototypes_KD)) * weight_C[:, None]
        towards_KD = F.normalize(weight_CK.T.to(features_CD.dtype) @ features_CD, dim=1)
        self.prototypes_KD.copy_(F.normalize(self.prototypes_KD + towards_KD, dim=1))
