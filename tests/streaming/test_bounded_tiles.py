"""A slide is read in bounded memory, with the same bytes in every pass.

The number of tiles in memory, the chunk size and the number of processes change no byte, with
augmentation and sampling as without.
"""

import multiprocessing
import os
import time
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slides.errors import SettingsError, UnreadableRegionError
from slides.streaming import bounded_tiles as held
from slides.streaming.bounded_tiles import SlideTiles, host_budget, machine_memory, tiles_to_hold
from slides.streaming.chunks import WorkerDiedError
from slides.streaming.stream import Augment, BagDataset, SlideLoader, Turn
from slides.streaming.workers import _shared
from tests.sources import SIZE, Source, expected_tiles, make_index, make_row

TILES = 23
TURN = Turn(3, 0, 1)

pytestmark = pytest.mark.timeout(60)


def open_slide(tiles, row):
    return Source(), make_index(tiles, row.slide_id)


def bag(hold=None, workers=0, budget=17, **options):
    bags = BagDataset(
        [make_row(n) for n in range(2)],
        partial(open_slide, TILES),
        budget=budget,
        seed=5,
        augment=Augment(colour=0.2, stain=0.1),
        hold=hold,
        workers=workers,
        **options,
    )
    return bags[TURN]


def whole(tiles, size):
    return torch.cat(list(tiles.split(size)))


