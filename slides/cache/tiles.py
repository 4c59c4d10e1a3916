"""Decoded tiles on disk, one zarr array per slide, for slides that are read many times.

`build_cache` reads every tile of an index once; `CachedSlide` then returns them through the same
`read` as `reader.Slide`, pixel for pixel. It pays off if decoding is slow: a 40x scan read at 20x
takes about 5 ms a tile, the cache 0.2 ms in order and 2 ms at random.

    <dir>/<20x_224px_0px_overlap>/<slide_id>.zarr/     tiles (T, S, S, 3) uint8, crc32 (T,)

A cache is written under a temporary name and renamed when complete, so a killed run or a full disk
leaves no partial cache, and two processes may build the same one at once. A hash binds it to its
tiles: a cache of another index is refused. Each tile has a checksum, since zarr returns black
pixels for a lost file. With a budget, other cohorts' caches are removed, least recently used first
and never one in use (`slides.cache.disk_room`); slides that do not fit are read from their files.

Price: 147 kB of disk a 224 px H&E tile (lz4 compresses tissue little, but is 4 to 10 times faster
to read than zstd for 8 % more disk), in files of 256 tiles; 39 MB of memory to build one, 2.4 MB
a slide in use.

Shapes: T tiles of a slide, C tiles of a chunk, S side of a tile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import zlib
from pathlib import Path

import numpy as np

from slides.cache.disk_room import lock_if_possible, put_in_place, remove_leftovers, scratch
from slides.errors import IndexFileError, IndexSettingsError, UnreadableRegionError
from slides.grid import Grid
from slides.tiling.index_file import TileIndex

CHUNK = 16  # tiles compressed together: 2.4 MB, one disk read of under 1 ms
SHARD = 256  # tiles per file, so that a cohort is thousands of files and not a million
VERSION = 2  # version of this layout


def cache_path(cache_dir: Path, index: TileIndex) -> Path:
    """Return the path of an index's cache, whether it exists or not."""
    return Path(cache_dir) / index.grid.tag / f"{index.slide_id}.zarr"


