"""A slide's own mask is its tissue, pixel for pixel; a mask of another slide is an error.

The references are matplotlib's point-in-polygon test at pixel centres, and hand-drawn pictures.
"""

import hashlib
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import Image

from slides.errors import IndexSettingsError, MaskError, NoTissueError
from slides.grid import Grid
from slides.tiling.index import index_cohort, index_path, index_slide, read_index, write_index
from slides.tiling.masks import _fill, geojson_polygons, mask_path, mask_sha256, read_mask
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tapfm.cli import main
from tapfm.inference.heatmap import write_geojson
from tests.conftest import stained_picture, write_pyramid

GRID = Grid(64, 0.5)
SQUARE = [[128, 192], [640, 192], [640, 512], [128, 512], [128, 192]]
NO_TISSUE = {  # properties that QuPath writes
    "Ignore*": {"classification": {"name": "Ignore*", "color": [180, 180, 180]}},
    "Ignore*, of version 0.5": {"classification": {"names": ["Ignore*"]}},
    "Ignore*, by its name": {"classification": "Ignore*"},
    "Region*": {"classification": {"name": "Region*", "colorRGB": -1}},
    "a missing core": {"objectType": "tma_core", "isMissing": True},
}
HOLE = [[256, 256], [384, 256], [384, 384], [256, 384], [256, 256]]
SLIDE = SimpleNamespace(name="a", width0=1201, height0=907, bounds0=(0, 0, 1201, 907))


def feature(*rings, kind="Polygon", **more):
    coordinates = list(rings) if kind == "Polygon" else [list(rings)]
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": {"tissue_id": 1}, **more}


def qupath(*rings):
    return feature(*rings, id="0f7e", properties={"objectType": "annotation"})


@pytest.fixture
def folder(tmp_path):
    """Return a folder of masks; its `put` writes one for slide a."""
    (tmp_path / "masks").mkdir()

    def put(found, kind=".geojson"):
        path = tmp_path / "masks" / f"a{kind}"
        path.write_text(found if isinstance(found, str) else json.dumps(found))
        return path

    return SimpleNamespace(
        put=put, path=tmp_path / "masks", tissue=Tissue(masks=str(path_of(tmp_path)))
    )


def path_of(tmp_path):
    return tmp_path / "masks"


