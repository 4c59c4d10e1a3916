"""A tile shows exactly its square, at any level, and its size follows from the true mpp.

The slide encodes its own coordinates, which proves the place; `level_by_search` chooses a level by
plain search. Every file that is not an intact slide is refused with its own reason.
"""

import multiprocessing
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest

from slides.errors import (
    MissingResolutionError,
    NotASlideError,
    TooCoarseError,
    UnreadableRegionError,
)
from slides.grid import Grid
from slides.wsi import reader
from slides.wsi.diagnose import tiff_contents
from slides.wsi.reader import Slide, slide_stem
from slides.wsi.resolution import find_mpp

CORNERS0 = [(0, 0), (37, 41), (509, 251), (1531 - 448, 1193 - 448)]


def with_levels(slide, downsamples):
    """Return the same slide with these downsamples as its levels'."""
    slide.levels._facts = replace(slide.facts, level_downsamples=downsamples)
    return slide


class TestPlace:
    @pytest.mark.parametrize(("x0", "y0"), CORNERS0)
    def test_unscaled_tiles_are_the_scan_pixel_for_pixel(self, coordinate_slide, x0, y0):
        tile = Slide(coordinate_slide.path).read(x0, y0, Grid(113, 0.25))
        assert tile.shape == (113, 113, 3)
        assert tile.dtype == np.uint8
        coordinate_slide.assert_shows(tile, x0, y0, size0=113, within0=0)

    @pytest.mark.parametrize("level", [1, 2, 3])
    @pytest.mark.parametrize(("x0", "y0"), CORNERS0)
    def test_every_level(self, coordinate_slide, x0, y0, level):
        """Without reduction each pixel is one of the level's; they are 2**level wide."""
        size0 = 448
        size = size0 >> level
        slide = Slide(coordinate_slide.path)
        ds = slide.level_downsamples[level]
        tile = slide.levels.pixels(
            round(x0 / ds) * round(ds), round(y0 / ds) * round(ds), level, size, size
        )
        coordinate_slide.assert_shows(
            tile, round(x0 / ds) * round(ds), round(y0 / ds) * round(ds), size0, within0=ds + 1
        )

    @pytest.mark.parametrize("mpp", [0.3, 0.37, 0.499, 0.5, 0.7, 0.99, 1.0, 1.13])
    @pytest.mark.parametrize(("x0", "y0"), CORNERS0)
    def test_every_scale(self, coordinate_slide, x0, y0, mpp):
        """Reduced tiles, from any level: no pixel is off by more than one of the level's."""
        grid = Grid(97, mpp)
        slide = Slide(coordinate_slide.path)
        size0 = grid.size0(0.25)
        ds = slide.level_downsamples[slide.level_for(size0, 97)]
        tile = slide.read(x0, y0, grid)
        assert tile.shape == (97, 97, 3)
        coordinate_slide.assert_shows(tile, x0, y0, size0, within0=ds + 1)

    @pytest.mark.parametrize("shift0", [(9, 0), (0, 9), (-9, 0)])
    def test_a_tile_from_elsewhere_is_caught(self, coordinate_slide, shift0):
        """Partner test: with an offset of nine level-0 pixels in x or y, the check fails."""
        tile = Slide(coordinate_slide.path).read(300, 200, Grid(97, 1.13))
        with pytest.raises(AssertionError):
            coordinate_slide.assert_shows(tile, 300 + shift0[0], 200 + shift0[1], 438, within0=5)

    def test_swapped_axes_are_caught(self, coordinate_slide):
        tile = Slide(coordinate_slide.path).read(300, 200, Grid(97, 0.25))
        with pytest.raises(AssertionError):
            coordinate_slide.assert_shows(tile.swapaxes(0, 1), 300, 200, 97, within0=5)

    def test_the_thumbnail_covers_the_whole_slide(self, coordinate_slide):
        slide = Slide(coordinate_slide.path)
        rgb, downsample = slide.thumbnail(mpp=2.0)
        assert downsample == pytest.approx(8, rel=0.01)
        height, width = rgb.shape[:2]
        assert (width - 1) * downsample < 1531 <= width * downsample + downsample
        assert (height - 1) * downsample < 1193 <= height * downsample + downsample
        side = min(height, width) - 1
        coordinate_slide.assert_shows(rgb[:side, :side], 0, 0, side * downsample, downsample + 1)

    @pytest.mark.parametrize("block", [64, 101, 4096])
    def test_the_thumbnail_does_not_depend_on_how_it_was_cut(
        self, coordinate_slide, block, monkeypatch
    ):
        slide = with_levels(Slide(coordinate_slide.path), (1.0,))
        whole, downsample = slide.thumbnail(mpp=0.75)
        assert downsample == 3
        assert whole.shape == (398, 511, 3)
        monkeypatch.setattr(reader, "BLOCK", block)
        np.testing.assert_array_equal(slide.thumbnail(mpp=0.75)[0], whole)

    @pytest.mark.parametrize("max_side", [1531, 1000, 500, 97, 11])
    def test_the_thumbnail_stays_within_its_side(self, coordinate_slide, max_side):
        rgb, downsample = Slide(coordinate_slide.path).thumbnail(max_side=max_side)
        assert max_side / 2 < max(rgb.shape) <= max_side
        assert rgb.shape[1] == pytest.approx(1531 / downsample, abs=1.01)


