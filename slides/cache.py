"""Decoded tiles on disk, for slides that are read many times: a zarr array a slide.

`build_cache` reads every tile of an index once; `CachedSlide` then gives them back through the same
`read` as `reader.Slide`, pixel for pixel, so nothing that reads tiles can tell the two apart. It
pays where decoding is dear: a 40x scan read at 20x costs some 5 ms a tile, the cache 0.2 to 0.8 ms.

    <dir>/<20x_224px_0px_overlap>/<slide_id>.zarr/     tiles (T, S, S, 3) uint8, crc32 (T,)

A cache is written under another name and renamed when whole, so a run that is killed or a disk that
is full leaves nothing that could be taken for one. It is bound by a hash to the tiles it was made
from: a cache of another index is refused, never used. Each tile carries a checksum, since zarr
gives black pixels for a chunk file that was lost.

Price: 147 kB of disk a 224 px H&E tile (lz4 finds little to squeeze in tissue, and is 4 to 10
times faster to read than zstd for 8 % more disk); 2.4 MB of memory a slide in use.

Shapes: T tiles of a slide, C tiles of a chunk, S side of a tile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import zlib
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from slides.errors import IndexFileError, IndexSettingsError, SlideError, UnreadableRegionError
from slides.grid import Grid
from slides.index import TileIndex, index_path, read_index
from slides.reader import Slide
from slides.tissue import Tissue

CHUNK = 16  # tiles a file: 2.4 MB, one disk read; reading one tile of it alone takes under 1 ms
VERSION = 1  # of this layout


def cache_path(cache_dir: Path, index: TileIndex) -> Path:
    """Where the cache of an index lies, whether it exists or not."""
    return Path(cache_dir) / index.grid.tag / f"{index.slide_id}.zarr"


def build_cache(slide, index: TileIndex, cache_dir: Path) -> Path:
    """Read all tiles of the index and keep them; a cache of the same tiles is left as it is.

    Args:
        slide: anything with `read(x0, y0, grid)`.
        index: the tiles.
        cache_dir: made if absent. One chunk of tiles is in memory at a time.

    Raises:
        IndexFileError: the cache cannot be written; nothing is left behind.
        SlideError: a tile cannot be read; nothing is left behind.
    """
    path = cache_path(cache_dir, index)
    with contextlib.suppress(IndexFileError, IndexSettingsError):
        _check(path, index)
        return path
    host = f"{socket.gethostname()}-"
    partial = path.with_name(f".{path.name}.{host}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path, host)
        _write(partial, slide, index)
        if path.exists():  # an outdated one: a folder that is not empty cannot be replaced
            outdated = partial.with_name(partial.name + ".outdated")
            path.rename(outdated)
            partial.rename(path)
            shutil.rmtree(outdated, ignore_errors=True)
        else:
            partial.rename(path)
    except OSError as error:
        raise IndexFileError(
            f"{index.slide_id}: its tile cache cannot be written to {path} ({error}). Free some "
            f"disk (it takes up to {len(index.coords0) * index.grid.size**2 * 3 / 1e9:.1f} GB), "
            "give another folder, or run without a cache."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def cache_cohort(
    rows: Iterable,
    index_dir: Path,
    cache_dir: Path,
    grid: Grid,
    tissue: Tissue,
    workers: int = 0,
    on_error: str = "stop",
    progress: bool = True,
) -> dict[str, str]:
    """Cache every slide of a cohort that has been indexed; caches that are right are kept.

    Args:
        rows: slides: anything with `slide_id`, `path` and `mpp`.
        index_dir: where their indexes lie.
        cache_dir: where the caches go.
        grid: as the slides were indexed.
        tissue: as the slides were indexed.
        workers: processes; 0 reads in this one.
        on_error: `stop` raises the first slide's fault, `skip` goes on. A cache that cannot be
            written always stops: the next slide would find the same disk.
        progress: show a bar.

    Returns:
        The slides that failed, each with its reason.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be stop or skip, got {on_error!r}")
    from tqdm import tqdm

    jobs = [(row.slide_id, row.path, row.mpp, index_dir, cache_dir, grid, tissue) for row in rows]
    failed = {}
    with contextlib.ExitStack() as stack:
        outcomes = map(_cache_one, jobs)
        if workers:
            context = multiprocessing.get_context("spawn")  # open slides must not be forked
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))
            stack.callback(pool.shutdown, cancel_futures=True)  # after a fault, begin no more
            outcomes = pool.map(_cache_one, jobs)
        bar = tqdm(outcomes, "cache", len(jobs), unit="slide", disable=not progress)
        for (slide_id, *_), (fault, is_disk) in zip(jobs, bar, strict=True):
            if fault and (on_error == "stop" or is_disk):
                raise fault
            if fault:
                failed[slide_id] = str(fault)
    return failed


def _cache_one(job: tuple) -> tuple[SlideError | None, bool]:
    """The slide's fault if any, and whether the cache's own disk is to blame."""
    slide_id, path, mpp, index_dir, cache_dir, grid, tissue = job
    writing = False
    try:
        index = read_index(index_path(index_dir, grid, slide_id), grid, tissue)
        with Slide(path, mpp=mpp, name=slide_id) as slide:
            writing = True
            build_cache(slide, index, cache_dir)
    except SlideError as fault:
        return fault, writing and isinstance(fault, IndexFileError)
    return None, False


