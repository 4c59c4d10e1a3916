"""Decodes the JPEG tiles of a TIFF without OpenSlide: the same pixels, several times faster.

OpenSlide spends most of its time compositing tiles with cairo, not decoding them. If a level is
a plain grid of JPEG tiles and the requested region lies on its pixels, the tiles' bytes are read,
decoded by libjpeg-turbo and cropped. This is the same arithmetic in the same library, so the
pixels are identical; `tests/wsi/test_jpeg_tiles.py` checks it, and the first region of every level
is read both ways before direct decoding is used (`levels.Levels`).

OpenSlide reads everything else: other formats and codecs silently (`JpegDecoder.why_not` has the
reason), unusual JPEG TIFFs (missing tiles, strange colour) with one warning.

A tile that libjpeg decodes with a warning is damaged: its pixels are guessed from there on. That is
a fault of the slide (`DamagedTileError`), for OpenSlide too. A change that leaves a valid JPEG,
about one in six, shows in no decoder: only in a checksum of the file.

Tiles are kept where they are asked for again, as in an index's order. Where few are, at random
places of a large slide, one buffer a thread serves all: writing to it is cheaper.

Price: 0.15 to 0.3 ms a tile of 256 px, and `CACHE_BYTES` of memory a process. A tile that was used
whole is not cached, since a lattice reads no pixel twice.

Source: TIFF 6.0 and its technical note 2 (JPEG tables); ITU T.81, annex B (markers).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg

from slides.wsi.jpeg_stream import ADOBE, DamagedTileError, NotDirectError, tables, whole_stream
from slides.wsi.tiff_tags import JPEG_TABLES, directories

LATELY, SPAN = 512, 64  # tiles: how far back one counts as asked for, over how many is the share
SCARCE = 0.1  # of tiles are asked for again: random places on a slide; an index's order has .6
ALONE = 2  # references to a tile that nobody else has: of a variable, and of the function asked
CACHE_BYTES = 64 << 20  # for all slides of this process: holds one row of tiles of a large slide
VENDORS = ("aperio", "generic-tiff")  # other formats overlap tiles or leave some out
JPEG, RGB, YCBCR = 7, 2, 6  # TIFF's numbers
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
SAMPLES, PLANAR, TILE_WIDTH, TILE_HEIGHT, OFFSETS, COUNTS = 277, 284, 322, 323, 324, 325
MAX_SIDE = 4096  # pixels: no real tile is larger


@dataclass(frozen=True)
class Level:
    """One level as a grid of JPEG tiles."""

    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: np.ndarray
    counts: np.ndarray
    head: bytes
    """Start of every tile's JPEG stream: SOI, colour space, the TIFF's tables."""

    @property
    def columns(self) -> int:
        """Number of tiles in a row."""
        return -(-self.width // self.tile_width)


class JpegDecoder:
    """A JPEG decoder for the levels of one file. Use in one process; thread-safe.

    Args:
        path: The file.
        vendor: OpenSlide's name for its format.
        level_sizes: Width and height of each of OpenSlide's levels.
        mislabelled: Whether each level's tiles are YCbCr under an RGB tag; none if left out.

    Attributes:
        levels: A `Level`, or None where OpenSlide reads.
        why_not: For each level that OpenSlide reads, the reason.
        odd: Whether one of the reasons deserves a warning.
    """

    def __init__(
        self,
        path: Path,
        vendor: str,
        level_sizes: tuple[tuple[int, int], ...],
        mislabelled: tuple[bool, ...] = (),
    ):
        self.levels: list[Level | None] = [None] * len(level_sizes)
        self.why_not: dict[int, str] = {}
        self.odd = False
        self._descriptor = None
        self._number = next(_serial)
        self._headers: dict[
            bytes, tuple[bytes, bytes]
        ] = {}  # of `Level.head`: tile's, and stream's
        reason = "" if vendor in VENDORS else f"the format is {vendor}"
        if not hasattr(os, "pread"):
            reason = "this system has no pread"
        found = [tags for tags, _ in directories(path) if TILE_WIDTH in tags] if not reason else []
        holes = False
        for number, size in enumerate(level_sizes):
            same = [tags for tags in found if (_one(tags, WIDTH), _one(tags, HEIGHT)) == size]
            try:
                if len(same) != 1:
                    raise NotDirectError(reason or f"{len(same)} directories are of its size")
                if holes:  # OpenSlide then omits these tiles from coarser Aperio levels too
                    raise NotDirectError("tiles are missing from a finer level")
                holes = _missing(same[0]) > 0
                self.levels[number] = _level(same[0], any(mislabelled[number : number + 1]))
            except NotDirectError as why:
                self.why_not[number] = str(why)
                self.odd |= bool(same) and _one(same[0], COMPRESSION) == JPEG
        if any(self.levels):
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def close(self) -> None:
        """Close the file and drop its decoded tiles."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        _cache.forget(self._number)

    def drop(self, level: int, why: str) -> None:
        """Read this level through OpenSlide from now on."""
        self.levels[level], self.why_not[level], self.odd = None, why, True

    def pixels(self, level: int, x_r: int, y_r: int, width: int, height: int) -> np.ndarray:
        """Return a region of a level, (height, width, 3) uint8, white outside the level.

        `x_r`, `y_r` are pixels of the level.

        Raises:
            NotDirectError: OpenSlide has to read this region.
            DamagedTileError: one of its tiles is damaged.
        """
        grid = self.levels[level]
        if grid is None:
            raise NotDirectError(self.why_not[level])
        (row, y_t), (column, x_t) = divmod(y_r, grid.tile_height), divmod(x_r, grid.tile_width)
        whole = not (x_t or y_t) and (width, height) == (grid.tile_width, grid.tile_height)
        if whole and 0 <= x_r <= grid.width - width and 0 <= y_r <= grid.height - height:
            return self._decode(grid, row * grid.columns + column)
        left, top = max(x_r, 0), max(y_r, 0)
        right, bottom = min(x_r + width, grid.width), min(y_r + height, grid.height)
        if left >= right or top >= bottom:
            return np.full((height, width, 3), 255, np.uint8)
        rows = range(top // grid.tile_height, -(-bottom // grid.tile_height))
        columns = range(left // grid.tile_width, -(-right // grid.tile_width))
        inside = (right - left, bottom - top) == (width, height)
        out = np.empty((height, width, 3), np.uint8)
        if not inside:
            out[:] = 255
        for row, column in itertools.product(rows, columns):
            tile_x, tile_y = column * grid.tile_width, row * grid.tile_height
            x = slice(max(left, tile_x), min(right, tile_x + grid.tile_width))
            y = slice(max(top, tile_y), min(bottom, tile_y + grid.tile_height))
            tile = self._tile(grid, level, row * grid.columns + column)
            out[y.start - y_r : y.stop - y_r, x.start - x_r : x.stop - x_r] = tile[
                y.start - tile_y : y.stop - tile_y, x.start - tile_x : x.stop - tile_x
            ]
        return out

    def damaged(self, level: int) -> int:
        """Return how many of a level's tiles are damaged, decoding all of them."""
        grid, found = self.levels[level], 0
        for number in range(len(grid.offsets)):
            try:
                self._decode(grid, number)
            except DamagedTileError:
                found += 1
            except NotDirectError:
                pass
        return found

    def _tile(self, grid: Level, level: int, number: int) -> np.ndarray:
        """Return a decoded tile, which this thread must have used before it asks for another."""
        key, size = (self._number, level, number), grid.tile_width * grid.tile_height * 3
        tile = _cache.get(key)
        if tile is not None:
            return tile
        if _cache.again < SCARCE:  # tiles at random: keeping them costs and saves nothing
            if getattr(_own, "memory", _NONE).nbytes != size:
                _own.memory = np.empty(size, np.uint8)
            return self._decode(grid, number, _own.memory)
        tile = self._decode(grid, number, _cache.spare(size))
        _cache.put(key, tile)
        return tile

    def _decode(self, grid: Level, number: int, into: np.ndarray | None = None) -> np.ndarray:
        """Return one decoded tile, (tile_height, tile_width, 3) uint8; `into` is memory for it."""
        count = int(grid.counts[number])
        if count > MAX_SIDE**2 * 3:
            raise NotDirectError(f"a tile of {count} bytes")
        try:
            data = os.pread(self._descriptor, count, int(grid.offsets[number]))
            if len(data) != count:
                raise NotDirectError("the file ends within a tile")
            stream = self._stream(grid, data)
        except (OSError, OverflowError, ValueError) as error:
            raise NotDirectError(str(error)) from error
        try:
            tile = simplejpeg.decode_jpeg(stream, buffer=into)
        except ValueError as error:
            with contextlib.suppress(ValueError):
                simplejpeg.decode_jpeg(stream, strict=False)
                raise DamagedTileError(str(error)) from error  # libjpeg warned, and went on
            raise NotDirectError(str(error)) from error
        if tile.shape != (grid.tile_height, grid.tile_width, 3):
            raise NotDirectError(f"a tile came as {tile.shape}")
        return tile

    def _stream(self, grid: Level, data: bytes) -> bytes:
        """Return a tile's whole JPEG stream; the headers of a level's tiles are mostly the same."""
        known = self._headers.get(grid.head)
        if known and data.startswith(known[0]):
            return known[1] + data[len(known[0]) :]
        stream, own = whole_stream(grid.head, data, grid.tile_width, grid.tile_height)
        self._headers[grid.head] = data[:own], stream[: len(stream) - len(data) + own]
        return stream


class TileCache:
    """Decoded tiles of this process; the least recently used ones are dropped first.

    Args:
        limit: Bytes of tiles that are kept.
        reuse: Keep the memory of dropped tiles for `spare`, one tile's more than the limit: new
            memory can cost as much as decoding a tile.
    """

    def __init__(self, limit: int, reuse: bool = False):
        self.limit, self.reuse = limit, reuse
        self.clear()
        if hasattr(os, "register_at_fork"):  # another thread may own the lock as the process forks
            os.register_at_fork(after_in_child=self.clear)

    def clear(self) -> None:
        """Drop all tiles."""
        self.tiles: dict[tuple, np.ndarray] = {}
        self.spares: list[np.ndarray] = []
        self.asked: dict[tuple, None] = {}  # the last keys, kept or not
        self.again = 1.0  # share of what is asked for that was asked for lately
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: tuple) -> np.ndarray | None:
        """Return a tile, or None if it is not kept."""
        with self.lock:
            known = key in self.asked
            self.asked.pop(key, None)
            self.asked[key] = None
            if len(self.asked) > LATELY:
                self.asked.pop(next(iter(self.asked)))
            self.again += (known - self.again) / SPAN
            tile = self.tiles.pop(key, None)
            if tile is not None:
                self.tiles[key] = tile
            return tile

    def put(self, key: tuple, tile: np.ndarray) -> None:
        """Keep a tile; its key begins with the number of its file."""
        with self.lock:
            self.bytes += tile.nbytes - (self.tiles[key].nbytes if key in self.tiles else 0)
            self.tiles[key] = tile
            while self.bytes > self.limit and self.tiles:
                self._drop(next(iter(self.tiles)))

    def spare(self, size: int) -> np.ndarray | None:
        """Return memory of `size` bytes that was a tile's, (size,) uint8; None if there is none."""
        with self.lock:
            if self.spares and self.spares[-1].nbytes == size:
                return self.spares.pop()
            self.spares.clear()  # of tiles of another size
            return None

    def _drop(self, key: tuple) -> None:
        tile = self.tiles.pop(key)
        self.bytes -= tile.nbytes
        waiting = sum(each.nbytes for each in self.spares[:1]) * len(self.spares)
        if not self.reuse or self.bytes + waiting > self.limit:
            return
        if tile.flags.c_contiguous and sys.getrefcount(tile) == ALONE:
            self.spares.append(tile.reshape(-1))

    def forget(self, number: int) -> None:
        """Drop the tiles of a file."""
        with self.lock:
            for key in [key for key in self.tiles if key[0] == number]:
                self._drop(key)


_cache, _serial = TileCache(CACHE_BYTES, reuse=True), itertools.count()
_own, _NONE = threading.local(), np.empty(0, np.uint8)  # memory of each thread for one tile


def _one(tags: dict[int, np.ndarray], tag: int, default: int = 0) -> int:
    return int(tags[tag][0]) if tag in tags else default


def _missing(tags: dict[int, np.ndarray]) -> int:
    """Return how many tiles of a directory have no bytes."""
    return max(int((tags.get(tag, np.empty(0)) == 0).sum()) for tag in (OFFSETS, COUNTS))


def _level(tags: dict[int, np.ndarray], mislabelled: bool) -> Level:
    """Return a directory's grid; raise NotDirectError unless it is of plain 8-bit RGB JPEG."""
    photometric = _one(tags, PHOTOMETRIC, -1)
    wanted = {
        "compression": (_one(tags, COMPRESSION), (JPEG,)),
        "photometric interpretation": (photometric, (RGB, YCBCR)),
        "samples per pixel": (_one(tags, SAMPLES, 1), (3,)),
        "bits per sample": (tuple(map(int, tags.get(BITS, (1,)))), ((8, 8, 8),)),
        "planar configuration": (_one(tags, PLANAR, 1), (1,)),
        "fill order": (_one(tags, FILL_ORDER, 1), (1,)),
    }
    for name, (value, plain) in wanted.items():
        if value not in plain:
            raise NotDirectError(f"{name} is {value}")
    sizes = [_one(tags, tag) for tag in (WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT)]
    if not all(1 <= side <= MAX_SIDE for side in sizes[2:]):
        raise NotDirectError(f"tiles are {sizes[2]} x {sizes[3]} pixels")
    offsets, counts = tags.get(OFFSETS, np.empty(0)), tags.get(COUNTS, np.empty(0))
    tiles = -(-sizes[0] // sizes[2]) * -(-sizes[1] // sizes[3])
    if not len(offsets) == len(counts) == tiles:
        raise NotDirectError(f"it needs {tiles} tiles, {len(offsets)} are listed")
    if missing := _missing(tags):
        raise NotDirectError(f"{missing} of its {tiles} tiles are missing")
    own = tables(tags[JPEG_TABLES].tobytes()) if JPEG_TABLES in tags else b""
    head = b"\xff\xd8" + ADOBE + bytes([photometric == YCBCR or mislabelled]) + own
    return Level(*sizes, offsets, counts, head)
