"""The levels of a pyramid: by how much each reduces the slide, and whether it shows the slide.

OpenSlide takes the mean of both axes' ratios for a level's downsample. That is right up to the
rounding of its sides, and wrong where a level is padded to whole tiles, or where one side of a long
scan is short. A label or a thumbnail may be stored as one more level. So the sizes are compared
with what one downsample gives, and the pixels with those of level 0.

Source: Philips scans of CAMELYON16 and DICOM for padded levels (libdicom, issue 79).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

# Other formats state their downsamples; plain images have levels where they are TIFFs.
VENDORS = ("aperio", "generic-tiff", "trestle", "dicom", "plain image")
DROPPED = math.inf  # downsample of a level that is not the slide's: no tile is as coarse
ROUNDING = 1.0  # pixels of a level: sides are rounded down, up or to the nearest
AREA0 = (512, 2048)  # level-0 pixels: least and largest side of a square that is compared
CELLS = 8  # a square is compared as so many means along each side, free of noise and sharpening
FLAT = 6.0  # grey levels: with less spread a square does not tell one picture from another
OTHER_GREY = 40.0  # grey levels between the means of two flat squares of different pictures
ALIKE = 0.5  # least correlation of a level with level 0; 0.9 and more on intact slides


def true_downsample(
    size0: Sequence[int],
    size_r: Sequence[int],
    stated: float,
    tile_r: Sequence[int],
    finer: float = 1.0,
) -> float:
    """Return level-0 pixels per pixel of a level; `DROPPED` if no downsample explains its size.

    A stated downsample that explains both sides to a pixel is returned as it is. Otherwise powers
    of two are preferred, then whole numbers: pyramids are made by them.

    Args:
        size0: the slide's width and height.
        size_r: the level's width and height.
        stated: OpenSlide's downsample, the mean of both ratios.
        tile_r: width and height of the level's tiles, to which it may be padded; 0 if unknown.
        finer: the downsample of the level before, which this one exceeds.
    """
    sides = list(zip(size0, size_r, strict=True))
    if all(abs(side0 / stated - side_r) <= ROUNDING for side0, side_r in sides):
        return stated
    for tiles in ((0, 0), tile_r):
        ranges = [
            _explained(side0, side_r, tile)
            for (side0, side_r), tile in zip(sides, tiles, strict=True)
        ]
        low = max(finer * 1.01, *(start for start, _ in ranges))
        high = min(end for _, end in ranges)
        if low >= high:
            continue
        for candidate in (2.0 ** math.ceil(math.log2(low)), float(math.ceil(low))):
            if candidate < high:
                return candidate
        if tiles == (0, 0):  # the longer side is the least rounded
            longer = max(sides)
            return min(max(longer[0] / longer[1], low), high)
    return DROPPED


def square_side0(downsample: float) -> int:
    """Return the side, in level-0 pixels, of a square in which a level is compared."""
    return int(min(max(2 * CELLS * downsample, AREA0[0]), AREA0[1]))


def same_picture(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> bool | None:
    """Return whether squares of a level show what level 0 shows; None if they cannot tell.

    Args:
        pairs: (h, w, 3) uint8 of the level and of level 0, covering the same squares.
    """
    means = [(_means(square_r), _means(square_0)) for square_r, square_0 in pairs]
    if not means:
        return None
    a, b = (np.concatenate(each) for each in zip(*means, strict=True))
    spread = a.std(), b.std()
    if max(spread) < FLAT:
        return None if abs(a.mean() - b.mean()) < OTHER_GREY else False
    return bool(min(spread) > 1 and np.corrcoef(a, b)[0, 1] >= ALIKE)


def liveliest(rgb: np.ndarray, side: int, number: int = 3) -> list[tuple[int, int]]:
    """Return the corners (row, column) of the squares of a picture with the largest spread."""
    grey = np.asarray(Image.fromarray(rgb).convert("L"), np.float32)
    rows, columns = (max(1, length // side) for length in grey.shape)
    corners = [(i * side, j * side) for i in range(rows) for j in range(columns)]
    spread = [grey[i : i + side, j : j + side].std() for i, j in corners]
    return [corners[n] for n in np.argsort(spread)[::-1][:number]]


def _explained(side0: int, side_r: int, tile_r: int) -> tuple[float, float]:
    """Return the open range of downsamples that give a side, rounded or padded to whole tiles."""
    low = side0 / (side_r + ROUNDING)
    least = side_r - ROUNDING
    if tile_r > 0 and side_r % tile_r == 0:
        least = side_r - tile_r
    return low, side0 / least if least > 0 else math.inf


def _means(rgb: np.ndarray) -> np.ndarray:
    """Return the mean greys of a square's cells, (CELLS * CELLS,) float64."""
    small = Image.fromarray(rgb).convert("L").resize((CELLS, CELLS), Image.Resampling.BOX)
    return np.asarray(small, np.float64).ravel()
