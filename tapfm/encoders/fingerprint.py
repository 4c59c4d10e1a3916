"""A short hash of what an encoder computes, to tell whether two encoders are the same.

It is the hash of the rounded features of a known tile. It stands in the header of a run's weights,
in every feature file and in the output of `tapfm doctor`. It depends on weights, normalisation,
feature and tile size; not on how a file stores the weights, the machine or the attention kernel,
because it is computed in float64, where machines agree to about 1e-12 and values hardly ever lie
at the edge of rounding.

Price: one tile through the model in float64: seconds, and 8 bytes a parameter. Condition: position
embeddings resampled for another tile size carry float32's rounding, so two machines may rarely
differ.

Shapes: C tiles, S side of a tile, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tapfm.encoders.backbones import Encoder, build, load_state
from tapfm.encoders.registry import Backbone

ROUNDING = 1e-4  # features are of order 1; float64 machines differ by far less


def state_fingerprint(row: Backbone, state: Mapping[str, Tensor], tile_px: int) -> str:
    """Return the fingerprint of plain timm weights, computed on the CPU in a new model."""
    with torch.random.fork_rng(devices=[]):  # building draws numbers that training is to draw
        vit = build(row, tile_px)
    load_state(vit, row, {name: value.detach().cpu() for name, value in state.items()})
    return fingerprint(Encoder(vit, row).eval())


@torch.no_grad()
def fingerprint(encoder: Encoder) -> str:
    """Return 16 hex digits of the sha256 of a known tile's rounded features.

    Args:
        encoder: in eval mode, on the CPU; it is turned to float64 in place.
    """
    z_CD, _ = encoder.double()(known_tiles(1, encoder.tile_px))
    rounded = (z_CD / ROUNDING).round().to(torch.int64).numpy().astype("<i8")
    return hashlib.sha256(rounded.tobytes()).hexdigest()[:16]


def known_tiles(tiles: int, side: int) -> Tensor:
    """Return tiles (C, 3, S, S), equal on every machine: integer arithmetic, no random numbers."""
    c, channel, y, x = np.ogrid[:tiles, :3, :side, :side]
    wave = (x * x + 3 * y * y + x * y * (channel + 1)) // 61 + 37 * channel + 101 * c
    checks = 64 * ((x // 16 + y // 16 + c) % 2)
    return torch.from_numpy(((wave % 128) + 64 + checks).astype(np.uint8))
