"""A TIFF that OpenSlide does not open is read part by part: its own pixels, never all at once.

Pictures are compared bit for bit with what was written; the partner tests show that a damaged part
is an error, and that reading the picture whole would break the bound on memory.
"""

import tracemalloc
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image

from slides.errors import NotASlideError, UnreadableRegionError
from slides.grid import Grid
from slides.wsi import tiff_image
from slides.wsi.levels import Levels
from slides.wsi.reader import Slide
from tests.conftest import stained_picture
from tests.zoo import imagej, ome, smaller

PICTURE = stained_picture(601, 433)
STRIPS = {
    "one strip": {},
    "strips": {"rowsperstrip": 7},
    "strips, LZW": {"rowsperstrip": 7, "compression": "lzw", "predictor": True},
    "strips, deflate": {"rowsperstrip": 64, "compression": "zlib"},
    "strips, JPEG 2000": {"rowsperstrip": 100, "compression": "jpeg2000"},
    "planes": {"rowsperstrip": 50, "planarconfig": "separate"},
    "planes, LZW": {"rowsperstrip": 50, "planarconfig": "separate", "compression": "lzw"},
    "big-endian": {"rowsperstrip": 7, "byteorder": ">", "bigtiff": True},
    "tiles, JPEG XL": {"tile": (96, 80), "compression": "jpegxl"},
    "tiles, WebP": {"tile": (96, 80), "compression": "webp", "compressionargs": {"level": -1}},
    "tiles, JPEG 2000": {"tile": (96, 80), "compression": "jpeg2000"},
    "planes in tiles, JPEG 2000":
        {"tile": (96, 80), "planarconfig": "separate", "compression": "jpeg2000"},
}  # fmt: skip
REGIONS = (
    (0, 0, 601, 433),
    (100, 50, 97, 97),
    (590, 425, 30, 30),
    (-9, -7, 40, 30),
    (900, 0, 8, 8),
)


def write(path, picture=PICTURE, **options):
    if options.get("planarconfig") == "separate":
        picture = np.ascontiguousarray(picture.transpose(2, 0, 1))
    tifffile.imwrite(path, picture, photometric="rgb", metadata=None, **options)
    return path


def expected(picture, x, y, width, height):
    out = np.full((height, width, 3), 255, np.uint8)
    part = picture[max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
    out[max(-y, 0) :, max(-x, 0) :][: part.shape[0], : part.shape[1]] = part
    return out


@pytest.mark.parametrize("way", STRIPS)
def test_every_region_is_the_picture(way, tmp_path):
    path = write(tmp_path / "a.tif", **STRIPS[way])
    levels = Levels(path, "a")
    assert isinstance(levels._open(), tiff_image.TiffImage)
    for x, y, width, height in REGIONS:
        got = levels.pixels(x, y, 0, width, height)
        np.testing.assert_array_equal(got, expected(PICTURE, x, y, width, height), str((x, y)))
    levels.close()


class TestColours:
    @pytest.mark.parametrize("kind", ["minisblack", "miniswhite", "palette"])
    def test_one_channel(self, kind, tmp_path):
        grey = PICTURE[..., 0]
        options = {"photometric": kind, "rowsperstrip": 9}
        truth = np.repeat((255 - grey if kind == "miniswhite" else grey)[..., None], 3, 2)
        if kind == "palette":
            table = np.random.default_rng(3).integers(0, 256, (3, 256))
            options["colormap"] = (table * 257).astype(np.uint16)
            truth = table.T[grey]
        tifffile.imwrite(tmp_path / "a.tif", grey, metadata=None, **options)
        levels = Levels(tmp_path / "a.tif", "a")
        np.testing.assert_array_equal(levels.pixels(0, 0, 0, 601, 433), truth)
        assert isinstance(levels._open(), tiff_image.TiffImage)

    def test_transparent_is_white(self, tmp_path):
        alpha = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 255, np.uint8)])
        alpha[:20, :30, 3] = 0
        tifffile.imwrite(
            tmp_path / "a.tif", alpha, photometric="rgb", extrasamples=["unassalpha"],
            metadata=None, rowsperstrip=9,
        )  # fmt: skip
        truth = PICTURE.copy()
        truth[:20, :30] = 255
        np.testing.assert_array_equal(
            Levels(tmp_path / "a.tif", "a").pixels(0, 0, 0, 601, 433), truth
        )

    def test_jpeg_strips_are_as_pillow_reads_them(self, tmp_path):
        Image.fromarray(PICTURE).save(tmp_path / "a.tif", compression="jpeg", quality=90)
        levels = Levels(tmp_path / "a.tif", "a")
        truth = np.asarray(Image.open(tmp_path / "a.tif").convert("RGB")).astype(int)
        assert isinstance(levels._open(), tiff_image.TiffImage)
        assert np.abs(levels.pixels(0, 0, 0, 601, 433) - truth).mean() < 0.5


