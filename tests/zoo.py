"""Odd slides as people have them, made small: a row each, so that the next report is a row.

    path = SLIDES["padded levels"].write(tmp_path / "a.tif")

`PICTURE` is the slide that most of them show. A row says whether its file is read, as that picture
and no other, or refused, and what is said; `tests/wsi/test_odd_slides.py` runs over all rows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from tests.conftest import stained_picture

JPEG = {"compression": "jpeg", "compressionargs": {"level": 95}}
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
    jfif: bool = False
    """Whether its tiles are JPEG files of their own: YCbCr, and their JFIF header says so."""
    tag: int | None = None
    """What its tag says of the colours, 2 for RGB and 6 for YCbCr; None the truth."""


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
            reduced, data = page.reduced and number > 0, page.picture
            if page.jfif:
                options |= {"photometric": "ycbcr", "subsampling": (2, 2), "compression": "jpeg"}
                options |= {"shape": data.shape, "dtype": data.dtype}
                data = _jpeg_files(padded(data, page.tile), page.tile)
            tiff.write(data, subfiletype=int(reduced), **options)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for written, page in zip(tiff.pages, pages, strict=True):
            if page.tag:
                written.tags["PhotometricInterpretation"].overwrite(page.tag)
    return path


def _jpeg_files(picture: np.ndarray, side: int) -> Iterator[bytes]:
    """Yield each tile as a JPEG file."""
    for y in range(0, picture.shape[0], side):
        for x in range(0, picture.shape[1], side):
            tile, file = Image.fromarray(picture[y : y + side, x : x + side]), io.BytesIO()
            tile.save(file, "jpeg", quality=95, subsampling="4:2:0")
            yield file.getvalue()


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


def orientation(value: int) -> tuple:
    """Return TIFF's Orientation tag: 3 is upside down, 6 on its side."""
    return 274, "H", 1, value, True


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
    "a thumbnail in strips comes first": OddSlide(
        lambda: [
            Page(smaller(PICTURE, 4), tile=0),
            Page(PICTURE, False),
            Page(smaller(PICTURE, 2)),
        ],
        refused="357 x 300 pixels, a thumbnail perhaps, and a larger page of 1429 x 1201 follows",
    ),
    "a thumbnail in tiles comes first": OddSlide(
        lambda: [Page(smaller(PICTURE, 4)), Page(PICTURE, False), Page(smaller(PICTURE, 2))],
        refused="a larger page of 1429 x 1201 follows",
    ),
    "a label is the second page": OddSlide(
        lambda: [Page(PICTURE), Page(label(200, 400), False, tile=0), Page(smaller(PICTURE, 2))]
    ),
    **{
        f"orientation {turned}": OddSlide(
            lambda turned=turned: [Page(PICTURE, options={"extratags": [orientation(turned)]})],
            refused=f"Orientation tag .* is {turned}, .*tiffset -s 274 1",
        )
        for turned in (3, 6)
    },
    "JPEG tiles with an orientation": OddSlide(
        lambda: [Page(PICTURE, options={"extratags": [orientation(3)], **JPEG})]
    ),
    "JFIF tiles under an RGB tag": OddSlide(
        lambda: [Page(PICTURE, jfif=True, tag=2)], warned="say that they are YCbCr, its tag says"
    ),
    "JFIF tiles rightly tagged": OddSlide(lambda: [Page(PICTURE, jfif=True)]),
    "JPEG tiles of true RGB": OddSlide(lambda: [Page(PICTURE, options=JPEG)]),
    "12 bits in 16": OddSlide(
        lambda: [Page(PICTURE.astype(np.uint16) * 16)], refused="16 bits a channel .*12-bit values"
    ),
    "16 bits": OddSlide(lambda: [Page(PICTURE.astype(np.uint16) * 257)]),
    "channels in pages": OddSlide(
        lambda: [
            Page(PICTURE[..., n].copy(), False, options={"photometric": "minisblack"})
            for n in range(3)
        ],
        refused="3 grey pages of 1429 x 1201 pixels: its channels lie in pages",
    ),
    "channels in pages of strips": OddSlide(
        lambda: [
            Page(PICTURE[..., n].copy(), False, 0, {"photometric": "minisblack"}) for n in range(3)
        ],
        refused="3 grey pages of 1429 x 1201 pixels: its channels lie in pages",
    ),
}


