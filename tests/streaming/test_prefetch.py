"""The same processes read slide after slide, the next one ahead of time.

For any workers, chunks and order of slides, the chunks are those of each slide read alone. A fault
of a slide is raised at its turn, with its name; no process is left however it ends.
"""

import multiprocessing
import os
import pickle
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
import yaml

from slides.errors import NotASlideError, SettingsError, UnreadableRegionError
from slides.streaming import workers as pool
from slides.streaming.bounded_tiles import SlideTiles, joined
from slides.streaming.chunks import WorkerDiedError
from slides.streaming.prefetch import Prefetcher, stream_chunks
from slides.streaming.workers import StreamedSlide
from tapfm.cli import main
from tapfm.data.bag import SkippedBag
from tapfm.training.fit import read_config
from tests.cohorts import stamp, write_cohort
from tests.sources import SIZE, Source, expected_tiles, make_index

COUNTS = [23, 3, 0, 1, 17]  # tiles of each slide; the last chunks are short
BAD = (SIZE, SIZE)  # row 8: in the second chunk of five

pytestmark = pytest.mark.timeout(60)  # a hang is a failure


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Check that no process is left after any test."""
    children = multiprocessing.active_children()
    yield
    assert multiprocessing.active_children() == children


def listed(number, count, **source):
    return StreamedSlide.at_hand(Source(**source), make_index(count, f"slide.{number}"))


def prefetcher_of(workers, counts=COUNTS, prefetch=2, **faults):
    """A prefetcher and its slides' sources; `faults` are of slide 1."""
    prefetcher, sources = Prefetcher(workers, prefetch), []
    for number, count in enumerate(counts):
        slide = listed(number, count, **(faults if number == 1 else {}))
        sources.append(slide.open_slide.args[0])
        prefetcher.add(slide)
    return prefetcher, sources


def alone(number, count, size):
    chunks = stream_chunks(Source(), make_index(count, f"slide.{number}"), size)
    return [(start, tiles.tolist()) for start, tiles in chunks]


def taken(prefetcher, number, size):
    return [(start, tiles.tolist()) for start, tiles in prefetcher.chunks(number, size)]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_each_slide_comes_as_it_does_alone(workers, size):
    prefetcher, sources = prefetcher_of(workers)
    with prefetcher:
        for number, count in enumerate(COUNTS):
            assert taken(prefetcher, number, size) == alone(number, count, size)
    assert [source.reads.value for source in sources] == COUNTS, "every tile is read once"


def test_the_parity_test_can_fail():
    prefetcher, _ = prefetcher_of(2)
    with prefetcher:
        assert taken(prefetcher, 0, 5) != alone(4, COUNTS[4], 5)


