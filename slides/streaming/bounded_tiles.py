"""The tiles of a slide in chunks, repeatable, with a bounded number kept in memory.

Training reads a slide twice and must see the same pixels. The first tiles of a slide are kept in
host memory, as many as the budget allows; the rest is read again, which costs time but no memory.
A tile depends only on its position (`slides.streaming.augment`), so the number in memory, the chunk
size and the number of processes change no byte.

Price: `host_budget` for all slides in memory or read ahead, divided by `tiles_to_hold`; and the
slots of `slides.streaming.prefetch`.

Shapes: C tiles of a chunk, H tiles in memory, S side of a tile.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slides.errors import SlideError
from slides.streaming.chunks import SlideSource
from slides.streaming.prefetch import Prefetcher
from slides.streaming.workers import StreamedSlide

if TYPE_CHECKING:
    from slides.tiling.index import TileIndex

SHARE = 0.5  # of the machine's memory: the rest is for model, optimizer and page cache
LIMITS = (  # files with a container's memory limit, by cgroup version
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


class SlideTiles:
    """All tiles of a slide; `split` gives the same chunks in index order each time. Pickles.

    Not a dataclass: Lightning would rebuild it field by field.

    Args:
        slide: opens the slide when it is read.
        prefetcher: reads the slide, and ahead of it the next slides that were added to it.
        in_memory: uint8 (H, 3, S, S), the first tiles, equal to what reading would give.
        on_fault: called with a slide's fault before it is raised; may raise something else.
    """

    def __init__(
        self,
        slide: StreamedSlide,
        prefetcher: Prefetcher,
        in_memory: Tensor | None = None,
        on_fault: Callable[[SlideError], None] | None = None,
    ):
        self.prefetcher, self.number, self.count = prefetcher, prefetcher.add(slide), slide.count
        self.in_memory, self.on_fault = in_memory, on_fault

    @classmethod
    def of(cls, source: SlideSource, index: TileIndex, workers: int = 0, **more) -> SlideTiles:
        """Return the tiles of an open slide, read by a prefetcher of their own."""
        return cls(StreamedSlide.at_hand(source, index), Prefetcher(workers), **more)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield chunks of `size` tiles; the last may be short.

        Raises:
            SlideError: a tile cannot be read, unless `on_fault` raises something else.
        """
        kept = 0 if self.in_memory is None else len(self.in_memory) // size * size
        try:
            with contextlib.closing(self.prefetcher.chunks(self.number, size, kept)) as rest:
                for start in range(0, kept, size):  # meanwhile the rest is read ahead
                    yield self.in_memory[start : start + size]
                for _, tiles_CSS in rest:
                    yield tiles_CSS
                    del tiles_CSS  # frees it before the next chunk is read
        except SlideError as fault:
            if self.on_fault:
                self.on_fault(fault)
            raise


class JoinedTiles:
    """The tiles of several slides, one slide after the other."""

    def __init__(self, parts: Sequence[Tensor | SlideTiles]):
        self.parts = tuple(parts)

    @property
    def count(self) -> int:
        """Number of tiles."""
        return sum(len(part) if isinstance(part, Tensor) else part.count for part in self.parts)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield chunks of `size` tiles; the last of each slide may be short."""
        for part in self.parts:
            yield from part.split(size)


def joined(parts: Sequence[Tensor | SlideTiles]) -> Tensor | SlideTiles | JoinedTiles:
    """Return the tiles of several slides as one object; a tensor if all are tensors."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(list(parts))
    return JoinedTiles(parts)


def tiles_to_hold(budget: int, size: int, slides: int) -> int:
    """Return how many tiles of each slide fit in `budget` bytes, for so many slides."""
    return budget // (slides * 3 * size**2)


def host_budget(gigabytes: float | None = None, taken: int = 0, processes: int = 1) -> int:
    """Return bytes of host memory for the tiles of one of several processes.

    Args:
        gigabytes: for all of them; None is half of the machine's.
        taken: bytes of each process that are not left for tiles, such as an optimizer's.
        processes: of this machine.
    """
    if gigabytes is not None:
        return int(gigabytes * 1e9) // processes
    return max(0, int(SHARE * (machine_memory() // processes - taken)))


def machine_memory() -> int:
    """Return the bytes of memory of the machine or the container, the smaller one."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            found.append(int(Path(path).read_text()))
    return min(found)