class TestLevel:
    @staticmethod
    def level_by_search(downsamples, wanted):
        fine_enough = [ds for ds in downsamples if ds <= wanted * 1.005]
        return downsamples.index(max(fine_enough))

    @pytest.mark.parametrize(
        ("downsamples", "size0", "level"),
        [
            ((1.0, 3.9997), 4 * 224, 1),
            ((1.0, 4.0056), 4 * 224, 1),
            ((1.0, 4.05), 4 * 224, 0),
            ((1.0, 2.0, 4.0), 443, 0),
            ((1.0, 2.0, 4.0), 450, 1),
            ((1.0, 4.0, 16.0), 5 * 224, 1),
            ((1.0, 4.0, 16.0), 224, 0),
        ],
    )
    def test_by_float_downsample(self, coordinate_slide, downsamples, size0, level):
        """3.9997 means 4, where int() would give 3; 4.05 would enlarge by 1 %."""
        slide = with_levels(Slide(coordinate_slide.path), downsamples)
        assert slide.level_for(size0, 224) == level
        assert self.level_by_search(downsamples, size0 / 224) == level

    def test_a_level_that_fits_is_not_resampled(self, coordinate_slide):
        """Its pixels are the level's own: bytes of neighbours are not mixed where they wrap."""
        slide = Slide(coordinate_slide.path)
        tile = slide.region(128, 128, 448, 224)
        direct = slide.levels.pixels(128, 128, 1, 224, 224)
        assert slide.level_for(448, 224) == 1
        np.testing.assert_array_equal(tile, direct)

    def test_enlarging_is_refused(self, coordinate_slide):
        slide = Slide(coordinate_slide.path)
        with pytest.raises(TooCoarseError, match=r"coordinates.*0\.1 microns"):
            slide.read(0, 0, Grid(224, 0.1))
        with pytest.raises(ValueError, match="never enlarged"):
            slide.region(0, 0, 100, 101)

    @pytest.mark.parametrize("size0", [448, 443, 700])
    def test_reducing_is_antialiased(self, coordinate_slide, monkeypatch, size0):
        """A fine chequerboard becomes grey; sampling every other pixel would keep or alias it."""
        slide = with_levels(Slide(coordinate_slide.path), (1.0,))
        board = np.indices((size0, size0)).sum(0) % 2 * np.uint8(200)
        board = np.repeat(board[..., None].astype(np.uint8), 3, axis=2)
        monkeypatch.setattr(slide.levels, "pixels", lambda *_: board)
        tile = slide.region(0, 0, size0, 224)[2:-2, 2:-2]
        assert abs(tile.mean() - 100) < 1
        assert tile.std() < 10
        sampled = board[np.arange(224) * size0 // 224][:, np.arange(224) * size0 // 224]
        assert size0 == 448 or sampled.std() > 90


class TestOutside:
    def test_is_white(self, coordinate_slide):
        tile = Slide(coordinate_slide.path).region(1531 - 100, 1193 - 50, 224, 224)
        assert (tile[:, 101:] == 255).all()
        assert (tile[51:] == 255).all()
        coordinate_slide.assert_shows(tile[:50, :50], 1431, 1143, 50, within0=0)

    def test_transparent_is_white(self, coordinate_slide, monkeypatch):
        """Alpha blends over white: half-transparent black is grey 127 or 128."""
        rgba = np.zeros((1, 3, 4), np.uint8)
        rgba[0, :, 3] = 0, 128, 255

        class Handle:
            def read_region(self, *_):
                return rgba

        slide = Slide(coordinate_slide.path, direct=False)
        assert slide.width0 == 1531
        monkeypatch.setattr(slide.levels, "_open", Handle)
        assert slide.levels.pixels(0, 0, 0, 3, 1)[0, :, 0].tolist() == [255, 127, 0]


class TestResolution:
    def test_of_an_aperio_slide(self, small_slide):
        slide = Slide(small_slide("a.svs", mpp=0.2527))
        assert (slide.mpp, slide.vendor) == (pytest.approx(0.2527), "aperio")
        assert slide.mpp_source == "openslide.mpp-x"
        assert slide.read(0, 0, Grid()).shape == (224, 224, 3)

    def test_of_a_generic_tiff(self, small_slide):
        slide = Slide(small_slide("a.tif", mpp=0.5021))
        assert (slide.mpp, slide.vendor) == (pytest.approx(0.5021), "generic-tiff")

    def test_the_table_wins(self, small_slide):
        slide = Slide(small_slide("a.svs", mpp=0.25), mpp=0.5)
        assert (slide.mpp, slide.mpp_source) == (0.5, "table")

    def test_missing(self, small_slide):
        slide = Slide(small_slide("lost.tif", mpp=None))
        with pytest.raises(MissingResolutionError, match=r"lost: no pixel size.*mpp column"):
            _ = slide.mpp
        assert slide.thumbnail(max_side=100)[0].shape[2] == 3, "pixels need no resolution"

    def test_objective_power_is_a_last_resort_and_warns(self, small_slide):
        slide = Slide(small_slide("a.svs", mpp=None, power=40))
        with pytest.warns(UserWarning, match=r"a: no pixel size in the file.*0.25"):
            assert slide.mpp == 0.25
        assert slide.mpp_source == "objective power"

    @pytest.mark.parametrize(
        ("properties", "mpp", "source"),
        [
            ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, 0.255, "openslide.mpp-x"),
            ({"openslide.mpp-x": "352.8", "aperio.MPP": "0.25"}, 0.25, "aperio.MPP"),
            ({"openslide.mpp-x": "nan", "ventana.ScanRes": "0.46"}, 0.46, "ventana.ScanRes"),
            (
                {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800"},
                0.5,
                "TIFF resolution",
            ),
            (
                {"tiff.ImageDescription": '<Pixels PhysicalSizeX="0.4" PhysicalSizeY="0.4"/>'},
                0.4,
                "OME PhysicalSizeX",
            ),
            (
                {"tiff.ImageDescription": '<Pixels PhysicalSizeX="400" PhysicalSizeXUnit="nm"/>'},
                0.4,
                "OME PhysicalSizeX",
            ),
            (
                {"tiff.ImageDescription": '<P PhysicalSizeX=".4" PhysicalSizeXUnit="&#181;m"/>'},
                0.4,
                "OME PhysicalSizeX",
            ),
            ({"openslide.comment": "scanner|MPP = 0.2527|"}, 0.2527, "MPP in the description"),
        ],
    )
    def test_order_of_sources(self, properties, mpp, source):
        x, y, found = find_mpp(properties, "a")
        assert ((x + y) / 2, found) == (pytest.approx(mpp), source)

    def test_pixels_that_are_not_square_are_refused_unless_the_table_knows_better(self):
        oblong = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}
        with pytest.raises(MissingResolutionError, match=r"a: its pixels are 0.25 x 0.5 microns"):
            find_mpp(oblong, "a")
        assert find_mpp(oblong, "a", 0.25) == (0.25, 0.25, "table")

    @pytest.mark.parametrize("value", ["352.8", "0.049", "20.1"])
    def test_absurd_values_count_as_missing_and_are_named(self, value):
        with pytest.raises(MissingResolutionError, match=f"openslide.mpp-x = {value}"):
            find_mpp({"openslide.mpp-x": value}, "a")

    def test_an_absurd_table_value_is_not_passed_over(self):
        with pytest.raises(MissingResolutionError, match="table = 250"):
            find_mpp({"openslide.mpp-x": "0.25"}, "a", 250.0)


