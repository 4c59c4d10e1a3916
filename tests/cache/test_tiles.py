"""A cached slide gives exactly the slide's tiles, or an error that says why it cannot.

The cache only saves work. It never returns other tiles or another slide's, not after a run that was
killed half-way and not after one of its files was lost.
"""

import os
import pickle
import signal
from dataclasses import replace

import numpy as np
import pytest

from slides.cache import tiles as cache
from slides.cache.cohort import cache_cohort
from slides.cache.tiles import CHUNK, CachedSlide, build_cache, cache_path
from slides.errors import IndexFileError, IndexSettingsError, UnreadableRegionError
from slides.grid import Grid
from slides.streaming.chunks import read_tiles
from slides.streaming.prefetch import stream_chunks
from slides.tiling.index import index_cohort, index_path, read_index
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tests.sources import SIZE, Source, expected_tiles, make_index, make_row, tile_at

TILES = 37  # prime, and more than two chunks


SHARD = 2 * CHUNK


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Put two chunks in a file, so that a few tiles make two files."""
    monkeypatch.setattr(cache, "SHARD", SHARD)


@pytest.fixture
def built(tmp_path):
    index = make_index(TILES)
    build_cache(Source(), index, tmp_path)
    return tmp_path, index


@pytest.mark.parametrize("tiles", [1, CHUNK - 1, CHUNK, CHUNK + 1, SHARD, TILES, 2 * SHARD + 1])
def test_pixels_are_the_slides(tmp_path, tiles):
    index = make_index(tiles)
    build_cache(Source(), index, tmp_path)
    got = read_tiles(CachedSlide(tmp_path, index), index).numpy()
    np.testing.assert_array_equal(got, expected_tiles(index))


def test_the_parity_test_can_fail(built):
    cache_dir, index = built
    rows = np.arange(TILES)[::-1]
    got = read_tiles(CachedSlide(cache_dir, index), index, rows).numpy()
    assert not np.array_equal(got, expected_tiles(index))
    np.testing.assert_array_equal(got, expected_tiles(index, rows))


def test_a_tile_is_the_callers_to_keep(built):
    slide = CachedSlide(*built)
    first = slide.read(0, 0, built[1].grid)
    first[:] = 0  # the chunk it came from is still in memory
    np.testing.assert_array_equal(slide.read(0, 0, built[1].grid), tile_at(0, 0))


def test_it_works_in_workers_and_after_pickling(built):
    cache_dir, index = built
    slide = CachedSlide(cache_dir, index)
    slide.read(0, 0, index.grid)  # opened here first: zarr keeps a thread that no fork inherits
    tiles = np.concatenate([part.numpy() for _, part in stream_chunks(slide, index, 5, 2)])
    np.testing.assert_array_equal(tiles, expected_tiles(index))
    again = pickle.loads(pickle.dumps(slide))
    np.testing.assert_array_equal(again.read(SIZE, 0, index.grid), tile_at(SIZE, 0))


def test_a_closed_slide_opens_again(built):
    with CachedSlide(*built) as slide:
        slide.read(0, 0, built[1].grid)
    np.testing.assert_array_equal(slide.read(0, 0, built[1].grid), tile_at(0, 0))


def test_a_cache_of_the_same_tiles_is_kept(built):
    source = Source()
    build_cache(source, built[1], built[0])
    assert source.reads.value == 0


CHANGES = {
    "coords0_sha256": lambda index: replace(index, coords0=index.coords0[:, ::-1].copy()),
    "tiles": lambda index: replace(index, coords0=index.coords0[:-1]),
    "slide_mpp": lambda index: replace(index, slide_mpp=0.51),
    "size0": lambda index: replace(index, size0=6),
    "slide": lambda index: replace(index, fingerprint="1009:second"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_cache_of_other_tiles_is_refused_then_rebuilt(built, name):
    cache_dir, index = built
    other = CHANGES[name](index)
    with pytest.raises(IndexSettingsError, match=rf"slide\.a: .* made with {name} = "):
        CachedSlide(cache_dir, other)
    source = Source()
    build_cache(source, other, cache_dir)
    assert source.reads.value == len(other.coords0)
    got = read_tiles(CachedSlide(cache_dir, other), other).numpy()
    np.testing.assert_array_equal(got, expected_tiles(other))
    assert [path.name for path in cache_path(cache_dir, index).parent.iterdir()] == ["slide.a.zarr"]


def test_grids_of_one_magnification_share_a_folder_but_never_a_cache(built):
    """The folder's name rounds 10 / mpp; the settings inside do not."""
    cache_dir, index = built
    near = replace(index, grid=Grid(SIZE, 0.5 + 1e-9))
    assert cache_path(cache_dir, near) == cache_path(cache_dir, index)
    with pytest.raises(IndexSettingsError, match="mpp"):
        CachedSlide(cache_dir, near)


