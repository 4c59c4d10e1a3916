"""Planted traits: labels balanced and independent, nuclei changed by what is said, all else equal.

Tissue is painted here: round dark nuclei on pink, with grain.
"""

import csv
import json

import numpy as np
import pytest
from scipy.ndimage import spline_filter

from benchmarks import nuclei as cells
from benchmarks import tissue_plants as plants
from slides.errors import SettingsError

HAEMATOXYLIN, EOSIN = cells.STAINS_32.T


def disc(centre, radius, side=plants.TILE):
    """1 within a circle, 0 outside, a soft pixel between."""
    y, x = np.mgrid[:side, :side]
    return np.clip(radius + 0.5 - np.hypot(y - centre[0], x - centre[1]), 0, 1)


def stained(haematoxylin, eosin=0.3):
    """The colours, 0 to 1, of stains (h, w)."""
    eosin = np.broadcast_to(eosin, haematoxylin.shape)
    return np.exp(-haematoxylin[..., None] * HAEMATOXYLIN - eosin[..., None] * EOSIN)


def circle(*centres, radius=7.0):
    """Nuclei of one radius."""
    count = len(centres)
    shape = np.tile(np.eye(2) / radius**2, (count, 1, 1))
    return cells.Nuclei(np.array(centres, float), shape, np.full(count, radius))


@pytest.fixture(scope="module")
def window():
    """A window as large as a slide, (h, w, 3) uint8, and its nuclei's centres."""
    rng = np.random.default_rng(5)
    side, step = plants.SIDE, 28
    centres = [(y + rng.uniform(-3, 3), x + rng.uniform(-3, 3))
               for y in range(14, side, step) for x in range(14, side, step)]  # fmt: skip
    amount = 0.1 * rng.random((side, side))
    for centre in centres:
        low = [int(c) - 14 for c in centre]
        part = tuple(slice(max(a, 0), a + 28) for a in low)
        spot = disc([c - max(a, 0) for c, a in zip(centre, low, strict=True)], 6.5, 28)
        amount[part] += spot[: amount[part].shape[0], : amount[part].shape[1]]
    return np.rint(255 * stained(amount)).astype(np.uint8), np.array(centres)


def windows(*counts):
    return [{"patient": f"P{p}", "slide_id": f"P{p}_{k}", "split": "train"}
            for p, count in enumerate(counts) for k in range(count)]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_labels_are_balanced_and_independent_within_each_patient(seed):
    slides = plants.plan(windows(1, 2, 3, 5), seed)
    assert [s.slide_id for s in slides[:5]] == ["P0_0_0", "P0_0_1", "P0_0_2", "P0_0_3", "P1_0_0"]
    for patient in {s.window["patient"] for s in slides}:
        labels = np.array([s.labels for s in slides if s.window["patient"] == patient])
        sign = 2 * labels - 1
        np.testing.assert_array_equal(sign.sum(0), 0)
        np.testing.assert_array_equal(sign.T @ sign, len(sign) * np.eye(3))


def test_another_seed_deals_other_labels_and_the_same_seed_the_same():
    first, again, other = ([s.labels for s in plants.plan(windows(*[2] * 9), n)] for n in (3, 3, 4))
    assert first == again != other


def test_nuclei_are_found_with_their_size(window):
    rgb, centres = window
    found = cells.find_nuclei(rgb)
    inner = ((centres > 20) & (centres < plants.SIDE - 20)).all(1)
    away = np.linalg.norm(centres[inner][:, None] - found.centre_N2, axis=-1)
    assert (away.min(1) < 1).mean() > 0.95
    assert np.median(found.radius_N) == pytest.approx(6.5, abs=0.7)


@pytest.mark.parametrize(("by", "place"), [(1.2, (50.3, 61.8)), (1.35, (40.0, 40.0))])
def test_enlargement_is_what_is_asked_and_a_turn_enlarges_nothing(by, place):
    nucleus, image = circle(place), stained(disc(place, 7.0))
    y, x = np.mgrid[: plants.TILE, : plants.TILE]
    away = np.hypot(y - place[0], x - place[1])
    spline = np.stack([spline_filter(image[..., c]) for c in range(3)])

    def area(rgb):
        return (image[0, 0, 0] - rgb[..., 0]).sum()

    ratios = []
    for enlarged in (True, False):
        change = cells.changes(np.array([enlarged]), np.array([1]), by)
        offset = cells.warp(nucleus, change, by, plants.TILE)
        np.testing.assert_allclose(np.hypot(*offset)[away < 8], (1 - 1 / by) * away[away < 8])
        np.testing.assert_array_equal(offset[:, away > cells.REACH * 7], 0)
        ratios.append(area(plants.sample(spline, y + offset[0], x + offset[1])) / area(image))
    assert ratios == pytest.approx([by**2, 1], rel=0.02)


