"""`predict` and `heatmap` take any slide, hold few chunks, and name unreadable slides."""

import gc
import json
import re
import weakref

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from slides.cohort.table import SlideRow
from slides.files import file_fingerprint
from slides.grid import Grid
from slides.streaming.bounded_tiles import SlideTiles
from slides.streaming.stain import StainedSlide
from slides.tiling.index import index_slide
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tapfm.cli import main
from tapfm.data.bag import Bag, Places
from tapfm.encoders import backbones
from tapfm.inference.predict import new_slide_bag
from tapfm.inference.prediction import predict_bag
from tapfm.slide_model import model as models
from tests.cohorts import LABELS
from tests.conftest import stained_picture, write_pyramid

TILE = 32


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a model with random weights, saved as a run saves it."""
    torch.manual_seed(0)
    model_config = models.ModelConfig("demo_vit", "tapfm_gated", LABELS, TILE, 0.5)
    model = models.SlideModel(model_config, backbones.load("demo_vit", "random", tile_px=TILE))
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    models.save(model, path, tissue={"min_area_um2": 1000.0})
    return path


@pytest.fixture
def slide(tmp_path):
    return write_pyramid(tmp_path / "one.svs", stained_picture(601, 463), 0.25)


def row_of(path):
    return SlideRow(path.stem, path.stem, path, "test", None, "", "", ())


def test_predict_and_heatmap(saved, slide, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["heatmap", str(slide), "--model", str(saved), "--out", str(out)]) == 0
    table = pd.read_csv(out / "predictions.csv")
    assert table["slide_id"].tolist() == ["one"]
    assert table[[f"p_{label}" for label in LABELS]].notna().all().all()
    with h5py.File(out / "one_weights.h5") as file:
        weights, coords = file["weights"][:], file["coords"][:]
        assert file["coords"].attrs["patch_size_level0"] == 64  # 32 px at 0.5 on a 0.25 scan
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert (out / "one.png").stat().st_size > 10_000
    tiles = json.loads((out / "one.geojson").read_text())["features"]
    assert len(tiles) == len(weights) == len(coords)
    ring = np.array(tiles[0]["geometry"]["coordinates"][0])
    np.testing.assert_array_equal(ring.min(0), coords[0])
    np.testing.assert_array_equal(ring.max(0), coords[0] + 64)


def test_tiles_with_logits_of_their_own_are_written_in_the_labels_unit(saved, slide, tmp_path):
    """Here a slide's probability is the mean of its tiles'."""
    spec = {"name": "additive", "attention": False, "probability": True}
    torch.manual_seed(0)
    model_config = models.ModelConfig("demo_vit", spec, LABELS, TILE, 0.5)
    model = models.SlideModel(model_config, backbones.load("demo_vit", "random", tile_px=TILE))
    path, out = tmp_path / "m.safetensors", tmp_path / "out"
    models.save(model, path, tissue={"min_area_um2": 1000.0})
    assert main(["heatmap", str(slide), "--model", str(path), "--out", str(out)]) == 0
    names = [f"p_{label}" for label in LABELS]
    with h5py.File(out / "one_weights.h5") as file:
        values_TP = file["predictions"][:]
    predicted = pd.read_csv(out / "predictions.csv").loc[0, names].to_numpy(float)
    np.testing.assert_allclose(values_TP.mean(0), predicted, atol=1e-6)
    assert values_TP.std(0).min() > 1e-6
    tiles = json.loads((out / "one.geojson").read_text())["features"]
    found = [[tile["properties"]["measurements"][name] for name in names] for tile in tiles]
    np.testing.assert_allclose(found, values_TP, atol=1e-3)
    assert main(["predict", str(slide), "--model", str(saved), "--out", str(tmp_path / "p")]) == 0
    with h5py.File(tmp_path / "p" / "one_weights.h5") as file:
        assert file["predictions"].shape == (len(file["weights"]), len(names)), "each tile alone"


def test_a_picture_says_risk_and_survival_by_their_names(slide, tmp_path, monkeypatch):
    """Not by those of the logits, which are hazards, and as many."""
    task = {"name": "survival", "time": "t", "event": "e", "edges": (12.0, 24.0), "horizon": 14.0}
    model_config = models.ModelConfig("demo_vit", "gated", ("h1", "h2", "h3"), TILE, 0.5, task=task)
    model = models.SlideModel(model_config, backbones.load("demo_vit", "random", tile_px=TILE))
    path, titles = tmp_path / "m.safetensors", []
    models.save(model, path, tissue={"min_area_um2": 1000.0})
    monkeypatch.setattr(
        "tapfm.inference.predict.overlay_png", lambda *_, title, **how: titles.append(title)
    )
    out = tmp_path / "out"
    assert main(["heatmap", str(slide), "--model", str(path), "--out", str(out)]) == 0
    row = pd.read_csv(out / "predictions.csv").iloc[0]
    said = ", ".join(f"{key} {row[key]:.3f}" for key in ("risk", "survival_12", "survival_24"))
    assert titles[0].startswith(f"one: {said}; ")


def test_stains_are_normalised_as_in_training(saved, slide, tmp_path):
    """The model says how; its prediction is that of the tiles normalised by hand."""
    model = models.load(saved)
    models.save(model, tmp_path / "m.safetensors", tissue={"min_area_um2": 1e3}, stain="macenko")
    run = ["predict", str(slide), "--out", str(tmp_path / "out"), "--model"]
    probabilities = []
    for path in (saved, tmp_path / "m.safetensors"):
        assert main([*run, str(path)]) == 0
        probabilities.append(pd.read_csv(tmp_path / "out" / "predictions.csv")["p_EGFR"][0])
    with Slide(slide) as opened:
        index = index_slide(opened, Grid(TILE, 0.5), Tissue(min_area_um2=1e3))
        normalised = StainedSlide(opened, index, "macenko")
        bag = new_slide_bag(row_of(slide), SlideTiles.of(normalised, index), len(LABELS), [index])
        expected = predict_bag(model.eval(), bag, 16).probs_K[0]
    assert probabilities[1] == pytest.approx(expected, abs=2e-6)
    assert probabilities[0] != pytest.approx(expected, abs=1e-5)


def test_masks_of_the_users_own(saved, slide, tmp_path, capsys):
    """Also for a model whose cohort had masks, which are not these slides'."""
    model = models.load(saved)
    gone = str(tmp_path / "masks of the cohort")
    tissue = {"min_area_um2": 1000.0, "masks": gone}
    models.save(model, tmp_path / "m.safetensors", tissue=tissue)
    square = [[[128, 128], [320, 128], [320, 256], [128, 256]]]
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "one.geojson").write_text(
        json.dumps({"type": "Polygon", "coordinates": square})
    )
    run = [
        "predict",
        str(slide),
        "--out",
        str(tmp_path),
        "--model",
        str(tmp_path / "m.safetensors"),
    ]
    assert main(run) == 0
    assert main([*run, "--masks", str(tmp_path / "masks")]) == 0
    with h5py.File(tmp_path / "one_weights.h5") as file:
        assert {tuple(c) for c in file["coords"][:]} == {
            (x, y) for x in (128, 192, 256) for y in (128, 192)
        }


