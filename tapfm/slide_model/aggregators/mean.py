"""The mean of the tiles and a linear head: a linear probe whose encoder learns.

Every tile has the same weight, so nothing but the head stands between the label and the encoder.
It suits a trait of many tiles and a cohort too small to learn attention from; where a few tiles
carry the label they are diluted. A tile's logits say what it adds: their mean is the slide's.

Shapes: T tiles, D features, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


class MeanPooling(Aggregator):
    """The standardised mean tile to logits; see the file's docstring."""

    def __init__(self, dim: int, labels: int):
        super().__init__(dim, labels)
        self.head = nn.Linear(dim, labels)

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, equal weights, the mean tile, and each tile's logits; see `Aggregator`."""
        x_TD = self.standardised(tiles.z_TD)
        b_D = x_TD.mean(0)
        weights_T = torch.zeros_like(x_TD[:, 0]).softmax(0)  # 1 / T, for any T of a fixed graph
        return SlideOutput(self.head(b_D), weights_T, b_D, tile_logits_TK=self.head(x_TD))


@dataclass(frozen=True)
class Mean:
    """Every tile weighs the same; it has no options."""

    def build(self, dim: int, labels: int) -> MeanPooling:
        """See `AggregatorOptions`."""
        return MeanPooling(dim, labels)
