"""One open slide: its true resolution, its levels, a tile at (x0, y0).

The handle is opened on first use in each process and never travels: OpenSlide objects can neither
be pickled nor safely used after a fork, so a `Slide` carries its path and what it has learnt.

A tile is read from the coarsest level that is not coarser than the tile, by the level's *float*
downsample (levels of odd slides say 3.9997 or 4.0056, both mean 4), then reduced with an
anti-aliasing filter. Nothing is ever enlarged. Transparent pixels and those outside are white.

OpenSlide is the reference. Where it can be shown to give the same pixels, `slides.direct` decodes
the file's JPEG tiles itself; `Slide(..., direct=False)` never does.

Price: 0.2 to 0.8 ms for a 224 px tile read unscaled, 2 to 3 ms from 443 px (one core, JPEG tiles);
three times that through OpenSlide.
Condition: OpenSlide places reads by whole level-0 pixels, so at a level whose downsample is not a
whole number its pixels come interpolated, shifted by up to half a level-0 pixel.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from slides.diagnose import impossible, tiff_contents, truncated, why_refused
from slides.direct import Direct, NotDirectError
from slides.errors import NotASlideError, UnreadableRegionError
from slides.grid import Grid
from slides.plain import PlainImage, is_plain
from slides.resolution import find_mpp

CACHE_BYTES = 64 << 20  # all handles of a process together; by default each would hold 32 MiB
LEVEL_TOLERANCE = 0.005  # of a downsample: about one pixel of a 224 px tile
CHECKED = 512  # pixels across, of the first region of each level that is read both ways
BLOCK = 2048  # side of the pieces in which a thumbnail is read, so memory does not follow the slide
TIFF_VENDORS = {"aperio", "generic-tiff", "leica", "philips", "trestle", "ventana"}
_inherited = []  # handles that came through a fork: closing them here could stop the parent's


@dataclass(frozen=True)
class Facts:
    """What a slide says of itself, kept so that a copy in another process need not reopen it."""

    width0: int
    height0: int
    level_sizes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    bounds0: tuple[int, int, int, int]
    """x0, y0, width, height of the scanned part; the whole slide where the scanner names none."""
    vendor: str
    properties: dict[str, str]


class Slide:
    """A whole-slide image, or a plain picture of tissue (`slides.plain`).

    Opened lazily; safe to pickle and to use after a fork.

    Args:
        path: The slide's file.
        mpp: Microns per level-0 pixel from the user's table; beats what the file says.
        name: What to call it in errors; the file's name without its extension otherwise.
        direct: Decode JPEG tiles without OpenSlide where the pixels are proven the same.
    """

    def __init__(
        self,
        path: str | Path,
        mpp: float | None = None,
        name: str | None = None,
        direct: bool = True,
    ):
        self.path = Path(path)
        self.name = name or slide_stem(self.path)
        self._table_mpp = mpp
        self._want_direct = direct
        self._direct = None
        self._proven = set()
        self._said_slow = False
        self._handle = None
        self._pid = None
        self._facts = None
        self._mpp = None

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r})"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handle": None, "_pid": None, "_direct": None, "_proven": set()}

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; the next read opens it again."""
        if self._handle is not None and self._pid == os.getpid():
            self._handle.close()
        elif self._handle is not None:
            _inherited.append(self._handle)
        self._handle = None
        if self._direct is not None:
            self._direct.close()
            self._direct = None

    @property
    def facts(self) -> Facts:
        """Sizes, levels and properties.

        Raises:
            NotASlideError: OpenSlide refuses the file.
        """
        if self._facts is None:
            self._facts = _facts(self._open())
        return self._facts

    @property
    def width0(self) -> int:
        """Width in level-0 pixels."""
        return self.facts.width0

    @property
    def height0(self) -> int:
        """Height in level-0 pixels."""
        return self.facts.height0

    @property
    def level_downsamples(self) -> tuple[float, ...]:
        """Level-0 pixels per pixel of each level, finest first."""
        return self.facts.level_downsamples

    @property
    def bounds0(self) -> tuple[int, int, int, int]:
        """x0, y0, width, height of the scanned part, which is where QuPath puts its origin."""
        return self.facts.bounds0

    @property
    def vendor(self) -> str:
        """OpenSlide's name for the format."""
        return self.facts.vendor

    @property
    def decoders(self) -> tuple[str, ...]:
        """Who decodes each level: "direct", or "OpenSlide" and why."""
        why = self._directly().why_not if self._want_direct else {}
        return tuple(
            f"OpenSlide: {why.get(level, 'asked for')}" if level in why or not self._want_direct
            else "direct"
            for level in range(len(self.level_downsamples))
        )  # fmt: skip

    @property
    def mpp(self) -> float:
        """Microns per level-0 pixel, mean of both axes.

        Raises:
            MissingResolutionError: neither the table nor the file gives a believable value.
        """
        return (self.mpp_x + self.mpp_y) / 2

    @property
    def mpp_x(self) -> float:
        """Microns per level-0 pixel, along x."""
        return self._resolution()[0]

    @property
    def mpp_y(self) -> float:
        """Microns per level-0 pixel, along y."""
        return self._resolution()[1]

    @property
    def mpp_source(self) -> str:
        """Where the resolution came from: `table`, a property's name, `objective power`."""
        return self._resolution()[2]

    def read(self, x0: int, y0: int, grid: Grid) -> np.ndarray:
        """The tile at (x0, y0): (size, size, 3) uint8 RGB at the grid's resolution.

        Raises:
            TooCoarseError: the tile is finer than the scan.
            UnreadableRegionError: its pixels cannot be decoded.
        """
        return self.region(x0, y0, grid.size0(self.mpp, self.name), grid.size)

    def region(self, x0: int, y0: int, size0: int, size: int) -> np.ndarray:
        """The square of `size0` level-0 pixels at (x0, y0), as (size, size, 3) uint8 RGB."""
        if size > size0:
            raise ValueError(f"{self.name}: {size} px asked of {size0}: tiles are never enlarged")
        level = self.level_for(size0, size)
        ds = self.level_downsamples[level]
        if abs(ds * size / size0 - 1) <= LEVEL_TOLERANCE:  # the level is the tile: no resampling
            shift = (size0 / ds - size) / 2  # under a pixel: keeps the centre where it was
            i, j = round(y0 / ds + shift), round(x0 / ds + shift)
            return self._pixels(round(j * ds), round(i * ds), level, size, size)
        start0 = [round(math.floor(v / ds) * ds) for v in (x0, y0)]
        left, top = (x0 - start0[0]) / ds, (y0 - start0[1]) / ds
        width, height = (math.ceil(edge + size0 / ds) for edge in (left, top))
        wide = Image.fromarray(self._pixels(*start0, level, width, height))
        box = (left, top, left + size0 / ds, top + size0 / ds)
        return np.asarray(wide.resize((size, size), Image.Resampling.HAMMING, box=box))

    def level_for(self, size0: int, size: int) -> int:
        """The coarsest level that is not coarser than `size0 / size`, within `LEVEL_TOLERANCE`."""
        limit = size0 / size * (1 + LEVEL_TOLERANCE)
        return max(n for n, ds in enumerate(self.level_downsamples) if n == 0 or ds <= limit)

    def thumbnail(self, mpp: float = 8.0, max_side: int | None = None) -> tuple[np.ndarray, float]:
        """The whole slide, small: (h, w, 3) uint8 and its exact downsample from level 0.

        The downsample is a whole number of some level's pixels, the nearest to `mpp`; with
        `max_side` the least that keeps both sides within it (and no resolution is needed).
        Pixel (i, j) covers [j, j + 1) x [i, i + 1) times the downsample.
        """
        if max_side is None:
            wanted = max(1.0, mpp / self.mpp)
        else:
            wanted = max(1.0, max(self.width0, self.height0) / max_side)
        level = self.level_for(round(wanted * 1_000_000), 1_000_000)
        width_r, height_r = self.facts.level_sizes[level]
        ds = self.level_downsamples[level]
        factor = max(1, round(wanted / ds))
        if max_side is not None:
            factor = math.ceil(max(width_r, height_r) / max_side)
        block = factor * max(1, BLOCK // factor)
        out = np.empty((-(-height_r // factor), -(-width_r // factor), 3), np.uint8)
        for top in range(0, height_r, block):
            for left in range(0, width_r, block):
                size_r = min(block, width_r - left), min(block, height_r - top)
                piece = self._pixels(round(left * ds), round(top * ds), level, *size_r)
                small = np.asarray(Image.fromarray(piece).reduce(factor))
                i, j = top // factor, left // factor
                out[i : i + small.shape[0], j : j + small.shape[1]] = small
        return out, ds * factor

    def check_complete(self) -> None:
        """See that a TIFF-based file is as long as its own table of tiles says.

        A copy that broke off can open and give its thumbnail, and fail hours into a run.

        Raises:
            NotASlideError: it is shorter.
        """
        if self.vendor not in TIFF_VENDORS:
            return
        contents, size = tiff_contents(self.path), self.path.stat().st_size
        if contents is not None and contents.reach > size:
            raise NotASlideError(
                f"{self.name}: {truncated(self.path, contents.reach, size)} Copy it again from its "
                f"source, or leave this slide out."
            )

    def _open(self) -> openslide.OpenSlide:
        if self._handle is None or self._pid != os.getpid():
            self.close()
            if fault := impossible(self.path):
                raise NotASlideError(f"{self.name}: {fault}")
            try:
                self._handle = openslide.OpenSlide(self.path)
                self._handle.set_cache(_process_cache(os.getpid()))
            except (openslide.OpenSlideError, OSError) as error:
                self._handle = None
                if not self._is_plain():
                    raise NotASlideError(why_refused(self.name, self.path, error)) from error
                self._handle = PlainImage(self.path, self.name)
            self._pid = os.getpid()
        return self._handle

    def _is_plain(self) -> bool:
        """A picture that only lacks OpenSlide's tiles: whole, and no slide that was damaged."""
        if not self.path.is_file():
            return False
        contents = tiff_contents(self.path)
        if contents is None:
            return is_plain(self.path)
        return not contents.tiled and contents.reach <= self.path.stat().st_size

    def _resolution(self) -> tuple[float, float, str]:
        if self._mpp is None:
            self._mpp = find_mpp(self.facts.properties, self.name, self._table_mpp)
        return self._mpp

    def _pixels(self, x0: int, y0: int, level: int, width_r: int, height_r: int) -> np.ndarray:
        """A region of a level, (height_r, width_r, 3) uint8 RGB, by whoever may decode it."""
        if not self._want_direct:
            return self._reference(x0, y0, level, width_r, height_r)
        direct, fault, ds = self._directly(), "", self.level_downsamples[level]
        x_r, y_r = x0 / ds, y0 / ds  # between pixels OpenSlide interpolates: only it can
        if direct.levels[level] is None or not (x_r.is_integer() and y_r.is_integer()):
            return self._reference(x0, y0, level, width_r, height_r)
        try:
            rgb = direct.pixels(level, int(x_r), int(y_r), width_r, height_r)
        except NotDirectError as error:
            fault = str(error)
        if not fault and level not in self._proven:
            part = min(CHECKED, height_r), min(CHECKED, width_r)
            reference = self._reference(x0, y0, level, *part[::-1])
            if np.array_equal(rgb[: part[0], : part[1]], reference):
                self._proven.add(level)
            else:
                fault = f"level {level} decodes to other pixels here"
                direct.drop(level, fault)
        if fault:
            rgb = self._reference(x0, y0, level, width_r, height_r)
            self._say_slow(fault)  # only now: where OpenSlide fails too, its error says more
        return rgb

    def _directly(self) -> Direct:
        if self._direct is None:
            self._direct = Direct(self.path, self.vendor, self.facts.level_sizes)
            if self._direct.odd:
                self._say_slow("; ".join(sorted(set(self._direct.why_not.values()))))
        return self._direct

    def _say_slow(self, why: str) -> None:
        """Once a slide, in each process."""
        if not self._said_slow:
            self._said_slow = True
            warnings.warn(
                f"{self.name}: read through OpenSlide, which is slower: {why}. ({self.path})",
                stacklevel=2,
            )

    def _reference(self, x0: int, y0: int, level: int, width_r: int, height_r: int) -> np.ndarray:
        """What OpenSlide reads, over white."""
        try:
            rgba = np.asarray(self._open().read_region((x0, y0), level, (width_r, height_r)))
        except openslide.OpenSlideError as error:
            self.close()  # OpenSlide answers nothing more on a handle that failed once
            raise UnreadableRegionError(
                f"{self.name}: {width_r} x {height_r} pixels of level {level} at level-0 "
                f"({x0}, {y0}) cannot be decoded: {error}. The file is damaged or truncated: copy "
                f"it again from its source, or leave this slide out. ({self.path})"
            ) from error
        alpha = rgba[..., 3:]
        if alpha.min() == 255:
            return np.ascontiguousarray(rgba[..., :3])
        over = rgba[..., :3].astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
        return ((over + 127) // 255).astype(np.uint8)


def slide_stem(path: str | Path) -> str:
    """File name without its extension: `.ome.tif` is one; inner dots (TCGA barcodes) stay."""
    name = Path(path).name
    return re.sub(r"(?i)(\.ome)(?=\.tiff?$)", "", name).rsplit(".", 1)[0] if "." in name else name


def _facts(handle: openslide.OpenSlide) -> Facts:
    width0, height0 = handle.dimensions
    keys = ("bounds-x", "bounds-y", "bounds-width", "bounds-height")
    bounds = [handle.properties.get(f"openslide.{key}") for key in keys]
    whole = (0, 0, width0, height0)
    return Facts(
        width0=width0,
        height0=height0,
        level_sizes=tuple(handle.level_dimensions),
        level_downsamples=tuple(handle.level_downsamples),
        bounds0=tuple(int(b) if b else w for b, w in zip(bounds, whole, strict=True)),
        vendor=handle.properties.get("openslide.vendor", "unknown"),
        properties=_properties(handle),
    )


def _properties(handle: openslide.OpenSlide) -> dict[str, str]:
    """All that can be read: a damaged name is listed, and then not found under itself."""
    found = {}
    for key in handle.properties:
        with contextlib.suppress(KeyError):
            found[key] = handle.properties[key]
    return found


@cache
def _process_cache(pid: int) -> openslide.OpenSlideCache:
    """One tile cache for all handles of this process; a forked child gets its own."""
    return openslide.OpenSlideCache(CACHE_BYTES)
