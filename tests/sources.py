"""A slide without a file, whose tiles encode their position; for tests of what reads tiles."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np

from slides.cohort.table import SlideRow
from slides.errors import UnreadableRegionError
from slides.grid import Grid
from slides.tiling.index import TileIndex

SIZE = 5  # prime, so that a tile's side is no other number here


def tile_at(x0, y0, size=SIZE):
    """Return pixels that encode the corner, and whose rows differ from their columns."""
    row, column = np.mgrid[:size, :size]
    planes = [x0 + 2 * row + 7 * column, y0 + 3 * row + column, x0 // 256 * 16 + y0 // 256 + row]
    return np.stack(planes, axis=-1).astype(np.uint8)


def make_index(tiles, slide_id="slide.a", columns=7, grid=None):
    grid = grid or Grid(SIZE, 0.5)
    number = np.arange(tiles)
    coords0 = np.stack([number % columns * SIZE, number // columns * SIZE], axis=-1)
    return TileIndex(
        slide_id=slide_id,
        coords0=coords0.astype(np.int64),
        tissue_fraction=np.ones(tiles, np.float32),
        grid=grid,
        size0=grid.size,
        width0=columns * SIZE,
        height0=(tiles // columns + 1) * SIZE,
        slide_mpp=0.5,
        mpp_source="table",
        bounds0=(0, 0, columns * SIZE, (tiles // columns + 1) * SIZE),
        level=0,
        tissue_mm2=1.0,
        mask_sha256="",
        fingerprint="1009:first",
    )


class Source:
    """A slide that counts its reads over all processes, and fails or dies at a given tile."""

    def __init__(self, fail_at=None, error=None, die_at=None):
        self.fail_at, self.die_at = fail_at, die_at
        self.error = error or UnreadableRegionError("slide.a: bad bytes")
        self.reads = multiprocessing.Value("i", 0)
        self.closed = 0

    def read(self, x0, y0, grid):
        if self.reads is not None:
            with self.reads.get_lock():
                self.reads.value += 1
        if (x0, y0) == self.fail_at:
            raise self.error
        if (x0, y0) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return tile_at(x0, y0, grid.size)

    def close(self):
        self.closed += 1

    def __getstate__(self):
        return self.__dict__ | {"reads": None}  # a lock travels by inheritance only


def expected_tiles(index, rows=slice(None)):
    """Return uint8 (T, 3, S, S), read tile by tile."""
    tiles = [tile_at(x0, y0).transpose(2, 0, 1) for x0, y0 in index.coords0[rows].tolist()]
    return np.stack(tiles)


def make_row(number, labels=(1.0, float("nan")), split="train"):
    return SlideRow(
        case_id=f"case.{number}",
        slide_id=f"slide.{number}",
        path=Path(f"slide.{number}.svs"),
        split=split,
        mpp=None,
        stain="",
        site="",
        labels=labels,
    )