class CachedSlide:
    """The tiles of one slide, read from its cache. Pickles; opened at the first `read`."""

    def __init__(self, cache_dir: Path, index: TileIndex, slide_path: Path | None = None):
        """Check that the cache is there and is of these tiles.

        Args:
            cache_dir: as given to `build_cache`.
            index: the tiles that will be asked for.
            slide_path: the slide's file, to notice that it was exchanged; it may be away.

        Raises:
            IndexFileError: there is no cache, or it is damaged.
            IndexSettingsError: it holds other tiles than those of the index, or of another slide.
        """
        self.path, self.name, self.index = cache_path(cache_dir, index), index.slide_id, index
        _check(self.path, index)
        if slide_path is not None and Path(slide_path).is_file():
            found = Path(slide_path).stat().st_size
            if found != index.slide_bytes:
                raise IndexSettingsError(
                    f"{self.name}: its file {slide_path} has {found} bytes, the one that was "
                    f"indexed and cached had {index.slide_bytes}. Index and cache it again."
                )
        self._forget()

    def read(self, x0: int, y0: int, grid: Grid) -> np.ndarray:
        """The tile at (x0, y0), uint8 (S, S, 3); one of those in the index.

        Raises:
            IndexSettingsError: the grid or the corner is not of the index.
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
        if number != self._chunk_number:  # tiles come in order, so the next is mostly in it too
            self._chunk_CSS = self._read_chunk(number)
            self._chunk_number = number
        tile = self._chunk_CSS[row % CHUNK]
        if zlib.crc32(tile) != self._crc32_T[row]:
            raise self._damaged(f"the tile at ({x0}, {y0}) fails its checksum")
        return tile.copy()  # the caller's to keep; the chunk goes when the next one is read

    def close(self) -> None:
        """Let go of memory; the next `read` opens the cache again."""
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
        self._tiles = self._crc32_T = self._row_of = None
        self._chunk_number = self._chunk_CSS = None

    def _open(self) -> None:
        if self._tiles is not None:
            return  # also after a fork: zarr keeps no file open, and mends its own thread
        import zarr  # here: it takes longer to import than the rest of slides together

        try:
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
            "anew from the slide."
        )


def _write(partial: Path, slide, index: TileIndex) -> None:
    import zarr
    from zarr.codecs import BloscCodec

    tiles, size = len(index.coords0), index.grid.size
    group = zarr.create_group(partial, attributes={"cache": _key(index)})
    array = group.create_array(
        "tiles",
        shape=(tiles, size, size, 3),
        chunks=(min(CHUNK, max(tiles, 1)), size, size, 3),
        dtype="uint8",
        compressors=BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle"),
    )
    crc32_T = np.zeros(tiles, np.uint32)
    for start in range(0, tiles, CHUNK):
        corners = index.coords0[start : start + CHUNK].tolist()
        try:
            chunk_CSS = np.stack([slide.read(x0, y0, index.grid) for x0, y0 in corners])
        except OSError as error:  # the slide's disk, not the cache's
            raise UnreadableRegionError(
                f"{index.slide_id}: the slide cannot be read ({error}). Check that its file is "
                "there and readable, or leave the slide out."
            ) from error
        crc32_T[start : start + CHUNK] = [zlib.crc32(np.ascontiguousarray(t)) for t in chunk_CSS]
        array[start : start + len(chunk_CSS)] = chunk_CSS
    group.create_array("crc32", data=crc32_T)


def _key(index: TileIndex) -> dict:
    """What a cache must have been made from to be the cache of this index."""
    return {
        "version": VERSION,
        "slide_id": index.slide_id,
        "slide_bytes": int(index.slide_bytes),  # another file under the same name
        "slide_mpp": float(index.slide_mpp),
        "size": index.grid.size,
        "mpp": index.grid.mpp,
        "size0": int(index.size0),
        "tiles": len(index.coords0),
        "coords0_sha256": hashlib.sha256(index.coords0.astype("<i8").tobytes()).hexdigest(),
    }


def _check(path: Path, index: TileIndex) -> None:
    try:
        found = json.loads((path / "zarr.json").read_text())["attributes"]["cache"]
        found = {name: found.get(name) for name in _key(index)}
    except FileNotFoundError:
        raise IndexFileError(
            f"{index.slide_id}: there is no tile cache at {path}. Build it, or run without one."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IndexFileError(
            f"{index.slide_id}: the tile cache {path} is damaged ({error}). Delete it; it is made "
            "anew from the slide."
        ) from error
    for name, wanted in _key(index).items():
        if found[name] != wanted:
            raise IndexSettingsError(
                f"{index.slide_id}: the tile cache {path} was made with {name} = {found[name]}, "
                f"asked for is {wanted}. Build it again, or ask for what it holds."
            )


def _remove_leftovers(path: Path, host: str) -> None:
    """Delete what killed runs of this machine left half-written: it can be many gigabytes."""
    for leftover in path.parent.glob(f".{path.name}.{host}*"):
        pid = leftover.name.removeprefix(f".{path.name}.{host}").split(".")[0]
        try:
            os.kill(int(pid), 0)  # sends nothing: asks whether the process lives
        except (ProcessLookupError, ValueError):
            shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:
            pass  # it lives, and is another user's
