"""The batch of labelled tiles: where `tile_training.data` and `tile_training.module` meet.

Shapes: C tiles of a batch, S side of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass  # not frozen: Lightning's precision plugins rebuild a batch field by field
class TileBatch:
    """Some tiles and their classes."""

    tiles_CP: Tensor
    """uint8 (C, 3, S, S)."""
    labels_C: Tensor
    """int64, 0 to K - 1."""
    seed: int
    """Seeds dropout and drop-path: a function of run seed, epoch and place."""
    turn: tuple[int, int, int]
    """Its place in training: epoch, position, batch."""

    @property
    def count(self) -> int:
        """C."""
        return len(self.labels_C)

    @property
    def slide_id(self) -> str:
        """None: tiles of a batch are of many slides."""
        return ""

    def to(self, device, non_blocking: bool = False) -> TileBatch:
        """Nothing moves: the encoder takes tiles from anywhere."""
        return self
