"""Tiles are painted at their places, and QuPath gets level-0 pixels minus the slide's bounds.

The painting is checked against a loop over pixels; the GeoJSON by reading it back.
"""

import itertools
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import rankdata

from tapfm.inference import heatmap
from tapfm.inference.heatmap import (
    effective_text,
    overlay_png,
    rank_percentile,
    scale_bar,
    tile_map,
    weight_opacity,
    write_geojson,
)

COORDS0 = np.array([[0, 0], [448, 0], [0, 448], [896, 1344]])
SIZE0 = 448


def painted_by_pixels(shape, downsample, coords0, size0, values):
    """Return the mean of the tiles that contain each pixel's centre."""
    found = np.full(shape, np.nan)
    for y in range(shape[0]):
        for x in range(shape[1]):
            centre = (np.array([x, y]) + 0.5) * downsample
            inside = ((centre >= coords0) & (centre < coords0 + size0)).all(1)
            inside &= ~np.isnan(values)
            if inside.any():
                found[y, x] = values[inside].mean()
    return found


@pytest.mark.parametrize(("downsample", "size0"), [(16.0, 448), (31.7, 443), (31.7, 900)])
def test_tiles_are_painted_where_they_are(downsample, size0):
    """A wide slide, a fractional downsample, overlapping tiles, and one tile without a value."""
    coords0 = np.stack(np.meshgrid(np.arange(7) * 443, np.arange(3) * 443), -1).reshape(-1, 2)
    values = np.random.default_rng(0).random(21)
    values[5] = np.nan
    arguments = ((47, 103), downsample, coords0, size0, values)
    np.testing.assert_allclose(tile_map(*arguments), painted_by_pixels(*arguments))


def test_the_painting_test_can_fail():
    coords0, values = np.array([[0, 0], [448, 0]]), np.array([1.0, 2.0])
    right = painted_by_pixels((5, 90), 16.0, coords0, SIZE0, values)
    swapped = tile_map((5, 90), 16.0, coords0[:, ::-1], SIZE0, values)
    assert not np.array_equal(right, swapped, equal_nan=True)


def test_a_tile_smaller_than_a_pixel_is_still_seen():
    painted = tile_map((5, 7), 100.0, np.array([[210, 310]]), 10, np.array([3.0]))
    assert np.argwhere(~np.isnan(painted)).tolist() == [[3, 2]]


@given(st.lists(st.sampled_from([0.0, 1e-9, 0.5, 2.0, np.nan]), min_size=1, max_size=23))
def test_rank_percentile_is_the_mean_rank(values):
    values = np.array(values)
    found = rank_percentile(values)
    assert (np.isnan(found) == np.isnan(values)).all()
    known = values[~np.isnan(values)]
    if len(known) > 1:
        expected = 100 * (rankdata(known) - 1) / (len(known) - 1)
        np.testing.assert_allclose(found[~np.isnan(values)], expected)
    if len(set(known)) == 1:
        np.testing.assert_allclose(found[~np.isnan(values)], 50)


def colours_of(path, shape, values, **options):
    """Return the mean colour of each quadrant's middle in the right panel of an overlay."""
    thumbnail = np.full((*shape, 3), 255, np.uint8)
    coords0 = np.array([[0, 0], [500, 0], [0, 500], [500, 500]])
    overlay_png(thumbnail, 10.0, coords0, 500, values, path, title="", **options)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_overlay_shows_each_tile_in_its_colour(tmp_path):
    """Four tiles fill the slide: the right panel has viridis at rank 0, 33, 67 and 100, blended."""
    from matplotlib import colormaps

    image = colours_of(tmp_path / "new" / "a.png", (100, 100), np.array([1e-9, 1e-6, 1e-3, 0.9]))
    middle = image.shape[1] // 2
    for place, rank in enumerate((0.0, 1 / 3, 2 / 3, 1.0)):
        shade = np.array(colormaps["viridis"](rank)[:3])
        shade = 255 * (heatmap.OPACITY * shade + 1 - heatmap.OPACITY)
        hits = (abs(image - shade) < 4).all(2)
        # the colour bar has these shades too, but only in a thin strip at the right edge
        ys, xs = np.nonzero(hits[:, : int(0.85 * image.shape[1])])
        assert len(ys) > 10_000, f"tile {place} is not seen"
        assert xs.min() >= middle - 0.1 * image.shape[1]  # the left panel stays bare
        below, right = divmod(place, 2)
        assert (np.mean(ys) > image.shape[0] / 2) == bool(below)
        assert (np.mean(xs) > 0.7 * image.shape[1]) == bool(right)


