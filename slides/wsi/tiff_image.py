"""A TIFF that OpenSlide does not open, read part by part: strips, or tiles of another codec.

ImageJ, Photoshop and camera programs write strips, QuPath and Bio-Formats also JPEG 2000, JPEG XL
or WebP tiles. `TiffImage` has the part of an OpenSlide handle's interface that `levels.Levels`
uses. A read decodes the strips or tiles that it touches, and no others; of uncompressed strips it
reads the rows alone. Levels that tifffile finds (SubIFDs of an OME-TIFF too) are used as such.

Price: `CACHE_BYTES` of decoded parts in a process, for any size of picture. A strip is as wide as
the picture, so tiles are cheap in the order of rows, in which indexes and caches take them, and
dear at random where strips are compressed and many rows high.

What it does not read (more than 8 bits, CMYK, a single compressed strip of `MAX_PART` pixels) is
`slides.wsi.plain_image`'s, whole, within its limit of pixels.

Source: TIFF 6.0; codecs and tags by tifffile and imagecodecs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
import tifffile

from slides.files import DAMAGE
from slides.wsi.jpeg_tiles import TileCache
from slides.wsi.plain_image import VENDOR

CACHE_BYTES = 256 << 20  # a row of 512 px tiles of a picture 150,000 px wide
MAX_PART = 1 << 26  # pixels of a strip or tile that is decoded at once: 0.2 GB
ROWS_BYTES = 1 << 20  # of an uncompressed strip that are read at once
MINISWHITE, MINISBLACK, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6  # TIFF's PhotometricInterpretation
NONE, JPEGS = 1, (7, 33003, 33005, 34712, 50001, 50002)  # codecs that turn YCbCr into RGB
UNITS = {1: "none", 2: "inch", 3: "centimeter"}


@dataclass(frozen=True)
class _Part:
    """A strip, a tile, or some rows of an uncompressed strip."""

    number: int
    x: int
    y: int
    width: int
    height: int
    offset: int
    bytes: int


class TiffImage:
    """A TIFF picture with OpenSlide's interface, decoded part by part.

    Raises:
        OpenSlideError: it is nothing that is read here.
    """

    def __init__(self, path: Path):
        self._number = next(_serial)
        try:
            self._tiff = tifffile.TiffFile(path)
        except DAMAGE as error:
            raise openslide.OpenSlideError(str(error)) from error
        try:
            self._pages = _levels(self._tiff)
            first = self._pages[0]
            if why := _why_not(first):
                raise openslide.OpenSlideError(why)
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self.level_dimensions = tuple((p.imagewidth, p.imagelength) for p in self._pages)
            self.dimensions = self.level_dimensions[0]
            self.level_downsamples = tuple(
                (self.dimensions[0] / width + self.dimensions[1] / height) / 2
                for width, height in self.level_dimensions
            )
            self.properties = {"openslide.vendor": VENDOR} | _properties(self._pages)
        except DAMAGE as error:
            self._tiff.close()
            raise openslide.OpenSlideError(str(error)) from error

    def close(self) -> None:
        """Close the file and drop its decoded parts."""
        self._tiff.close()
        os.close(self._descriptor)
        _cache.forget(self._number)

    def read_region(self, corner0: tuple[int, int], level: int, size: tuple[int, int]):
        """Return (height, width, 4) uint8 like OpenSlide; transparent outside.

        Raises:
            OpenSlideError: a part of it is damaged.
        """
        page, ds = self._pages[level], self.level_downsamples[level]
        x, y = (round(value / ds) for value in corner0)
        out = np.zeros((size[1], size[0], 4), np.uint8)
        for part in _touched(page, x, y, *size):
            piece = self._decoded(level, part)
            rows = slice(max(part.y, y), min(part.y + piece.shape[0], y + size[1]))
            columns = slice(max(part.x, x), min(part.x + piece.shape[1], x + size[0]))
            piece = piece[
                rows.start - part.y : rows.stop - part.y,
                columns.start - part.x : columns.stop - part.x,
            ]
            _paint(page, piece, out[rows.start - y : rows.stop - y,
                                    columns.start - x : columns.stop - x])  # fmt: skip
        return out

    def _decoded(self, level: int, part: _Part) -> np.ndarray:
        """Return a part's samples as they are stored, (h, w, samples) uint8; (0, 0, n) if none."""
        key = self._number, level, part.number
        if (samples := _cache.get(key)) is None:
            try:
                samples = self._decode(self._pages[level], part)
            except DAMAGE as error:
                raise openslide.OpenSlideError(f"part {part.number}: {error}") from error
            _cache.put(key, samples)
        return samples

    def _decode(self, page: tifffile.TiffPage, part: _Part) -> np.ndarray:
        if page.compression == NONE and not page.is_tiled and page.planarconfig == 1:
            data = self._bytes(part.offset, part.bytes)
            return np.frombuffer(data, np.uint8).reshape(part.height, part.width, -1)
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        each = len(page.dataoffsets) // planes
        found = []
        for number in range(part.number, part.number + planes * each, each):
            offset, count = page.dataoffsets[number], page.databytecounts[number]
            if not count:
                return np.empty((0, 0, page.samplesperpixel), np.uint8)
            plane = page.decode(self._bytes(offset, count), number, jpegtables=page.jpegtables)[0]
            found.append(plane[0, : part.height, : part.width])
        samples = np.concatenate(found, -1)
        if samples.shape[:2] != (part.height, part.width) or samples.dtype != np.uint8:
            raise ValueError(f"came as {samples.shape}, {samples.dtype}")
        return samples

    def _bytes(self, offset: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, offset)
        if len(data) != count:
            raise ValueError("the file ends within it")
        return data