@pytest.mark.parametrize("corner", [(1, 0), (0, 10_000)])
def test_a_tile_that_is_not_in_the_index_is_refused(built, corner):
    with pytest.raises(IndexSettingsError, match=r"slide\.a: no tile at .* holds the 37 tiles"):
        CachedSlide(*built).read(*corner, built[1].grid)


def test_another_grid_is_refused(built):
    with pytest.raises(IndexSettingsError, match=r"mpp=0\.25"):
        CachedSlide(*built).read(0, 0, Grid(SIZE, 0.25))


def test_no_cache_is_an_error_that_says_so(tmp_path):
    with pytest.raises(IndexFileError, match=r"slide\.a: there is no tile cache at .*Build it"):
        CachedSlide(tmp_path, make_index(TILES))


class TestCohort:
    """Real files: the cache gives what the real reader reads."""

    GRID, TISSUE = Grid(61, 0.5), Tissue(min_fraction=0.1)

    @pytest.fixture
    def rows(self, tmp_path):
        """Return three slides of noise that looks like tissue, and their index."""
        tifffile = pytest.importorskip("tifffile")
        rows = []
        for number in range(3):
            random = np.random.default_rng(number)
            pixels = random.normal((170, 90, 150), 25, (331, 449, 3)).clip(0, 255).astype(np.uint8)
            path = tmp_path / f"s{number}.tif"
            tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb")
            rows.append(replace(make_row(number), path=path, slide_id=f"s{number}", mpp=0.5))
        index_cohort(rows, tmp_path, self.GRID, self.TISSUE, progress=False)
        return rows

    def cache(self, rows, folder, **options):
        options = {"progress": False} | options
        return cache_cohort(rows, folder, folder, self.GRID, self.TISSUE, **options)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_pixels_are_the_readers(self, rows, tmp_path, workers):
        assert self.cache(rows, tmp_path, workers=workers) == {}
        for row in rows:
            path = index_path(tmp_path, self.GRID, row.slide_id)
            index = read_index(path, self.GRID, self.TISSUE)
            assert len(index) > CHUNK
            with Slide(row.path, mpp=row.mpp, name=row.slide_id) as slide:
                expected = read_tiles(slide, index)
            cached = CachedSlide(tmp_path, index)
            np.testing.assert_array_equal(read_tiles(cached, index), expected)

    def test_a_fault_stops_or_is_skipped(self, rows, tmp_path):
        index_path(tmp_path, self.GRID, "s1").unlink()
        with pytest.raises(IndexFileError, match="s1"):
            self.cache(rows, tmp_path)
        failed = self.cache(rows, tmp_path, on_error="skip")
        assert list(failed) == ["s1"]
        assert "s1" in failed["s1"]

    def test_a_full_disk_always_stops(self, rows, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache, "_write", full)
        with pytest.raises(IndexFileError, match=r"s0: .*No space left"):
            self.cache(rows, tmp_path, on_error="skip")


