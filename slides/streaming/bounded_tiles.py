"""The tiles of a slide, in chunks, as often as asked: the first of them held, the rest read.

Training goes over a slide twice and must see the same pixels. A slide that fits is in host memory;
one that does not is held as far as the budget goes and read again beyond, which costs time and
never memory. Tiles are a function of their place alone (`slides.streaming.augment`), so what is
held, in what chunks and by how many processes changes no byte.

Price: `host_budget` for all slides that are held or read ahead, shared out by `tiles_to_hold`; and
the slots of `slides.streaming.prefetch`.

Shapes: C tiles of a chunk, H tiles held, S side of a tile.
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

SHARE = 0.5  # of the machine's memory: the rest is the model's, the optimizer's, the page cache's
LIMITS = (  # of a container, by version of cgroup
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


class SlideTiles:
    """All tiles of a slide; `split` gives them in index order, the same every time. Pickles.

    Not a dataclass: Lightning takes those in a batch apart.

    Args:
        slide: gives pixels and tiles when it is read.
        prefetcher: who reads them; where it has further slides, those of the next `SlideTiles` that
        are
            made of it are read ahead (`slides.streaming.prefetch`).
        in_memory: uint8 (H, 3, S, S), the first tiles, as the slide's pixels would give them.
        on_fault: told of a slide's fault; where it returns, the fault goes on its way.
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
        """Those of a slide whose pixels and tiles are at hand, with a prefetcher of its own."""
        return cls(StreamedSlide.at_hand(source, index), Prefetcher(workers), **more)

    def split(self, size: int) -> Iterator[Tensor]:
        """Chunks of `size` tiles; the last may be short.

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
                    del tiles_CSS  # the caller may be done with it
        except SlideError as fault:
            if self.on_fault:
                self.on_fault(fault)
            raise

    def pin_memory(self) -> SlideTiles:
        """What is held, page-locked."""
        self.in_memory = None if self.in_memory is None else self.in_memory.pin_memory()
        return self


class JoinedTiles:
    """The tiles of several slides, one slide after the other."""

    def __init__(self, parts: Sequence[Tensor | SlideTiles]):
        self.parts = tuple(parts)

    @property
    def count(self) -> int:
        """How many they are."""
        return sum(len(part) if isinstance(part, Tensor) else part.count for part in self.parts)

    def split(self, size: int) -> Iterator[Tensor]:
        """Chunks of `size` tiles; the last of each slide may be short. See `SlideTiles`."""
        for part in self.parts:
            yield from part.split(size)

    def pin_memory(self) -> JoinedTiles:
        """What is held, page-locked."""
        return JoinedTiles([part.pin_memory() for part in self.parts])


def joined(parts: Sequence[Tensor | SlideTiles]) -> Tensor | SlideTiles | JoinedTiles:
    """The tiles of several slides as those of one; in one piece where all of them are held."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat(list(parts))
    return JoinedTiles(parts)


def tiles_to_hold(budget: int, size: int, slides: int) -> int:
    """How many tiles of each slide `budget` bytes hold, with so many slides in memory at a time."""
    return budget // (slides * 3 * size**2)


def host_budget(gigabytes: float | None = None) -> int:
    """Bytes for tiles in host memory: so many GB, or a half of what this process may have."""
    return int(SHARE * machine_memory() if gigabytes is None else gigabytes * 1e9)


def machine_memory() -> int:
    """Bytes of memory, of the machine or of the container, whichever has less."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
            found.append(int(Path(path).read_text()))
    return min(found)
