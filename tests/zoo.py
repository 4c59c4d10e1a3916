"""Odd slides as people have them, made small: a row each, so that the next report is a row.

    path = SLIDES["padded levels"].write(tmp_path / "a.tif")

`PICTURE` is the slide that most of them show. A row says whether its file is read, as that picture
and no other, or refused, and what is said; `tests/wsi/test_odd_slides.py` runs over all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from tests.conftest import stained_picture

WIDTH, HEIGHT, TILE = 1429, 1201, 128  # primes: sides of levels are rounded
PICTURE = np.asarray(Image.fromarray(stained_picture(230, 194)).resize((WIDTH, HEIGHT)))
"""Tissue with nuclei of 50 pixels: a shift by one pixel changes little, by six a lot."""


@dataclass(frozen=True)
class Page:
    """One directory of a TIFF."""

    picture: np.ndarray
    reduced: bool = True
    """Whether it is marked as a smaller version of another page."""
    tile: int = TILE
    """Side of its tiles; 0 stores strips."""
    options: dict = field(default_factory=dict)
    """Further arguments of `tifffile.TiffWriter.write`."""


@dataclass(frozen=True)
class OddSlide:
    """A kind of odd file, and what is right for it."""

    pages: Callable[[], Sequence[Page]]
    refused: str = ""
    """Pattern of the error; "" if the file is read as `PICTURE`."""
    warned: str = ""
    """Pattern of the warning at its reading; "" if there is none."""
    picture: np.ndarray = field(default_factory=lambda: PICTURE)
    """What it shows."""

    def write(self, path: Path) -> Path:
        """Write the file; return its path."""
        return write_pages(path, self.pages())


def write_pages(path: Path, pages: Sequence[Page], mpp: float | None = 0.5) -> Path:
    """Write a TIFF, uncompressed unless a page's options say otherwise; return its path."""
    stated = {"resolution": (1e4 / mpp,) * 2, "resolutionunit": "CENTIMETER"} if mpp else {}
    with tifffile.TiffWriter(path) as tiff:
        for number, page in enumerate(pages):
            options = {"photometric": "rgb", "metadata": None} | stated | page.options
            if page.tile:
                options["tile"] = (page.tile, page.tile)
            reduced = page.reduced and number > 0
            tiff.write(page.picture, subfiletype=int(reduced), **options)
    return path


def smaller(picture: np.ndarray, times: int) -> np.ndarray:
    """Return the means of `times` x `times` pixels; what does not fill a pixel is dropped."""
    height, width = (side // times * times for side in picture.shape[:2])
    cut = picture[:height, :width].reshape(height // times, times, width // times, times, 3)
    return cut.mean((1, 3)).round().astype(np.uint8)


def padded(picture: np.ndarray, tile: int = TILE, value: int = 0) -> np.ndarray:
    """Return the picture in the upper left corner of a whole number of tiles."""
    down, right = (-side % tile for side in picture.shape[:2])
    return np.pad(picture, ((0, down), (0, right), (0, 0)), constant_values=value)


def label(width: int, height: int) -> np.ndarray:
    """Return a label: white, written on in red ink."""
    picture = np.full((height, width, 3), 250, np.uint8)
    for line in range(height // 8, height * 7 // 8, 24):
        picture[line : line + 9, width // 2 : width * 7 // 8] = (190, 60, 120)
    return picture


def _padded_levels() -> list[Page]:
    """Return levels padded to whole tiles, as Philips scans have them."""
    return [Page(padded(smaller(PICTURE, times)) if times > 1 else PICTURE) for times in (1, 2, 4)]


SLIDES = {
    "levels rounded down": OddSlide(lambda: [Page(PICTURE), Page(smaller(PICTURE, 2))]),
    "padded levels": OddSlide(_padded_levels),
    "levels padded with white": OddSlide(
        lambda: [Page(PICTURE), Page(padded(smaller(PICTURE, 4), value=255))]
    ),
    "a long scan": OddSlide(
        lambda: [Page(PICTURE[:131]), Page(smaller(PICTURE[:131], 4))], picture=PICTURE[:131]
    ),
    "a label of other proportions": OddSlide(
        lambda: [Page(PICTURE), Page(smaller(PICTURE, 2)), Page(label(200, 400))],
        warned="level 2 .* is left out: its proportions are not those of 1429 x 1201",
    ),
    "a label like a padded level": OddSlide(
        lambda: [Page(PICTURE), Page(smaller(PICTURE, 2)), Page(label(384, 384))],
        warned="level 2 .* is left out: it shows another picture",
    ),
    "a label of the slide's proportions": OddSlide(
        lambda: [Page(PICTURE), Page(smaller(PICTURE, 2)), Page(label(WIDTH // 4, HEIGHT // 4))],
        warned="level 2 .* is left out: it shows another picture",
    ),
    "a level turned round": OddSlide(
        lambda: [Page(PICTURE), Page(smaller(PICTURE, 2)[::-1, ::-1])],
        warned="level 1 .* is left out: it shows another picture",
    ),
}
