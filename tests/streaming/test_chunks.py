"""Chunks contain every tile once, in index order, in a fixed amount of memory.

For any numbers of chunks and workers, the chunks together are `expected_tiles`, which reads tile by
tile. A tile that cannot be read and a killed worker are errors with the slide's name, never a hang.
"""

import multiprocessing
import os
import time
from itertools import islice

import numpy as np
import pytest
import torch

from slides.errors import NotASlideError, SettingsError, SlideError, UnreadableRegionError
from slides.streaming import workers as processes
from slides.streaming.chunks import WorkerDiedError, read_tiles
from slides.streaming.prefetch import stream_chunks
from tests.sources import SIZE, Source, expected_tiles, make_index

TILES = 23  # prime: the last chunk is always short
WORKERS = [0, 1, 2, 3]

pytestmark = pytest.mark.timeout(60)  # a hang is a failure


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("chunk", [1, 4, 5, TILES, 100])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_chunks_end_to_end_are_the_slide(chunk, workers, prefetch):
    index = make_index(TILES)
    starts, tiles = zip(*stream_chunks(Source(), index, chunk, workers, prefetch), strict=True)
    assert list(starts) == list(range(0, TILES, chunk))
    assert [len(part) for part in tiles[:-1]] == [chunk] * (len(starts) - 1)
    assert all(part.dtype == torch.uint8 and part.is_contiguous() for part in tiles)
    np.testing.assert_array_equal(torch.cat(tiles).numpy(), expected_tiles(index))


def test_the_parity_test_can_fail():
    index = make_index(TILES)
    tiles = torch.cat([part for _, part in stream_chunks(Source(), index, 4, 2)])
    tiles = tiles.numpy()
    assert not np.array_equal(tiles, expected_tiles(index, slice(None, None, -1)))
    assert not np.array_equal(tiles, expected_tiles(index).swapaxes(-1, -2))


@pytest.mark.parametrize("workers", WORKERS)
def test_every_tile_is_read_once(workers):
    source = Source()
    for _ in stream_chunks(source, make_index(TILES), 4, workers):
        pass
    assert source.reads.value == TILES


def test_chosen_rows_are_read_in_their_order():
    index, rows = make_index(TILES), np.array([3, 5, 19])
    np.testing.assert_array_equal(read_tiles(Source(), index, rows), expected_tiles(index, rows))
    np.testing.assert_array_equal(read_tiles(Source(), index), expected_tiles(index))
    assert read_tiles(Source(), index, np.array([], int)).shape == (0, 3, SIZE, SIZE)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_tiles_are_no_chunks(workers):
    assert list(stream_chunks(Source(), make_index(0), 4, workers)) == []