def test_a_heatmap_does_not_take_the_place_of_the_mask_it_is_of(
    saved, slide, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ring = [[128, 128], [320, 128], [320, 256], [128, 256]]
    mask = tmp_path / "one.geojson"
    mask.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    before, given = mask.read_bytes(), [str(slide), "--model", str(saved), "--masks", str(tmp_path)]
    assert main(["heatmap", *given, "--out", "."]) == 2
    assert "is the folder of the masks" in capsys.readouterr().err
    assert main(["heatmap", *given, "--out", "drawn"]) == 0
    assert main(["predict", *given, "--out", "."]) == 0
    assert mask.read_bytes() == before


def test_bad_slides_are_named_and_the_others_done(saved, slide, tmp_path, capsys):
    (tmp_path / "text.svs").write_text("no slide")
    write_pyramid(tmp_path / "nompp.tif", stained_picture(601, 463), None)
    glass = write_pyramid(tmp_path / "glass.tif", stained_picture(601, 463, tissue=False), 0.5)
    coarse = write_pyramid(tmp_path / "coarse.tif", stained_picture(601, 463), 2.0)
    cut = tmp_path / "cut.svs"
    cut.write_bytes(slide.read_bytes()[: slide.stat().st_size // 2])
    bad = [tmp_path / "text.svs", tmp_path / "nompp.tif", glass, coarse, cut, tmp_path / "gone.svs"]
    out = tmp_path / "out"
    arguments = ["predict", *map(str, bad), str(slide), "--model", str(saved), "--out", str(out)]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    faults = re.findall("tapfm: (.*)", said)
    assert len(faults) == len(bad)
    of = {path.stem: next(fault for fault in faults if path.stem in fault) for path in bad}
    assert len(set(of.values())) == len(bad)
    for fault, reason in zip(
        [*of.values()][1:4], ("--slide-mpp|mpp", "no tissue", "2 "), strict=True
    ):
        assert any(part in fault for part in reason.split("|")), fault
    assert pd.read_csv(out / "predictions.csv")["slide_id"].tolist() == ["one"]


def test_slide_after_slide_the_table_grows(saved, slide, tmp_path, capsys):
    """As in a shell loop; a slide predicted again has one row, the new one."""
    other = write_pyramid(tmp_path / "two.svs", stained_picture(461, 603, seed=1), 0.25)
    (tmp_path / "text.svs").write_text("no slide")
    out = tmp_path / "out"
    table = out / "predictions.csv"

    def run(path):
        return main(["predict", str(path), "--model", str(saved), "--out", str(out)])

    assert run(tmp_path / "text.svs") == 2
    assert not out.exists(), "nothing was predicted"
    assert [run(slide), run(other)] == [0, 0]
    both = table.read_text()
    assert pd.read_csv(table)["slide_id"].tolist() == ["one", "two"]
    assert pd.read_csv(table)["model"].tolist() == [file_fingerprint(saved)] * 2
    table.write_text(both.replace("one,one", "one,P1").replace("two,two", "two,P2"))
    assert run(other) == 0
    assert [line[:6] for line in table.read_text().splitlines()[1:]] == ["one,P1", "two,tw"]
    before = table.read_text()
    assert run(tmp_path / "text.svs") == 2
    assert table.read_text() == before


@pytest.mark.parametrize("there", [b"slide_id,called\none,a\n", b"slide_id\n\xff\n"])
def test_a_table_of_other_columns_is_refused_before_any_work(saved, slide, tmp_path, capsys, there):
    table = tmp_path / "predictions.csv"
    table.write_bytes(there)
    assert main(["predict", str(slide), "--model", str(saved), "--out", str(tmp_path)]) == 2
    assert f"tapfm: {table}: " in capsys.readouterr().err
    assert table.read_bytes() == there
    assert not (tmp_path / "one_weights.h5").exists()


def test_two_slides_of_one_name_are_refused(saved, slide, tmp_path, capsys):
    other = tmp_path / "other" / "one.tif"
    assert main(["predict", str(slide), str(other), "--model", str(saved)]) == 2
    said = capsys.readouterr().err
    assert f"one: {slide} and {other} both have this name" in said
    assert "--out" in said


def test_prediction_is_the_validation_path_whatever_the_chunk(saved, slide):
    model = models.load(saved)
    with Slide(slide) as opened:
        index = index_slide(opened, Grid(TILE, 0.5), Tissue(min_area_um2=1000.0))
        streamed = new_slide_bag(row_of(slide), SlideTiles.of(opened, index), len(LABELS), [index])
        whole = torch.cat(list(streamed.tiles.split(7)))
    in_memory = Bag("one", "one", whole, Places.unknown(len(whole)), torch.full((2,), torch.nan), 0)
    a, b = predict_bag(model, streamed, 3), predict_bag(model, in_memory, 1000)
    np.testing.assert_allclose(a.probs_K, b.probs_K, rtol=1e-4)
    np.testing.assert_allclose(a.weights_T, b.weights_T, rtol=1e-3, atol=1e-7)


class CountedTiles:
    """A slide of any length whose chunks are counted while they live."""

    def __init__(self, tiles):
        self.tiles, self.alive, self.most = tiles, 0, 0

    def split(self, size):
        for start in range(0, self.tiles, size):
            rows = min(size, self.tiles - start)
            chunk = torch.zeros(rows, 3, TILE, TILE, dtype=torch.uint8)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(chunk, self.gone)
            yield chunk
            del chunk
            gc.collect()

    def gone(self):
        self.alive -= 1


@pytest.mark.parametrize("tiles", [21, 210])
def test_pixels_in_memory_do_not_depend_on_the_slide(saved, tiles):
    model, counted = models.load(saved), CountedTiles(tiles)
    bag = Bag("long", "long", counted, Places.unknown(tiles), torch.full((2,), torch.nan), 0)
    assert len(predict_bag(model, bag, 7).weights_T) == tiles
    assert counted.most <= 2


def test_a_damaged_model_is_named(saved, slide, tmp_path, capsys):
    damaged = tmp_path / "best.safetensors"
    damaged.write_bytes(saved.read_bytes()[:1000])
    assert main(["predict", str(slide), "--model", str(damaged)]) == 2
    assert "not a model that tapfm saved" in capsys.readouterr().err
    assert main(["predict", str(slide), "--model", str(tmp_path / "none")]) == 2
    assert "there is no such file" in capsys.readouterr().err