def test_linear_scale_differs_and_an_unknown_one_is_refused(tmp_path):
    values = np.array([0.0, 0.01, 0.02, 1.0])
    rank = colours_of(tmp_path / "rank.png", (100, 100), values)
    linear = colours_of(tmp_path / "linear.png", (100, 100), values, scale="linear")
    assert rank.shape != linear.shape or (rank != linear).any()
    with pytest.raises(ValueError, match="scale: 'log' is none of rank, linear"):
        colours_of(tmp_path / "log.png", (100, 100), values, scale="log")
    assert not (tmp_path / "log.png").exists()


@pytest.mark.parametrize("shape", [(61, 173), (173, 61)])
@pytest.mark.parametrize(
    "values",
    [np.full(4, 0.25), np.full(4, np.nan), np.array([0.1, np.nan, 0.2, 0.3])],
    ids=["equal", "unknown", "partly unknown"],
)
def test_overlay_of_any_shape_values_and_truth(tmp_path, shape, values):
    truth = np.zeros((31, 47), bool)
    truth[7:19, 11:23] = True
    for mask in (truth, ~truth & False, truth | True):
        thumbnail = np.full((*shape, 3), 200, np.uint8)
        path = overlay_png(thumbnail, 16.0, COORDS0, SIZE0, values, tmp_path / "a.png", truth=mask)
        assert Image.open(path).size[0] > 300
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def read(path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            (inner,) = archive.namelist()
            assert inner.endswith(".geojson")
            return json.loads(archive.read(inner))
    return json.loads(path.read_text())


def test_geojson_is_what_qupath_reads(tmp_path):
    weights = np.array([0.5, np.nan, 1e-9, 0.25], np.float32)
    path = write_geojson(
        tmp_path / "new" / "s.geojson",
        COORDS0,
        SIZE0,
        {"tile weight": weights, "P(KRAS)": [1, 2, 3, 4]},
        (100, 200, 5000, 6000),
        "s",
    )
    collection = read(path)
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == 4
    for feature, (x0, y0) in zip(collection["features"], COORDS0 - (100, 200), strict=True):
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "tile"
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1] == [x0, y0]
        assert sorted(ring[:4]) == sorted(
            [[x0, y0], [x0 + 448, y0], [x0 + 448, y0 + 448], [x0, y0 + 448]]
        )
        area = sum(a[0] * b[1] - b[0] * a[1] for a, b in itertools.pairwise(ring)) / 2
        assert abs(area) == 448**2  # a ring, not a bow tie
    found = [feature["properties"]["measurements"] for feature in collection["features"]]
    assert [each["tile weight"] for each in found] == [0.5, "NaN", 1e-9, 0.25]
    assert [each["P(KRAS)"] for each in found] == [1, 2, 3, 4]


def test_geojson_without_bounds_or_tiles(tmp_path):
    path = write_geojson(tmp_path / "a.geojson", COORDS0, SIZE0, {}, None, "s")
    assert read(path)["features"][3]["geometry"]["coordinates"][0][0] == [896, 1344]
    path = write_geojson(tmp_path / "b.geojson", np.zeros((0, 2)), SIZE0, {"w": []}, None, "s")
    assert read(path) == {"type": "FeatureCollection", "features": []}


def test_ids_depend_on_slide_and_place_alone(tmp_path):
    def ids(name, coords0, bounds0=None):
        path = write_geojson(tmp_path / "a.geojson", coords0, SIZE0, {}, bounds0, name)
        return [feature["id"] for feature in read(path)["features"]]

    first = ids("s", COORDS0)
    assert len(set(first)) == 4
    assert ids("s", COORDS0[::-1]) == first[::-1]
    assert ids("s", COORDS0, (100, 200, 1, 1)) == first
    assert not set(ids("t", COORDS0)) & set(first)


def test_many_tiles_go_into_a_zip_with_the_same_file(tmp_path, monkeypatch):
    values = {"w": np.arange(4.0)}
    plain = write_geojson(tmp_path / "s.geojson", COORDS0, SIZE0, values, None, "s")
    monkeypatch.setattr(heatmap, "ZIP_FROM", 3)
    packed = write_geojson(tmp_path / "s.geojson", COORDS0, SIZE0, values, None, "s")
    assert packed == tmp_path / "s.zip"
    assert read(packed) == read(plain)
    before = packed.read_bytes()
    write_geojson(tmp_path / "s.geojson", COORDS0, SIZE0, values, None, "s")
    assert packed.read_bytes() == before


