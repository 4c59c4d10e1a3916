"""Opens a cohort row's pixels and tiles, from slide, index and cache.

    for row, tiles in TileSource.of(source).streamed(rows, workers):
        for tiles_CSS in tiles.split(chunk): ...

One prefetcher (`slides.streaming.prefetch`) reads slide after slide, ahead of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from slides.cache.tiles import CachedSlide
from slides.cohort.table import SlideRow
from slides.errors import IndexFileError, IndexSettingsError, SlideError
from slides.grid import Grid
from slides.streaming.bounded_tiles import JoinedTiles, SlideTiles, joined
from slides.streaming.chunks import SlideSource
from slides.streaming.prefetch import Prefetcher
from slides.streaming.settings import Source, TileSettings, index_and_cache
from slides.streaming.stain import StainedSlide
from slides.streaming.workers import StreamedSlide
from slides.tiling.index import (
    TileIndex,
    index_path,
    ledger_reason,
    read_index,
    why_outdated,
)
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide


@dataclass(frozen=True)
class TileSource:
    """Opens the slide of a cohort row and its index. Picklable, for worker processes."""

    index_dir: Path
    cache_dir: Path | None
    grid: Grid
    tissue: Tissue
    stain: str | None = None
    """Stain normalisation, see `slides.streaming.stain`; None is off."""
    cache_gb: float | None = None
    """Disk budget of the cache; with one, slides without a cache are read from their files."""

    @classmethod
    def of(cls, source: Source) -> TileSource:
        """Return the tile source with the settings of `source`."""
        grid, tissue = source.tiles.grid, source.tiles.tissue
        return cls(source.index_dir, source.cache_dir, grid, tissue, source.stain, source.cache_gb)

    def index(self, row: SlideRow) -> TileIndex:
        """Return the slide's index from disk.

        Raises:
            SlideError: there is none, or it was made with other settings.
        """
        path = index_path(self.index_dir, self.grid, row.slide_id)
        index = read_index(path, self.grid, self.tissue, row.path)
        if why := why_outdated(index, Path(row.path), row.mpp):
            raise IndexSettingsError(
                f"{row.slide_id}: its index {path} is outdated: {why}, and no new one could be "
                "made. The ledger beside it has the reason; fix that, and run `tapfm index`."
            )
        return index

    def why_not(self, row: SlideRow) -> str | None:
        """Return why a slide has no index, as the ledger of indexing says; None if it does not."""
        return ledger_reason(self.index_dir, self.grid, row.slide_id)

    def __call__(self, row: SlideRow) -> tuple[SlideSource, TileIndex]:
        """Return the open pixels (cached, stain-normalised if set) and the index."""
        index = self.index(row)
        source = Slide(row.path, mpp=row.mpp, name=row.slide_id)  # opened at its first read
        if self.cache_dir is not None:
            try:
                source = CachedSlide(self.cache_dir, index)
            except (IndexFileError, IndexSettingsError):  # no cache, or an outdated one
                if self.cache_gb is None:
                    raise
        if self.stain is None:
            return source, index
        try:
            return StainedSlide(source, index, self.stain), index
        except SlideError:
            source.close()
            raise

    def tiles(
        self,
        row: SlideRow,
        workers: int | Prefetcher = 0,
        on_fault: Callable[[SlideError], None] | None = None,
    ) -> SlideTiles:
        """Return all tiles of a slide, read chunk by chunk each time they are requested.

        `workers` may be a prefetcher shared by several slides, see `SlideTiles`.
        """
        prefetcher = workers if isinstance(workers, Prefetcher) else Prefetcher(workers)
        return SlideTiles(
            StreamedSlide.of(partial(self, row), self.index(row)), prefetcher, on_fault=on_fault
        )

    def streamed(
        self, rows: Sequence[SlideRow], workers: int
    ) -> Iterator[tuple[SlideRow, SlideTiles | JoinedTiles]]:
        """Yield each slide or case with its tiles, reading the next one ahead.

        Raises:
            SlideError: a slide has no index, or its tiles cannot be read.
        """
        prefetcher = Prefetcher(workers)
        every = [
            (row, joined([self.tiles(slide, prefetcher) for slide in row.slides])) for row in rows
        ]
        with prefetcher:
            yield from every


def tiles_as_trained(
    trained: TileSettings, mpp: float | None = None, masks: str | None = None
) -> TileSettings:
    """Return tile settings for new slides, and print how they differ from training.

    Args:
        trained: the settings of the model's training.
        mpp: microns per tile pixel, if not the model's own.
        masks: folder of masks of the new slides; the training cohort's are not used.
    """
    if mpp is not None and mpp != trained.mpp:
        print(f"tiles at {mpp:g} microns per pixel; the model was trained at {trained.mpp:g}")
    tissue = replace(trained.tissue, masks=masks, coords=None)
    return replace(trained, mpp=mpp or trained.mpp, tissue=tissue)


@contextmanager
def new_slides(
    rows: Sequence[SlideRow], tiles: TileSettings, workers: int, stain: str | None = None
) -> Iterator[tuple[TileSource, list[SlideRow], dict[str, str]]]:
    """Index slides outside any cohort in a temporary folder.

    Args:
        rows: the slides.
        tiles: the tile settings.
        workers: processes that index.
        stain: the stain normalisation.

    Yields:
        Their tile source, the slides that can be read, and the faults of the others, which
        indexing prints.
    """
    with TemporaryDirectory() as index_dir:
        source = Source(rows, Path(index_dir), None, tiles, "skip", workers, stain)
        _, failed = index_and_cache(source)
        yield TileSource.of(source), [row for row in rows if row.slide_id not in failed], failed