class TestHandle:
    def test_travels_as_its_path(self, coordinate_slide):
        slide = Slide(coordinate_slide.path)
        tile = slide.read(5, 7, Grid(64, 0.25))
        copy = pickle.loads(pickle.dumps(slide))
        assert copy.levels._handle is None
        assert copy.width0 == 1531
        np.testing.assert_array_equal(copy.read(5, 7, Grid(64, 0.25)), tile)

    def test_a_forked_child_opens_its_own(self, coordinate_slide):
        slide = Slide(coordinate_slide.path)
        tile, handle = slide.read(5, 7, Grid(64, 0.25)), id(slide.levels._handle)
        with multiprocessing.get_context("fork").Pool(1, _remember, (slide,)) as pool:
            theirs, their_tile = pool.apply(_read_remembered)
        assert theirs != handle
        np.testing.assert_array_equal(their_tile, tile)

    def test_opens_again_after_close(self, coordinate_slide):
        with Slide(coordinate_slide.path) as slide:
            tile = slide.read(5, 7, Grid(64, 0.25))
        assert slide.levels._handle is None
        np.testing.assert_array_equal(slide.read(5, 7, Grid(64, 0.25)), tile)


def _remember(slide):
    global _slide
    _slide = slide


def _read_remembered():
    tile = _slide.read(5, 7, Grid(64, 0.25))
    return id(_slide.levels._handle), tile


