"""Reads tiles one after the other, and names the slide in every error on the way.

Shapes: T tiles of a slide, S side of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from slides.errors import SlideError, UnreadableRegionError, slide_fault
from slides.grid import Grid

if TYPE_CHECKING:
    from slides.tiling.index import TileIndex


class SlideSource(Protocol):
    """An open slide, or anything that gives tiles like one: `reader.Slide`, `CachedSlide`."""

    def read(self, x0: int, y0: int, grid: Grid) -> np.ndarray:
        """Return the tile whose corner is at (x0, y0) in level-0 pixels, uint8 (S, S, 3)."""


def close(source: SlideSource) -> None:
    """Close the source if it has a `close`."""
    if end := getattr(source, "close", None):
        end()


class WorkerDiedError(RuntimeError):
    """A reading process was killed or crashed."""

    @classmethod
    def of(cls, slide_ids: Sequence[str], how: str) -> WorkerDiedError:
        """Return the error for a worker that died while reading these slides."""
        return cls(
            f"{', '.join(slide_ids)}: a process that was reading died ({how}). Most often memory "
            "or /dev/shm ran out: use fewer workers or a smaller chunk or tile budget. If it is "
            "always the same slide, its file crashes the decoder: leave it out."
        )


def named_fault(error: Exception, slide_id: str) -> Exception:
    """Return the same error with the slide's name; a `SlideError` for slide or disk faults."""
    if isinstance(error, SlideError):
        return error if slide_id in str(error) else type(error)(f"{slide_id}: {error}")
    if isinstance(error, MemoryError):
        return slide_fault(error, slide_id, "its tile")
    if isinstance(error, OSError):
        return UnreadableRegionError(
            f"{slide_id}: the disk gave an error ({error}). Check that the file is there and "
            "readable, or leave the slide out."
        )
    return RuntimeError(f"{slide_id}: {type(error).__name__} while reading its tiles: {error}")


def read_tiles(
    source: SlideSource,
    index: TileIndex,
    rows: np.ndarray | slice | None = None,
    shared: bool = False,
) -> Tensor:
    """Return the tiles of an index, or of some of its rows, as uint8 (T, 3, S, S).

    `shared` uses shared memory, which other processes can receive without a copy.
    """
    coords0 = index.coords0 if rows is None else index.coords0[rows]
    shape = (len(coords0), 3, index.grid.size, index.grid.size)
    tiles_TCSS = torch.empty(shape, dtype=torch.uint8)
    if shared and len(coords0):
        tiles_TCSS.share_memory_()
    read_into(tiles_TCSS.numpy(), source, index, coords0)
    return tiles_TCSS


def read_into(tiles_TCSS: np.ndarray, source, index: TileIndex, coords0: np.ndarray) -> None:
    """Read the tiles at these corners into the given uint8 (T, 3, S, S)."""
    size = index.grid.size
    for tile_CSS, (x0, y0) in zip(tiles_TCSS, coords0.tolist(), strict=True):
        tile = source.read(x0, y0, index.grid)
        if tile.shape != (size, size, 3) or tile.dtype != np.uint8:  # assigning would broadcast
            raise UnreadableRegionError(
                f"{index.slide_id}: the tile at ({x0}, {y0}) came as {tile.dtype} {tile.shape} "
                f"where uint8 {(size, size, 3)} was expected. Check the reader of this format."
            )
        tile_CSS[:] = tile.transpose(2, 0, 1)