def mask_of(path, slide=SLIDE, downsample=16.0):
    shape = tuple(-(-side // int(downsample)) for side in (slide.height0, slide.width0))
    return read_mask(path, slide, shape, downsample)


def tiles(where):
    """Return corners of lattice tiles inside (left, top, right, bottom) boxes, minus a hole."""
    return {tuple(c) for c in GRID.coords(1201, 907, 0.5) if where(*c, *(c + 64))}


class TestGeoJson:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda f: {"type": "FeatureCollection", "name": "a", "features": [f]},
            lambda f: [f],
            lambda f: f,
            lambda f: f["geometry"],
            lambda f: {"type": "GeometryCollection", "geometries": [f["geometry"]]},
        ],
    )
    @pytest.mark.parametrize("kind", ["Polygon", "MultiPolygon"])
    def test_every_wrapping_gives_the_square_less_its_hole(self, folder, wrap, kind):
        mask = mask_of(folder.put(wrap(feature(SQUARE, HOLE, kind=kind))))
        expected = np.zeros((57, 76), bool)
        expected[12:32, 8:40] = True
        expected[16:24, 16:24] = False
        np.testing.assert_array_equal(mask, expected)

    def test_features_add_up_where_they_overlap(self, folder):
        mask = mask_of(folder.put([feature(SQUARE), feature(HOLE)]))
        assert mask[12:32, 8:40].all()

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.floats(-20, 60), st.floats(-20, 50)), min_size=3, max_size=12))
    def test_a_pixel_is_in_where_its_centre_is(self, corners):
        ring = np.array(corners)
        mask = np.zeros((37, 53), bool)
        _fill(mask, [ring])
        x, y = np.meshgrid(np.arange(53) + 0.5, np.arange(37) + 0.5)
        flips = np.zeros(mask.shape, int)  # even-odd, an edge at a time
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, 0), strict=True):
            crosses = (y1 <= y) != (y2 <= y)
            with np.errstate(all="ignore"):
                flips += crosses & (x >= x1 + (y - y1) / (y2 - y1) * (x2 - x1))
        differ = mask != flips % 2
        assert differ.mean() < 0.002  # rounding, where an edge runs through a centre

    def test_a_triangle_is_matplotlibs(self):
        ring = np.array([[3.2, 4.1], [47.7, 9.3], [20.4, 33.9]])
        mask = np.zeros((37, 53), bool)
        _fill(mask, [ring])
        points = np.stack(np.meshgrid(np.arange(53) + 0.5, np.arange(37) + 0.5), -1)
        inside = Outline(ring).contains_points(points.reshape(-1, 2)).reshape(37, 53)
        np.testing.assert_array_equal(mask, inside)

    def test_qupath_counts_from_the_bounds_and_trident_does_not(self, folder):
        slide = SimpleNamespace(name="a", width0=1201, height0=907, bounds0=(160, 48, 900, 700))
        plain = mask_of(folder.put([feature(SQUARE)]), slide)
        shifted = mask_of(folder.put([qupath(SQUARE)]), slide)
        np.testing.assert_array_equal(shifted[3:, 10:], plain[:-3, :-10])
        assert plain.any()
        assert not np.array_equal(plain, shifted)

    def test_points_and_lines_mean_nothing(self, folder):
        point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}
        nothing = {"type": "Feature", "geometry": None, "properties": {}}
        assert mask_of(folder.put([point, nothing, feature(SQUARE)])).any()
        with pytest.raises(MaskError, match=r"a: .* has no polygon"):
            mask_of(folder.put([point, nothing]))

    @pytest.mark.parametrize("kind", ["Polygon", "MultiPolygon"])
    def test_an_empty_outline_is_none(self, folder, kind):
        empty = {"type": kind, "coordinates": [] if kind == "Polygon" else [[]]}
        empty = {"type": "Feature", "geometry": empty, "properties": {}}
        full, both = folder.put([feature(SQUARE)]), folder.put([empty, feature(SQUARE)])
        np.testing.assert_array_equal(mask_of(both), mask_of(full))
        with pytest.raises(MaskError, match=r"a: .* has no polygon"):
            mask_of(folder.put([empty]))

    @pytest.mark.parametrize("name", NO_TISSUE)
    def test_qupaths_own_classes_are_no_tissue(self, folder, name):
        inner, more, taken_out = feature(HOLE), NO_TISSUE[name], name.startswith("Ignore")
        inner["properties"] = {"objectType": "annotation", **more}
        with nullcontext() if taken_out else pytest.warns(UserWarning, match="a: .* 1 of"):
            mask = mask_of(folder.put([inner, feature(SQUARE)]))
        rings = (SQUARE, HOLE) if taken_out else (SQUARE,)
        np.testing.assert_array_equal(mask, mask_of(folder.put([feature(*rings)])))
        with pytest.raises(MaskError, match=r"a: .* no polygon of tissue in it, only 1 of"):
            mask_of(folder.put([inner]))

    @pytest.mark.parametrize("kind", [{"name": "Tumor"}, {"names": ["Stroma", "CD3"]}, "Tissue"])
    def test_every_other_class_is_tissue(self, folder, kind):
        named = feature(SQUARE)
        named["properties"] = {"objectType": "annotation", "classification": kind}
        np.testing.assert_array_equal(
            mask_of(folder.put([named])), mask_of(folder.put([feature(SQUARE)]))
        )

    def test_an_index_that_took_them_for_tissue_is_another(self, folder):
        text = json.dumps([feature(SQUARE)])
        folder.put(text)
        assert mask_sha256(folder.path, "a") == hashlib.sha256(text.encode()).hexdigest()
        text = text.replace('"tissue_id": 1', '"classification": {"name": "Ignore*"}')
        folder.put(text)
        assert mask_sha256(folder.path, "a") != hashlib.sha256(text.encode()).hexdigest()

    def test_tiles_that_we_wrote_come_back(self, tmp_path):
        """`tapfm heatmap` writes QuPath objects; read as a mask they are the same tiles."""
        corners = np.array([[64, 128], [128, 128], [640, 320]])
        bounds0 = (16, 32, 1100, 800)
        write_geojson(tmp_path / "a.geojson", corners, 64, {}, bounds0, "a")
        slide = SimpleNamespace(name="a", width0=1201, height0=907, bounds0=bounds0)
        found = [
            rings[0].min(0) for rings in geojson_polygons(tmp_path / "a.geojson", "a", (16, 32))[0]
        ]
        np.testing.assert_array_equal(found, corners)
        assert mask_of(tmp_path / "a.geojson", slide).sum() == 3 * 4 * 4

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "3",
            "[3]",
            '{"a": 1}',
            '{"type": "FeatureCollection"}',
            '{"type": "Feature", "geometry": {"type": "Circle"}}',
            '{"type": "Polygon", "coordinates": 5}',
            '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}',
            '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], ["x", 5]]]}',
            '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [NaN, 5]]]}',
            "[" * 100_000,
            "\x00\xff",
        ],
    )
    def test_what_is_no_geojson_is_said_so(self, folder, text):
        with pytest.raises(MaskError, match=r"^a: .*(cannot be read as GeoJSON|no polygon)"):
            mask_of(folder.put(text))

    @pytest.mark.parametrize("shift", [(700, 0), (0, -300), (50_000, 50_000)])
    def test_another_slides_outlines_are_refused(self, folder, shift):
        moved = (np.array(SQUARE) + shift).tolist()
        with pytest.raises(MaskError, match=r"a: .*leave the slide's 1201 x 907 pixels"):
            mask_of(folder.put([feature(moved)]))


