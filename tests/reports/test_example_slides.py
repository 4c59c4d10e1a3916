"""Example slides follow rules checked by hand, and their pictures show the right places."""

import h5py
import numpy as np
import pytest
from PIL import Image

from tapfm.reports.example_slides import row_thresholds
from tapfm.reports.html.case_pictures import NoPicturesError, pictures_of
from tapfm.reports.html.task_reports import REPORTS
from tapfm.reports.rows import ResultRow
from tapfm.tasks.multiclass import Multiclass
from tapfm.tasks.multilabel import Multilabel
from tapfm.tasks.regression import Regression
from tapfm.tasks.survival import Survival
from tests.conftest import write_pyramid

SIDE = 32


def choose_examples(task, row, facts):
    return REPORTS[task.report].choose(task, row, facts)


def test_the_surest_of_every_kind():
    slides = [f"s{n}" for n in range(7)]
    y = np.array([[1, 1, 1, 0, 0, np.nan, 0], [0, 0, 0, 0, 0, 0, 1]]).T
    p = np.array([[0.9, 0.2, 0.97, 0.5, 0.1, 1.0, 0.8], [0.4, 0.3, 0.2, 0.1, 0.3, 0.45, 0.5]]).T
    found = choose_examples(Multilabel(("A", "B")), ResultRow("x", True, slides, slides, y, p), {})
    assert listed(found) == [
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
    assert row_thresholds(chosen, ["A", "B", "C", "D"]) == [0.25, 0.5, 0.5, 0.5]
    assert row_thresholds({"operating_points": None}, ["A"]) == [0.5]
    one = ResultRow("x", True, ["s"], ["c"], np.array([[1.0]]), np.array([[0.3]]))
    for facts, kind in ((chosen, "true positive"), ({}, "false negative")):
        found = choose_examples(Multilabel(("A",)), one, facts)
        assert [each.kind for each in found.slides] == [kind]


def test_of_classes_values_and_times():
    slides = [f"s{n}" for n in range(6)]
    y = np.array([[0.0], [0], [1], [1], [2], [np.nan]])
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1],
                  [0.5, 0.3, 0.2], [0, 0, 1]])  # fmt: skip
    task = Multiclass(("a", "b", "c"), "kind", (1.0, 1.0, 1.0))
    found = choose_examples(task, ResultRow("x", True, slides, slides, y, p), {})
    assert listed(found) == [
        ("a", "right", "s0", 0.6),
        ("a", "wrong", "s4", 0.5),
        ("a", "missed", "s1", 0.2),
        ("b", "right", "s2", 0.8),
        ("b", "wrong", "s1", 0.7),
        ("c", "missed", "s4", 0.2),
    ]
    assert found.targets_NL[1] == ["1", "0", "0"]
    assert found.targets_NL[5] == ["unknown"] * 3

    y = np.array([[1.0], [2], [3], [4], [np.nan], [5]])
    p = np.array([[3.0], [2.25], [2.5], [3.75], [9], [3]])
    found = choose_examples(
        Regression(("v",), (0.0,), (1.0,)), ResultRow("x", True, slides, slides, y, p), {}
    )
    assert listed(found) == [
        ("v", "near, low half", "s1", 2.25),
        ("v", "near, high half", "s3", 3.75),
        ("v", "most too high", "s0", 3),
        ("v", "most too low", "s5", 3),
    ]

    time = np.array([[2, 1], [3, 1], [4, 0], [9, 1], [8, 0], [np.nan, np.nan]], float)
    risk = np.array([[5.0], [1], [9], [4], [0], [3.5]])
    task = Survival(("h",), "months", "dead", (), 5.0, "cox")
    found = choose_examples(
        task, ResultRow("x", True, slides, slides, np.c_[time, time[:, 0]], risk), {}
    )
    assert found.thresholds == {"risk": 3.75}  # s2 was lost before the horizon: it is neither
    assert listed(found) == [
        ("risk", "early, high risk", "s0", 5),
        ("risk", "late, low risk", "s4", 0),
        ("risk", "late, high risk", "s3", 4),
        ("risk", "early, low risk", "s1", 1),
    ]
    assert found.targets_NL[2:4] == [["no event at 4"], ["event at 9"]]


def listed(examples):
    return [(each.label, each.kind, each.slide_id, each.value) for each in examples.slides]


@pytest.fixture
def run(tmp_path):
    """Return a run with a slide of 9 x 8 tiles whose weights rise from left to right, then down."""
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
    with pytest.raises(NoPicturesError, match=r"s cannot be opened: .*s.tif is missing"):
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
    with pytest.raises(NoPicturesError, match="its path is unknown, since the index is missing"):
        pictures(folder, path=None)
    (folder / "torn.tif").write_bytes((folder / "s.tif").read_bytes()[:2000])
    with pytest.raises(NoPicturesError, match="s: "):
        pictures(folder, path="torn.tif")
    assert not (folder / "run" / "cases_test" / "s" / "case.json").exists()
    (folder / "run" / "weights_test" / "s.h5").write_bytes(b"")
    with pytest.raises(NoPicturesError, match=r"s.h5 cannot be read"):
        pictures(folder)