def settled(counter):
    """Return the counter's value once the workers have nothing more to do."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 0.3:
        if counter.value != last:
            last, since = counter.value, time.monotonic()
        time.sleep(0.01)
    return last


@pytest.mark.parametrize("tiles", [211, 1009])
@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), (1, 1), (2, 2)])
def test_no_more_is_read_than_the_slots_hold(tiles, workers, prefetch):
    """Counts tiles read and not yet taken: the same small number for slides of any length."""
    source, chunk, most = Source(), 5, 0
    for start, part in stream_chunks(source, make_index(tiles), chunk, workers, prefetch):
        if start in (0, 5, 50, 100):
            ahead = settled(source.reads) - (start + len(part))
            assert ahead == workers * prefetch * chunk
            most = max(most, ahead)
    assert most == workers * prefetch * chunk


def test_memory_is_made_once(monkeypatch):
    """The slots are the only allocation besides the chunk that is returned."""
    made, shared = [], processes._shared
    monkeypatch.setattr(processes, "_shared", lambda *a: made.append(a[0]) or shared(*a))
    for _ in stream_chunks(Source(), make_index(211), 5, 2, 3):
        pass
    assert made == [(6, 5, 3, SIZE, SIZE)]


def test_a_chunk_is_the_callers_to_keep():
    """Slots are reused; a returned chunk must not change with them."""
    index = make_index(TILES)
    kept = [part for _, part in stream_chunks(Source(), index, 2, 1, 1)]
    np.testing.assert_array_equal(torch.cat(kept).numpy(), expected_tiles(index))


@pytest.mark.parametrize("workers", [0, 2])
class TestFaults:
    BAD = (3 * SIZE, SIZE)  # row 10: in the third chunk of four

    def stream(self, workers, source):
        return list(stream_chunks(source, make_index(TILES), 4, workers))

    def test_a_slides_fault_keeps_its_kind_and_text(self, workers):
        with pytest.raises(NotASlideError) as caught:
            self.stream(workers, Source(self.BAD, NotASlideError("slide.a: no bytes there")))
        assert str(caught.value) == "slide.a: no bytes there"

    def test_a_fault_without_a_name_is_given_one(self, workers):
        with pytest.raises(UnreadableRegionError, match=r"^slide\.a: bad bytes"):
            self.stream(workers, Source(self.BAD, UnreadableRegionError("bad bytes")))

    def test_a_disk_error_is_the_slides_fault(self, workers):
        with pytest.raises(SlideError, match=r"slide\.a: the disk gave an error .*Stale"):
            self.stream(workers, Source(self.BAD, OSError(116, "Stale file handle")))

    def test_a_bug_is_no_slide_fault_but_names_it(self, workers):
        with pytest.raises(RuntimeError, match=r"slide\.a: ZeroDivisionError .*: by zero"):
            self.stream(workers, Source(self.BAD, ZeroDivisionError("by zero")))

    def test_chunks_before_the_fault_still_come(self, workers):
        stream = stream_chunks(Source(self.BAD), make_index(TILES), 4, workers)
        assert [start for start, _ in islice(stream, 2)] == [0, 4]
        with pytest.raises(UnreadableRegionError):
            next(stream)

    def test_a_tile_of_another_shape_is_refused(self, workers):
        """Numpy would silently broadcast one pixel over the whole tile."""

        class OnePixel(Source):
            def read(self, x0, y0, grid):
                return np.zeros((1, 1, 3), np.uint8)

        with pytest.raises(UnreadableRegionError, match=r"slide\.a: .*uint8 \(1, 1, 3\)"):
            self.stream(workers, OnePixel())


@pytest.mark.parametrize("tile", [0, 10, TILES - 1])
def test_a_killed_worker_is_an_error_with_the_slides_name(tile):
    index = make_index(TILES)
    source = Source(die_at=tuple(index.coords0[tile].tolist()))
    with pytest.raises(WorkerDiedError, match=r"^slide\.a: .*SIGKILL.*fewer workers"):
        list(stream_chunks(source, index, 4, 2))


def test_a_worker_killed_while_idle_is_an_error_too():
    stream = stream_chunks(Source(), make_index(211), 4, 2, 1)
    next(stream)
    time.sleep(0.2)  # until both wait for work
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(WorkerDiedError, match=r"slide\.a"):
        list(stream)


def test_no_worker_outlives_its_stream():
    before = multiprocessing.active_children()
    stream = stream_chunks(Source(), make_index(211), 4, 3)
    next(stream)
    assert len(multiprocessing.active_children()) == len(before) + 3
    stream.close()  # what a loop that is left early does
    assert multiprocessing.active_children() == before


def test_no_worker_outlives_its_parent(monkeypatch):
    """A killed parent runs no clean-up: workers notice by themselves."""
    monkeypatch.setattr(processes, "ORPHAN_CHECK_S", 0.1)
    theirs, ours = multiprocessing.Pipe()

    def parent():
        stream = stream_chunks(Source(), make_index(211), 4, 2)
        next(stream)
        theirs.send([child.pid for child in multiprocessing.active_children()])
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    pids = ours.recv()
    assert len(pids) == 2
    process.kill()
    process.join()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("numbers", [(0, 0, 1), (4, -1, 1), (4, 1, 0)])
def test_impossible_numbers_are_refused_at_once(numbers):
    with pytest.raises(SettingsError, match="must be at least"):
        stream_chunks(Source(), make_index(5), *numbers)


def test_workers_are_other_processes():
    class Who(Source):
        def read(self, x0, y0, grid):
            return np.full((SIZE, SIZE, 3), os.getpid() % 251, np.uint8)

    parts = [part for _, part in stream_chunks(Who(), make_index(8), 4, 2)]
    assert {os.getpid() % 251} != {int(part[0, 0, 0, 0]) for part in parts}