def ome(size: str, unit: str = "", pixels: int = 400) -> str:
    """Return an image's element of an OME-XML with its pixel size."""
    axes = "".join(
        f' Size{axis}="{pixels}" PhysicalSize{axis}="{size}"'
        + (f' PhysicalSize{axis}Unit="{unit}"' if unit else "")
        for axis in "XY"
    )
    return f"<Pixels{axes}/>"


def imagej(unit: str, dots: float) -> dict[str, str]:
    """Return the properties of a TIFF that ImageJ wrote: pixels per a unit of its own."""
    text = f"ImageJ=1.54f\nunit={unit}\nloop=false\nmin=0.0\n"
    return {
        "tiff.ImageDescription": text, "tiff.ResolutionUnit": "none",
        "tiff.XResolution": str(dots), "tiff.YResolution": str(dots),
    }  # fmt: skip


RESOLUTIONS = {
    # properties of a slide: all of 0.4 microns per pixel, and the source that is named
    **{
        f"OME in {unit}": ({"tiff.ImageDescription": ome(size, unit)}, "OME PhysicalSizeX")
        for size, unit in [
            ("0.4", "&#181;m"), ("0.4", "\u00b5m"), ("0.4", "\u03bcm"), ("400", "nm"),
            ("4000", "\u00c5"), ("0.0004", "mm"), ("4e-5", "cm"), ("4e-7", "m"),
            (str(0.4 / 25400), "in"),
        ]
    },
    "OME without a unit": ({"tiff.ImageDescription": ome("0.4")}, "OME PhysicalSizeX"),
    "OME whose first image is a macro": (
        {"tiff.ImageDescription": ome("9") + ome("0.4", pixels=40_000) + ome("1.6", pixels=10_000)},
        "OME PhysicalSizeX",
    ),
    **{
        f"ImageJ's {unit}": (imagej(unit, dots), "ImageJ's unit")
        for unit, dots in [
            ("micron", 2.5), ("microns", 2.5), ("\\u00B5m", 2.5), ("\u00b5m", 2.5), ("um", 2.5),
            ("nm", 0.0025), ("mm", 2500), ("cm", 25_000), ("inch", 63_500),
        ]
    },
}  # fmt: skip
NO_RESOLUTION = {
    **{f"ImageJ's {unit!r}": imagej(unit, 2.5) for unit in ("pixel", "", "furlong")},
    "OME in pixels": {"tiff.ImageDescription": ome("1", "pixel")},
    "OME of no size": {"tiff.ImageDescription": ome("")},
    "another program's unit": imagej("micron", 2.5) | {"tiff.ImageDescription": "unit=micron"},
}
PART_FOLDERS = (  # of labelled tiles: what trains first, what tests last
    ("train", "val", "test"),
    ("Train", "Val", "Test"),
    ("TRAIN", "TEST"),
    ("training", "validation", "testing"),
    ("Training", "Valid", "Testing"),
    ("trainval", "Test"),
)
BARCODE = "TCGA-05-4244-01Z-00-DX1"
STEM = f"{BARCODE}.D4FF32CD-38CF-40EA-8213-45C2B100AC01"
FILE_NAMES = (
    # a slide's slide_id and file, and how another program names its files of that slide
    (BARCODE, f"{STEM}.svs", STEM),
    (STEM, f"{STEM}.svs", BARCODE),
    (BARCODE, f"{BARCODE}.svs", BARCODE),
    ("1", "S21-0007_A.ome.tif", "S21-0007_A"),
    (STEM, "moved.svs", BARCODE),
)
