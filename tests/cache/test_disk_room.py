"""The cache stays within its budget, keeps caches in use, and survives a kill at any moment.

Writers are real processes, and are killed for real, at moments spread over their work.
"""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slides.cache import tiles as cache
from slides.cache.cohort import cache_cohort
from slides.cache.disk_room import CacheLock, make_room
from slides.cache.tiles import CachedSlide, build_cache, cache_path
from slides.errors import IndexFileError
from slides.streaming.chunks import read_tiles
from slides.streaming.tile_source import TileSource
from slides.tiling.index import index_path, write_index
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tapfm import config
from tests.sources import Source, expected_tiles, make_index, make_row

TILES = 101
FORK = multiprocessing.get_context("fork")
MIB = 1 << 20


def built(folder, *names, tiles=TILES):
    """Return the indexes and paths of caches, used in this order."""
    indexes = [make_index(tiles, slide_id=name) for name in names]
    for age, index in enumerate(indexes):
        path = build_cache(Source(), index, folder)
        os.utime(path, (1e9 + age, 1e9 + age))
    return indexes, [cache_path(folder, index) for index in indexes]


def bytes_of(path):
    return sum(each.stat().st_size for each in path.rglob("*"))


def there(paths):
    return [path.name[0] for path in paths if path.exists()]


class TestRoom:
    def test_the_longest_unused_goes_first_and_no_more_than_must(self, tmp_path):
        indexes, paths = built(tmp_path, "a", "b", "c", "d")
        size = bytes_of(paths[0])
        with CachedSlide(tmp_path, indexes[0]):
            pass  # now a is the one used last
        make_room(tmp_path, 4 * size)
        assert there(paths) == ["a", "b", "c", "d"]
        make_room(tmp_path, int(2.5 * size))
        assert there(paths) == ["a", "d"]
        make_room(tmp_path, 0)
        assert there(paths) == []
        assert not list(paths[0].parent.iterdir())

    def test_what_is_kept_or_read_stays(self, tmp_path):
        indexes, paths = built(tmp_path, "a", "b", "c")
        slide = CachedSlide(tmp_path, indexes[0])
        make_room(tmp_path, 0, keep=[paths[1]])
        assert there(paths) == ["a", "b"]
        np.testing.assert_array_equal(read_tiles(slide, indexes[0]), expected_tiles(indexes[0]))
        slide.close()
        make_room(tmp_path, 0)
        assert there(paths) == []

    def test_a_reader_in_another_process_counts_until_it_dies(self, tmp_path):
        indexes, paths = built(tmp_path, "a")
        ours, theirs = FORK.Pipe()
        reader = FORK.Process(target=_read_and_wait, args=(tmp_path, indexes[0], theirs))
        reader.start()
        assert ours.recv() == "reading"
        make_room(tmp_path, 0)
        assert there(paths) == ["a"]
        os.kill(reader.pid, signal.SIGKILL)
        reader.join()
        make_room(tmp_path, 0)
        assert there(paths) == []

    def test_a_forgotten_slide_lets_go(self, tmp_path):
        indexes, paths = built(tmp_path, "a")
        CachedSlide(tmp_path, indexes[0]).read(0, 0, indexes[0].grid)
        make_room(tmp_path, 0)
        assert there(paths) == []

    def test_a_cache_that_went_is_no_cache(self, tmp_path):
        indexes, paths = built(tmp_path, "a")
        make_room(tmp_path, 0)
        with pytest.raises(IndexFileError, match="there is no tile cache"):
            CachedSlide(tmp_path, indexes[0])
        with pytest.raises(FileNotFoundError):
            CacheLock(paths[0])


def _read_and_wait(folder, index, pipe):
    slide = CachedSlide(folder, index)
    slide.read(0, 0, index.grid)
    pipe.send("reading")
    time.sleep(60)


class SlowSource(Source):
    """A slide that reads slowly, so that a kill can hit it."""

    def read(self, x0, y0, grid):
        time.sleep(0.0002)
        return super().read(x0, y0, grid)


