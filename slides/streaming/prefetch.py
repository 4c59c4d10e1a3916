"""The tiles of slide after slide, read by processes ahead of whoever takes them.

A `Prefetcher` is told of slides, in the order in which they will be wanted, and gives the chunks of
any of them. Its processes (`slides.streaming.workers`) begin at the first chunk that is asked for.
Inside `with prefetcher` they live on from slide to slide, and the first chunks of the next slides
are read while the last of this one are used; outside of it they end with the slide. What is taken
in another order (a slide a second time, or not to its end) is right all the same: what was read in
vain is let go.

Price: workers * prefetch chunks of shared memory, whatever the slides.

Shapes: T tiles of a slide, C tiles of a chunk, S side of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from slides.streaming.chunks import SlideSource, WorkerDiedError, close, named_fault, read_tiles
from slides.streaming.workers import StreamedSlide, Workers

if TYPE_CHECKING:
    from slides.tiling.index import TileIndex


class Prefetcher:
    """Reads the slides it was told of, chunk by chunk. Pickles, without its processes.

    Args:
        workers: reading processes; 0 reads in this one, when a chunk is asked for.
        prefetch: chunks each worker may be ahead.
    """

    def __init__(self, workers: int = 0, prefetch: int = 2):
        for name, value, least in (("workers", workers, 0), ("prefetch", prefetch, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
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
        """End the processes; whoever asks for a chunk starts new ones."""
        live, self._live = self._live, None
        if live:
            live.end()

    def add(self, slide: StreamedSlide) -> int:
        """Tell of one more slide; its number. For before the first chunk is asked for."""
        self.close()  # they would not know of it
        self.slides.append(slide)
        return len(self.slides) - 1

    def chunks(self, number: int, size: int, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """The tiles of a slide in index order: (number of the first, uint8 (C, 3, S, S)).

        Reading ahead begins now. A chunk handed out is the caller's to keep.

        Args:
            number: the slide's.
            size: tiles of a chunk; the last may be short.
            first: the tile to begin with.

        Raises:
            SlideError: a tile cannot be read; names the slide.
            WorkerDiedError: a worker was killed; names the slide.
        """
        if size < 1:
            raise ValueError(f"chunk must be at least 1, got {size}")
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
            yield 0, self._live.slots_NC[:0]  # for `chunks`: reading ahead has begun
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
        """See that the next chunk to be taken is this one."""
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
        """The chunks from here on, as (slide, first tile): of all slides while they are kept."""
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
            del tiles_CSS  # the caller may be done with it: do not hold it while reading the next
    finally:
        close(source)
