"""A row of the cohort to its pixels and tiles: from slide, index, and cache where there is one.

    for row, tiles in TileSource.of(source).streamed(rows, workers):
        for tiles_CSS in tiles.split(chunk): ...

One prefetcher of processes (`slides.streaming.prefetch`) reads slide after slide, ahead of whoever
takes the tiles.
"""

from __future__ import annotations

import sys
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
from slides.tiling.index import TileIndex, index_path, outdated, read_index
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide


@dataclass(frozen=True)
class TileSource:
    """A row of the cohort to an open slide and its tiles; picklable, for worker processes."""

    index_dir: Path
    cache_dir: Path | None
    grid: Grid
    tissue: Tissue
    stain: str | None = None
    """How stains are normalised, see `slides.streaming.stain`; None leaves them."""
    cache_gb: float | None = None
    """With a limit, slides without a cache are read from their files."""

    @classmethod
    def of(cls, source: Source) -> TileSource:
        """What opens the slides of a config."""
        grid, tissue = source.tiles.grid, source.tiles.tissue
        return cls(source.index_dir, source.cache_dir, grid, tissue, source.stain, source.cache_gb)

    def index(self, row: SlideRow) -> TileIndex:
        """The slide's tiles, from the index on disk.

        Raises:
            SlideError: there is none, or it was made with other settings.
        """
        path = index_path(self.index_dir, self.grid, row.slide_id)
        index = read_index(path, self.grid, self.tissue)
        if why := outdated(index, Path(row.path), row.mpp):
            raise IndexSettingsError(
                f"{row.slide_id}: {path} is not its index any more: {why}, and no new one could "
                "be made. The ledger beside it says why; mend that, and run `tapfm index`."
            )
        return index

    def __call__(self, row: SlideRow) -> tuple[SlideSource, TileIndex]:
        """Pixels, from the cache where there is one, normalised if asked for, and tiles."""
        index = self.index(row)
        source = Slide(row.path, mpp=row.mpp, name=row.slide_id)  # opened when it is read
        if self.cache_dir is not None:
            try:
                source = CachedSlide(self.cache_dir, index)
            except (IndexFileError, IndexSettingsError):  # none, or an old one and no room
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
        """All tiles of a slide, read chunk by chunk each time they are asked for.

        `workers` may be the prefetcher of several slides, see `SlideTiles`.
        """
        prefetcher = workers if isinstance(workers, Prefetcher) else Prefetcher(workers)
        return SlideTiles(
            StreamedSlide.of(partial(self, row), self.index(row)), prefetcher, on_fault=on_fault
        )

    def streamed(
        self, rows: Sequence[SlideRow], workers: int
    ) -> Iterator[tuple[SlideRow, SlideTiles | JoinedTiles]]:
        """Each slide or case with its tiles; while they are used, the next one's are read ahead.

        Raises:
            SlideError: a slide has no index; reading the tiles raises what `SlideTiles` does.
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
    """Which tiles a model is to see of slides of no cohort; says so where they are others.

    Args:
        trained: those of its training.
        mpp: microns per tile pixel, where it is not to be the model's own.
        masks: folder of masks to take for the tissue; those of the training cohort are not.
    """
    if mpp is not None and mpp != trained.mpp:
        print(f"tiles at {mpp:g} microns per pixel; the model was trained at {trained.mpp:g}")
    tissue = replace(trained.tissue, masks=masks, coords=None)
    return replace(trained, mpp=mpp or trained.mpp, tissue=tissue)


@contextmanager
def new_slides(
    rows: Sequence[SlideRow], tiles: TileSettings, workers: int, stain: str | None = None
) -> Iterator[tuple[TileSource, list[SlideRow], dict[str, str]]]:
    """Slides of no cohort, indexed for as long as this lasts.

    Args:
        rows: the slides.
        tiles: which of their tiles.
        workers: processes that index.
        stain: how stains are normalised.

    Yields:
        What opens them; those that can be read; and the faults of the others, which are printed.
    """
    with TemporaryDirectory() as index_dir:
        source = Source(rows, Path(index_dir), None, tiles, "skip", workers, stain)
        _, failed = index_and_cache(source)
        for reason in failed.values():
            print(f"tapfm: {reason}", file=sys.stderr)
        yield TileSource.of(source), [row for row in rows if row.slide_id not in failed], failed
