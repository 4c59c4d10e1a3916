"""Settings of slides and tiles that indexing, caching and streaming share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slides.cohort.table import SlideRow
from slides.errors import reading_faults, refuse
from slides.grid import Grid
from slides.streaming.stain import METHODS
from slides.tiling.tissue import Tissue


@dataclass(frozen=True)
class TileSettings:
    """Size, resolution and tissue settings of the tiles."""

    tile_px: int = 224
    """Side of a tile, in tile pixels."""
    mpp: float = 0.5
    """Microns per tile pixel."""
    overlap: int = 0
    """Pixels shared by neighbours."""
    tissue: Tissue = field(default_factory=Tissue)
    """The tissue settings."""

    @property
    def grid(self) -> Grid:
        """The grid of these tiles."""
        return Grid(self.tile_px, self.mpp, self.overlap)


@dataclass(frozen=True)
class Source:
    """A cohort's slides, and the settings to index, cache and read them."""

    rows: Sequence[SlideRow]
    index_dir: Path
    cache_dir: Path | None
    tiles: TileSettings
    on_error: str
    workers: int
    stain: str | None = None
    """Stain normalisation when tiles are read (`slides.streaming.stain`); None is off."""
    cache_gb: float | None = None
    """Disk budget of all caches in `cache_dir`; None is no limit."""

    def __post_init__(self):
        faults = reading_faults(self.workers, self.on_error)
        if self.stain not in (None, *METHODS):
            faults.append(f"data.stain is {self.stain!r}: give {' or '.join(METHODS)}, or null")
        if self.cache_gb is not None and (self.cache_dir is None or self.cache_gb <= 0):
            faults.append(
                f"data.cache_gb is {self.cache_gb:g} and data.cache_dir {self.cache_dir}: a limit "
                "must be above 0 and needs a folder. Give both, or neither."
            )
        refuse(faults, "data")


def index_and_cache(source: Source, pictures: Path | None = None) -> tuple[int, dict[str, str]]:
    """Index every slide, and fill the tile cache if there is one.

    Args:
        source: the slides and their settings.
        pictures: folder for a picture of each slide's stages; None draws none.

    Returns:
        The number of tiles, and the slides left out, slide_id -> reason.

    Raises:
        SlideError: with `on_error: stop`, the first slide's fault.
    """
    from slides.tiling.index import index_cohort

    rows, grid, tissue = source.rows, source.tiles.grid, source.tiles.tissue
    how = source.workers, source.on_error
    ledger = index_cohort(rows, source.index_dir, grid, tissue, *how, pictures=pictures)
    failed = {row["slide_id"]: row["reason"] for row in ledger if row["status"] == "failed"}
    if source.cache_dir is not None:
        from slides.cache.cohort import cache_cohort

        kept = [row for row in rows if row.slide_id not in failed]
        budget = None if source.cache_gb is None else int(source.cache_gb * 1e9)
        where = source.index_dir, source.cache_dir
        failed |= cache_cohort(kept, *where, grid, tissue, *how, budget=budget)
    return sum(row["tiles"] for row in ledger), failed
