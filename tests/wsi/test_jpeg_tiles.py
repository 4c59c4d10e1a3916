"""A region decoded directly equals OpenSlide's to the last bit, or OpenSlide reads it.

There is no tolerance, for any chroma subsampling, colour space, tile size, edge tile or level: both
sides are libjpeg-turbo with the same transform and upsampling, and stitching copies bytes. Unusual
files fall back with one warning, and then the pixels are OpenSlide's by construction.
"""

import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slides.errors import SlideError, UnreadableRegionError
from slides.grid import Grid
from slides.wsi import jpeg_tiles as direct
from slides.wsi.jpeg_tiles import JpegDecoder
from slides.wsi.reader import Slide
from tests.conftest import stained_picture

simplejpeg = pytest.importorskip("simplejpeg")
WIDTH, HEIGHT = 709, 431  # prime: the last tiles of each row and column are cut
SLOW = "read through OpenSlide, which is slower"


def jpeg_tiff(
    path, tile=(96, 80), sampling="420", space="YCbCr", levels=(1, 2), damage=None, **encode
):
    """Write a pyramid of separately encoded JPEG tiles; `damage(number, bytes)` changes some.

    `tile` is height, width; `space` is what the TIFF says of what is in the tiles.
    """
    factors = {"444": (1, 1), "422": (2, 1)}.get(sampling, (2, 2))  # only the tiles' own counts
    picture = stained_picture(WIDTH, HEIGHT)

    def tiles(level):
        high, wide = tile
        down, right = -level.shape[0] % high, -level.shape[1] % wide
        padded = np.pad(level, ((0, down), (0, right), (0, 0)), "reflect")
        number = 0
        for y in range(0, level.shape[0], high):
            for x in range(0, level.shape[1], wide):
                part = np.ascontiguousarray(padded[y : y + high, x : x + wide])
                data = simplejpeg.encode_jpeg(part, 85, colorsubsampling=sampling, **encode)
                if space == "RGB":  # scanners that store it write no JFIF header
                    data = data[:2] + data[2 + int.from_bytes(data[4:6]) + 2 :]
                yield damage(number, data) if damage else data
                number += 1

    with tifffile.TiffWriter(path) as tiff:
        for step in levels:
            level = picture[::step, ::step]
            tiff.write(
                tiles(level),
                shape=level.shape,
                dtype=np.uint8,
                tile=tile,
                photometric="YCbCr",
                subsampling=factors,
                compression="jpeg",
                subfiletype=int(step > 1),
                resolution=(1e4 / 0.5 / step,) * 2,
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    if space == "RGB":  # tifffile would not write that of these tiles; scanners do
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            for page in tiff.pages:
                page.tags["PhotometricInterpretation"].overwrite(2)
    return path


def both(path, level, x0, y0, width, height):
    """Return the pixels or the error's class of both ways to read."""
    answers = []
    for way in (True, False):
        with Slide(path, direct=way) as slide:
            try:
                answers.append(slide.levels.pixels(x0, y0, level, width, height))
            except SlideError as error:
                answers.append(type(error))
    return answers


def assert_same(path, regions, decoder="direct"):
    """Read each (level, x_r, y_r, width, height) both ways, and compare."""
    with Slide(path) as fast, Slide(path, direct=False) as slow:
        for level, x_r, y_r, width, height in regions:
            ds = fast.level_downsamples[level]
            where = round(x_r * ds), round(y_r * ds), level, width, height
            np.testing.assert_array_equal(fast.levels.pixels(*where), slow.levels.pixels(*where))
            assert fast.decoders[level].startswith(decoder), fast.decoders


EDGES = [
    (0, 0, 0, 80, 96),
    (0, 80, 96, 80, 96),
    (0, 79, 95, 3, 3),
    (0, 640, 384, 80, 96),  # the last tile, cut by the slide's edge
    (0, -7, -11, 50, 60),
    (0, 700, 425, 64, 32),
    (0, -50, -50, 900, 600),
    (0, 1000, 1000, 8, 8),
    (1, 0, 0, 400, 250),
    (1, 0, 0, 80, 96),
]


class TestSamePixels:
    @pytest.mark.parametrize("sampling", ["444", "422", "420", "440", "411"])
    @pytest.mark.parametrize("space", ["YCbCr", "RGB"])
    def test_every_subsampling_and_colour_space(self, tmp_path, sampling, space):
        """RGB means here that the TIFF says so, and no JFIF header contradicts it."""
        assert_same(jpeg_tiff(tmp_path / "a.tif", sampling=sampling, space=space), EDGES)

    @pytest.mark.parametrize("tile", [(16, 16), (240, 240), (256, 128), (448, 720)])
    def test_every_tile_size(self, tmp_path, tile):
        assert_same(jpeg_tiff(tmp_path / "a.tif", tile), EDGES)

    @pytest.mark.parametrize("name", ["a.svs", "a.tif"])
    def test_as_scanners_write(self, small_slide, name):
        """The JPEG tables are in the directory and not in the tiles."""
        assert_same(small_slide(name), [(0, x, y, 224, 224) for x in (0, 101) for y in (0, 809)])

    @settings(max_examples=60, deadline=None)
    @given(
        x=st.integers(-100, WIDTH + 50),
        y=st.integers(-100, HEIGHT + 50),
        width=st.integers(1, 300),
        height=st.integers(1, 300),
    )
    def test_any_region(self, shared_tiff, x, y, width, height):
        np.testing.assert_array_equal(*both(shared_tiff, 0, x, y, width, height))

    def test_the_real_slides(self, shared_data):
        names = ("PDACtc3_20x.tif", "BS25_SYN_10x.tif", "../fixtures/CMU-1-Small-Region.svs")
        for name in names:
            rng = np.random.default_rng(0)
            path = shared_data / "slides" / "atlas" / name
            with Slide(path, mpp=0.5) as fast, Slide(path, mpp=0.5, direct=False) as slow:
                assert set(fast.decoders) == {"direct"}
                for level in range(len(fast.level_downsamples)):
                    for x0, y0 in rng.integers(-200, (fast.width0, fast.height0), (12, 2)).tolist():
                        where = x0, y0, level, 224, 300
                        np.testing.assert_array_equal(
                            fast.levels.pixels(*where), slow.levels.pixels(*where)
                        )
                tiles = rng.integers(0, (fast.width0 - 448, fast.height0 - 448), (6, 2)).tolist()
                for grid in (Grid(224, 0.5), Grid(224, 0.9)):
                    for x0, y0 in tiles:
                        np.testing.assert_array_equal(
                            fast.read(x0, y0, grid), slow.read(x0, y0, grid)
                        )


@pytest.fixture(scope="module")
def shared_tiff(tmp_path_factory):
    return jpeg_tiff(tmp_path_factory.mktemp("direct") / "a.tif")


class TestTheCheck:
    """Partner tests: each guard, when broken, would let other pixels through."""

    def test_other_pixels_are_noticed_and_not_believed(self, shared_tiff, monkeypatch):
        true = JpegDecoder._decode
        monkeypatch.setattr(JpegDecoder, "_decode", lambda *a: true(*a) ^ 1)
        with Slide(shared_tiff) as slide, Slide(shared_tiff, direct=False) as slow:
            with pytest.warns(UserWarning, match=f"{SLOW}: level 0 decodes to other pixels"):
                tile = slide.levels.pixels(8, 8, 0, 64, 64)
            np.testing.assert_array_equal(tile, slow.levels.pixels(8, 8, 0, 64, 64))
            assert slide.decoders[0].startswith("OpenSlide: level 0 decodes to other pixels")

    def test_a_shift_by_one_pixel_fails_the_rule(self, shared_tiff):
        with Slide(shared_tiff) as fast, Slide(shared_tiff, direct=False) as slow:
            assert fast.decoders[0] == "direct"
            assert (
                fast.levels.pixels(200, 150, 0, 64, 64) != slow.levels.pixels(201, 150, 0, 64, 64)
            ).any()

    def test_between_pixels_of_a_level_openslide_interpolates(self, shared_tiff):
        where = 1, 1, 1, 64, 64  # half a pixel of level 1
        np.testing.assert_array_equal(*both(shared_tiff, *where[2:3], *where[:2], *where[3:]))
        with Slide(shared_tiff) as slide:
            assert (slide.levels.pixels(*where) != slide.levels.pixels(0, 0, *where[2:])).any()


class TestOddFiles:
    """Each file falls back to OpenSlide: same pixels or refusal, at most one warning."""

    def test_a_damaged_tile_is_a_fault_of_the_slide_and_is_counted(self, tmp_path):
        """libjpeg warns, and guesses the rest of the tile; OpenSlide's own word is shorter."""

        def cut(number, data):
            half = len(data) // 2
            return data[:half] + bytes(200) + data[half + 200 :] if number in (22, 30) else data

        path = jpeg_tiff(tmp_path / "a.tif", levels=(1,), damage=cut)
        grid = Grid(64, 0.5)
        with Slide(path) as slide:
            slide.read(0, 0, grid)
            says = (
                r"2 of the 45 JPEG tiles of level 0 .* near level-0 \(320, 192\): Corrupt JPEG data"
            )
            with pytest.raises(UnreadableRegionError, match=says):
                slide.read(320, 192, grid)
            slide.read(0, 0, grid)

    def read_all(self, path):
        """Read all of level 0 in squares both ways; return the warnings of the direct one."""
        with warnings.catch_warnings(record=True) as caught, Slide(path) as fast:
            warnings.simplefilter("always")
            with Slide(path, direct=False) as slow:
                for x0 in range(0, WIDTH, 128):
                    for y0 in range(0, HEIGHT, 128):
                        answers = []
                        for slide in (fast, slow):
                            try:
                                answers.append(slide.levels.pixels(x0, y0, 0, 128, 128))
                            except SlideError as error:
                                answers.append(type(error))
                        np.testing.assert_array_equal(*answers)
        return [str(w.message) for w in caught if SLOW in str(w.message)]

    @pytest.mark.parametrize(
        ("what", "warning"),
        [
            ("progressive", None),
            ("cut", None),
            ("zeros", None),
            ("marker", None),
            ("no jpeg", None),
            ("other size", None),
            ("grey", None),
            ("fill bytes", "damaged"),
            ("adobe", None),
        ],
    )
    def test_one_odd_tile(self, tmp_path, what, warning):
        rng = np.random.default_rng(0)
        small = rng.integers(0, 255, (48, 80, 3), np.uint8)
        grey = rng.integers(0, 255, (96, 80, 1), np.uint8)
        odd = {
            "progressive": lambda d: d.replace(b"\xff\xc0", b"\xff\xc2", 1),
            "cut": lambda d: d[: len(d) // 2],
            "zeros": lambda d: d[: len(d) // 2] + bytes(200) + d[len(d) // 2 + 200 :],
            "marker": lambda d: d[: len(d) // 2] + b"\xff\xd3\x11" + d[len(d) // 2 + 3 :],
            "no jpeg": lambda d: bytes(len(d)),
            "other size": lambda d: simplejpeg.encode_jpeg(small),
            "grey": lambda d: simplejpeg.encode_jpeg(grey, colorspace="GRAY"),
            "fill bytes": lambda d: d[:2] + b"\xff" + d[2:],
            "adobe": lambda d: d[:2] + direct.ADOBE + b"\0" + d[2:],
        }[what]
        path = jpeg_tiff(tmp_path / "a.tif", damage=lambda n, d: odd(d) if n == 22 else d)
        warned = self.read_all(path)
        assert len(warned) == bool(warning)
        assert not warning or warning in warned[0]

    @pytest.mark.parametrize(
        ("tag", "value", "reason"),
        [
            ("TileByteCounts", 0, "1 of its 45 tiles are missing"),
            ("TileOffsets", 0, "1 of its 45 tiles are missing"),
            ("PhotometricInterpretation", 8, "photometric interpretation is 8"),
            ("FillOrder", 2, "fill order is 2"),
        ],
    )
    def test_odd_tags(self, tmp_path, tag, value, reason):
        path = jpeg_tiff(tmp_path / "a.tif", levels=(1,))
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            tags = tiff.pages[0].tags
            if tag == "FillOrder":  # in place of a tag that nobody misses
                spare = tags["ResolutionUnit"]
                tiff.filehandle.seek(spare.offset)
                tiff.filehandle.write((266).to_bytes(2, "little"))
                tiff.filehandle.seek(spare.valueoffset)
                tiff.filehandle.write(value.to_bytes(2, "little"))
            elif tag.startswith("Tile"):
                values = list(tags[tag].value)
                tags[tag].overwrite([*values[:7], value, *values[8:]])
            else:
                tags[tag].overwrite(value)
        warned = self.read_all(path)
        assert len(warned) == 1
        assert reason in warned[0]

    def test_two_directories_of_one_size(self, tmp_path):
        """It cannot be decided which of them is the level."""
        path = jpeg_tiff(tmp_path / "a.tif", levels=(1, 1, 2))
        with Slide(path) as slide, pytest.warns(UserWarning, match="2 directories are of its size"):
            assert "2 directories are of its size" in slide.decoders[0]

    def test_other_formats_are_left_alone_without_a_word(self, coordinate_slide):
        with warnings.catch_warnings(), Slide(coordinate_slide.path) as slide:
            warnings.simplefilter("error")
            slide.levels.pixels(0, 0, 0, 64, 64)
            assert slide.decoders == ("OpenSlide: compression is 1",) * 4


class TestHandle:
    def test_travels_forks_and_opens_again(self, shared_tiff):
        slide = Slide(shared_tiff)
        tile = slide.levels.pixels(10, 10, 0, 100, 100)
        slide.close()
        for again in (slide, pickle.loads(pickle.dumps(slide))):
            np.testing.assert_array_equal(again.levels.pixels(10, 10, 0, 100, 100), tile)

    def test_threads_share_one(self, shared_tiff):
        corners = [(x, y) for x in range(0, 600, 37) for y in range(0, 300, 41)]
        with Slide(shared_tiff) as slide:
            alone = [slide.levels.pixels(*c, 0, 64, 64) for c in corners]
            with ThreadPoolExecutor(4) as pool:
                both = list(pool.map(lambda c: slide.levels.pixels(*c, 0, 64, 64), corners * 3))
        for n, tile in enumerate(both):
            np.testing.assert_array_equal(tile, alone[n % len(alone)])

    def test_the_cache_is_bounded_and_emptied_on_close(self, shared_tiff, monkeypatch):
        monkeypatch.setattr(direct._cache, "limit", 5 * 96 * 80 * 3)
        direct._cache.clear()
        with Slide(shared_tiff) as slide:
            for x0, y0 in pairwise(range(0, 400, 7)):
                slide.levels.pixels(x0, y0, 0, 90, 90)
                held = sum(tile.nbytes for tile in direct._cache.tiles.values())
                assert 0 < held == direct._cache.bytes <= direct._cache.limit
        assert direct._cache.bytes == 0 == len(direct._cache.tiles)

    def test_memory_that_is_used_again_is_nobodys(self, shared_tiff, monkeypatch):
        """Three tiles fit in the cache, so each read of two threads takes another tile's memory."""
        monkeypatch.setattr(direct._cache, "limit", 3 * 96 * 80 * 3)
        direct._cache.clear()
        taken, spare = [], direct._cache.spare
        monkeypatch.setattr(
            direct._cache, "spare", lambda size: taken.append(spare(size)) or taken[-1]
        )
        corners = [(x, y) for x in range(0, 600, 37) for y in range(0, 300, 41)]
        with Slide(shared_tiff) as slide, Slide(shared_tiff, direct=False) as reference:
            truth = [reference.levels.pixels(*c, 0, 64, 64) for c in corners]
            kept = [slide.levels.pixels(*c, 0, 64, 64) for c in corners]
            with ThreadPoolExecutor(4) as pool:
                both = list(pool.map(lambda c: slide.levels.pixels(*c, 0, 64, 64), corners * 3))
        for n, tile in enumerate([*kept, *both]):
            np.testing.assert_array_equal(tile, truth[n % len(truth)])
        again = [each for each in taken if each is not None]
        assert len(again) > 100
        assert not any(np.shares_memory(each, tile) for each in again[:20] for tile in kept[:50])
        held = direct._cache.bytes + sum(each.nbytes for each in direct._cache.spares)
        assert held <= direct._cache.limit + 96 * 80 * 3

    def test_at_random_one_buffer_serves_and_pixels_are_the_same(self, tmp_path):
        """Places of a large slide that do not meet, then all of them in order, in two threads."""
        path = jpeg_tiff(tmp_path / "a.tif", tile=(16, 16), levels=(1,))
        apart = [(x, y) for y in range(3, HEIGHT - 16, 32) for x in range(3, WIDTH - 16, 32)]
        order = [(x, y) for y in range(3, 60, 8) for x in range(3, WIDTH - 16, 8)]
        direct._cache.clear()
        with Slide(path) as fast, Slide(path, direct=False) as slow:
            fast.levels.pixels(0, 0, 0, 16, 16)
            for places, scarce in ((apart, True), (order, False)):
                with ThreadPoolExecutor(2) as pool:
                    found = list(pool.map(lambda c: fast.levels.pixels(*c, 0, 9, 9), places))
                assert (direct._cache.again < direct.SCARCE) == scarce
                for corner, rgb in zip(places, found, strict=True):
                    np.testing.assert_array_equal(rgb, slow.levels.pixels(*corner, 0, 9, 9))

    def test_tiles_with_headers_of_their_own(self, tmp_path):
        """Tables within the tiles, of two qualities: a header that is known is not each tile's."""

        def other(number, data):
            image = Image.open(io.BytesIO(data))
            file = io.BytesIO()
            image.save(file, "jpeg", quality=40 if number % 3 else 85, subsampling="4:2:0")
            return file.getvalue()

        path = jpeg_tiff(tmp_path / "a.tif", damage=other)
        with Slide(path) as fast, Slide(path, direct=False) as slow:
            for x0, y0 in ((0, 0), (80, 96), (160, 96), (240, 96), (33, 50), (400, 200)):
                for width, height in ((80, 96), (150, 120)):
                    regions = [s.levels.pixels(x0, y0, 0, width, height) for s in (fast, slow)]
                    np.testing.assert_array_equal(*regions)
            assert fast.decoders[0] == "direct"

    def test_tiles_handed_out_are_the_callers_to_write(self, shared_tiff):
        with Slide(shared_tiff) as slide:
            for where in ((80, 96, 0, 80, 96), (3, 3, 0, 50, 50)):
                first = slide.levels.pixels(*where)
                kept = first.copy()
                first[:] = 0
                np.testing.assert_array_equal(slide.levels.pixels(*where), kept)
