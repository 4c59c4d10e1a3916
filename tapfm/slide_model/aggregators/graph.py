"""A graph of touching tiles: each tile takes in its neighbours', then attention pools them.

    h_t = relu(W z_t)
    h_t <- relu(S h_t + N mean_{u touches t} h_u)             `layers` times; 8 cells touch one
    w = softmax(gate(h)),  logits = head(norm(sum_t w_t h_t))

A tile without neighbours has a mean of 0. Slides of a case do not touch.

Price: 2 W x W numbers a layer; time grows as the tiles.
Condition: coordinates. With `data.tiles_per_slide` a step sees tiles far apart, few of which touch.
Source: GNN-ViTCap (arXiv 2507.07006), graph of tiles and attention pooling, without its captions
    and its clusters; Hamilton et al. 2017 (GraphSAGE, arXiv 1706.02216), mean aggregator.
Differs: tiles are joined where they touch, and not with their k nearest, which are the same 8
    inside tissue but depend on the order of equally near tiles at its edges. GraphSAGE divides each
    layer's output by its length; here the pooled vector is normalised.

Shapes: T tiles, D features, W width, P pairs of touching tiles, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfm.settings import below, refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet, need_coords
from tapfm.slide_model.layers.attention import Gate

AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


@dataclass(frozen=True)
class Graph:
    """GraphSAGE on touching tiles, pooled by attention."""

    width: int = 256
    """Of the nodes, W."""
    layers: int = 2
    """How many steps away a tile takes in others."""

    def __post_init__(self):
        faults = below(vars(self), {"width": 1, "layers": 1})
        refuse(f"model.aggregator graph: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> TouchingTiles:
        """Return the module; see `AggregatorOptions`."""
        return TouchingTiles(dim, labels, self)


class TouchingTiles(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: width and layers.
    """

    uses_coords = True
    has_attention = True

    def __init__(self, dim: int, labels: int, options: Graph):
        super().__init__(dim, labels)
        width = options.width
        self.project = nn.Linear(dim, width)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(options.layers))
        self.around = nn.ModuleList(
            nn.Linear(width, width, bias=False) for _ in range(options.layers)
        )
        self.gate = Gate(width, start_at_zero=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, labels)

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, attention over the nodes, and their normalised weighted mean."""
        pairs_P2 = touching(need_coords(tiles, "graph"), tiles.slide_of_T).to(tiles.z_TD.device)
        h_TW = self.project(self.standardised(tiles.z_TD)).relu()
        for own, around in zip(self.own, self.around, strict=True):
            h_TW = (own(h_TW) + around(neighbour_means(h_TW, pairs_P2))).relu()
        scores_T = self.gate(h_TW)
        weights_T = scores_T.softmax(0)
        b_W = self.norm(weights_T @ h_TW)
        return SlideOutput(self.head(b_W), weights_T, b_W, scores_T.log_softmax(0))


def touching(cells_T2: Tensor, slide_of_T: Tensor) -> Tensor:
    """Return the pairs (P, 2) of a tile and one in a touching cell of its slide, both ways.

    Tiles in one cell, as those of overlapping grids can be, are not told apart: one is found.
    """
    rows, columns = (cells_T2.amax(0) + 3).tolist()  # an empty rim, so that no row meets the next
    place_T = (slide_of_T * rows + cells_T2[:, 0] + 1) * columns + cells_T2[:, 1] + 1
    sorted_T, order_T = place_T.sort()
    pairs = []
    for dy, dx in AROUND:
        wanted_T = place_T + dy * columns + dx
        at_T = torch.searchsorted(sorted_T, wanted_T).clamp(max=len(sorted_T) - 1)
        there_T = (sorted_T[at_T] == wanted_T).nonzero()[:, 0]
        pairs.append(torch.stack([there_T, order_T[at_T[there_T]]], 1))
    return torch.cat(pairs)


def neighbour_means(h_TW: Tensor, pairs_P2: Tensor) -> Tensor:
    """Return the mean (T, W) of each tile's neighbours, 0 where it has none."""
    tile_P, other_P = pairs_P2.unbind(1)
    sums_TW = torch.zeros_like(h_TW).index_add(0, tile_P, h_TW[other_P])
    return sums_TW / tile_P.bincount(minlength=len(h_TW)).clamp(min=1)[:, None]