class TestProcesses:
    @pytest.fixture(autouse=True)
    def small_shards(self, monkeypatch):
        monkeypatch.setattr(cache, "SHARD", 2 * cache.CHUNK)

    def test_a_writer_killed_at_any_moment_leaves_all_or_nothing(self, tmp_path):
        """This includes the replacement of an outdated cache."""
        old, new = make_index(TILES), replace(make_index(TILES), fingerprint="1009:second")
        whole = left = 0
        for turn in range(24):
            index = (old, new)[turn % 2]
            writer = FORK.Process(target=build_cache, args=(SlowSource(), index, tmp_path))
            writer.start()
            time.sleep(0.02 + 0.006 * turn)
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
            left += len(list(cache_path(tmp_path, index).parent.glob(".*"))) > 0
            for each in (old, new):
                try:
                    slide = CachedSlide(tmp_path, each)
                except ValueError:  # none, or of the other index: refused
                    continue
                np.testing.assert_array_equal(read_tiles(slide, each), expected_tiles(each))
                whole += 1
        assert left > 3, "some kills must have come in the middle"
        build_cache(Source(), new, tmp_path)
        np.testing.assert_array_equal(
            read_tiles(CachedSlide(tmp_path, new), new), expected_tiles(new)
        )
        assert [p.name for p in cache_path(tmp_path, new).parent.iterdir()] == ["slide.a.zarr"]

    def test_two_writers_of_one_slide_both_succeed(self, tmp_path):
        index = make_index(TILES)
        for _ in range(4):
            writers = [
                FORK.Process(target=build_cache, args=(SlowSource(), index, tmp_path))
                for _ in range(3)
            ]
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
            assert [writer.exitcode for writer in writers] == [0, 0, 0]
            slide = CachedSlide(tmp_path, index)
            np.testing.assert_array_equal(read_tiles(slide, index), expected_tiles(index))
            assert [p.name for p in slide.path.parent.iterdir()] == ["slide.a.zarr"]
            slide.close()
            make_room(tmp_path, 0)

    def test_writing_and_removing_at_once(self, tmp_path):
        """A reader gets correct pixels or no cache, whatever other processes do."""
        index, stop = make_index(TILES), FORK.Event()
        others = [
            FORK.Process(target=_again, args=(stop, build_cache, Source(), index, tmp_path)),
            FORK.Process(target=_again, args=(stop, make_room, tmp_path, 0)),
        ]
        for other in others:
            other.start()
        read, until = 0, time.monotonic() + 60
        try:
            while read < 20 and time.monotonic() < until:
                try:
                    slide = CachedSlide(tmp_path, index)
                except IndexFileError:
                    continue
                with slide:
                    np.testing.assert_array_equal(read_tiles(slide, index), expected_tiles(index))
                read += 1
        finally:
            stop.set()
            for other in others:
                other.join()
        assert read == 20
        assert [other.exitcode for other in others] == [0, 0]


def _again(stop, do, *arguments):
    while not stop.is_set():
        do(*arguments)


class TestCohort:
    """Within a budget the first slides are cached and the others read: with the same pixels."""

    @pytest.fixture
    def cohort(self, small_slide, tmp_path):
        from slides.grid import Grid
        from slides.tiling.index import index_cohort

        grid, tissue = Grid(61, 0.5), Tissue(min_fraction=0.1)
        rows = [
            replace(make_row(n), slide_id=name, path=small_slide(f"{name}.tif", seed=n))
            for n, name in enumerate("abc")
        ]
        index_cohort(rows, tmp_path / "index", grid, tissue, progress=False)
        return rows, tmp_path / "index", grid, tissue

    def test_what_does_not_fit_is_read_from_its_file(self, cohort, tmp_path):
        rows, index_dir, grid, tissue = cohort
        tile_source = TileSource(index_dir, tmp_path / "cache", grid, tissue, cache_gb=1.0)
        sizes = [len(tile_source.index(row)) * 61 * 61 * 3 for row in rows]
        budget = sizes[0] + sizes[1] + 1
        failed = cache_cohort(
            rows, index_dir, tmp_path / "cache", grid, tissue, progress=False, budget=budget
        )
        assert failed == {}
        kinds = []
        for row in rows:
            source, index = tile_source(row)
            kinds.append(type(source))
            with source, Slide(row.path) as slide:
                np.testing.assert_array_equal(read_tiles(source, index), read_tiles(slide, index))
        assert kinds == [CachedSlide, CachedSlide, Slide]
        with pytest.raises(IndexFileError, match="c: there is no tile cache"):
            replace(tile_source, cache_gb=None)(rows[2])

    def test_another_cohorts_caches_make_room_and_ones_own_stay(self, cohort, tmp_path):
        rows, index_dir, grid, tissue = cohort
        folder = tmp_path / "cache"
        other = make_index(4001, slide_id="z")
        write_index(index_path(index_dir, other.grid, "z"), other, tissue)
        theirs = build_cache(Source(), other, folder)
        run = lambda budget: cache_cohort(  # noqa: E731
            rows, index_dir, folder, grid, tissue, progress=False, budget=budget
        )
        run(100 * MIB)
        assert theirs.exists()
        made = [path.stat().st_mtime_ns for path in sorted(folder.glob(f"{grid.tag}/*.zarr"))]
        assert len(made) == 3
        run(
            sum(len(TileSource(index_dir, None, grid, tissue).index(r)) for r in rows) * 61 * 61 * 3
        )
        assert not theirs.exists()
        again = [path.stat().st_mtime_ns for path in sorted(folder.glob(f"{grid.tag}/*.zarr"))]
        assert again == made


@pytest.mark.parametrize(("folder", "limit"), [(None, 5.0), ("cache", 0.0), ("cache", -1.0)])
def test_a_limit_goes_with_a_folder(folder, limit):
    folder = folder and Path(folder)
    with pytest.raises(config.SettingsError, match=r"data\.cache_gb is .* Give both, or neither"):
        config.Source((), Path("index"), folder, config.TileSettings(), "stop", 0, None, limit)
