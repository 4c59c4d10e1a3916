"""The tiles of one slide: all at once (`read_tiles`), or chunk by chunk (`stream_chunks`).

`stream_chunks` reads every tile of a slide, however many, in a fixed amount of memory: worker
processes write into slots of shared memory that are made once and used over and over. Chunk number
n is read by worker n % workers into slot n % slots, so chunks come in order and nothing is pickled
but three numbers a chunk. The processes are our own and not a DataLoader's, because a DataLoader
tells of a killed worker by a signal that lands anywhere in the caller's code.

Price: workers * prefetch chunks of shared memory and one that is handed out; one copy a chunk.

Shapes: N slots, T tiles of a slide, C tiles of a chunk, S side of a tile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor

from slides.errors import SlideError, UnreadableRegionError
from slides.grid import Grid

if TYPE_CHECKING:
    from slides.index import TileIndex

ORPHAN_CHECK_S = 5.0  # how often an idle worker looks whether its parent still lives


class SlideSource(Protocol):
    """An open slide, or anything that gives tiles like one: `reader.Slide`, `cache.CachedSlide`."""

    def read(self, x0: int, y0: int, grid: Grid) -> np.ndarray:
        """The tile whose corner is at (x0, y0) in level-0 pixels, uint8 (S, S, 3)."""


class WorkerDiedError(RuntimeError):
    """A reading process ended without a word."""

    @classmethod
    def of(cls, slide_ids: Sequence[str], how: str) -> WorkerDiedError:
        """The error for a worker that was lost while these slides were being read."""
        return cls(
            f"{', '.join(slide_ids)}: a process that was reading died ({how}). Most often memory "
            "or /dev/shm ran out: use fewer workers or a smaller chunk or tile budget. If it is "
            "always the same slide, its file crashes the decoder: leave it out."
        )


def named_fault(error: Exception, slide_id: str) -> Exception:
    """The same fault with the slide's name: a `SlideError` if slide or disk is at fault."""
    if isinstance(error, SlideError):
        return error if slide_id in str(error) else type(error)(f"{slide_id}: {error}")
    if isinstance(error, OSError):
        return UnreadableRegionError(
            f"{slide_id}: the disk gave an error ({error}). Check that the file is there and "
            "readable, or leave the slide out."
        )
    return RuntimeError(f"{slide_id}: {type(error).__name__} while reading its tiles: {error}")


def read_tiles(
    source: SlideSource,
    index: TileIndex,
    rows: np.ndarray | slice | None = None,
    shared: bool = False,
) -> Tensor:
    """The tiles of an index, or those of its rows, as contiguous uint8 (T, 3, S, S).

    `shared` puts them into memory that another process can be handed without a copy.
    """
    coords0 = index.coords0 if rows is None else index.coords0[rows]
    shape = (len(coords0), 3, index.grid.size, index.grid.size)
    tiles_TCSS = torch.empty(shape, dtype=torch.uint8)
    if shared and len(coords0):
        tiles_TCSS.share_memory_()
    _read_into(tiles_TCSS.numpy(), source, index, coords0)
    return tiles_TCSS