ORDERS = {
    "backwards": [4, 3, 2, 1, 0],
    "some are left out": [0, 3],
    "some come twice": [0, 0, 1, 4, 4, 0],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_any_other_order_is_right_too(order):
    prefetcher, _ = prefetcher_of(2)
    with prefetcher:
        for number in order:
            for size in (5, 4):
                assert taken(prefetcher, number, size) == alone(number, COUNTS[number], size)


def test_slides_that_are_left_or_read_at_the_same_time_are_right_too():
    prefetcher, _ = prefetcher_of(2)
    with prefetcher:
        left = prefetcher.chunks(0, 2)
        next(left)
        first, last = prefetcher.chunks(0, 2), prefetcher.chunks(4, 2)
        pairs = list(zip(first, last, strict=False))
        assert [start for (start, _), _ in pairs] == list(range(0, 17, 2))
        for (one, tiles), (other, more) in pairs:
            expected = expected_tiles(make_index(23))
            np.testing.assert_array_equal(tiles.numpy(), expected[one : one + 2])
            np.testing.assert_array_equal(more.numpy(), expected[other : min(other + 2, 17)])
        assert next(left)[0] == 2


def test_from_the_middle_of_a_slide_on_nothing_is_read_in_vain():
    prefetcher, sources = prefetcher_of(2)
    with prefetcher:
        assert [start for start, _ in prefetcher.chunks(0, 5, first=10)] == [10, 15, 20]
        for number in (1, 2, 3, 4):
            assert taken(prefetcher, number, 5) == alone(number, COUNTS[number], 5)
    assert [source.reads.value for source in sources] == [13, *COUNTS[1:]]


def test_processes_live_over_all_slides():
    prefetcher, _ = prefetcher_of(2)
    seen = set()
    with prefetcher:
        for number in range(len(COUNTS)):
            for _ in prefetcher.chunks(number, 5):
                seen.add(frozenset(child.pid for child in multiprocessing.active_children()))
    assert len(seen) == 1
    assert len(*seen) == 2


def test_outside_of_with_they_end_with_the_slide_and_read_no_other():
    prefetcher, sources = prefetcher_of(2)
    assert taken(prefetcher, 0, 5) == alone(0, COUNTS[0], 5)
    assert not multiprocessing.active_children()
    assert sum(source.reads.value for source in sources[1:]) == 0


def settled(sources):
    """Return the number of tiles read of all slides, once the workers are idle."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 0.3:
        if (now := sum(source.reads.value for source in sources)) != last:
            last, since = now, time.monotonic()
        time.sleep(0.01)
    return last


def test_the_next_slides_are_read_ahead_as_far_as_the_slots_go():
    """At most workers * prefetch chunks are read and not yet taken, for any slides."""
    prefetcher, sources = prefetcher_of(2, [10, 10, 1000])
    done = 0
    with prefetcher:
        for number in range(3):
            for start, tiles in prefetcher.chunks(number, 5):
                done += len(tiles)
                if number < 2 or start in (0, 500):
                    assert settled(sources) == done + 2 * 2 * 5
                if start == 500:
                    break


def test_slots_are_made_once_for_all_slides(monkeypatch):
    made, shared = [], pool._shared
    monkeypatch.setattr(pool, "_shared", lambda *a: made.append(a[0]) or shared(*a))
    prefetcher, _ = prefetcher_of(2)
    with prefetcher:
        for number in range(len(COUNTS)):
            assert sum(len(tiles) for _, tiles in prefetcher.chunks(number, 5)) == COUNTS[number]
    assert made == [(4, 5, 3, SIZE, SIZE)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_is_told_at_its_turn_and_the_next_slide_is_whole(workers):
    prefetcher, _ = prefetcher_of(
        workers, [7, 23, 17], fail_at=BAD, error=NotASlideError("no bytes there")
    )
    with prefetcher:
        assert taken(prefetcher, 0, 5) == alone(0, 7, 5)
        stream = prefetcher.chunks(1, 5)
        assert next(stream)[0] == 0
        with pytest.raises(NotASlideError, match=r"^slide\.1: no bytes there"):
            next(stream)
        assert taken(prefetcher, 2, 5) == alone(2, 17, 5)


def fails(error):
    raise error


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slide_that_does_not_open_is_told_at_its_turn_too(workers):
    prefetcher = Prefetcher(workers)
    prefetcher.add(listed(0, 7))
    broken = partial(fails, UnreadableRegionError("slide.1: no such file"))
    prefetcher.add(StreamedSlide(broken, "slide.1", 9, SIZE))
    prefetcher.add(listed(2, 17))
    with prefetcher:
        assert taken(prefetcher, 0, 5) == alone(0, 7, 5)
        with pytest.raises(UnreadableRegionError, match=r"^slide\.1: no such file"):
            taken(prefetcher, 1, 5)
        assert taken(prefetcher, 2, 5) == alone(2, 17, 5)


def test_a_bug_is_no_slides_fault_but_names_it():
    prefetcher, _ = prefetcher_of(2, [7, 23], fail_at=BAD, error=ZeroDivisionError("by zero"))
    with prefetcher, pytest.raises(RuntimeError, match=r"slide\.1: ZeroDivisionError .*: by zero"):
        taken(prefetcher, 1, 5)


def test_a_worker_that_dies_at_a_slide_is_an_error_with_its_name():
    """Earlier slides are complete, though it died while they were used."""
    prefetcher, sources = prefetcher_of(2, [7, 23, 17], die_at=BAD)
    with prefetcher:
        stream = prefetcher.chunks(0, 5)
        first = [next(stream)]
        settled(sources)  # the dead one has been dead for a while
        assert [start for start, _ in [*first, *stream]] == [0, 5]
        with pytest.raises(WorkerDiedError, match=r"^slide\.1: .*SIGKILL"):
            taken(prefetcher, 1, 5)
        assert not multiprocessing.active_children()


def test_workers_killed_from_outside_are_an_error_too():
    prefetcher, sources = prefetcher_of(2, [7, 23, 17])
    with prefetcher:
        taken(prefetcher, 0, 5)
        settled(sources)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match=r"^slide\.[12]: .*SIGKILL"):
            for number in (1, 2):
                taken(prefetcher, number, 5)


def test_no_process_outlives_a_loop_that_is_left():
    prefetcher, _ = prefetcher_of(2)
    tiles = [SlideTiles(listed(number, count), prefetcher) for number, count in enumerate(COUNTS)]
    with pytest.raises(KeyError), prefetcher:
        for _ in tiles[0].split(5):
            assert len(multiprocessing.active_children()) == 2
            raise KeyError
    assert not multiprocessing.active_children()


def test_no_file_stays_open():
    """Open files are compared after a first run, which opens torch's own."""
    found = []
    for _ in range(4):
        prefetcher, _ = prefetcher_of(2)
        with prefetcher:
            next(prefetcher.chunks(0, 5))
        found.append(len(os.listdir("/proc/self/fd")))
    assert found[1:] == [found[1]] * 3


def test_tiles_of_a_case_are_read_by_one_crew():
    prefetcher, _ = prefetcher_of(2, [])
    parts = [
        SlideTiles(listed(number, count), prefetcher) for number, count in enumerate([7, 0, 6])
    ]
    case = joined(parts)
    assert case.count == 13
    with prefetcher:
        stream = case.split(5)
        found = [next(stream)]
        pids = {child.pid for child in multiprocessing.active_children()}
        found.extend(stream)
        assert pids == {child.pid for child in multiprocessing.active_children()}
    assert [len(tiles) for tiles in found] == [5, 2, 5, 1]
    expected = np.concatenate([expected_tiles(make_index(count)) for count in (7, 6)])
    np.testing.assert_array_equal(torch.cat(found).numpy(), expected)


def test_it_pickles_without_its_processes():
    prefetcher, _ = prefetcher_of(2)
    with prefetcher:
        next(prefetcher.chunks(0, 5))
        copy = pickle.loads(pickle.dumps(prefetcher))
    assert taken(copy, 0, 5) == alone(0, COUNTS[0], 5)


@pytest.mark.parametrize("numbers", [(-1, 2), (2, 0)])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(SettingsError, match="must be at least"):
        Prefetcher(*numbers)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Return the config of a tiny cohort, indexed and cached."""
    config = write_cohort(tmp_path_factory.mktemp("prefetcher"), labels=["KRAS"], on_error="skip")
    text = config.read_text().replace("c1,", "c0,")
    config.write_text(text)
    assert main(["index", "--config", str(config)]) == 0
    return config


def streaming(config, *options):
    data = read_config(["--config", str(config), *options]).datamodule
    data.prepare_data()
    return data


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["files", "cache"])
def test_a_split_streams_as_its_bags_do_alone(cohort, workers, where):
    cache = ["--data.cache_dir", str(cohort.parent / "cache")] if where == "cache" else []
    data = streaming(cohort, "--data.workers", str(workers), *cache)
    rows, alone = data.rows("train"), streaming(cohort, "--data.workers", "0")
    streamed = data.streamed(rows)
    assert len(streamed) == len(rows)
    for _ in range(2):  # each validation
        for row, bag in zip(rows, streamed, strict=True):
            expected = torch.cat(list(alone.bag(row).tiles.split(5)))
            assert torch.equal(torch.cat(list(bag.tiles.split(5))), expected)
            assert (bag.slide_id, bag.count) == (row.slide_id, len(expected))
    kept = list(streamed)  # used when the loop is over
    assert torch.equal(torch.cat(list(kept[-1].tiles.split(5))), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_slide_that_breaks_is_skipped_and_the_next_is_whole(cohort, workers, monkeypatch):
    data = streaming(cohort, "--data.workers", str(workers))
    rows = data.rows("test")
    expected = [torch.cat(list(bag.tiles.split(5))) for bag in data.streamed(rows)]
    broken = rows[1].path
    sound = broken.read_bytes()
    try:
        broken.write_bytes(sound[:300] + bytes(len(sound) - 600) + sound[-300:])
        stamp(broken)
        found = {}
        for bag in data.streamed(rows):
            try:
                found[bag.slide_id] = torch.cat(list(bag.tiles.split(5)))
            except SkippedBag:
                continue
    finally:
        broken.write_bytes(sound)
        stamp(broken)
    assert list(found) == [row.slide_id for row in rows if row is not rows[1]]
    assert list(data.skipped) == [rows[1].slide_id]
    for row, tiles in zip(rows, expected, strict=True):
        assert row is rows[1] or torch.equal(found[row.slide_id], tiles)


class TestTraining:
    """A slide larger than memory is read during training, and may fail then."""

    @pytest.fixture
    def broken(self, tmp_path):
        """Return the command to fit a cohort whose slide s1 (train) was indexed and then lost."""
        config = write_cohort(tmp_path, on_error="skip")
        text = yaml.safe_load(config.read_text())
        text["trainer"]["max_epochs"] = 1
        config.write_text(yaml.safe_dump(text))
        assert main(["index", "--config", str(config)]) == 0
        path = tmp_path / "slides" / "s1.svs"
        path.write_bytes(path.read_bytes()[:300] + bytes(path.stat().st_size - 300))
        stamp(path)
        return ["fit", "--config", str(config)]

    def test_what_breaks_in_the_first_pass_is_left_out_whole(self, broken, tmp_path):
        """The run equals that of a cohort in memory, where the slide failed before it was a bag."""
        assert main([*broken, "--name", "memory"]) == 0
        assert main([*broken, "--name", "reread", "--data.host_gb", "0"]) == 0
        runs = tmp_path / "runs"
        for file in ("metrics.csv", "best.safetensors", "skipped.json"):
            one, other = ((runs / name / file).read_bytes() for name in ("memory", "reread"))
            assert one[-10_000:] == other[-10_000:]  # the header names the run's command
        assert "s1" in (runs / "reread" / "skipped.json").read_text()

    def test_what_breaks_in_the_second_pass_stops_the_run(self, tmp_path, monkeypatch, capsys):
        config, whole, passes = write_cohort(tmp_path, on_error="skip"), SlideTiles.split, []

        def split(self, size):
            passes.append(self)
            if passes.count(self) == 2 and self.on_fault:
                self.on_fault(UnreadableRegionError("s1: bad bytes, the second time"))
            return whole(self, size)

        monkeypatch.setattr(SlideTiles, "split", split)
        assert main(["fit", "--config", str(config), "--data.host_gb", "0"]) == 2
        assert "s1: bad bytes, the second time" in capsys.readouterr().err
