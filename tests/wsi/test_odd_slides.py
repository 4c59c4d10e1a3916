"""Each odd file of the zoo is read as the picture it shows, at every scale, or refused with why.

A tile is compared with the mean of the picture's pixels that it covers; the partner tests show
that a tile from a few pixels further, or a level that is believed, would fail.
"""

import io
import pickle
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from slides.errors import NotASlideError
from slides.grid import Grid
from slides.tiling.index import index_slide
from slides.tiling.tissue import Tissue
from slides.wsi import facts, jpeg_colours, levels, pyramid
from slides.wsi.pyramid import DROPPED, true_downsample
from slides.wsi.reader import Slide
from tests.zoo import PICTURE, SLIDES, Page, label, padded, smaller, write_pages

READ = [name for name, slide in SLIDES.items() if not slide.refused]
REFUSED = [name for name, slide in SLIDES.items() if slide.refused]
GREYS = 2.5  # mean difference that resampling and half a pixel cause; twice that is six pixels off


def truth(picture, x0, y0, size0, size):
    """The mean of the picture's pixels under each pixel of a tile."""
    part = Image.fromarray(picture[y0 : y0 + size0, x0 : x0 + size0])
    return np.asarray(part.resize((size, size), Image.Resampling.BOX), float)


def difference(slide, picture, grid):
    """The largest mean difference of nine tiles from the picture."""
    size0 = grid.size0(slide.mpp)
    furthest = np.array(picture.shape[1::-1]) - size0
    worst = 0.0
    for share_y in (0, 0.5, 1):
        for share_x in (0, 0.5, 1):
            x0, y0 = (
                int(v) // 4 * 4 for v in furthest * (share_x, share_y)
            )  # on all levels' pixels
            tile = slide.read(x0, y0, grid).astype(float)
            worst = max(worst, np.abs(tile - truth(picture, x0, y0, size0, grid.size)).mean())
    return worst


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("name", READ)
def test_read_as_what_it_shows(name, direct, tmp_path):
    odd = SLIDES[name]
    path = odd.write(tmp_path / "a.tif")
    with warnings.catch_warnings(record=True) as caught, Slide(path, direct=direct) as slide:
        warnings.simplefilter("always")
        assert (slide.width0, slide.height0) == odd.picture.shape[1::-1]
        thumbnail, downsample = slide.thumbnail(mpp=2.0)
        side = min(thumbnail.shape[:2]) - 1
        shown = truth(odd.picture, 0, 0, round(side * downsample), side)
        assert np.abs(thumbnail[:side, :side] - shown).mean() < GREYS
        for mpp in (0.5, 1.0, 2.0):
            assert difference(slide, odd.picture, Grid(24, mpp)) < GREYS, mpp
    said = [str(w.message) for w in caught if "slower" not in str(w.message)]
    assert len(said) == bool(odd.warned), said
    assert not odd.warned or re.search(odd.warned, said[0])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name, tmp_path):
    path = SLIDES[name].write(tmp_path / "a.tif")
    with pytest.raises(NotASlideError, match=f"a: .*{SLIDES[name].refused}") as caught:
        Slide(path, mpp=0.5).facts  # noqa: B018, reading the property opens the file
    assert "leave this slide out" in str(caught.value)


class TestTheCheck:
    def test_a_few_pixels_off_is_seen(self, tmp_path):
        path = SLIDES["levels rounded down"].write(tmp_path / "a.tif")
        with Slide(path) as slide:
            assert difference(slide, np.roll(PICTURE, 6, 1), Grid(24, 1.0)) > 2 * GREYS

    def test_padded_levels_that_are_believed_are_seen(self, tmp_path, monkeypatch):
        monkeypatch.setattr(facts, "true_downsample", lambda size0, size_r, stated, *_: stated)
        monkeypatch.setattr(levels, "same_picture", lambda pairs: True)
        with Slide(SLIDES["padded levels"].write(tmp_path / "a.tif")) as slide:
            assert difference(slide, PICTURE, Grid(24, 1.0)) > 2 * GREYS

    def test_a_label_that_is_believed_is_seen(self, tmp_path, monkeypatch):
        monkeypatch.setattr(levels, "same_picture", lambda pairs: True)
        path = SLIDES["a label of the slide's proportions"].write(tmp_path / "a.tif")
        with Slide(path) as slide:
            assert difference(slide, PICTURE, Grid(24, 2.0)) > 2 * GREYS

    def test_colours_by_the_tag_alone_are_seen(self, tmp_path, monkeypatch):
        monkeypatch.setattr(jpeg_colours, "_says_ycbcr", lambda *_: False)
        path = SLIDES["JFIF tiles under an RGB tag"].write(tmp_path / "a.tif")
        with Slide(path) as slide:
            assert difference(slide, PICTURE, Grid(24, 0.5)) > 10 * GREYS


