"""CLAM: attention, and a classifier of single tiles taught by what attention looks at.

    h = relu(W z),  a_k = softmax(gate_k(h)),  logit_k = <c_k, sum_t a_kt h_t>
    for each label k: the B tiles of most attention are its evidence, the B of least are not

A slide that has the label teaches its tile classifier both groups, as 1 and 0; of a slide that has
it not, the tiles of most attention are 0. `multi: true` is CLAM-MB, a row of attention for each
label; `false` is CLAM-SB, one row for all, whose head is linear. Columns bag_loss and
instance_loss of metrics.csv are weighted, and add up to the loss. `tile_logits_TK` is the tile
classifiers': how much a tile looks like evidence of the label.

Price: 0.8 M parameters on 1,024 features.
Condition: labels of 0 and 1, or classes; no numbers, no survival.
Source: Lu et al. 2021 (CLAM, arXiv 2004.09666): attention branches, instance-level clustering;
    Berrada et al. 2018 (arXiv 1802.07595) for the smooth top-1 SVM loss.
Differs: labels need not exclude each other, and unknown ones teach nothing. Both groups shrink
    where a bag has fewer than 2 B tiles, so that none is 1 and 0 at once; of one tile nothing is
    taught. The published code's options differ from the paper: here tiles of absent labels always
    teach (its `subtyping`), and the loss of tiles is the SVM (its default is cross-entropy:
    `margin: 0`). No dropout.

Shapes: T tiles, D features, W width, A gate units, R rows of attention, K labels, B tiles a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfm.settings import below, refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


@dataclass(frozen=True)
class Clam:
    """Attention whose most and least regarded tiles teach a classifier of tiles."""

    multi: bool = True
    """A row of attention for each label (CLAM-MB), or one for all (CLAM-SB)."""
    width: int = 512
    """Of the projected tiles, W."""
    units: int = 256
    """Of the gate, A."""
    group: int = 8
    """Tiles of most and of least attention that teach, B."""
    weight: float = 0.3
    """Of the tiles' loss; the slide's has 1 less this."""
    margin: float = 1.0
    """Of the smooth SVM loss of tiles; at 0 it is cross-entropy."""

    def __post_init__(self):
        least = {"width": 1, "units": 1, "group": 1, "margin": 0}
        faults = below(vars(self), least)
        if not 0 <= self.weight < 1:
            faults.append(f"weight must be 0 or more and less than 1, got {self.weight}")
        refuse(f"model.aggregator clam: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> TileClustering:
        """Return the module; see `AggregatorOptions`."""
        return TileClustering(dim, labels, self)


class TileClustering(Aggregator):
    """The aggregator, and its classifiers of tiles.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: of the method.
    """

    has_attention = True
    tasks = ("multilabel", "multiclass")
    terms = ("bag_loss", "instance_loss")

    def __init__(self, dim: int, labels: int, options: Clam):
        super().__init__(dim, labels)
        self.options, self.linear_head = options, not options.multi
        width = options.width
        self.project = nn.Linear(dim, width)
        self.tanh = nn.Linear(width, options.units)
        self.sigmoid = nn.Linear(width, options.units)
        self.attention = nn.Linear(options.units, labels if options.multi else 1)
        last = nn.Linear(width, labels)  # with several rows, row k reads the bag of label k
        self.add_module("bag_head" if options.multi else "head", last)
        self.instance_heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(labels))

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, the mean attention, and the tile classifiers' logits."""
        h_TW = self.project(self.standardised(tiles.z_TD)).relu()
        gated_TA = torch.tanh(self.tanh(h_TW)) * torch.sigmoid(self.sigmoid(h_TW))
        scores_RT = self.attention(gated_TA).T
        a_RT = scores_RT.softmax(1)
        b_RW = a_RT @ h_TW
        if self.options.multi:
            logits_K = (b_RW * self.bag_head.weight).sum(1) + self.bag_head.bias
        else:
            logits_K = self.head(b_RW[0])
        two_TK2 = torch.stack([head(h_TW) for head in self.instance_heads], 1)
        tile_logits_TK = two_TK2[..., 1] - two_TK2[..., 0]
        return SlideOutput(
            logits_K=logits_K,
            weights_T=a_RT.mean(0),
            embedding_E=b_RW.flatten(),
            log_weights=scores_RT.log_softmax(1).squeeze(0),
            tile_logits_TK=tile_logits_TK,
            extras={"scores_RT": scores_RT, "tile_logits_TK": tile_logits_TK},
        )

    def losses(self, output: SlideOutput, target_Y: Tensor, loss: nn.Module) -> dict[str, Tensor]:
        """Return the slide's and the tiles' loss, weighted, by their names in `terms`."""
        share = self.options.weight
        tiles = self.tile_loss(loss.positives(target_Y), **output.extras)
        bag = loss(output.logits_K, target_Y)
        return dict(zip(self.terms, ((1 - share) * bag, share * tiles), strict=True))

    def tile_loss(self, has_K: Tensor, scores_RT: Tensor, tile_logits_TK: Tensor) -> Tensor:
        """Return the mean loss of the known labels' tiles; 0 where nothing can be taught.

        Args:
            has_K: 1 where the slide has the label, 0 where not, nan where unknown.
            scores_RT: attention, before its softmax.
            tile_logits_TK: of the tile classifiers.
        """
        count = min(self.options.group, scores_RT.shape[1] // 2)
        most_RB = scores_RT.topk(count, dim=1).indices
        least_RB = scores_RT.topk(count, dim=1, largest=False).indices
        row_K = range(self.labels) if self.options.multi else [0] * self.labels
        terms = [0 * tile_logits_TK.sum()]
        for k, row in enumerate(row_K):
            if count and not has_K[k].isnan():
                most_B = tile_logits_TK[most_RB[row], k]
                if has_K[k] == 1:
                    wrong_B = torch.cat([-most_B, tile_logits_TK[least_RB[row], k]])
                else:
                    wrong_B = most_B
                terms.append(nn.functional.softplus(self.options.margin + wrong_B).mean())
        return torch.stack(terms).sum() / max(1, len(terms) - 1)