@pytest.mark.parametrize("sampling", ["uniform", "spatial"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hold", [0, 1, 6, 16, 17, 99])
def test_whatever_is_held_both_passes_see_the_tiles_of_a_slide_in_memory(hold, workers, sampling):
    expected = bag(sampling=sampling).tiles
    assert isinstance(expected, torch.Tensor)
    tiles = bag(hold, workers, sampling=sampling).tiles
    assert isinstance(tiles, torch.Tensor) == (hold >= 17)
    for size in (4, 4, 5, 1, 100):  # two passes, then other chunks: after memory ran out, say
        parts = list(tiles.split(size))
        assert [len(part) for part in parts] == [len(part) for part in expected.split(size)]
        assert torch.equal(torch.cat(parts), expected)


def test_it_is_augmented_and_drawn_at_all():
    tiles, raw = bag(3).tiles, expected_tiles(make_index(TILES))
    assert not np.array_equal(whole(tiles, 4), raw[:17])
    assert whole(bag(3, sampling="spatial").tiles, 4).shape == (17, 3, SIZE, SIZE)
    assert not torch.equal(whole(bag(3, sampling="spatial").tiles, 4), whole(tiles, 4))


def test_what_is_held_is_not_read_again():
    source = Source()
    kept = torch.from_numpy(expected_tiles(make_index(TILES))[:10])
    tiles = SlideTiles.of(source, make_index(TILES), in_memory=kept)
    assert torch.equal(whole(tiles, 4), torch.from_numpy(expected_tiles(make_index(TILES))))
    assert source.reads.value == TILES - 8  # chunks of four: two are held whole
    assert next(iter(tiles.split(4))).data_ptr() == kept.data_ptr()
    assert source.reads.value == TILES - 8


def test_tiles_beyond_are_read_in_bounded_memory():
    """The slide has 100 times the tiles in memory: only the slots and one chunk are read ahead."""
    source, index = Source(), make_index(2003)
    tiles = SlideTiles.of(source, index, in_memory=torch.from_numpy(expected_tiles(index)[:20]))
    for number, _ in enumerate(islice(tiles.split(5), 40)):
        assert source.reads.value <= max(0, (number - 3) * 5)


def test_what_is_not_held_is_read_ahead_while_the_rest_is_used():
    source, index = Source(), make_index(TILES)
    tiles = SlideTiles.of(source, index, 2, in_memory=torch.from_numpy(expected_tiles(index)[:12]))
    stream = tiles.split(4)
    next(stream)
    deadline = time.monotonic() + 20
    while source.reads.value < TILES - 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.reads.value == TILES - 12
    stream.close()
    assert not multiprocessing.active_children()


def test_bags_arrive_from_workers_as_they_are_made_here():
    """They pass through shared memory and pickling, and are opened again in this process."""
    rows = [make_row(n) for n in range(3)]
    options = {"budget": 17, "augment": Augment(colour=0.2), "hold": 6}
    bags = BagDataset(rows, partial(open_slide, TILES), **options)
    loaded = list(SlideLoader(bags, workers=2))
    for number, each in enumerate(loaded):
        assert each.tiles.in_memory.is_shared()
        assert len(each.tiles.in_memory) == 6
        assert len(each.coords0) == 17
        assert torch.equal(whole(each.tiles, 4), whole(bags[number].tiles, 4))


def test_a_bag_in_memory_was_decoded_into_shared_memory():
    bags = BagDataset([make_row(0)], partial(open_slide, TILES))
    (each,) = SlideLoader(bags, workers=1)
    assert each.tiles.is_shared()
    assert not bags[0].tiles.is_shared()


@pytest.mark.parametrize("hold", [None, 6])
def test_bags_come_through_pipes_where_shared_memory_is_small(hold, monkeypatch):
    """A container's /dev/shm has 64 MB; a bag of 500 tiles of 224 px has 75."""
    free = SimpleNamespace(free=TILES)  # bytes
    monkeypatch.setattr("slides.streaming.stream.shutil.disk_usage", lambda _: free)
    bags = BagDataset([make_row(n) for n in range(3)], partial(open_slide, TILES), hold=hold)
    for number, each in enumerate(SlideLoader(bags, workers=2)):
        tiles = each.tiles if hold is None else each.tiles.in_memory
        assert not tiles.is_shared()
        assert torch.equal(whole(each.tiles, 4), whole(bags[number].tiles, 4))


def test_slots_of_forked_processes_need_no_shared_memory_folder():
    before = {path.name for path in Path("/dev/shm").iterdir()}
    slots = _shared((2, 3, 5), "fork")
    slots[1] = 7
    assert slots.sum() == 3 * 5 * 7
    assert {path.name for path in Path("/dev/shm").iterdir()} <= before
    assert _shared((2, 3, 5), "spawn").is_shared()


class TestFaults:
    LATE = (SIZE, 2 * SIZE)  # row 15: not among the tiles held

    def test_a_fault_beyond_what_is_held_is_the_slides(self):
        tiles = SlideTiles.of(Source(self.LATE), make_index(TILES), workers=2)
        with pytest.raises(UnreadableRegionError, match=r"slide\.a: bad bytes"):
            whole(tiles, 4)

    def test_whoever_wants_to_hears_of_it_first(self):
        faults = []
        tiles = SlideTiles.of(Source(self.LATE), make_index(TILES), on_fault=faults.append)
        with pytest.raises(UnreadableRegionError):
            whole(tiles, 4)
        assert [str(fault) for fault in faults] == ["slide.a: bad bytes"]

    def test_a_killed_worker_is_an_error_with_the_slides_name(self):
        source, index = Source(die_at=self.LATE), make_index(TILES)
        tiles = SlideTiles.of(
            source, index, 2, in_memory=torch.from_numpy(expected_tiles(index)[:8])
        )
        with pytest.raises(WorkerDiedError, match=r"^slide\.a: .*SIGKILL"):
            whole(tiles, 4)

    def test_the_slide_is_closed_however_it_ends(self):
        sound, broken = Source(), Source(self.LATE)
        whole(SlideTiles.of(sound, make_index(TILES)), 4)
        with pytest.raises(UnreadableRegionError):
            whole(SlideTiles.of(broken, make_index(TILES)), 4)
        stream = SlideTiles.of(sound, make_index(TILES)).split(4)
        next(stream)
        stream.close()
        assert (sound.closed, broken.closed) == (2, 1)

    def test_an_unknown_sampling_is_refused(self):
        with pytest.raises(SettingsError, match="sampling is 'grid': give uniform"):
            bag(sampling="grid")


class TestBudget:
    def test_what_is_held_stays_within_it(self):
        hold = tiles_to_hold(10**9, 224, slides=6)
        assert hold * 6 * 3 * 224**2 <= 10**9 < (hold + 1) * 6 * 3 * 224**2

    def test_the_default_is_half_of_what_the_machine_or_container_has(self, tmp_path, monkeypatch):
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        monkeypatch.setattr(held, "LIMITS", (str(tmp_path / "max"), str(tmp_path / "limit")))
        assert machine_memory() == physical
        (tmp_path / "max").write_text("max\n")
        assert machine_memory() == physical
        (tmp_path / "limit").write_text("1000003\n")
        assert host_budget() == 500001
        assert host_budget(1.5) == 1_500_000_000