class TestColours:
    def test_the_arithmetic_is_the_decoders(self):
        """A JPEG of all colours in steps of 51, decoded by libjpeg with and without conversion."""
        values = np.arange(0, 256, 51, np.uint8)
        colours = np.stack(np.meshgrid(values, values, values), -1).reshape(-1, 1, 3)
        file = io.BytesIO()
        Image.fromarray(np.tile(colours, (1, 97, 1))).save(file, "jpeg", quality=70)
        planes = Image.open(file)
        planes.draft("YCbCr", None)
        decoded = np.asarray(Image.open(file))
        assert planes.mode == "YCbCr"
        np.testing.assert_array_equal(jpeg_colours.ycbcr_to_rgb(np.asarray(planes)), decoded)

    def test_transparent_pixels_stay_so(self):
        pixels = np.zeros((1, 2, 4), np.uint8)
        pixels[0, 0] = 235, 128, 128, 255
        out = jpeg_colours.ycbcr_to_rgb(pixels)[0].tolist()
        assert out == [[235, 235, 235, 255], [0, 0, 0, 0]]

    @pytest.mark.parametrize("name", ["JFIF tiles under an RGB tag", "JPEG tiles of true RGB"])
    def test_both_ways_give_the_same_bits(self, name, tmp_path):
        path = SLIDES[name].write(tmp_path / "a.tif")
        with warnings.catch_warnings(), Slide(path) as fast, Slide(path, direct=False) as slow:
            warnings.simplefilter("ignore")
            for x0, y0 in ((0, 0), (333, 257), (1300, 1100)):
                regions = [s.levels.pixels(x0, y0, 0, 200, 150) for s in (fast, slow)]
                np.testing.assert_array_equal(*regions)
            assert fast.decoders == ("direct",)


class TestDownsample:
    CAMELYON = (97792, 221184)  # a slide of CAMELYON16, and its levels, all of whole tiles

    def test_of_levels_padded_to_tiles_of_512(self):
        sizes = [(49152, 110592), (24576, 55296), (12288, 27648), (6144, 13824), (3072, 7168),
                 (1536, 3584), (1024, 2048), (512, 1024), (512, 512)]  # fmt: skip
        found = [1.0]
        for size in sizes:
            stated = (self.CAMELYON[0] / size[0] + self.CAMELYON[1] / size[1]) / 2
            found.append(true_downsample(self.CAMELYON, size, stated, (512, 512), found[-1]))
        assert found == [2.0**level for level in range(10)]

    @pytest.mark.parametrize(
        ("size0", "size_r", "tile", "downsample"),
        [
            ((200_000, 3000), (12_500, 187), 256, 16.0),  # 3000 / 16 is rounded down
            ((3000, 200_000), (188, 12_500), 256, 16.0),  # or up
            ((99_999, 1000), (33_333, 334), 256, 3.0),
            ((2000, 1000), (400, 400), 256, DROPPED),
            ((2000, 1000), (250, 400), 256, DROPPED),
        ],
    )
    def test_of_one_level(self, size0, size_r, tile, downsample):
        stated = np.mean([size0[0] / size_r[0], size0[1] / size_r[1]])
        assert true_downsample(size0, size_r, stated, (tile, tile)) == downsample

    def test_what_explains_both_sides_is_kept_to_the_last_bit(self):
        for stated in (4.000828729281768, 3.9997):
            size_r = tuple(round(side / stated) for side in (7243, 8392))
            assert true_downsample((7243, 8392), size_r, stated, (256, 256)) == stated


class TestCompared:
    def test_a_level_is_compared_once(self, tmp_path, monkeypatch):
        path = SLIDES["levels rounded down"].write(tmp_path / "a.tif")
        calls = []
        monkeypatch.setattr(
            levels, "same_picture", lambda pairs: calls.append(pairs) or pyramid.same_picture(pairs)
        )
        with Slide(path) as slide:
            for x0 in (300, 500, 700):
                slide.read(x0, 600, Grid(64, 1.0))
            pickle.loads(pickle.dumps(slide)).read(500, 600, Grid(64, 1.0))
        assert len(calls) == 1

    def test_glass_does_not_tell_and_is_asked_a_few_times(self, tmp_path, monkeypatch):
        glass = np.full_like(PICTURE, 244)
        path = write_pages(tmp_path / "a.tif", [Page(glass), Page(smaller(glass, 2))])
        told = []
        monkeypatch.setattr(
            levels, "same_picture", lambda pairs: told.append(pyramid.same_picture(pairs))
        )
        with Slide(path) as slide:
            for x0 in range(0, 1200, 100):
                slide.read(x0, 600, Grid(64, 1.0))
        assert told == [None] * levels.UNTOLD

    def test_level_0_without_pixels_blames_no_level(self, tmp_path):
        """A generic TIFF may leave out tiles: the coarser level shows what was there."""
        import tifffile

        path = write_pages(tmp_path / "a.tif", [Page(PICTURE), Page(smaller(PICTURE, 4))])
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            counts = tiff.pages[0].tags["TileByteCounts"]
            counts.overwrite([0] * counts.count)
        with warnings.catch_warnings(), Slide(path) as slide:
            warnings.simplefilter("error")
            assert slide.thumbnail(mpp=2.0)[0].std() > 20
            assert DROPPED not in slide.level_downsamples

    def test_tissue_is_sought_on_the_slide_and_not_on_its_label(self, tmp_path):
        picture = np.full((1024, 1536, 3), 245, np.uint8)
        picture[64:960, 64:512] = (200, 110, 160)
        pages = [Page(picture), Page(smaller(picture, 2)), Page(padded(label(384, 384)))]
        path = write_pages(tmp_path / "a.tif", pages)
        with pytest.warns(UserWarning, match="left out"):
            index = index_slide(Slide(path), Grid(64, 0.5), Tissue(min_area_um2=1000.0))
        assert len(index) > 40
        assert index.coords0[:, 0].max() <= 512