_cache, _serial = TileCache(CACHE_BYTES), itertools.count()


def _levels(tiff: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """Return the first page and the smaller versions of it that are stored alike."""
    first = tiff.pages.first
    series = tiff.series[0]
    found = [first]
    if series.levels[0].keyframe is first and len(series.pages) == 1:
        for level in series.levels[1:]:
            page = level.keyframe
            smaller = page.imagewidth < found[-1].imagewidth
            if smaller and not _why_not(page) and page.photometric == first.photometric:
                found.append(page)
    return found


def _why_not(page: tifffile.TiffPage) -> str:
    """Return why a page is not read here; "" if it is."""
    samples, extra = page.samplesperpixel, page.extrasamples
    colours = {MINISWHITE: 1, MINISBLACK: 1, PALETTE: 1, RGB: 3}
    if page.compression in JPEGS:
        colours[YCBCR] = 3
    if page.dtype != np.uint8 or page.bitspersample != 8 or page.imagedepth != 1:
        return f"{page.bitspersample} bits a channel"
    if samples - len(extra) != colours.get(page.photometric) or len(extra) > 1 or 1 in extra:
        return f"{samples} channels of photometric interpretation {page.photometric}"
    sides = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, _rows(page))
    if min(sides) < 1:
        return f"parts of {sides[0]} x {sides[1]} pixels"
    if not len(page.dataoffsets) == len(page.databytecounts) == _parts_needed(page):
        return "its table of strips or tiles is incomplete"
    part = sides[0] * sides[1]
    if part > MAX_PART and (page.is_tiled or page.compression != NONE or page.planarconfig == 2):
        return f"a part of {part} pixels"
    try:
        tifffile.TIFF.DECOMPRESSORS[page.compression]
    except (KeyError, ImportError):
        return f"compression {page.compression}"
    return ""


def _rows(page: tifffile.TiffPage) -> int:
    return min(page.rowsperstrip or page.imagelength, page.imagelength)


def _parts_needed(page: tifffile.TiffPage) -> int:
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    if page.is_tiled:
        across = -(-page.imagewidth // page.tilewidth)
        return planes * across * -(-page.imagelength // page.tilelength)
    return planes * -(-page.imagelength // _rows(page))


def _touched(page: tifffile.TiffPage, x: int, y: int, width: int, height: int) -> Iterator[_Part]:
    """Yield the parts of a page that a region touches, in the order of rows."""
    left, right = max(x, 0), min(x + width, page.imagewidth)
    top, bottom = max(y, 0), min(y + height, page.imagelength)
    if left >= right or top >= bottom:
        return
    side_x, side_y = (page.tilewidth, page.tilelength) if page.is_tiled else (
        page.imagewidth, _rows(page))  # fmt: skip
    across = -(-page.imagewidth // side_x)
    for row in range(top // side_y, -(-bottom // side_y)):
        for column in range(left // side_x, -(-right // side_x)):
            part_x, part_y = column * side_x, row * side_y
            part = _Part(
                row * across + column, part_x, part_y, min(side_x, page.imagewidth - part_x),
                min(side_y, page.imagelength - part_y), 0, 0,
            )  # fmt: skip
            if page.compression == NONE and not page.is_tiled and page.planarconfig == 1:
                yield from _bands(page, part, top, bottom)
            else:
                yield part


def _bands(page: tifffile.TiffPage, strip: _Part, top: int, bottom: int) -> Iterator[_Part]:
    """Yield the rows of an uncompressed strip that are needed, some at a time."""
    row_bytes = page.imagewidth * page.samplesperpixel
    step = max(1, ROWS_BYTES // row_bytes)
    start = page.dataoffsets[strip.number]
    first = (max(top, strip.y) - strip.y) // step * step
    for row in range(first, min(bottom - strip.y, strip.height), step):
        rows = min(step, strip.height - row)
        offset = start + row * row_bytes
        yield _Part(offset, 0, strip.y + row, strip.width, rows, offset, rows * row_bytes)


def _paint(page: tifffile.TiffPage, samples: np.ndarray, out: np.ndarray) -> None:
    """Write samples as RGBA into `out`, (h, w, 4) uint8; no samples leave it transparent."""
    if not samples.size:
        return
    colours = samples[..., :3] if page.photometric in (RGB, YCBCR) else samples[..., :1]
    if page.photometric == MINISWHITE:
        colours = 255 - colours
    elif page.photometric == PALETTE:
        colours = (page.colormap >> 8).astype(np.uint8).T[colours[..., 0]]
    out[..., :3] = colours
    out[..., 3] = samples[..., -1] if page.extrasamples == (2,) else 255


def _properties(pages: list[tifffile.TiffPage]) -> dict[str, str]:
    """Return what OpenSlide would: the first page's description and resolution, sizes of tiles."""
    first = pages[0]
    found = {"tiff.ImageDescription": first.description} if first.description else {}
    unit = first.tags.get("ResolutionUnit")
    found["tiff.ResolutionUnit"] = UNITS.get(int(unit.value) if unit else 2, "none")
    for axis in "XY":
        if (tag := first.tags.get(f"{axis}Resolution")) and tag.value[1]:
            found[f"tiff.{axis}Resolution"] = str(tag.value[0] / tag.value[1])
    for level, page in enumerate(pages):
        if page.is_tiled:
            found[f"openslide.level[{level}].tile-width"] = str(page.tilewidth)
            found[f"openslide.level[{level}].tile-height"] = str(page.tilelength)
    return found
