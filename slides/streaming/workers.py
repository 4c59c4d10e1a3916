"""Processes that fill slots of shared memory with the chunks they are asked for, in order.

Chunk n is read by worker n % workers into slot n % slots, so chunks come in order, and nothing is
pickled but three numbers a chunk. The processes are our own and not a DataLoader's, because a
DataLoader tells of a killed worker by a signal that lands anywhere in the caller's code.

Price: the slots, made once and used over and over, and the chunk that is handed out, a copy; each
worker opens each slide.

Shapes: N slots, T tiles of a slide, C tiles of a chunk, S side of a tile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import torch
import torch.multiprocessing
from torch import Tensor

from slides.errors import SlideError
from slides.streaming.chunks import SlideSource, WorkerDiedError, close, named_fault, read_into

if TYPE_CHECKING:
    from slides.tiling.index import TileIndex

ORPHAN_CHECK_S = 5.0  # how often an idle worker looks whether its parent still lives


@dataclass(frozen=True)
class StreamedSlide:
    """A slide that a prefetcher was told of. All slides of a prefetcher are cut by one grid."""

    open_slide: Callable[[], tuple[SlideSource, TileIndex]]
    """Gives pixels and tiles; called by whoever reads, and the pixels are closed after it."""
    slide_id: str
    count: int
    """T, the number of tiles."""
    size: int
    """S, the side of a tile."""

    @classmethod
    def of(
        cls, open_slide: Callable[[], tuple[SlideSource, TileIndex]], index: TileIndex
    ) -> StreamedSlide:
        """A slide whose tiles are known already."""
        return cls(open_slide, index.slide_id, len(index.coords0), index.grid.size)

    @classmethod
    def at_hand(cls, source: SlideSource, index: TileIndex) -> StreamedSlide:
        """A slide whose pixels are, too."""
        return cls.of(partial(_both, source, index), index)


class Workers:
    """Running processes, their slots, and what they were asked for and has not been taken."""

    def __init__(self, slides: Sequence[StreamedSlide], size: int, workers: int, slots: int):
        self.slides, self.size, self.number = slides, size, 0
        self.plan: Iterator[tuple[int, int]] = iter(())
        self.asked: deque[tuple[int, int, int]] = deque()  # chunk's number, slide, first tile
        shape = slots, size, 3, slides[0].size, slides[0].size
        self.slots_NC = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self.processes = []
        context = torch.multiprocessing.get_context()
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                arguments = (theirs, self.slots_NC, slides, os.getpid())
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                theirs.close()  # the worker has its own
                self.processes.append((process, ours))
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Kill them and let all go."""
        for process, _ in self.processes:
            process.kill()  # it writes nothing that could be left half-written
        for process, ours in self.processes:
            process.join()
            process.close()
            ours.close()

    def comes_to(self, slide: int, start: int) -> bool:
        """Whether that chunk is the next to be taken."""
        return bool(self.asked) and self.asked[0][1:] == (slide, start)

    def turn_to(self, plan: Iterator[tuple[int, int]]) -> None:
        """Let go of what was asked for, and ask for this instead."""
        while self.asked:
            with contextlib.suppress(SlideError):  # of a slide that was left
                self._await(*self.asked.popleft()[:2])
        self.plan = plan
        for _ in range(len(self.slots_NC)):
            self._ask()

    def take(self) -> Tensor:
        """The next chunk; its slot is free again."""
        number, slide, _ = self.asked.popleft()
        length = self._await(number, slide)
        tiles_CSS = self.slots_NC[number % len(self.slots_NC), :length].clone()
        self._ask()
        return tiles_CSS

    def _ask(self) -> None:
        if (wanted := next(self.plan, None)) is None:
            return
        with contextlib.suppress(OSError):  # a dead worker is reported when its chunk is awaited
            slot = self.number % len(self.slots_NC)
            self.processes[self.number % len(self.processes)][1].send((slot, *wanted))
        self.asked.append((self.number, *wanted))
        self.number += 1

    def _await(self, number: int, slide: int) -> int:
        """How many tiles the chunk has, once it is in its slot."""
        process, ours = self.processes[number % len(self.processes)]
        wait([ours, process.sentinel])
        try:
            reply = ours.recv() if ours.poll() else None
        except (EOFError, OSError):
            reply = None
        if reply is None:
            process.join()
            code = process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise WorkerDiedError.of([self.slides[slide].slide_id], how)
        if isinstance(reply, Exception):
            raise reply
        return reply


def _work(
    theirs: Connection, slots_NC: Tensor, slides: Sequence[StreamedSlide], parent: int
) -> None:
    """A worker's life: read the chunk asked for into its slot, say how long it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)  # each worker is one of several
    slots_NCSS, chunk = slots_NC.numpy(), slots_NC.shape[1]
    opened, source, index = None, None, None
    while os.getppid() == parent:  # a parent killed outright cannot end its workers
        if not theirs.poll(ORPHAN_CHECK_S):
            continue
        try:
            slot, number, start = theirs.recv()
            try:
                if opened != number:
                    close(source)
                    opened = source = None
                    source, index = slides[number].open_slide()
                    opened = number
                coords0 = index.coords0[start : start + chunk]
                read_into(slots_NCSS[slot, : len(coords0)], source, index, coords0)
                theirs.send(len(coords0))
            except Exception as error:
                fault = named_fault(error, slides[number].slide_id)
                if not isinstance(fault, SlideError):  # a bug: its place in the code matters
                    fault = RuntimeError(f"{fault}\n{traceback.format_exc()}")
                theirs.send(fault)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _both(source: SlideSource, index: TileIndex) -> tuple[SlideSource, TileIndex]:
    return source, index