class TestDamage:
    def files(self, built):
        folder = cache_path(*built) / "tiles"
        return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix == "")

    def test_a_lost_file_is_no_black_tile(self, built):
        """zarr silently gives its fill value for a missing chunk."""
        files = self.files(built)
        assert len(files) == 2
        files[1].unlink()
        slide = CachedSlide(*built)
        slide.read(0, 0, built[1].grid)
        with pytest.raises(UnreadableRegionError, match=r"fails its checksum.*Delete it"):
            slide.read(*built[1].coords0[SHARD].tolist(), built[1].grid)

    @pytest.mark.parametrize("at", [4, 20, -20])  # header and body of the compressed chunk
    def test_a_flipped_byte_is_noticed(self, built, at):
        file = self.files(built)[0]
        data = bytearray(file.read_bytes())
        data[at] ^= 0xFF
        file.write_bytes(data)
        with pytest.raises(UnreadableRegionError, match=r"slide\.a: the tile cache .* is damaged"):
            read_tiles(CachedSlide(*built), built[1], slice(CHUNK))

    def test_a_truncated_file_is_noticed(self, built):
        file = self.files(built)[0]
        file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(UnreadableRegionError, match="is damaged"):
            CachedSlide(*built).read(0, 0, built[1].grid)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"attributes": {"cache": 3}}', "\x00"])
    def test_damaged_settings_are_refused_then_rebuilt(self, built, text):
        (cache_path(*built) / "zarr.json").write_text(text)
        with pytest.raises(IndexFileError, match=r"slide\.a: the tile cache .* is damaged"):
            CachedSlide(*built)
        build_cache(Source(), built[1], built[0])
        assert len(read_tiles(CachedSlide(*built), built[1])) == TILES

    def test_lost_arrays_are_noticed(self, built):
        (cache_path(*built) / "crc32" / "zarr.json").unlink()
        with pytest.raises(UnreadableRegionError, match="cannot be opened"):
            CachedSlide(*built).read(0, 0, built[1].grid)


class TestWriting:
    def left(self, tmp_path):
        return [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_a_full_disk_is_named_and_leaves_nothing(self, tmp_path, monkeypatch):
        def full(partial, slide, index):
            partial.mkdir()
            (partial / "half").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache, "_write", full)
        with pytest.raises(IndexFileError, match=r"slide\.a: .*No space left.*Free some disk"):
            build_cache(Source(), make_index(TILES), tmp_path)
        assert self.left(tmp_path) == []

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(IndexFileError, match=r"slide\.a: its tile cache cannot be written"):
            build_cache(Source(), make_index(TILES), tmp_path / "file")

    def test_a_broken_slide_leaves_nothing(self, tmp_path):
        index = make_index(TILES)
        with pytest.raises(UnreadableRegionError, match="bad bytes"):
            build_cache(Source(tuple(index.coords0[20].tolist())), index, tmp_path)
        assert self.left(tmp_path) == []

    def test_the_slides_disk_is_not_taken_for_the_caches(self, tmp_path):
        with pytest.raises(UnreadableRegionError, match="the slide cannot be read"):
            build_cache(Source((0, 0), OSError(5, "I/O error")), make_index(TILES), tmp_path)

    def test_a_killed_build_is_never_taken_for_whole_and_is_cleared(self, tmp_path):
        index = make_index(TILES)
        child = os.fork()
        if not child:
            build_cache(Source(die_at=tuple(index.coords0[20].tolist())), index, tmp_path)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert self.left(tmp_path)  # half a cache, under another name
        with pytest.raises(IndexFileError, match="there is no tile cache"):
            CachedSlide(tmp_path, index)
        build_cache(Source(), index, tmp_path)
        assert [path.name for path in cache_path(tmp_path, index).parent.iterdir()] == [
            "slide.a.zarr"
        ]

    def test_memory_is_one_shard(self, tmp_path, monkeypatch):
        """Counts tiles that are read but not yet written, at each write of the slide's array."""
        import zarr

        source, ahead = Source(), []
        write = zarr.Array.__setitem__

        def spy(array, key, value):
            if getattr(value, "ndim", 0) == 4:
                ahead.append(source.reads.value - key.start)
            write(array, key, value)

        monkeypatch.setattr(zarr.Array, "__setitem__", spy)
        build_cache(source, make_index(TILES), tmp_path)
        assert ahead == [SHARD, TILES - SHARD]