def stream_chunks(
    source: SlideSource, index: TileIndex, chunk: int, workers: int = 0, prefetch: int = 2
) -> Iterator[tuple[int, Tensor]]:
    """All tiles of a slide in index order: (number of the first, uint8 (C, 3, S, S)).

    A chunk handed out is the caller's to keep.

    Args:
        source: the slide; inherited by the workers under `fork`, pickled under `spawn`.
        index: its tiles.
        chunk: tiles of a chunk; the last may be short.
        workers: reading processes; 0 reads in this one, when a chunk is asked for.
        prefetch: chunks each worker may be ahead.

    Raises:
        SlideError: a tile cannot be read; names the slide.
        WorkerDiedError: a worker was killed; names the slide.
    """
    for name, value, least in (
        ("chunk", chunk, 1),
        ("workers", workers, 0),
        ("prefetch", prefetch, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    starts = range(0, len(index.coords0), chunk)
    if workers and len(starts) > 1:
        stream = _stream_ahead(source, index, starts, min(workers, len(starts)), prefetch)
        next(stream)  # the workers begin now, whenever the first chunk is asked for
        return stream
    return _stream_here(source, index, starts)


def _stream_here(source, index: TileIndex, starts: range) -> Iterator[tuple[int, Tensor]]:
    for start in starts:
        try:
            tiles_CSS = read_tiles(source, index, slice(start, start + starts.step))
        except Exception as error:
            raise named_fault(error, index.slide_id) from error
        yield start, tiles_CSS
        del tiles_CSS  # the caller may be done with it: do not hold it while reading the next


def _stream_ahead(
    source, index: TileIndex, starts: range, workers: int, prefetch: int
) -> Iterator[tuple[int, Tensor]]:
    size, slots = index.grid.size, min(workers * prefetch, len(starts))
    slots_NC = torch.empty((slots, starts.step, 3, size, size), dtype=torch.uint8).share_memory_()
    context = torch.multiprocessing.get_context()
    crew = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            arguments = (theirs, slots_NC, source, index, starts.step, os.getpid())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # the worker has its own; this one would leak a descriptor a slide
            crew.append((process, ours))
        for number in range(slots):
            _ask(crew, number, slots, starts)
        yield 0, slots_NC[:0]
        for number, start in enumerate(starts):
            length = _await(crew, number, index.slide_id)
            tiles_CSS = slots_NC[number % slots, :length].clone()
            if number + slots < len(starts):
                _ask(crew, number + slots, slots, starts)  # the slot is free again
            yield start, tiles_CSS
            del tiles_CSS
    finally:
        for process, _ in crew:
            process.kill()  # it writes nothing that could be left half-written
        for process, ours in crew:
            process.join()
            ours.close()


def _ask(crew: list, number: int, slots: int, starts: range) -> None:
    with contextlib.suppress(OSError):  # a dead worker is reported when its chunk is awaited
        crew[number % len(crew)][1].send((number % slots, starts[number]))


def _await(crew: list, number: int, slide_id: str) -> int:
    """How many tiles the chunk has, once it is in its slot."""
    process, ours = crew[number % len(crew)]
    wait([ours, process.sentinel])
    try:
        reply = ours.recv() if ours.poll() else None
    except (EOFError, OSError):
        reply = None
    if reply is None:
        process.join()
        code = process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise WorkerDiedError.of([slide_id], how)
    if isinstance(reply, Exception):
        raise reply
    return reply


def _work(
    theirs: Connection, slots_NC: Tensor, source, index: TileIndex, chunk: int, parent: int
) -> None:
    """A worker's life: read the chunk asked for into its slot, say how long it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)  # each worker is one of several
    slots_NCSS = slots_NC.numpy()
    while os.getppid() == parent:  # a parent killed outright cannot end its workers
        if not theirs.poll(ORPHAN_CHECK_S):
            continue
        try:
            slot, start = theirs.recv()
            coords0 = index.coords0[start : start + chunk]
            try:
                _read_into(slots_NCSS[slot, : len(coords0)], source, index, coords0)
                theirs.send(len(coords0))
            except Exception as error:
                fault = named_fault(error, index.slide_id)
                if not isinstance(fault, SlideError):  # a bug: its place in the code matters
                    fault = RuntimeError(f"{fault}\n{traceback.format_exc()}")
                theirs.send(fault)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _read_into(tiles_TCSS: np.ndarray, source, index: TileIndex, coords0: np.ndarray) -> None:
    size = index.grid.size
    for tile_CSS, (x0, y0) in zip(tiles_TCSS, coords0.tolist(), strict=True):
        tile = source.read(x0, y0, index.grid)
        if tile.shape != (size, size, 3) or tile.dtype != np.uint8:  # assigning would broadcast
            raise UnreadableRegionError(
                f"{index.slide_id}: the tile at ({x0}, {y0}) came as {tile.dtype} {tile.shape} "
                f"where uint8 {(size, size, 3)} was asked for. Check the reader of this format."
            )
        tile_CSS[:] = tile.transpose(2, 0, 1)