def test_no_warp_reaches_a_tiles_border():
    near = circle((3, 50), (108, 108), (50, 4))
    enlarged = cells.changes(np.ones(3, bool), np.ones(3), 1.2)
    offset = cells.warp(near, enlarged, 1.2, plants.TILE)
    assert np.abs(offset).max() > 0.3
    for edge in (offset[:, 0], offset[:, -1], offset[:, :, 0], offset[:, :, -1]):
        np.testing.assert_array_equal(edge, 0)


def test_clearing_takes_haematoxylin_from_the_centre_alone():
    image = stained(0.2 + 0.8 * disc((50, 60), 7.0))
    out = cells.clear(image, circle((50, 60), (20, 20)), np.array([0.4, 0]), np.ones(2))
    before, after = (cells.haematoxylin(cells.density(each)) for each in (image, out))
    assert before[50, 60] == pytest.approx(1.0, abs=1e-6)
    assert after[50, 60] == pytest.approx(0.6, abs=1e-6)
    rim = np.hypot(*(np.mgrid[: plants.TILE, : plants.TILE] - np.reshape([50, 60], (2, 1, 1))))
    np.testing.assert_allclose(out[rim > 0.85 * 7], image[rim > 0.85 * 7], atol=1e-12)
    eosin = [np.linalg.pinv(cells.STAINS_32)[1] @ cells.density(e)[50, 60] for e in (image, out)]
    assert eosin[0] == pytest.approx(eosin[1], abs=1e-6)


def test_colour_is_held_and_grain_is_kept():
    rng = np.random.default_rng(1)
    like = stained(0.2 + 0.8 * disc((50, 60), 9.0) + 0.05 * rng.random((112, 112)))
    changed = cells.clear(like, circle((50, 60), radius=9.0), np.array([0.5]), np.ones(1))
    held = cells.hold(changed, like)
    assert np.abs(changed.mean((0, 1)) - like.mean((0, 1))).max() > 1e-3
    np.testing.assert_allclose(held.mean((0, 1)), like.mean((0, 1)), atol=1e-9)
    np.testing.assert_allclose(held.std((0, 1)), like.std((0, 1)), atol=1e-9)
    corner = np.s_[:20, :20]
    steps = [np.abs(np.diff(each[corner], axis=0)).mean() for each in (held, like)]
    assert steps[0] == pytest.approx(steps[1], rel=0.01)


def test_a_trait_is_in_its_tiles_and_nothing_else_changes(window):
    rgb, _ = window
    found, spline = cells.find_nuclei(rgb), plants.coefficients(rgb)
    slide = plants.Plan("A_0", {}, (0, 0), (1, 1, 0))
    planted = plants.planted_tiles(slide, found, seed=0)
    np.testing.assert_array_equal(planted.sum(0), 22)  # 60 % of 36
    negative = plants.Plan("A_0", {}, (0, 0), (0, 0, 1))
    assert not plants.planted_tiles(negative, found, seed=0).any()
    out, bare = (plants.plant(spline, found, slide, each, seed=0)
                 for each in (planted, np.zeros_like(planted)))  # fmt: skip
    grid = (plants.GRID, plants.TILE) * 2
    differs = (out != bare).any(-1).reshape(grid).any((1, 3)).ravel()
    np.testing.assert_array_equal(differs, planted.any(1))


def test_tiles_without_nuclei_come_last():
    everywhere = [(r * 112 + 50, c * 112 + 20 * k) for r in range(4) for c in range(6)
                  for k in (1, 2, 3)]  # fmt: skip
    slide = plants.Plan("A_0", {}, (0, 0), (1, 0, 0))
    planted = plants.planted_tiles(slide, circle(*everywhere), seed=0)[:, 0]
    assert planted.sum() == 22
    assert not planted[24:].any()


def test_a_folder_planted_otherwise_is_refused(tmp_path):
    plants.describe(tmp_path, 0)
    plants.describe(tmp_path, 0)
    with pytest.raises(SettingsError, match="planted otherwise"):
        plants.describe(tmp_path, 1)
    assert json.loads((tmp_path / "planting.json").read_text())["seed"] == 0


def test_a_written_slide_is_read_back(tmp_path, window):
    import openslide

    path = tmp_path / "A.tif"
    plants.write_slide(path, window[0], 0.504)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((672, 672), (168, 168))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.504, rel=1e-5)
        rgb = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    assert np.abs(rgb.astype(float) - window[0]).mean() < 6


def test_a_table_is_written_whole(tmp_path):
    path = plants.write_table(tmp_path / "t.csv", ["a", "b"], [[1, "x"], [2, "y,z"]])
    assert list(csv.reader(path.open())) == [["a", "b"], ["1", "x"], ["2", "y,z"]]