def test_bad_values_are_named_and_leave_no_file(tmp_path):
    path = tmp_path / "s.geojson"
    with pytest.raises(ValueError, match=r"s: 4 tiles, but 'w' has shape \(3,\)"):
        write_geojson(path, COORDS0, SIZE0, {"w": [1, 2, 3]}, None, "s")
    with pytest.raises(ValueError, match="s: measurement 'w' is infinite"):
        write_geojson(path, COORDS0, SIZE0, {"w": [1, 2, np.inf, 3]}, None, "s")
    with pytest.raises(ValueError, match="4 tiles, but 'tile weight'"):
        overlay_png(np.zeros((9, 9, 3), np.uint8), 1.0, COORDS0, 1, [1.0], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_two_dollars_in_a_name_are_no_formula(tmp_path):
    thumbnail, coords = np.full((90, 90, 3), 255, np.uint8), np.array([[0, 0]])
    path = tmp_path / "a$x_$b.png"
    assert overlay_png(thumbnail, 1, coords, 9, np.ones(1), path, label="p($^$)").exists()


def test_a_long_title_is_within_a_narrow_picture(tmp_path):
    thumbnail = np.full((800, 200, 3), 255, np.uint8)
    coords = np.array([[0, 0]])
    title = (
        "TCGA-05-4244-01Z-00-DX1.d4ff32cd-38cf-40ea-8213-45c2b100ac01: WWWWWW 0.999, WWWWW 0.001"
    )
    path = overlay_png(thumbnail, 1, coords, 9, np.ones(1), tmp_path / "a.png", title=title)
    drawn = np.asarray(Image.open(path).convert("L"))
    ink = drawn[: drawn.shape[0] // 9] < 128
    assert ink.any()
    assert not ink[:, :4].any()
    assert not ink[:, -4:].any()


def test_opacity_is_the_weight_and_flat_attention_is_called_so():
    equal, one = np.full(10, 0.1), np.eye(10)[3]
    np.testing.assert_allclose(weight_opacity(equal), 0.12 + 0.88 / 3)
    np.testing.assert_allclose(weight_opacity(one), [1.0 if n == 3 else 0.12 for n in range(10)])
    np.testing.assert_allclose(weight_opacity(7 * equal), weight_opacity(equal), rtol=1e-12)
    assert effective_text(equal).startswith("10.0 effective of 10 tiles; ATTENTION IS FLAT")
    assert effective_text(one) == "1.0 effective of 10 tiles"
    edge = np.concatenate([np.full(89, 1.0), np.zeros(11)])
    assert "FLAT" not in effective_text(edge), "89 of 100"
    assert "FLAT" in effective_text(np.concatenate([np.full(91, 1.0), np.zeros(9)]))


@pytest.mark.parametrize(
    ("width", "mpp", "text", "microns"),
    [(1000, 1.0, "200 µm", 200), (1600, 16.0, "5 mm", 5000), (640, 0.25, "20 µm", 20),
     (1000, 4.0, "1 mm", 1000)],
)  # fmt: skip
def test_a_scale_bar_is_a_round_length_of_at_most_a_quarter(width, mpp, text, microns):
    length, said = scale_bar(width, mpp)
    assert said == text
    assert length * mpp == pytest.approx(microns)
    assert length <= width / 4


def test_pale_tiles_leave_the_slide_to_be_seen(tmp_path):
    """On the same colours a tile of little weight changes the picture less than without opacity."""
    thumbnail = np.full((80, 80, 3), 255, np.uint8)
    coords0 = np.array([[0, 0], [40, 0], [0, 40], [40, 40]])
    weights_T = np.array([0.97, 0.01, 0.01, 0.01])

    def ink(**how):
        path = overlay_png(thumbnail, 1.0, coords0, 40, weights_T, tmp_path / "a.png", **how)
        return 255 - np.asarray(Image.open(path).convert("L"), float).mean()

    assert ink(opacity_T=weight_opacity(weights_T)) < 0.8 * ink()
    assert ink(mpp0=0.5) > ink(), "a scale bar"
    assert ink(made_by="a run, a model") > ink(), "named"
