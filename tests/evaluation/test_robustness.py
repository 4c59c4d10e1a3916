"""What adapting did to robustness: stain draws, sampled tiles, the drop, RI and MaRI."""

import sys

import numpy as np
import pytest
import torch

from tapfm.data.bag import Bag, Places
from tapfm.evaluation.robustness import (
    IndexLeftOut,
    SampledTiles,
    drops,
    indices,
    restained,
    sampled_features,
    taken,
)
from tapfm.reports.rows import ResultRow
from tapfm.slide_model.model import ModelConfig, build
from tapfm.stats.metrics import macro_auroc
from tapfm.tasks.multiclass import Multiclass
from tapfm.tasks.multilabel import Multilabel
from tapfm.tasks.regression import Regression

TASK = Multilabel(("A", "B"))


def bag(tiles, name="s", slides=1):
    corners = [np.arange(2 * len(part)).reshape(-1, 2) for part in tiles.chunk(slides)]
    places = Places.of(corners, [32.0] * slides, 0.5)
    return Bag(name, "c", tiles, places, torch.tensor([1.0, 0.0]), seed=0)


def grey(count):
    return torch.full((count, 3, 32, 32), 150, dtype=torch.uint8)


def test_a_stain_draw_is_a_slides_own_whatever_the_chunks():
    tiles = grey(10)
    changed = restained(bag(tiles, slides=2)).tiles
    by_three, whole = torch.cat(list(changed.split(3))), torch.cat(list(changed.split(10)))
    assert torch.equal(by_three, whole)
    assert (tiles == 150).all()
    assert [len(whole[part].flatten(2)[..., 0].unique(dim=0))
            for part in (slice(5), slice(5, 10))] == [1, 1]  # fmt: skip
    assert not torch.equal(whole[0], whole[5])
    assert not torch.equal(whole[0], tiles[0])
    other = torch.cat(list(restained(bag(tiles, "t")).tiles.split(4)))
    assert not torch.equal(other[0], whole[0])
    glass = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(torch.cat(list(restained(bag(glass)).tiles.split(2))), glass)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_tiles_are_taken_by_their_rows(chunk):
    tiles = torch.randint(0, 256, (17, 3, 4, 4), dtype=torch.uint8)
    rows = torch.tensor([0, 2, 3, 9, 16])
    assert torch.equal(taken(tiles, rows, chunk), tiles[rows])


def test_both_encoders_see_the_same_tiles(monkeypatch):
    monkeypatch.setattr("tapfm.evaluation.robustness.OF_SLIDE", 3)
    model = build(ModelConfig("demo_vit", "gated", ("A", "B"), 32, 0.5)).eval()
    tiles = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    found = sampled_features([model, model], [bag(tiles), bag(tiles[:2], "t")], 5, 2)
    assert found.slides == ["s"] * 3 + ["t"] * 2
    assert found.cases == ["c"] * 5
    assert torch.equal(*found.z_ND)
    with torch.no_grad():
        every = model.encode(tiles)[0]
    distance = torch.cdist(found.z_ND[0], every).amin(1)
    assert distance.max() < 1e-3


def test_a_drop_is_the_paired_difference_of_the_figure():
    rng = np.random.default_rng(0)
    names = [f"s{n:02d}" for n in range(40)]
    y = (rng.random((40, 2)) < 0.5).astype(float)
    plain = y + 0.3 * rng.standard_normal(y.shape)
    worse = y + 2.0 * rng.standard_normal(y.shape)
    rows = [ResultRow(title, True, names, names, y, plain) for title in ("run", "control")]
    shuffled = rng.permutation(40)
    stained = [
        {names[n]: worse[n] for n in shuffled},
        {names[n]: plain[n] for n in shuffled[1:]},  # a slide that one could not read
    ]
    found = drops(TASK, rows, stained)
    shared = np.sort(shuffled[1:])
    lost = macro_auroc(y[shared], plain[shared]) - macro_auroc(y[shared], worse[shared])
    assert found["run"]["value"] == pytest.approx(lost)
    assert found["run"]["low"] > 0.05
    assert [found["control"][end] for end in ("value", "low", "high")] == [0, 0, 0]
    assert found["more"] == found["run"]


def sampled(*by):
    """Return tiles of 40 slides of two sites; features tell what `by` says, one of each encoder."""
    rng, number = np.random.default_rng(0), np.repeat(np.arange(40), 5)
    kinds = {"class": number % 2, "site": number // 2 % 2}
    z = [torch.from_numpy(np.eye(2)[kinds[each]] + 0.05 * rng.standard_normal((200, 2)))
         for each in by]  # fmt: skip
    slides = [f"s{n}" for n in number]
    site = {f"s{n}": "ab"[n // 2 % 2] for n in range(40)}
    target = {f"s{n}": np.array([n % 2, np.nan]) for n in range(40)}
    return SampledTiles(z, slides, slides), site, target


def test_features_of_the_class_are_robust_and_those_of_the_site_are_not():
    pytest.importorskip("croma")
    tiles, site, target = sampled("class", "site")
    for task in (TASK, Multiclass(("x", "y"), "grade", (1.0, 1.0))):
        found = indices(task, tiles, site, target)
        for kind in ("ri", "mari"):
            assert found[kind]["run"] > 0.95
            assert found[kind]["control"] < 0.05


def test_indices_that_cannot_be_are_left_out_with_the_reason(monkeypatch):
    tiles, site, target = sampled("class", "site")
    with pytest.raises(IndexLeftOut, match="need classes"):
        indices(Regression(("v",), (0.0,), (1.0,)), tiles, site, target)
    monkeypatch.setitem(sys.modules, "croma", None)
    with pytest.raises(IndexLeftOut, match=r"pip install 'tapfm\[robustness\]'"):
        indices(TASK, tiles, site, target)
    monkeypatch.setitem(sys.modules, "croma", type(sys)("croma"))
    sys.modules["croma"].RI = sys.modules["croma"].MaRI = None
    with pytest.raises(IndexLeftOut, match="fewer than two sites"):
        indices(TASK, tiles, dict.fromkeys(site, "a"), target)
    with pytest.raises(IndexLeftOut, match="no label has both classes"):
        indices(TASK, tiles, site, dict.fromkeys(target, np.array([1.0, np.nan])))
