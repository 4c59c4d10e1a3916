"""CUDA's caching allocator on paper: what it reserves for a sequence of allocations.

    reserved(events, growing=True)      bytes from the driver at the end, with growing segments

Rules of `c10/cuda/CUDACachingAllocator.cpp`: sizes are rounded to 512 bytes; up to 1 MiB come from
segments of 2 MiB, up to 10 MiB from segments of 20, larger ones from a segment of their own, in
steps of 2 MiB. A request takes the smallest free block that is large enough and leaves the rest, if
the rest is worth it; freed neighbours join. With growing segments there is one for each pool, and
it grows by pages of 2 and 20 MiB. Nothing is given back, as no run empties its cache.
"""

from bisect import bisect_left, insort

MIB = 2**20
ROUND, SMALL, SMALL_SEGMENT, MIDDLE, SEGMENT = 512, MIB, 2 * MIB, 10 * MIB, 20 * MIB


class Pool:
    """Free blocks of one pool: (size, segment, start), smallest first."""

    def __init__(self, small: bool, growing: bool):
        self.small, self.growing = small, growing
        self.free: list[tuple[int, int, int]] = []
        self.by_start, self.by_end = {}, {}
        self.segments: list[int] = []

    def take(self, size: int) -> tuple[int, int, int]:
        """Return a block of that size or more."""
        found = bisect_left(self.free, (size, -1, -1))
        if found == len(self.free):
            self._grow(size)
            found = bisect_left(self.free, (size, -1, -1))
        whole, segment, start = block = self.free[found]
        self._forget(block)
        rest = whole - size
        if rest >= ROUND if self.small or self.growing else rest > SMALL:
            self._add((rest, segment, start + size))
            whole = size
        return whole, segment, start

    def give(self, block: tuple[int, int, int]) -> None:
        """Free a block; it joins free neighbours."""
        size, segment, start = block
        if before := self.by_end.get((segment, start)):
            self._forget(before)
            size, start = size + before[0], before[2]
        if behind := self.by_start.get((segment, start + size)):
            self._forget(behind)
            size += behind[0]
        self._add((size, segment, start))

    def _grow(self, size: int) -> None:
        if not self.growing:
            large = SEGMENT if size < MIDDLE else _up(size, 2 * MIB)
            whole = SMALL_SEGMENT if self.small else large
            self.segments.append(whole)
            self._add((whole, len(self.segments) - 1, 0))
            return
        if not self.segments:
            self.segments.append(0)
        end, page = self.segments[0], SMALL_SEGMENT if self.small else SEGMENT
        last = self.by_end.get((0, end))
        more = _up(size - (last[0] if last else 0), page)
        self.segments[0] += more
        self.give((more, 0, end))

    def _add(self, block) -> None:
        insort(self.free, block)
        size, segment, start = block
        self.by_start[segment, start] = self.by_end[segment, start + size] = block

    def _forget(self, block) -> None:
        size, segment, start = block
        self.free.pop(bisect_left(self.free, block))
        del self.by_start[segment, start], self.by_end[segment, start + size]


def reserved(events: list[tuple[int, int]], growing: bool) -> int:
    """Return bytes reserved after all events: (number, bytes), bytes 0 when it is freed."""
    pools = {small: Pool(small, growing) for small in (True, False)}
    held = {}
    for number, size in events:
        if size:
            size = _up(size, ROUND)
            held[number] = pools[size <= SMALL], pools[size <= SMALL].take(size)
        elif number in held:
            pool, block = held.pop(number)
            pool.give(block)
    return sum(sum(pool.segments) for pool in pools.values())


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
