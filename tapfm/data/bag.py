"""The batch: one slide's tiles and labels. Where `tapfm.data.datamodule` and `tapfm.training.module` meet.

Shapes: T tiles of a slide, K labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Tiles(Protocol):
    """A slide's tiles, cut into chunks: a uint8 tensor (T, 3, H, W), or a slide read on the way."""

    def split(self, size: int) -> Iterable[Tensor]:
        """Chunks (C, 3, H, W) of `size` tiles in order, the last one short; the same every time."""


class SkippedBag(Exception):
    """A slide turned out unreadable while it was streamed, and is to be left out.

    Raised by `Tiles.split` where the run was told to skip such slides; whoever gave the tiles has
    noted the slide and its fault.
    """


@contextmanager
def too_late_to_skip() -> Iterator[None]:
    """Where something has learned from the slide, and its fault is an error after all."""
    try:
        yield
    except SkippedBag as skipped:
        raise (skipped.__cause__ or skipped) from None


@dataclass(frozen=True)
class Bag:
    """One slide as the trainer sees it."""

    slide_id: str
    case_id: str
    tiles: Tiles
    count: int
    """T, the number of tiles."""
    labels_K: Tensor
    """float32: 0, 1, or nan where unknown; of other tasks the target's numbers."""
    seed: int
    """Seeds dropout and drop-path: a function of run seed, epoch and slide."""
    turn: tuple[int, int, int] | None = None
    """Its place in training: epoch, position, slide; None outside training."""
    counts: tuple[int, ...] = ()
    """Tiles of each of its slides, in order, where it is a case of several."""
