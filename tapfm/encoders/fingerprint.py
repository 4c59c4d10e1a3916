"""A short name for what an encoder computes, so that two people can say whether theirs is the same.

It is the hash of the features of a known tile, rounded, and stands in the header of a run's
weights, in every feature file and in what `tapfm doctor` prints. It tells weights, normalisation,
feature and tile size; how a file stores the weights, the machine and the attention kernel do not
change it, for it is taken in float64, where machines agree to some 1e-12 and hardly a number comes
near the edge of its rounding.

Price: one tile through the model in float64: seconds, and 8 bytes a parameter. Condition: position
embeddings that were resampled for another tile size carry float32's rounding, by which two machines
may now and then differ.

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
    """Of plain timm weights, on the CPU and in a model of its own: nothing given is changed."""
    with torch.random.fork_rng(devices=[]):  # building draws numbers that training is to draw
        vit = build(row, tile_px)
    load_state(vit, row, {name: value.detach().cpu() for name, value in state.items()})
    return fingerprint(Encoder(vit, row).eval())


@torch.no_grad()
def fingerprint(encoder: Encoder) -> str:
    """The start of a sha256 of rounded features of a known tile. Turns the model to float64.

    Args:
        encoder: in eval mode, on the CPU.
    """
    z_CD, _ = encoder.double()(known_tiles(1, encoder.tile_px))
    rounded = (z_CD / ROUNDING).round().to(torch.int64).numpy().astype("<i8")
    return hashlib.sha256(rounded.tobytes()).hexdigest()[:16]


def known_tiles(tiles: int, side: int) -> Tensor:
    """Tiles (C, 3, S, S) that are the same everywhere: integer arithmetic, no random numbers."""
    c, channel, y, x = np.ogrid[:tiles, :3, :side, :side]
    wave = (x * x + 3 * y * y + x * y * (channel + 1)) // 61 + 37 * channel + 101 * c
    checks = 64 * ((x // 16 + y // 16 + c) % 2)
    return torch.from_numpy(((wave % 128) + 64 + checks).astype(np.uint8))
