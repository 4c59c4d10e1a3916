"""The tile grid of a slide: tile sizes and corners. Pure arithmetic, no file is opened.

There are three coordinate frames, always named so:

    0   level-0 pixels of the scan     x0, y0, size0     what OpenSlide and h5 files use
    r   pixels of the level read       size_r            what the decoder returns
    t   pixels of the tile             size              what the model sees

Microns per pixel (`mpp`) join them: size0 = size * mpp / slide_mpp, rounded. Nominal magnification
never sizes a tile: at 0.2527 mpp a 224 px tile at 0.5 mpp is 443 level-0 pixels, not 448.

If the tile's resolution is within 5 % of the scan's own, the tile is read unscaled, pixel for
pixel: many 20x scans report 0.5021, and resampling by half a percent only costs sharpness.
A scan coarser than that is refused, never enlarged.

The lattice of tiles starts at the slide's corner, not at its tissue: two masks of one slide choose
from the same tiles, and tiles never overlap by accident.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slides.errors import NotASlideError, TilingError, TooCoarseError, refuse

UNSCALED_TOLERANCE = 0.05  # of the scan's mpp; scanners that say "0.5" differ by a few percent
MAX_TILES = 10_000_000  # of a slide: 300,000 x 200,000 pixels have 1.2 million of 224
MPP_RANGE = (0.05, 20.0)  # outside it a resolution is a printer's default (72 dpi reads 352.8)


@dataclass(frozen=True)
class Grid:
    """A regular grid of square tiles at one physical resolution."""

    size: int = 224
    """Side of a tile, in tile pixels."""
    mpp: float = 0.5
    """Microns per tile pixel: 0.5 is about 20x, 0.25 about 40x."""
    overlap: int = 0
    """Pixels shared by neighbours, in tile pixels."""

    def __post_init__(self):
        faults = []
        if self.size < 1:
            faults.append(f"tile size must be at least 1 pixel, got {self.size}: set tile_px")
        if not MPP_RANGE[0] <= self.mpp <= MPP_RANGE[1]:
            faults.append(
                f"mpp must be in [{MPP_RANGE[0]:g}, {MPP_RANGE[1]:g}] microns per pixel, "
                f"got {self.mpp:g}: 0.5 is about 20x, 0.25 about 40x"
            )
        if not 0 <= self.overlap < max(self.size, 1):
            faults.append(f"overlap must be in [0, tile size) pixels, got {self.overlap}")
        refuse(faults, "data.tiles", TilingError)

    @property
    def magnification(self) -> float:
        """Nominal magnification, 10 / mpp; used in names only, never to size a tile."""
        return 10 / self.mpp

    @property
    def tag(self) -> str:
        """Folder name of an index on this grid, in TRIDENT's spelling: 20x_224px_0px_overlap."""
        return f"{self.magnification:g}x_{self.size}px_{self.overlap}px_overlap"

    def unscaled(self, slide_mpp: float) -> bool:
        """Return whether tiles of a scan at `slide_mpp` are read without resampling."""
        return abs(self.mpp - slide_mpp) <= UNSCALED_TOLERANCE * slide_mpp

    def other_tiles(self, found: Grid) -> str:
        """Return why tiles of the grid `found` differ from this grid's, or "" if they match.

        Resolutions may differ by `UNSCALED_TOLERANCE`, as nominal magnifications do. Overlap
        is not compared: it adds tiles and does not change their size.
        """
        if found.size != self.size:
            return f"{found.size} px where {self.size} px were requested"
        if abs(found.mpp - self.mpp) > UNSCALED_TOLERANCE * self.mpp:
            return (
                f"{found.mpp:.4g} microns per tile pixel where {self.mpp:g} were requested, and "
                f"{UNSCALED_TOLERANCE:.0%} off is the most allowed"
            )
        return ""

    def size0(self, slide_mpp: float, name: str = "slide") -> int:
        """Return the side of a tile in level-0 pixels, rounded; `size` if tiles are unscaled.

        Raises:
            TooCoarseError: the tiles are finer than the scan by more than the tolerance.
        """
        return round(self.size * self._scale0(slide_mpp, name))

    def step0(self, slide_mpp: float, name: str = "slide") -> int:
        """Return the distance between neighbouring tiles in level-0 pixels, rounded, at least 1."""
        return max(1, round((self.size - self.overlap) * self._scale0(slide_mpp, name)))

    def coords(
        self,
        width0: int,
        height0: int,
        slide_mpp: float,
        name: str = "slide",
        origin0: tuple[int, int] = (0, 0),
    ) -> np.ndarray:
        """Return the top-left corners of all tiles that lie fully inside the slide.

        `width0` and `height0` are the whole slide's; `origin0` is the first tile's corner.

        Raises:
            NotASlideError: more tiles than any slide has.

        Returns:
            (T, 2) int64, columns x0, y0, in level-0 pixels; row by row. A slide smaller than one
            tile has T = 0.
        """
        size0, step0 = self.size0(slide_mpp, name), self.step0(slide_mpp, name)
        across, down = ((side - size0) // step0 + 1 for side in (width0, height0))
        if across > 0 < down and across * down > MAX_TILES:
            raise NotASlideError(
                f"{name}: {across} x {down} tiles, where {MAX_TILES} are the most of a slide: it "
                f"states {width0} x {height0} pixels at {slide_mpp:g} microns. Correct its mpp, "
                "ask for coarser tiles, or leave this slide out."
            )
        x0 = np.arange(origin0[0], width0 - size0 + 1, step0, dtype=np.int64)
        y0 = np.arange(origin0[1], height0 - size0 + 1, step0, dtype=np.int64)
        return np.stack(np.meshgrid(x0, y0), axis=-1).reshape(-1, 2)

    def _scale0(self, slide_mpp: float, name: str) -> float:
        """Return level-0 pixels per tile pixel."""
        if self.unscaled(slide_mpp):
            return 1.0
        if slide_mpp > self.mpp:
            raise TooCoarseError(
                f"{name}: tiles were requested at {self.mpp:g} microns per pixel but the scan has "
                f"{slide_mpp:g}, and enlarging it would invent detail. "
                f"Ask for {slide_mpp:g} or coarser, or leave this slide out."
            )
        return self.mpp / slide_mpp
