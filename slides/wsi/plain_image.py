"""A plain PNG or JPEG as a slide with one level, held in memory.

TIFFs that `slides.wsi.tiff_image` leaves are read here too, as Pillow has them. PNG and JPEG state
only a printer's resolution, so the cohort table must give mpp. `PlainImage` has the part of an
OpenSlide handle's interface that `levels.Levels` uses.

Price: the whole picture is decoded at the first read, 3 bytes a pixel in each process that reads
it; more than `MAX_PIXELS` is refused, because such a picture should be a pyramid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from slides.errors import NotASlideError

MAX_PIXELS = 1 << 28  # 16,384 x 16,384: 0.8 GB
BAND = 256  # rows that are converted at once
VENDOR = "plain image"
FORMATS = ("PNG", "JPEG", "TIFF")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1")  # 8 bits or fewer: others would have to be rescaled


class PlainImage:
    """A plain picture with OpenSlide's interface; decoded at the first read.

    Raises:
        NotASlideError: too large, more than 8 bits a channel, or CMYK; the message has a remedy.
    """

    def __init__(self, path: Path, name: str):
        self.path, self.name = Path(path), name
        self._pixels = None
        with self._open() as image:
            self.dimensions, mode, kind = image.size, image.mode, image.format
        vips = f"`vips tiffsave {self.path.name} {self.path.stem}_pyramid.tif --tile --pyramid`"
        if self.dimensions[0] * self.dimensions[1] > MAX_PIXELS:
            raise NotASlideError(
                f"{name}: {path} is a plain {kind} of {self.dimensions[0]} x {self.dimensions[1]} "
                f"pixels, too many to hold in memory. Make it a pyramid: {vips}, or leave this "
                f"slide out."
            )
        if mode not in MODES:
            raise NotASlideError(
                f"{name}: {path} is a plain {kind} of kind {mode}; 8-bit RGB or grey is read. "
                f"Convert it to 8-bit RGB, or leave this slide out."
            )
        self.level_dimensions, self.level_downsamples = (self.dimensions,), (1.0,)
        self.properties = {"openslide.vendor": VENDOR}

    def read_region(self, corner0: tuple[int, int], level: int, size: tuple[int, int]):
        """Return (height, width, 4) uint8 like OpenSlide; transparent outside."""
        if self._pixels is None:
            self._pixels = self._decode()
        (x0, y0), (width, height) = corner0, size
        out = np.zeros((height, width, 4), np.uint8)
        left, top = max(x0, 0), max(y0, 0)
        part = self._pixels[top : max(y0 + height, 0), left : max(x0 + width, 0)]
        inside = (
            slice(top - y0, top - y0 + part.shape[0]),
            slice(left - x0, left - x0 + part.shape[1]),
        )
        out[(*inside, slice(part.shape[2]))] = part
        if part.shape[2] == 3:
            out[(*inside, 3)] = 255
        return out

    def close(self) -> None:
        """Drop the decoded pixels."""
        self._pixels = None

    def _open(self) -> Image.Image:
        try:
            with _without_limit():
                return Image.open(self.path, formats=FORMATS)
        except (OSError, ValueError, SyntaxError) as error:
            raise NotASlideError(
                f"{self.name}: {self.path} is a plain image that cannot be opened: {error}. Copy "
                f"it again from its source, or leave this slide out."
            ) from error

    def _decode(self) -> np.ndarray:
        """Return the picture, (height, width, 3 or 4) uint8; raise OpenSlideError if damaged."""
        try:
            with _without_limit(), self._open() as image:
                if image.format == "JPEG" and image.mode == "RGB":
                    import simplejpeg  # strict: Pillow fills damaged parts with grey

                    return simplejpeg.decode_jpeg(self.path.read_bytes())
                mode = "RGBA" if image.has_transparency_data else "RGB"
                width, height = image.size
                out = np.empty((height, width, len(mode)), np.uint8)
                for top in range(0, height, BAND):  # whole, it would be in memory three times
                    below = min(top + BAND, height)
                    out[top:below] = image.crop((0, top, width, below)).convert(mode)
                return out
        except (OSError, ValueError, SyntaxError, ImportError) as error:
            raise openslide.OpenSlideError(str(error)) from error


@contextmanager
def _without_limit() -> Iterator[None]:
    """Lift Pillow's limit of pixels: `MAX_PIXELS` has a message with a remedy."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def is_plain(path: Path) -> bool:
    """Return whether the file begins like a PNG or a JPEG."""
    with open(path, "rb") as file:
        return file.read(4)[:3] in (b"\x89PN", b"\xff\xd8\xff")
