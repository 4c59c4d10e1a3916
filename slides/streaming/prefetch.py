"""Worker processes that read tiles of slide after slide, ahead of the training loop.

Slides are added to a `Prefetcher` in the order in which they will be read; it gives the chunks of
any of them. Its processes (`slides.streaming.workers`) start at the first request. Inside
`with prefetcher` they live from slide to slide, and the next slides' first chunks are read while
this slide's last are used; otherwise they end with the slide. Slides may also be read in another
order, twice or not to the end: chunks that were read in vain are dropped.

Price: workers * prefetch chunks of shared memory for any number of slides.

Shapes: T tiles of a slide, C tiles of a chunk, S side of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from slides.errors import SettingsError, reading_faults, refuse
from slides.streaming.chunks import SlideSource, WorkerDiedError, close, named_fault, read_tiles
from slides.streaming.workers import StreamedSlide, Workers

if TYPE_CHECKING:
    from slides.tiling.index import TileIndex


class Prefetcher:
    """Reads the slides added to it, chunk by chunk, in worker processes. Pickles.

    Args:
        workers: reading processes; 0 reads in this one, at each request.
        prefetch: chunks that each worker may read ahead.
    """

    def __init__(self, workers: int = 0, prefetch: int = 2):
        faults = reading_faults(workers)
        if prefetch < 1:
            faults.append(f"prefetch must be at least 1 chunk, got {prefetch}")
        refuse(faults)
        self.workers, self.prefetch = workers, prefetch
        self.slides: list[StreamedSlide] = []
        self._kept, self._live = False, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": False, "_live": None}

    def __enter__(self) -> Prefetcher:
        self._kept = True
        return self

    def __exit__(self, *_) -> None:
        self._kept = False
        self.close()

    def close(self) -> None:
        """End the processes; the next request for a chunk starts new ones."""
        live, self._live = self._live, None
        if live:
            live.end()

    def add(self, slide: StreamedSlide) -> int:
        """Add a slide and return its number; call it before the first chunk is requested."""
        self.close()  # running processes do not know the new slide
        self.slides.append(slide)
        return len(self.slides) - 1

    def chunks(self, number: int, size: int, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Yield the tiles of a slide in index order: (first tile, uint8 (C, 3, S, S)).

        Reading ahead starts at once. The caller may keep the chunks.

        Args:
            number: the slide's number.
            size: tiles of a chunk; the last may be short.
            first: the first tile to read.

        Raises:
            SlideError: a tile cannot be read; names the slide.
            WorkerDiedError: a worker was killed; names the slide.
        """
        if size < 1:
            raise SettingsError(f"model.chunk must be at least 1 tile, got {size}")
        slide = self.slides[number]
        starts = range(first, slide.count, size)
        if not (self.workers and starts) or (not self._kept and len(starts) == 1):
            return _chunks_here(slide, starts)
        stream = self._chunks(number, starts)
        next(stream)
        return stream

    def _chunks(self, number: int, starts: range) -> Iterator[tuple[int, Tensor]]:
        try:
            self._seek(number, starts[0], starts.step)
            yield 0, self._live.slots_NC[:0]  # tells `chunks` that reading ahead has begun
            for start in starts:
                self._seek(number, start, starts.step)
                yield start, self._take()
        finally:
            if not self._kept:
                self.close()

    def _take(self) -> Tensor:
        try:
            return self._live.take()
        except WorkerDiedError:
            self.close()
            raise

    def _seek(self, number: int, start: int, size: int) -> None:
        """Make sure that the next chunk to come is this one."""
        if self._live and self._live.size != size:
            self.close()
        if self._live is None:
            self._live = self._begin(number, start, size)
        elif not self._live.comes_to(number, start):
            try:
                self._live.turn_to(self._plan(number, start, size))
            except WorkerDiedError:
                self.close()
                raise

    def _begin(self, number: int, start: int, size: int) -> Workers:
        chunks = len(range(start, self.slides[number].count, size))
        if self._kept:
            chunks = sum(len(range(0, slide.count, size)) for slide in self.slides)
        workers = min(self.workers, chunks)
        slots = min(workers * self.prefetch, chunks)
        live = Workers(self.slides, size, workers, slots)
        live.turn_to(self._plan(number, start, size))
        return live

    def _plan(self, number: int, start: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield (slide, first tile) of the chunks from here on, of all slides if kept alive."""
        for each in range(number, len(self.slides) if self._kept else number + 1):
            yield from ((each, at) for at in range(start, self.slides[each].count, size))
            start = 0


def stream_chunks(
    source: SlideSource, index: TileIndex, chunk: int, workers: int = 0, prefetch: int = 2
) -> Iterator[tuple[int, Tensor]]:
    """Yield all tiles of one slide, read by a prefetcher of its own (`Prefetcher.chunks`)."""
    prefetcher = Prefetcher(workers, prefetch)
    return prefetcher.chunks(prefetcher.add(StreamedSlide.at_hand(source, index)), chunk)


def _chunks_here(slide: StreamedSlide, starts: range) -> Iterator[tuple[int, Tensor]]:
    if not starts:
        return
    source, index = slide.open_slide()
    try:
        for start in starts:
            try:
                tiles_CSS = read_tiles(source, index, slice(start, start + starts.step))
            except Exception as error:
                raise named_fault(error, slide.slide_id) from error
            yield start, tiles_CSS
            del tiles_CSS  # frees it before the next chunk is read
    finally:
        close(source)