@pytest.mark.parametrize(
    ("file", "stem"),
    [
        ("TCGA-05-4244-01Z-00-DX1.d4ff32cd-38cf.svs", "TCGA-05-4244-01Z-00-DX1.d4ff32cd-38cf"),
        ("a/b.ome.tif", "b"),
        ("b.OME.TIFF", "b"),
        ("b.home.tif", "b.home"),
        ("plain", "plain"),
    ],
)
def test_names_keep_their_inner_dots(file, stem):
    assert slide_stem(file) == stem


class TestBrokenFiles:
    @pytest.mark.parametrize("name", ["a.svs", "b.tif"])
    @pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999])
    def test_truncated_anywhere(self, small_slide, name, share):
        """Cut early it does not open; cut late it opens with a level less. Both are refused."""
        path = small_slide(name)
        whole = path.read_bytes()
        Slide(path).check_complete()
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(NotASlideError, match=rf"{path.stem}: .*truncated.*Copy it again"):
            Slide(path).check_complete()

    def test_the_reach_of_a_whole_file_is_its_size(self, small_slide):
        for name in ("a.svs", "b.tif"):
            path = small_slide(name)
            assert tiff_contents(path).reach == path.stat().st_size

    def test_pixels_that_do_not_decode_are_never_white(self, small_slide):
        path = small_slide("a.tif")
        raw = bytearray(path.read_bytes())
        raw[2000:60_000] = bytes(58_000)
        path.write_bytes(raw)
        slide = Slide(path)
        with pytest.raises(UnreadableRegionError, match=r"1 of the 20 JPEG tiles.*damaged"):
            _ = [slide.read(x0, 224, Grid()) for x0 in range(0, 900, 224)]
        assert slide.thumbnail(max_side=100)[0].size, "a new handle reads what is sound"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("gone.svs", None, "no file"),
            ("empty.svs", b"", "is empty"),
            ("text.svs", b"case_id,slide_id\n", "no format that OpenSlide knows"),
            ("photo.png", b"\x89PNG\r\n\x1a\n" + bytes(64), "cannot be opened"),
        ],
    )
    def test_no_slide_at_all(self, tmp_path, name, content, message):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(NotASlideError, match=message) as caught:
            _ = Slide(path).width0
        assert str(caught.value).startswith(path.stem)
        assert "leave this slide out" in str(caught.value)

    def test_a_folder(self, tmp_path):
        with pytest.raises(NotASlideError, match="is a folder"):
            _ = Slide(tmp_path).width0


class TestRealFiles:
    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("boxes.png", MissingResolutionError, "mpp column"),
            ("kidney-48-5.tif", MissingResolutionError, "mpp column"),
            ("broken.svs", NotASlideError, "no format that OpenSlide knows"),
            ("smalltif.tif", NotASlideError, "plain TIFF of kind I;16"),
            ("unopenable.tiff", NotASlideError, "compression 52479"),
            ("unreadable.svs", UnreadableRegionError, "Bogus marker length"),
            ("boxes.tiff", MissingResolutionError, "352.778"),
            ("tcga-cr-7395-01a-01-ts1.svs", MissingResolutionError, "no pixel size"),
        ],
    )
    def test_each_broken_one_has_its_own_error(self, shared_data, name, error, message):
        slide = Slide(shared_data / "slides" / "fixtures" / name)
        with pytest.raises(error, match=message) as caught:
            slide.read(0, 0, Grid(16, slide.mpp))
        assert str(caught.value).startswith(slide.name)

    def test_resolutions(self, shared_data):
        fixtures, atlas = shared_data / "slides" / "fixtures", shared_data / "slides" / "atlas"
        assert Slide(fixtures / "CMU-1-Small-Region.svs").mpp == pytest.approx(0.499)
        assert Slide(fixtures / "boxes_0.dcm").mpp == pytest.approx(0.499)
        assert Slide(atlas / "BS25_SYN_10x.tif").mpp == pytest.approx(1.052, abs=1e-3)

    def test_a_real_slide_cut_short(self, shared_data, tmp_path):
        path = tmp_path / "cut.tif"
        shutil.copyfile(shared_data / "slides" / "atlas" / "BS9_HE2_20x.tif", path)
        path.chmod(0o644)
        with open(path, "r+b") as file:
            file.truncate(4_000_000)
        with pytest.raises(NotASlideError, match=r"truncated.*4888720.*4000000"):
            Slide(path).check_complete()
