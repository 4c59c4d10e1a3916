"""Which slides and which tiles: what indexing, caching and streaming are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slides.cohort.table import SlideRow
from slides.errors import SettingsError
from slides.grid import Grid
from slides.tiling.tissue import Tissue


@dataclass(frozen=True)
class TileSettings:
    """Which tiles."""

    tile_px: int = 224
    """Side of a tile, in tile pixels."""
    mpp: float = 0.5
    """Microns per tile pixel."""
    overlap: int = 0
    """Pixels shared by neighbours."""
    tissue: Tissue = field(default_factory=Tissue)
    """What counts as tissue."""

    @property
    def grid(self) -> Grid:
        """The lattice of these tiles."""
        return Grid(self.tile_px, self.mpp, self.overlap)


@dataclass(frozen=True)
class Source:
    """The part of `data` that indexing needs."""

    rows: Sequence[SlideRow]
    index_dir: Path
    cache_dir: Path | None
    tiles: TileSettings
    on_error: str
    workers: int
    stain: str | None = None
    """How stains are normalised where tiles are read; indexing does not look at it."""
    cache_gb: float | None = None
    """What all caches in `cache_dir` may take; None is no limit."""

    def __post_init__(self):
        if self.cache_gb is not None and (self.cache_dir is None or self.cache_gb <= 0):
            raise SettingsError(
                f"data.cache_gb is {self.cache_gb:g} and data.cache_dir {self.cache_dir}: a limit "
                "is more than 0 and goes with a folder. Give both, or neither."
            )


def index_and_cache(source: Source, pictures: Path | None = None) -> tuple[int, dict[str, str]]:
    """Index every slide, and decode its tiles into the cache if there is to be one.

    Args:
        source: slides and tiles.
        pictures: folder for a picture of each slide's stages; None draws none.

    Returns:
        The number of tiles, and the slides left out, each with its reason.

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
