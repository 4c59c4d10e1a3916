"""A slide as deep zoom tiles (JPEG, by OpenSlide's DeepZoomGenerator), and single tiles of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import openslide
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from slides.errors import SlideError
from slides.wsi.reader import Slide
from tapfm.viewer.contents import Contents

TILE, OVERLAP = 254, 1  # px: 256 with both borders
QUALITY = 80
SINGLE = 224  # px of a single tile's picture, at most


class Pyramid:
    """An open slide.

    Args:
        path: its file.
        name: for errors.

    Raises:
        SlideError: it cannot be opened.
    """

    def __init__(self, path: Path, name: str):
        self.slide = Slide(path, name=name)
        downsamples = self.slide.level_downsamples
        try:
            image = openslide.open_slide(path)
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(f"{name}: {path} cannot be opened ({error})") from error
        if len(image.level_downsamples) == len(downsamples):
            image = _Levels(image, downsamples)
        self.zoom = DeepZoomGenerator(image, TILE, OVERLAP)

    def facts(self, level: int | None = None) -> Facts:
        """Return what the page needs of the slide, shown up to a level; None is the finest."""
        last = self.zoom.level_count - 1
        level = last if level is None else min(level, last)
        width, height = self.zoom.level_dimensions[level]
        try:
            mpp = self.slide.mpp
        except SlideError:  # a scale bar needs it, and nothing else
            mpp = None
        return Facts(width, height, 2 ** (last - level), level, mpp)

    def level_within(self, side: int) -> int:
        """Return the finest level whose longer side has at most so many pixels."""
        sizes = self.zoom.level_dimensions
        return max(n for n, size in enumerate(sizes) if max(size) <= side or n == 0)

    def tile(self, level: int, column: int, row: int) -> bytes:
        """Return a deep zoom tile as JPEG.

        Raises:
            ValueError: there is no such tile.
            OpenSlideError: it cannot be read.
        """
        return _jpeg(self.zoom.get_tile(level, (column, row)))

    def single(self, x0: int, y0: int, size0: int) -> bytes:
        """Return the picture of one tile at level-0 pixels as JPEG.

        Raises:
            SlideError: it cannot be read.
        """
        return _jpeg(Image.fromarray(self.slide.region(x0, y0, size0, min(size0, SINGLE))))


def open_slide(contents: Contents, number: int) -> Pyramid:
    """Return a slide of a run, opened.

    Raises:
        SlideError: it cannot be opened, or its file is unknown.
    """
    shown = contents.slides[number]
    if shown.path is None:
        raise SlideError(
            f"{shown.slide_id}: its file is not known, since cohort table or index are missing"
        )
    return Pyramid(shown.path, shown.slide_id)


@dataclass(frozen=True)
class Facts:
    """A slide's picture on the page."""

    width: int
    height: int
    """Pixels of the picture at its finest level."""
    scale: int
    """Level-0 pixels per pixel of it."""
    level: int
    """Number of that level."""
    mpp: float | None
    """Microns per level-0 pixel, where known."""


class _Levels:
    """A slide whose levels are those that show it, by their true downsamples (`wsi.pyramid`)."""

    def __init__(self, image: openslide.AbstractSlide, downsamples: tuple[float, ...]):
        self._image, self.level_downsamples = image, downsamples

    def __getattr__(self, name: str):
        return getattr(self._image, name)

    def get_best_level_for_downsample(self, downsample: float) -> int:
        """Return the coarsest level that is finer than a downsample."""
        fine = [n for n, each in enumerate(self.level_downsamples) if each <= downsample * 1.01]
        return max(fine, key=lambda n: self.level_downsamples[n], default=0)


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
