"""The batch: one slide's tiles and labels. Where `tapfm.data` and `tapfm.training` meet.

Shapes: T tiles of a bag, D features, K labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor


class Tiles(Protocol):
    """A slide's tiles, cut into chunks: a uint8 tensor (T, 3, H, W), or a slide read on the way."""

    def split(self, size: int) -> Iterable[Tensor]:
        """Return chunks (C, 3, H, W) of `size` tiles in order, the last short; always the same."""


class SkippedBag(Exception):
    """The signal that a slide is unreadable while streamed and is left out.

    Raised by `Tiles.split` where the run was told to skip such slides; whoever gave the tiles has
    noted the slide and its fault.
    """


@contextmanager
def too_late_to_skip() -> Iterator[None]:
    """Raise a skipped slide's own fault, since training has used the slide."""
    try:
        yield
    except SkippedBag as skipped:
        raise (skipped.__cause__ or skipped) from None


@dataclass(frozen=True, kw_only=True)
class Places:
    """Coordinates of the tiles of a bag. Its tensors stay on the CPU."""

    coords0_T2: Tensor | None
    """int64 level-0 pixels of each tile's upper left corner, in its own slide; None is unknown."""
    slide_of_T: Tensor
    """int64 number of each tile's slide in the bag, from 0 on and rising."""
    grid_px0_T: Tensor | None
    """float64 level-0 pixels from a tile to the next of the lattice; None is unknown."""
    mpp: float
    """Microns per tile pixel."""

    @classmethod
    def of(
        cls,
        coords0: Sequence[np.ndarray | Tensor],
        grid_px0: Sequence[float],
        mpp: float,
    ) -> Places:
        """Return the places of one or several slides, given the corners (T, 2) of each.

        Args:
            coords0: of each slide.
            grid_px0: level-0 pixels from a tile to the next, of each slide.
            mpp: microns per tile pixel.
        """
        counts = torch.tensor([len(each) for each in coords0])
        return cls(
            coords0_T2=torch.cat([torch.as_tensor(each, dtype=torch.int64) for each in coords0]),
            slide_of_T=torch.arange(len(counts)).repeat_interleave(counts),
            grid_px0_T=torch.tensor(grid_px0, dtype=torch.float64).repeat_interleave(counts),
            mpp=mpp,
        )

    @classmethod
    def unknown(cls, count: int, mpp: float = 0.5) -> Places:
        """Return the places of one slide's tiles whose coordinates are unknown."""
        slide_of_T = torch.zeros(count, dtype=torch.int64)
        return cls(coords0_T2=None, slide_of_T=slide_of_T, grid_px0_T=None, mpp=mpp)

    def __len__(self) -> int:
        return len(self.slide_of_T)

    @property
    def counts(self) -> list[int]:
        """Tiles of each slide that has any, in order."""
        return self.slide_of_T.unique_consecutive(return_counts=True)[1].tolist()

    def lattice(self) -> Tensor:
        """Return row and column of each tile on its slide's lattice, (T, 2) int64, from 0 on."""
        yx_T2 = (self.coords0_T2.flip(1) / self.grid_px0_T[:, None]).round().long()
        for number in self.slide_of_T.unique():
            own_T = self.slide_of_T == number
            yx_T2[own_T] -= yx_T2[own_T].amin(0)
        return yx_T2

    def take(self, rows_T: Tensor) -> Self:
        """Return the places of some tiles, chosen by a mask or row numbers."""
        tensors = {
            each.name: value[rows_T.to(value.device)]
            for each in fields(self)
            if isinstance(value := getattr(self, each.name), Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class Moment:
    """A run's progress and seed, for regularisers, bag transforms and aggregators."""

    progress: float
    """Share of the run that is over, 0 to 1."""
    epoch: int
    seed: int
    """A function of run seed, epoch and slide."""
    slide_id: str = ""
    """Name of the slide, or of the bag's case."""


@dataclass(frozen=True)
class Features:
    """A bag's features and scores by an encoder that stays frozen."""

    z_TD: Tensor
    score_T: Tensor


@dataclass(frozen=True)
class Bag:
    """One slide, or all slides of a case, as the trainer sees it."""

    slide_id: str
    case_id: str
    tiles: Tiles
    """Its pixels; of features, nothing is ever asked of them."""
    places: Places
    """Coordinates of its T tiles, and the slide of each."""
    labels_K: Tensor
    """float32: 0, 1, or nan where unknown; of other tasks the target's numbers."""
    seed: int
    """Seeds dropout and drop-path: a function of run seed, epoch and slide."""
    turn: tuple[int, int, int] | None = None
    """Its place in training: epoch, position, slide; None outside training."""
    features: Features | None = None
    """Features of the tiles, if they were encoded before; None otherwise."""
    behind: tuple[Bag, ...] = ()
    """In training: bags that come next and fit into a chunk with it (`data.lookahead`)."""

    @property
    def count(self) -> int:
        """T, the number of tiles."""
        return len(self.places)
