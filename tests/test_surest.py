"""The surest slides are chosen by hand's rules, and their pictures are of the right places."""

import h5py
import numpy as np
import pytest
from conftest import write_pyramid
from PIL import Image

from tapfm.arms import Arm
from tapfm.surest import NoPicturesError, choose_cases, pictures_of, thresholds

SIDE = 32


def test_the_surest_of_every_kind():
    slides = [f"s{n}" for n in range(7)]
    y = np.array([[1, 1, 1, 0, 0, np.nan, 0], [0, 0, 0, 0, 0, 0, 1]]).T
    p = np.array([[0.9, 0.2, 0.97, 0.5, 0.1, 1.0, 0.8], [0.4, 0.3, 0.2, 0.1, 0.3, 0.45, 0.5]]).T
    found = choose_cases(["A", "B"], Arm("x", True, slides, slides, y, p), [0.5, 0.5])
    assert [(case.label, case.kind, case.slide_id, case.prob) for case in found] == [
        ("A", "true positive", "s2", 0.97),
        ("A", "true negative", "s4", 0.1),
        ("A", "false positive", "s6", 0.8),
        ("A", "false negative", "s1", 0.2),
        ("B", "true positive", "s6", 0.5),  # called from 0.5
        ("B", "true negative", "s3", 0.1),
    ]


def test_positive_is_called_from_the_threshold_that_was_chosen():
    chosen = {"operating_points": {"A": {"balanced": {"threshold": 0.25}, "f1": {"threshold": 1}},
                                   "B": {"balanced": {"threshold": None}}, "C": None}}  # fmt: skip
    assert thresholds(chosen, ["A", "B", "C", "D"]) == [0.25, 0.5, 0.5, 0.5]
    assert thresholds({"operating_points": None}, ["A"]) == [0.5]
    one = Arm("x", True, ["s"], ["c"], np.array([[1.0]]), np.array([[0.3]]))
    assert [case.kind for case in choose_cases(["A"], one, [0.25])] == ["true positive"]
    assert [case.kind for case in choose_cases(["A"], one, [0.5])] == ["false negative"]


@pytest.fixture
def run(tmp_path):
    """A slide of 9 x 8 tiles with weights that rise from left to right, then down."""
    blocks = np.random.default_rng(5).integers(40, 255, (33, 39, 3))  # every place looks its own
    picture = np.kron(blocks, np.ones((8, 8, 1)))[:263, :311].astype(np.uint8)
    write_pyramid(tmp_path / "s.tif", picture, 0.5, levels=2)
    x, y = np.meshgrid(np.arange(9), np.arange(8))
    coords = np.stack([x.ravel(), y.ravel()], axis=1) * SIDE
    weights = np.arange(1, 73, dtype=np.float32)
    write_weights(tmp_path, weights / weights.sum(), coords)
    return tmp_path, picture, coords


def write_weights(folder, weights, coords):
    path = folder / "run" / "weights_test" / "s.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["weights"] = weights
        file.create_dataset("coords", data=coords).attrs["patch_size_level0"] = SIDE


def pictures(folder, path="s.tif"):
    return pictures_of(folder / "run", "test", "s", path and folder / path, SIDE)


def test_tiles_are_those_of_the_largest_weights_from_their_places(run):
    folder, picture, coords = run
    found = pictures(folder)
    assert [(each["x0"], each["y0"]) for each in found.facts["tiles"]] == [
        tuple(place) for place in coords[::-1][:8].tolist()
    ]
    weights = np.arange(1, 73) / np.arange(1, 73).sum()
    assert found.facts["count"] == 72
    assert found.facts["effective"] == pytest.approx(1 / np.square(weights).sum())
    for path, place in zip(found.tiles, found.facts["tiles"], strict=True):
        x0, y0 = place["x0"], place["y0"]
        there = np.asarray(picture)[y0 : y0 + SIDE, x0 : x0 + SIDE].astype(float)
        shown = np.asarray(Image.open(path)).astype(float)
        elsewhere = np.asarray(picture)[:SIDE, :SIDE].astype(float)
        assert shown.shape == (SIDE, SIDE, 3)
        assert np.abs(shown - there).mean() < 25 < np.abs(shown - elsewhere).mean()  # two JPEGs


def test_the_overlay_is_dark_where_weights_are_low_and_frames_the_tiles(run):
    folder, _, _ = run
    found = pictures(folder)
    small = np.asarray(Image.open(found.folder / "thumbnail.jpg")).astype(float)
    drawn = np.asarray(Image.open(found.folder / "overlay.jpg")).astype(float)
    assert small.shape == drawn.shape == (263, 311, 3)
    assert drawn[:SIDE, : 8 * SIDE].mean() < drawn[6 * SIDE : 7 * SIDE, : 8 * SIDE].mean()
    np.testing.assert_allclose(drawn[:, 290:], small[:, 290:], atol=40)  # no tile, no colour
    last = drawn[7 * SIDE, 8 * SIDE : 9 * SIDE - 2]  # the upper edge of the heaviest tile's frame
    surround = drawn[7 * SIDE - 1, 8 * SIDE : 9 * SIDE - 2]
    assert last.mean() > surround.mean() + 80  # white on black


def test_pictures_are_kept_without_the_slide_and_drawn_anew_for_other_weights(run):
    folder, _, coords = run
    first = pictures(folder)
    kept = first.tiles[0].stat().st_mtime_ns
    slide = folder / "s.tif"
    slide.rename(folder / "away.tif")
    assert pictures(folder).facts == first.facts
    assert pictures(folder, path=None).tiles[0].stat().st_mtime_ns == kept
    write_weights(folder, np.full(72, 1 / 72, np.float32), coords)
    with pytest.raises(NoPicturesError, match=r"s cannot be opened: .*s.tif is not there"):
        pictures(folder)
    (folder / "away.tif").rename(slide)
    found = pictures(folder)
    assert found.facts["effective"] == pytest.approx(72, rel=1e-5)
    assert [found.facts["tiles"][0][key] for key in ("x0", "y0")] == [0, 0]  # all alike: in order
    found.tiles[3].unlink()
    pictures(folder)
    assert found.tiles[3].exists()


def test_why_there_are_none_is_said(run):
    folder, _, _ = run
    with pytest.raises(NoPicturesError, match="the index is not there to say where it lies"):
        pictures(folder, path=None)
    (folder / "torn.tif").write_bytes((folder / "s.tif").read_bytes()[:2000])
    with pytest.raises(NoPicturesError, match="s: "):
        pictures(folder, path="torn.tif")
    assert not (folder / "run" / "cases_test" / "s" / "case.json").exists()
    (folder / "run" / "weights_test" / "s.h5").write_bytes(b"")
    with pytest.raises(NoPicturesError, match=r"s.h5 cannot be read"):
        pictures(folder)