def build_cache(slide, index: TileIndex, cache_dir: Path) -> Path:
    """Read all tiles of the index and write them; keep a cache of the same tiles.

    Args:
        slide: anything with `read(x0, y0, grid)`.
        index: the tiles.
        cache_dir: created if missing. `SHARD` tiles are in memory at a time.

    Raises:
        IndexFileError: the cache cannot be written; nothing is left behind.
        SlideError: a tile cannot be read; nothing is left behind.
    """
    path = cache_path(cache_dir, index)
    remove_leftovers(path)
    with contextlib.suppress(IndexFileError, IndexSettingsError):
        _check(path, index)
        return path
    partial = scratch(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(partial, slide, index)
        put_in_place(partial, path)
    except OSError as error:
        raise IndexFileError(
            f"{index.slide_id}: its tile cache cannot be written to {path} ({error}). Free some "
            f"disk (it takes up to {len(index.coords0) * index.grid.size**2 * 3 / 1e9:.1f} GB), "
            "give another folder, or run without a cache."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


class CachedSlide:
    """The tiles of one slide, read from its cache; opened at the first `read`. Pickles."""

    def __init__(self, cache_dir: Path, index: TileIndex):
        """Check that the cache in `cache_dir` exists and has the tiles of `index`.

        Raises:
            IndexFileError: there is no cache, or it is damaged.
            IndexSettingsError: it has other tiles than the index, or another slide's.
        """
        self.path, self.name, self.index = cache_path(cache_dir, index), index.slide_id, index
        self._forget()
        try:
            self._lock = lock_if_possible(self.path)
        except FileNotFoundError:
            raise _no_cache(self.path, index) from None
        _check(self.path, index)

    def read(self, x0: int, y0: int, grid: Grid) -> np.ndarray:
        """Return the tile at (x0, y0), uint8 (S, S, 3); it must be one of the index's.

        Raises:
            IndexSettingsError: the grid or the corner is not in the index.
            UnreadableRegionError: the cache is damaged here.
        """
        self._open()
        row = self._row_of.get((x0, y0)) if grid == self.index.grid else None
        if row is None:
            raise IndexSettingsError(
                f"{self.name}: no tile at ({x0}, {y0}) on {grid} in the cache {self.path}, which "
                f"holds the {len(self.index.coords0)} tiles of its index on {self.index.grid}. "
                "Ask for tiles of the index, or read the slide itself."
            )
        number = row // CHUNK
        if number != self._chunk_number:  # tiles are read in order: the next is mostly here too
            self._chunk_CSS = self._read_chunk(number)
            self._chunk_number = number
        tile = self._chunk_CSS[row % CHUNK]
        if zlib.crc32(tile) != self._crc32_T[row]:
            raise self._damaged(f"the tile at ({x0}, {y0}) fails its checksum")
        return tile.copy()  # the chunk is dropped when the next one is read

    def close(self) -> None:
        """Release memory and lock; the next `read` opens the cache again."""
        self._forget()

    def __enter__(self) -> CachedSlide:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {"path": self.path, "name": self.name, "index": self.index}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._lock = None  # releases itself
        self._tiles = self._crc32_T = self._row_of = None
        self._chunk_number = self._chunk_CSS = None

    def _open(self) -> None:
        if self._tiles is not None:
            return  # also after a fork: zarr keeps no file open and restarts its thread
        import zarr  # here: its import takes longer than that of all of `slides`

        try:
            self._lock = self._lock or lock_if_possible(self.path)
            group = zarr.open_group(self.path, mode="r")
            self._tiles, self._crc32_T = group["tiles"], group["crc32"][:]
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise self._damaged(f"it cannot be opened ({error})") from error
        corners = map(tuple, self.index.coords0.tolist())
        self._row_of = {corner: row for row, corner in enumerate(corners)}

    def _read_chunk(self, number: int) -> np.ndarray:
        try:
            return self._tiles[number * CHUNK : (number + 1) * CHUNK]
        except (OSError, ValueError, RuntimeError) as error:
            raise self._damaged(f"chunk {number} cannot be decoded ({error})") from error

    def _damaged(self, what: str) -> UnreadableRegionError:
        return UnreadableRegionError(
            f"{self.name}: the tile cache {self.path} is damaged: {what}. Delete it; it is made "
            "again from the slide."
        )


def _write(partial: Path, slide, index: TileIndex) -> None:
    import zarr
    from zarr.codecs import BloscCodec

    tiles, size = len(index.coords0), index.grid.size
    chunk = min(CHUNK, max(tiles, 1))
    shard = -(-min(SHARD, max(tiles, 1)) // chunk) * chunk
    group = zarr.create_group(partial, attributes={"cache": _key(index)})
    array = group.create_array(
        "tiles",
        shape=(tiles, size, size, 3),
        chunks=(chunk, size, size, 3),
        shards=(shard, size, size, 3),
        dtype="uint8",
        compressors=BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle"),
    )
    crc32_T = np.zeros(tiles, np.uint32)
    for start in range(0, tiles, shard):
        corners = index.coords0[start : start + shard].tolist()
        try:
            tiles_CSS = np.stack([slide.read(x0, y0, index.grid) for x0, y0 in corners])
        except OSError as error:  # the slide's disk, not the cache's
            raise UnreadableRegionError(
                f"{index.slide_id}: the slide cannot be read ({error}). Check that its file is "
                "there and readable, or leave the slide out."
            ) from error
        crc32_T[start : start + shard] = [zlib.crc32(np.ascontiguousarray(t)) for t in tiles_CSS]
        array[start : start + len(tiles_CSS)] = tiles_CSS
    group.create_array("crc32", data=crc32_T)


def _key(index: TileIndex) -> dict:
    """Return the facts about an index that its cache must match."""
    return {
        "version": VERSION,
        "slide_id": index.slide_id,
        "slide": index.fingerprint,  # detects another file under the same name
        "slide_mpp": float(index.slide_mpp),
        "size": index.grid.size,
        "mpp": index.grid.mpp,
        "size0": int(index.size0),
        "tiles": len(index.coords0),
        "coords0_sha256": hashlib.sha256(index.coords0.astype("<i8").tobytes()).hexdigest(),
    }


def _no_cache(path: Path, index: TileIndex) -> IndexFileError:
    return IndexFileError(
        f"{index.slide_id}: there is no tile cache at {path}. Build it, or run without one."
    )


def _check(path: Path, index: TileIndex) -> None:
    try:
        found = json.loads((path / "zarr.json").read_text())["attributes"]["cache"]
        found = {name: found.get(name) for name in _key(index)}
    except FileNotFoundError:
        raise _no_cache(path, index) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexFileError(
            f"{index.slide_id}: the tile cache {path} is damaged ({error}). Delete it; it is made "
            "again from the slide."
        ) from error
    for name, wanted in _key(index).items():
        if found[name] != wanted:
            raise IndexSettingsError(
                f"{index.slide_id}: the tile cache {path} was made with {name} = {found[name]}, "
                f"but {wanted} is requested. Build it again, or request what it has."
            )