class TestPicture:
    def put(self, folder, picture, **options):
        Image.fromarray(picture, **options).save(folder.path / "a.png")
        return folder.path / "a.png"

    @pytest.mark.parametrize("width", [76, 1201, 301, 20])
    def test_any_size_is_stretched(self, folder, width):
        height = round(width * 907 / 1201)
        picture = np.zeros((height, width), np.uint8)
        picture[: height // 2, width // 2 :] = 1
        mask = mask_of(self.put(folder, picture))
        x, y = np.meshgrid((np.arange(76) + 0.5) * 16 / 1201, (np.arange(57) + 0.5) * 16 / 907)
        clear = (abs(x - 0.5) > 1 / width) & (abs(y - 0.5) > 1 / height)
        np.testing.assert_array_equal(mask[clear], ((x > 0.5) & (y < 0.5))[clear])

    @pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16"])
    def test_what_is_not_zero_is_tissue_whatever_the_kind(self, folder, mode):
        picture = np.zeros((57, 76), np.uint8)
        picture[10:20, 30:50] = 255 if mode == "1" else 3
        image = Image.fromarray(picture)
        if mode == "I;16":
            image = Image.fromarray(picture.astype(np.uint16))
        elif mode == "P":
            image.putpalette([255, 255, 255] * 256)  # numbers count, not their colours
        else:
            image = image.convert(mode)
        image.save(folder.path / "a.png")
        mask = mask_of(folder.path / "a.png")
        assert mask.sum() == pytest.approx(200, rel=0.2)
        assert mask[15, 40]

    def test_another_slides_proportions_are_refused(self, folder):
        with pytest.raises(MaskError, match=r"a: .* 100 x 100 pixels, the slide 1201 x 907"):
            mask_of(self.put(folder, np.ones((100, 100), np.uint8)))

    def test_an_empty_one_and_a_broken_one(self, folder):
        path = self.put(folder, np.zeros((57, 76), np.uint8))
        with pytest.raises(MaskError, match=r"a: .*has no tissue"):
            mask_of(path)
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(MaskError, match=r"a: the mask .* cannot be read"):
            mask_of(path)


class TestIndex:
    @pytest.fixture
    def slide(self, tmp_path):
        return Slide(write_pyramid(tmp_path / "a.tif", stained_picture(1201, 907), 0.5))

    def test_tiles_are_the_masks_and_not_the_tissues(self, slide, folder):
        """The square covers glass; the tissue that would be found is larger."""
        folder.put([feature(SQUARE, HOLE)])
        index = index_slide(slide, GRID, folder.tissue)
        inside = tiles(lambda x, y, x1, y1: x >= 128 and y >= 192 and x1 <= 640 and y1 <= 512)
        hole = tiles(lambda x, y, x1, y1: x >= 256 and y >= 256 and x1 <= 384 and y1 <= 384)
        assert {tuple(c) for c in index.coords0} == inside - hole
        assert index.tissue_fraction.min() > 0.99  # the thumbnail is 16.03 times smaller, not 16
        assert len(index_slide(slide, GRID, Tissue())) != len(index)

    def test_an_index_of_another_mask_is_refused_and_rebuilt(self, slide, folder, tmp_path):
        rows = [SimpleNamespace(slide_id="a", path=slide.path, mpp=None)]
        run = lambda tissue: index_cohort(rows, tmp_path, GRID, tissue, progress=False)[0]  # noqa: E731
        path = index_path(tmp_path, GRID, "a")
        run(Tissue())
        folder.put([feature(SQUARE)])
        with pytest.raises(IndexSettingsError, match=r"tissue\.mask_sha256 was None, asked for"):
            read_index(path, GRID, folder.tissue)
        assert run(folder.tissue)["status"] == "rebuilt"
        assert run(folder.tissue)["status"] == "kept"
        folder.put([feature(HOLE)])
        with pytest.raises(IndexSettingsError, match=r"tissue\.mask_sha256 was"):
            read_index(path, GRID, folder.tissue)
        again = run(folder.tissue)
        assert (again["status"], again["tiles"]) == ("rebuilt", 4)
        assert run(Tissue())["status"] == "rebuilt"

    def test_where_masks_lie_does_not_matter(self, slide, folder, tmp_path):
        folder.put([feature(SQUARE)])
        index = index_slide(slide, GRID, folder.tissue)
        write_index(tmp_path / "a_patches.h5", index, folder.tissue)
        folder.path.rename(tmp_path / "elsewhere")
        elsewhere = Tissue(masks=str(tmp_path / "elsewhere"))
        assert len(read_index(tmp_path / "a_patches.h5", GRID, elsewhere)) == len(index)

    def test_no_mask_two_masks_and_no_tile(self, slide, folder, tmp_path):
        with pytest.raises(MaskError, match=r"a: no mask in .*a\.geojson or a\.png.*leave"):
            index_slide(slide, GRID, folder.tissue)
        folder.put([feature([[0, 0], [20, 0], [20, 20]])])
        with pytest.raises(NoTissueError, match=r"a: none .* of its mask in .*best has [1-9]"):
            index_slide(slide, GRID, folder.tissue)
        folder.put("", ".png")
        with pytest.raises(MaskError, match="two masks"):
            mask_path(folder.path, "a")


def test_the_command_line_takes_masks_and_draws(tmp_path, folder, capsys):
    slide = write_pyramid(tmp_path / "a.tif", stained_picture(1201, 907), 0.5)
    folder.put([feature(SQUARE)])
    index, pictures = tmp_path / "index", tmp_path / "pictures"
    command = ["index", str(slide), "--out", str(index), "--tile-px", "64", "--workers", "0"]
    options = ["--masks", str(folder.path), "--thumbnails", str(pictures)]
    assert main([*command, *options]) == 0
    assert "1 slides, 40 tiles" in capsys.readouterr().out
    assert (pictures / "a.png").stat().st_size > 10_000
    assert len(read_index(index_path(index, GRID, "a"), GRID, folder.tissue)) == 40


class TestArrays:
    """As SlideSegmenter gives tissue (h, w, 1), or cross-sections (h, w, S)."""

    def put(self, folder, values):
        folder.path.mkdir(exist_ok=True)
        np.save(folder.path / "a.npy", values)
        return folder.path / "a.npy"

    def test_tissue_and_cross_sections_are_the_picture(self, folder):
        tissue = np.zeros((57, 76), np.int64)
        tissue[12:32, 8:40] = 1
        sections = np.stack([tissue, np.zeros_like(tissue)], -1)
        sections[40:50, 50:60, 1] = 1
        likely = np.where(tissue, 0.7, 0.3)
        for values in (tissue, tissue[..., None], sections, sections.astype(bool), likely):
            drawn = values >= 0.5 if values is likely else values
            picture = drawn.reshape(57, 76, -1).any(-1).astype(np.uint8)
            Image.fromarray(picture).save(folder.path.parent / "a.png")
            mask = mask_of(self.put(folder, values))
            np.testing.assert_array_equal(mask, mask_of(folder.path.parent / "a.png"))
            assert mask[15:30, 10:38].all()
            assert mask.any(1).sum() < 40

    def test_what_is_no_mask_is_refused(self, folder):
        for values in (np.zeros(5), np.array(["a"]), np.array([None])):
            with pytest.raises(MaskError, match=r"a: the mask .*a.npy cannot be read"):
                mask_of(self.put(folder, values))
        (folder.path / "a.npy").write_bytes(b"")
        with pytest.raises(MaskError, match="cannot be read"):
            mask_of(folder.path / "a.npy")


class Network:
    """What SlideSegmenter is called with, and returns: the dark pixels, of which some are pen."""

    def __init__(self, channels_last=True, tissue_segmentation=True, pen_marking_segmentation=True,
                 separate_cross_sections=True, model_folder="latest", device="cpu"):  # fmt: skip
        assert (channels_last, separate_cross_sections) == (True, False)

    def segment(self, image):
        assert image.shape[2:] == (3,)
        assert image.min() >= 0
        assert image.max() <= 1
        tissue = np.zeros((*image.shape[:2], 1), np.int64)
        tissue[10:40, 20:50] = 1
        pen = np.zeros_like(tissue)
        pen[10:20] = 1
        return tissue, pen


def test_an_installed_segmenter_makes_masks_that_are_then_the_tissue(tmp_path, monkeypatch, capsys):
    slide = write_pyramid(tmp_path / "a.tif", stained_picture(1201, 907), 0.5)
    index = tmp_path / "index"
    command = ["index", str(slide), "--out", str(index), "--tile-px", "64", "--workers", "0"]
    assert main([*command, "--segmenter", "slidesegmenter"]) == 2
    assert "pip install git+https://github.com/RTLucassen/slidesegmenter" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "slidesegmenter", SimpleNamespace(SlideSegmenter=Network))
    assert main([*command, "--segmenter", "slidesegmenter"]) == 0
    with Image.open(index / "masks_slidesegmenter" / "a.png") as image:
        mask = np.asarray(image) > 0
    expected = np.zeros_like(mask)
    expected[20:40, 20:50] = True
    np.testing.assert_array_equal(mask, expected)
    tissue = Tissue(masks=str(index / "masks_slidesegmenter"))
    corners = read_index(index_path(index, GRID, "a"), GRID, tissue).coords0
    centres = (corners + 32) / (1201 / mask.shape[1])
    assert len(corners)
    assert ((centres >= [15, 15]) & (centres <= [55, 45])).all()
    monkeypatch.setattr(Network, "segment", None)  # masks that are there are kept
    assert main([*command, "--segmenter", "slidesegmenter"]) == 0
    coords = ["--coords", str(tmp_path)]
    assert main([*command, "--segmenter", "slidesegmenter", *coords]) == 2
