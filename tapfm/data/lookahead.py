"""Reads a few training slides ahead, so that a small one comes with those that fit its chunk.

`model.pack_chunks` encodes small slides of an update together, and must know the next ones at the
turn of the first. Turns, order and the place that a resume point keeps are as without.

Price: one more bag in memory, and the tiles of one chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slides.streaming.stream import Skipped, SlideLoader, TileBag


@dataclass
class Ahead:
    """A loader's item, and the slides behind it that fit into a chunk with it."""

    item: TileBag | Skipped
    behind: list[TileBag]


class LookaheadLoader(SlideLoader):
    """A `SlideLoader` whose slides come with those behind them.

    Args:
        room: tiles of a chunk; 0 gives slides alone, as `SlideLoader` does.
        how: arguments of `SlideLoader`.
    """

    def __init__(self, *how: Any, room: int = 0, **named: Any):
        super().__init__(*how, **named)
        self.room = room

    def __iter__(self) -> Iterator[TileBag | Skipped | Ahead]:
        return with_behind(super().__iter__(), self.room) if self.room else super().__iter__()


def with_behind(items: Iterable[TileBag | Skipped], room: int) -> Iterator[Ahead]:
    """Yield each item with the slides behind it, as far as all fit into `room` tiles."""
    items, window = iter(items), deque()
    while True:
        while sum(tiles_of(each, room) for each in window) <= room:
            if (item := next(items, None)) is None:
                break
            window.append(item)
        if not window:
            return
        yield fitting(window.popleft(), window, room)
        item = None  # frees it while the next one is awaited


def fitting(first: TileBag | Skipped, window: Iterable[TileBag | Skipped], room: int) -> Ahead:
    """Return an item with those behind it that fit into `room` tiles with it."""
    left, behind = room - tiles_of(first, room), []
    for item in window:
        left -= tiles_of(item, room)
        if left >= 0 and isinstance(item, TileBag):
            behind.append(item)
    return Ahead(first, behind)


def tiles_of(item: TileBag | Skipped, room: int) -> int:
    """Return a slide's number of tiles; more than `room` where they are not all in memory."""
    if isinstance(item, Skipped):
        return 0
    return len(item.tiles) if isinstance(item.tiles, Tensor) else room + 1


def chunk_to_fill(trainer: Any) -> int:
    """Return the tiles of the chunk that slides of a run may share; 0 where they do not."""
    return getattr(getattr(trainer, "lightning_module", None), "shared_chunk", 0)
