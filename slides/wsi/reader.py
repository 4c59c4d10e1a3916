"""One open slide: its true resolution, a tile at (x0, y0), a thumbnail.

A tile is read from the coarsest level that is not coarser than the tile, by the level's *float*
downsample (some slides state 3.9997 or 4.0056 for 4), then reduced with an anti-aliasing filter.
Nothing is ever enlarged. `slides.wsi.levels` decodes the pixels.

Price: 0.2 to 0.8 ms for a 224 px tile read unscaled, 2 to 3 ms from 443 px (one core, JPEG tiles);
three times that through OpenSlide.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from slides.errors import NotASlideError
from slides.files import slide_stem
from slides.grid import Grid
from slides.wsi.diagnose import tiff_contents, truncated
from slides.wsi.facts import SlideFacts
from slides.wsi.levels import Levels
from slides.wsi.pyramid import liveliest, square_side0
from slides.wsi.resolution import find_mpp, stated_otherwise

LEVEL_TOLERANCE = 0.005  # of a downsample: about one pixel of a 224 px tile
MAX_THUMBNAIL = 1 << 28  # pixels, 0.8 GB: a slide of 300,000 x 200,000 has a fifth of that
BLOCK = 2048  # side of the pieces in which a thumbnail is read: bounds memory for any slide
TIFF_VENDORS = {"aperio", "generic-tiff", "leica", "philips", "trestle", "ventana"}


class Slide:
    """A whole-slide image, or a plain picture of tissue (`slides.wsi.plain_image`).

    Opened lazily; safe to pickle and to use after a fork.

    Args:
        path: The slide's file.
        mpp: Microns per level-0 pixel from the user's table; overrides the file's value.
        name: Name in error messages; by default the file's name without its extension.
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
        self.levels = Levels(self.path, self.name, direct)
        self._table_mpp = mpp
        self._mpp = None

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r})"

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        self.levels.close()

    @property
    def facts(self) -> SlideFacts:
        """Sizes, levels and properties of the slide.

        Raises:
            NotASlideError: OpenSlide refuses the file.
        """
        return self.levels.facts

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
        """Level-0 pixels per pixel of each level, finest first; infinite if it is left out."""
        return self.facts.level_downsamples

    @property
    def bounds0(self) -> tuple[int, int, int, int]:
        """x0, y0, width, height of the scanned part, where QuPath has its origin."""
        return self.facts.bounds0

    @property
    def vendor(self) -> str:
        """OpenSlide's name for the format."""
        return self.facts.vendor

    @property
    def decoders(self) -> tuple[str, ...]:
        """Decoder of each level: "direct", or "OpenSlide: " and the reason."""
        return self.levels.decoders

    @property
    def mpp(self) -> float:
        """Microns per level-0 pixel, mean of both axes.

        Raises:
            MissingResolutionError: neither the table nor the file gives a plausible value.
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
        """Source of the resolution: `table`, a property's name or `objective power`."""
        return self._resolution()[2]

    @property
    def contradiction(self) -> str:
        """Return what the file states where the table's mpp contradicts it; else "" (nothing)."""
        if self._table_mpp is None:
            return ""
        return stated_otherwise(self.facts.properties, self._table_mpp)

    def read(self, x0: int, y0: int, grid: Grid) -> np.ndarray:
        """Return the tile at (x0, y0) at the grid's resolution, (size, size, 3) uint8 RGB.

        Raises:
            TooCoarseError: the tile is finer than the scan.
            UnreadableRegionError: its pixels cannot be decoded.
        """
        return self.region(x0, y0, grid.size0(self.mpp, self.name), grid.size)

    def region(self, x0: int, y0: int, size0: int, size: int) -> np.ndarray:
        """Return the square of `size0` level-0 pixels at (x0, y0), (size, size, 3) uint8 RGB."""
        if size > size0:
            raise ValueError(f"{self.name}: {size} px from {size0}: tiles are never enlarged")
        level = self._level_at(x0, y0, size0, size)
        ds = self.level_downsamples[level]
        if abs(ds * size / size0 - 1) <= LEVEL_TOLERANCE:  # the level is the tile: no resampling
            shift = (size0 / ds - size) / 2  # under a pixel: keeps the centre where it was
            i, j = round(y0 / ds + shift), round(x0 / ds + shift)
            return self.levels.pixels(round(j * ds), round(i * ds), level, size, size)
        start0 = [round(math.floor(v / ds) * ds) for v in (x0, y0)]
        left, top = (x0 - start0[0]) / ds, (y0 - start0[1]) / ds
        width, height = (math.ceil(edge + size0 / ds) for edge in (left, top))
        wide = Image.fromarray(self.levels.pixels(*start0, level, width, height))
        box = (left, top, left + size0 / ds, top + size0 / ds)
        return np.asarray(wide.resize((size, size), Image.Resampling.HAMMING, box=box))

    def level_for(self, size0: int, size: int) -> int:
        """Return the coarsest level that is still as fine as `size0 / size`."""
        limit = size0 / size * (1 + LEVEL_TOLERANCE)
        return max(n for n, ds in enumerate(self.level_downsamples) if n == 0 or ds <= limit)

    def _level_at(self, x0: int, y0: int, size0: int, size: int) -> int:
        """Return the level to read a square from, compared with level 0 at its first use."""
        level = self.level_for(size0, size)
        while not self.levels.believed(level):
            ds = self.level_downsamples[level]
            side0 = min(size0, square_side0(ds))
            corner0 = [round((v + (size0 - side0) // 2) // ds * ds) for v in (x0, y0)]
            if self.levels.compare(level, [(*corner0, side0, None)]):
                break
            level = self.level_for(size0, size)
        return level

    def thumbnail(self, mpp: float = 8.0, max_side: int | None = None) -> tuple[np.ndarray, float]:
        """Return the whole slide, small: (h, w, 3) uint8, and its downsample from level 0.

        The downsample is a whole multiple of a level's own: the nearest to `mpp`, or with
        `max_side` the smallest that keeps both sides within it (the slide then needs no mpp).
        Pixel (i, j) covers [j, j + 1) x [i, i + 1) times the downsample.
        """
        while True:
            out, downsample, level = self._thumbnail(mpp, max_side)
            if self.levels.believed(level):
                return out, downsample
            side = max(1, round(square_side0(self.level_downsamples[level]) / downsample))
            side = min(side, *out.shape[:2])
            squares = [
                (
                    round(j * downsample),
                    round(i * downsample),
                    round(side * downsample),
                    out[i : i + side, j : j + side],
                )
                for i, j in liveliest(out, side)
            ]
            if self.levels.compare(level, squares):
                return out, downsample

    def _thumbnail(self, mpp: float, max_side: int | None) -> tuple[np.ndarray, float, int]:
        """Return the thumbnail, its downsample, and the level it was made from."""
        if max_side is None:
            wanted = max(1.0, mpp / self.mpp)
        else:
            wanted = max(1.0, max(self.width0, self.height0) / max_side)
        level = self.level_for(round(wanted * 1_000_000), 1_000_000)
        width_r, height_r = self.facts.level_sizes[level]
        ds = self.level_downsamples[level]
        if ds != self.facts.stated_downsamples[level]:  # without the padding
            width_r, height_r = (round(side / ds) for side in (self.width0, self.height0))
        factor = max(1, round(wanted / ds))
        if max_side is not None:
            factor = math.ceil(max(width_r, height_r) / max_side)
        block = factor * max(1, BLOCK // factor)
        shape = -(-height_r // factor), -(-width_r // factor), 3
        if shape[0] * shape[1] > MAX_THUMBNAIL:
            raise NotASlideError(
                f"{self.name}: its thumbnail would have {shape[1]} x {shape[0]} pixels: the file "
                f"states {self.width0} x {self.height0} pixels, and tissue is looked for at "
                f"{ds * factor:g} of them a pixel. Correct its mpp, raise tissue.mpp, or leave "
                "this slide out."
            )
        out = np.empty(shape, np.uint8)
        for top in range(0, height_r, block):
            for left in range(0, width_r, block):
                size_r = min(block, width_r - left), min(block, height_r - top)
                piece = self.levels.pixels(round(left * ds), round(top * ds), level, *size_r)
                small = np.asarray(Image.fromarray(piece).reduce(factor))
                i, j = top // factor, left // factor
                out[i : i + small.shape[0], j : j + small.shape[1]] = small
        return out, ds * factor, level

    def check_complete(self) -> None:
        """Check that a TIFF file is as long as its tile tables say.

        An incomplete copy can open and give a thumbnail, and then fail hours into a run.

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

    def _resolution(self) -> tuple[float, float, str]:
        if self._mpp is None:
            self._mpp = find_mpp(self.facts.properties, self.name, self._table_mpp)
        return self._mpp
