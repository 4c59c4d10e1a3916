"""The interface of bag transforms, which change the tiles that the aggregator is given.

It acts on the leaves of the slide model's graph, in training alone. A tile that it leaves out gets
no gradient, and pass 2 does not encode it again: train/skipped_tiles counts those.

Random numbers come from a generator that is seeded by `moment.seed`, so that a repeated or resumed
run draws the same.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from tapfm.data.bag import Moment
from tapfm.slide_model.aggregators.contract import Aggregator, TileSet


class BagTransform(nn.Module):
    """Base of all bag transforms."""

    def forward(self, tiles: TileSet, moment: Moment) -> TileSet:
        """Return the tiles that the aggregator is given."""
        raise NotImplementedError


class BagTransformOptions(Protocol):
    """The frozen dataclass by which a config names a transform; its fields are its options."""

    def build(self, aggregator: Aggregator) -> BagTransform:
        """Return the module; SettingsError where it cannot serve with this aggregator."""
