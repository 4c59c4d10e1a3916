"""Tile sets for aggregators: features and scores with places on a lattice, one slide or several."""

import torch

from tapfm.data.bag import Bag, Places
from tapfm.slide_model.aggregators.contract import TileSet

STEP0 = 448


def places(count, counts=()):
    """Tiles of one slide, or `counts` of several, row by row on a lattice 5 tiles wide."""
    coords0 = [
        torch.stack([torch.arange(n) % 5, torch.arange(n) // 5], 1) * STEP0
        for n in counts or [count]
    ]
    return Places.of(coords0, [STEP0] * len(coords0), 0.5)


def tile_set(z_TD, score_T, counts=()):
    """These features and scores at those places."""
    return TileSet.of(places(len(z_TD), counts), z_TD, score_T)


def bag_of(tiles, counts=()):
    """A bag of these pixels, of whose labels nothing is known."""
    return Bag("s", "c", tiles, places(len(tiles), counts), torch.full((1,), torch.nan), seed=0)
