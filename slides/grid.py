"""Where the tiles of a slide are. Pure arithmetic: no file is opened here.

Three frames, and only these names for them:

    0   level-0 pixels of the scan     x0, y0, size0     what OpenSlide and h5 files use
    r   pixels of the level read       size_r            what the decoder returns
    t   pixels of the tile             size              what the model sees

Microns per pixel (`mpp`) join them: size0 = size * mpp / slide_mpp, rounded. Nominal magnification
never sizes a tile: at 0.2527 mpp a 224 px tile at 0.5 mpp is 443 level-0 pixels, not 448.

When the tile's resolution is within 5 % of the scan's own, the tile is read unscaled, pixel for
pixel: many 20x scans say 0.5021, and resampling by half a percent costs sharpness and buys nothing.
A scan coarser than that is refused, never enlarged.

The tiles of a slide lie on one lattice that starts at the slide's corner, whatever its tissue looks
like: two masks of the same slide choose from the same tiles, and tiles never overlap by accident.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slides.errors import TilingError, TooCoarseError

UNSCALED_TOLERANCE = 0.05  # of the scan's mpp; scanners that say "0.5" differ by a few percent
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
        if self.size < 1:
            raise TilingError(f"size must be at least 1 pixel, got {self.size}")
        if not MPP_RANGE[0] <= self.mpp <= MPP_RANGE[1]:
            raise TilingError(
                f"mpp must be in [{MPP_RANGE[0]:g}, {MPP_RANGE[1]:g}] microns per pixel, "
                f"got {self.mpp:g}"
            )
        if not 0 <= self.overlap < self.size:
            raise TilingError(f"overlap must be in [0, {self.size}), got {self.overlap}")

    @property
    def magnification(self) -> float:
        """Nominal magnification, 10 / mpp: a name for people and files, never used to size."""
        return 10 / self.mpp

    @property
    def tag(self) -> str:
        """Folder name of an index on this grid, as TRIDENT spells it: 20x_224px_0px_overlap."""
        return f"{self.magnification:g}x_{self.size}px_{self.overlap}px_overlap"

    def unscaled(self, slide_mpp: float) -> bool:
        """Whether tiles of such a scan are its own pixels, not resampled."""
        return abs(self.mpp - slide_mpp) <= UNSCALED_TOLERANCE * slide_mpp

    def other_tiles(self, found: Grid) -> str:
        """Why tiles of the grid found are not such as this one has; "" if they are.

        Their resolution may differ by the tolerance: nominal magnifications do. Overlap makes no
        other tiles, only more of them.
        """
        if found.size != self.size:
            return f"{found.size} px where {self.size} px were asked for"
        if abs(found.mpp - self.mpp) > UNSCALED_TOLERANCE * self.mpp:
            return (
                f"{found.mpp:.4g} microns per tile pixel where {self.mpp:g} were asked for, and "
                f"{UNSCALED_TOLERANCE:.0%} off is the most allowed"
            )
        return ""

    def size0(self, slide_mpp: float, name: str = "slide") -> int:
        """Side of a tile in level-0 pixels, rounded; `size` itself where tiles are unscaled.

        Raises:
            TooCoarseError: the tiles are finer than the scan by more than the tolerance.
        """
        return round(self.size * self._scale0(slide_mpp, name))

    def step0(self, slide_mpp: float, name: str = "slide") -> int:
        """Distance between neighbouring tiles in level-0 pixels, rounded, at least 1.

        Raises:
            TooCoarseError: as `size0`.
        """
        return max(1, round((self.size - self.overlap) * self._scale0(slide_mpp, name)))

    def coords(
        self,
        width0: int,
        height0: int,
        slide_mpp: float,
        name: str = "slide",
        origin0: tuple[int, int] = (0, 0),
    ) -> np.ndarray:
        """Top-left corners of all tiles that lie wholly inside the slide.

        `width0` and `height0` are the slide's own, whatever `origin0` (the first tile's corner) is.

        Returns:
            (T, 2) int64, columns x0, y0, in level-0 pixels; row by row. A slide smaller than one
            tile has T = 0.

        Raises:
            TooCoarseError: as `size0`.
        """
        size0, step0 = self.size0(slide_mpp, name), self.step0(slide_mpp, name)
        x0 = np.arange(origin0[0], width0 - size0 + 1, step0, dtype=np.int64)
        y0 = np.arange(origin0[1], height0 - size0 + 1, step0, dtype=np.int64)
        return np.stack(np.meshgrid(x0, y0), axis=-1).reshape(-1, 2)

    def _scale0(self, slide_mpp: float, name: str) -> float:
        """Level-0 pixels per tile pixel."""
        if self.unscaled(slide_mpp):
            return 1.0
        if slide_mpp > self.mpp:
            raise TooCoarseError(
                f"{name}: tiles were asked for at {self.mpp:g} microns per pixel but the scan has "
                f"{slide_mpp:g}, and enlarging it would invent detail. "
                f"Ask for {slide_mpp:g} or coarser, or leave this slide out."
            )
        return self.mpp / slide_mpp
