"""Worker processes that read requested chunks into shared memory, in order.

Worker n % workers reads chunk n into slot n % slots, so chunks come in order, and only three
numbers per chunk are pickled. A DataLoader is not used, because it reports a killed worker by a
signal that interrupts the caller's code anywhere.

Price: the slots, allocated once and reused, and a copy of each chunk that is taken; each worker
opens each slide.

Shapes: N slots, T tiles of a slide, C tiles of a chunk, S side of a tile.
"""

from __future__ import annotations

import contextlib
import math
import mmap
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
    """A slide that a prefetcher reads. All slides of a prefetcher share one grid."""

    open_slide: Callable[[], tuple[SlideSource, TileIndex]]
    """Returns pixels and index; called in the process that reads, which closes the pixels."""
    slide_id: str
    count: int
    """T, the number of tiles."""
    size: int
    """S, the side of a tile."""

    @classmethod
    def of(
        cls, open_slide: Callable[[], tuple[SlideSource, TileIndex]], index: TileIndex
    ) -> StreamedSlide:
        """Return a slide whose index is known."""
        return cls(open_slide, index.slide_id, len(index.coords0), index.grid.size)

    @classmethod
    def at_hand(cls, source: SlideSource, index: TileIndex) -> StreamedSlide:
        """Return a slide that is open and whose index is known."""
        return cls.of(partial(_both, source, index), index)


class Workers:
    """Running processes, their slots of shared memory, and the requests not yet taken."""

    def __init__(self, slides: Sequence[StreamedSlide], size: int, workers: int, slots: int):
        self.slides, self.size, self.number = slides, size, 0
        self.plan: Iterator[tuple[int, int]] = iter(())
        self.requests: deque[tuple[int, int, int]] = deque()  # chunk's number, slide, first tile
        shape = slots, size, 3, slides[0].size, slides[0].size
        self.processes = []
        context = torch.multiprocessing.get_context()
        self.slots_NC = _shared(shape, context.get_start_method())
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                arguments = (theirs, self.slots_NC, slides, os.getpid())
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                theirs.close()  # the worker has its own copy
                self.processes.append((process, ours))
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Kill the processes and close their pipes."""
        for process, _ in self.processes:
            process.kill()  # it writes nothing that could be left half-written
        for process, ours in self.processes:
            process.join()
            process.close()
            ours.close()

    def comes_to(self, slide: int, start: int) -> bool:
        """Return whether that chunk is the next one to be taken."""
        return bool(self.requests) and self.requests[0][1:] == (slide, start)

    def turn_to(self, plan: Iterator[tuple[int, int]]) -> None:
        """Drop all requests, and request the chunks of this plan instead."""
        while self.requests:
            with contextlib.suppress(SlideError):  # a fault of a slide that is not read any more
                self._await(*self.requests.popleft()[:2])
        self.plan = plan
        for _ in range(len(self.slots_NC)):
            self._ask()

    def take(self) -> Tensor:
        """Return the next chunk, and free its slot."""
        number, slide, _ = self.requests.popleft()
        length = self._await(number, slide)
        tiles_CSS = self.slots_NC[number % len(self.slots_NC), :length].clone()
        self._ask()
        return tiles_CSS

    def _ask(self) -> None:
        if (request := next(self.plan, None)) is None:
            return
        with contextlib.suppress(OSError):  # a dead worker is reported when its chunk is awaited
            slot = self.number % len(self.slots_NC)
            self.processes[self.number % len(self.processes)][1].send((slot, *request))
        self.requests.append((self.number, *request))
        self.number += 1

    def _await(self, number: int, slide: int) -> int:
        """Wait until a chunk is in its slot, and return its number of tiles."""
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


def _shared(shape: tuple[int, ...], start: str) -> Tensor:
    """Return uint8 memory that the processes share; where they fork, none of /dev/shm.

    Containers give /dev/shm 64 MB.
    """
    if start != "fork":
        return torch.empty(shape, dtype=torch.uint8).share_memory_()
    whole = mmap.mmap(-1, math.prod(shape))
    return torch.frombuffer(whole, dtype=torch.uint8).reshape(shape)


def _work(
    theirs: Connection, slots_NC: Tensor, slides: Sequence[StreamedSlide], parent: int
) -> None:
    """Run a worker: read each requested chunk into its slot, and reply with its length."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    torch.set_num_threads(1)  # several workers share the cores
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
                if not isinstance(fault, SlideError):  # a bug: keep its traceback
                    fault = RuntimeError(f"{fault}\n{traceback.format_exc()}")
                theirs.send(fault)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _both(source: SlideSource, index: TileIndex) -> tuple[SlideSource, TileIndex]:
    return source, index
