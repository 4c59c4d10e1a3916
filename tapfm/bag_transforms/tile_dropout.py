"""Tile dropout: a share of a slide's tiles, drawn anew at each step, is left out.

The aggregator cannot lean on single tiles, and pass 2 encodes so many fewer: at `share` 0.5 the
encoder's backward, most of a step's work, is halved. Pass 1 still sees all tiles.

Source: random masking of MHIM-MIL (Tang et al. 2023, arXiv 2307.15254), its simplest branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tapfm.bag_transforms.contract import BagTransform
from tapfm.data.bag import Moment
from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators.contract import Aggregator, TileSet


@dataclass(frozen=True)
class TileDropout:
    """Leaves out tiles at random."""

    share: float = 0.5
    """Share of a bag's tiles that is left out; one tile at least stays."""

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise SettingsError(
                f"model.bag_transforms tile_dropout: share must be in [0, 1), got {self.share}"
            )

    def build(self, aggregator: Aggregator) -> DropTiles:
        """See `BagTransformOptions`."""
        return DropTiles(self.share)


class DropTiles(BagTransform):
    """The transform; see the file's docstring."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, tiles: TileSet, moment: Moment) -> TileSet:
        """Return the tiles that stay, in their order."""
        if self.share == 0:
            return tiles
        kept = max(1, round(len(tiles) * (1 - self.share)))
        drawn = torch.Generator().manual_seed(moment.seed)
        rows = torch.randperm(len(tiles), generator=drawn)[:kept].sort().values
        return tiles.take(rows)