class TestLevels:
    def test_of_sub_directories(self, tmp_path):
        """QuPath's OME-TIFFs: smaller versions in SubIFDs, JPEG 2000, the size in OME-XML."""
        picture = np.asarray(Image.fromarray(PICTURE).resize((1202, 866)))
        options = {"photometric": "rgb", "compression": "jpeg2000", "tile": (128, 128)}
        text = f"<OME>{ome('0.25', pixels=1202)}</OME>"
        with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
            tiff.write(picture, subifds=2, metadata=None, description=text, **options)
            for times in (2, 4):
                tiff.write(smaller(picture, times), subfiletype=1, metadata=None, **options)
        with Slide(tmp_path / "a.ome.tif") as slide:
            assert slide.level_downsamples == pytest.approx((1, 2, 4), rel=0.01)
            assert (slide.mpp, slide.mpp_source) == (0.25, "OME PhysicalSizeX")
            tile = slide.read(400, 200, Grid(64, 0.5))
        np.testing.assert_array_equal(tile, smaller(picture, 2)[100:164, 200:264])

    def test_a_label_in_one_is_left_out(self, tmp_path):
        options = {"photometric": "rgb", "compression": "jpeg2000", "tile": (128, 128)}
        with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
            tiff.write(PICTURE, subifds=1, metadata=None, **options)
            tiff.write(smaller(PICTURE, 2)[::-1, ::-1].copy(), metadata=None, **options)
        with Slide(tmp_path / "a.tif", mpp=0.5) as slide, pytest.warns(UserWarning, match="left"):
            tile = slide.read(200, 100, Grid(128, 1.0)).astype(int)
        assert np.abs(tile - smaller(PICTURE, 2)[50:178, 100:228]).mean() < 8


def test_imagejs_strips_state_their_size(tmp_path):
    said = imagej("micron", 2.5)
    tifffile.imwrite(
        tmp_path / "a.tif", PICTURE, photometric="rgb", metadata=None,
        description=said["tiff.ImageDescription"], resolution=(2.5, 2.5), resolutionunit="none",
    )  # fmt: skip
    with Slide(tmp_path / "a.tif") as slide:
        assert (slide.mpp, slide.mpp_source) == (0.4, "ImageJ's unit")


class TestMemory:
    """A picture of 12 MB in strips: about a row of tiles is held, and a strip decoded once."""

    SIDE, CACHE = 2003, 2 << 20

    @pytest.fixture(params=[{}, {"rowsperstrip": 32, "compression": "zlib"}], ids=["raw", "zlib"])
    def path(self, request, tmp_path):
        picture = np.asarray(Image.fromarray(PICTURE).resize((self.SIDE, self.SIDE)))
        return write(tmp_path / "a.tif", picture, **request.param)

    def peak(self, path):
        """Read a lattice of tiles; return the most bytes that numpy and Python held meanwhile."""
        tracemalloc.start()
        try:
            with Slide(path, mpp=0.5) as slide:
                for y0 in range(0, self.SIDE - 224, 224):
                    for x0 in range(0, self.SIDE - 224, 224):
                        slide.read(x0, y0, Grid(224, 0.5))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_is_bounded_and_a_strip_is_decoded_once(self, path, monkeypatch):
        monkeypatch.setattr(tiff_image._cache, "limit", self.CACHE)
        monkeypatch.setattr(tiff_image, "ROWS_BYTES", 64 << 10)
        decoded, decode = [], tiff_image.TiffImage._decode
        monkeypatch.setattr(
            tiff_image.TiffImage, "_decode",
            lambda self, page, part: decoded.append(part.number) or decode(self, page, part),
        )  # fmt: skip
        assert self.peak(path) < 2 * self.CACHE < 3 * self.SIDE**2 / 2
        assert len(decoded) <= 1.2 * len(set(decoded))  # strips that two rows of tiles share

    def test_the_picture_whole_is_seen(self, path, monkeypatch):
        def refuse(path):
            raise tiff_image.openslide.OpenSlideError("not here")

        monkeypatch.setattr("slides.wsi.levels.TiffImage", refuse)
        assert self.peak(path) > 3 * self.SIDE**2


class TestDamage:
    def test_a_damaged_strip_is_an_error_and_no_other(self, tmp_path):
        path = write(tmp_path / "a.tif", **STRIPS["strips, deflate"])
        with tifffile.TiffFile(path) as tiff:
            start, size = (each[3] for each in (tiff.pages[0].dataoffsets,
                                                tiff.pages[0].databytecounts))  # fmt: skip
        raw = bytearray(path.read_bytes())
        raw[start + 20 : start + size - 20] = bytes(size - 40)
        path.write_bytes(raw)
        levels = Levels(path, "a")
        np.testing.assert_array_equal(levels.pixels(0, 0, 0, 601, 190), PICTURE[:190])
        with pytest.raises(UnreadableRegionError, match=r"a: .*part 3: .*damaged or truncated"):
            levels.pixels(0, 190, 0, 100, 10)
        np.testing.assert_array_equal(levels.pixels(0, 260, 0, 601, 100), PICTURE[260:360])

    def test_a_part_without_bytes_is_white(self, tmp_path):
        path = write(tmp_path / "a.tif", **STRIPS["tiles, JPEG 2000"])
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            counts = list(tiff.pages[0].databytecounts)
            tiff.pages[0].tags["TileByteCounts"].overwrite([0, *counts[1:]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            shown = Levels(path, "a").pixels(0, 0, 0, 160, 96)
        assert (shown[:, :80] == 255).all()
        np.testing.assert_array_equal(shown[:, 80:], PICTURE[:96, 80:160])

    def test_what_no_codec_reads_is_refused(self, tmp_path):
        path = write(tmp_path / "a.tif", **STRIPS["tiles, JPEG XL"])
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            tiff.pages[0].tags["Compression"].overwrite(60_001)
        with pytest.raises(NotASlideError, match=r"compression 60001.*leave this slide out"):
            _ = Slide(path).width0
