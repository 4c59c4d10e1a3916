"""`predict` and `heatmap` of a PathPT run, outside a cohort, give what the run gave."""

import csv
import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from slides.streaming.loose_slides import rows_of_files
from tapfm.cli import main
from tapfm.pathpt.model import load_pathpt, save_pathpt
from tapfm.pathpt.new_slides import load_whole, name_slides
from tapfm.pathpt.vote import ballot
from tests.cohorts import write_cohort
from tests.conftest import stained_picture, write_pyramid
from tests.pathpt.test_run import ask

NAMES = ("normal tissue", "tumour with smooth chromatin", "tumour with prominent nucleoli")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder of a cohort, and of the one draw of its run."""
    folder = tmp_path_factory.mktemp("pathpt")
    tiles = {"tile_px": 112, "mpp": 0.5, "tissue": {"min_area_um2": 1000.0}}
    config = write_cohort(folder, tiles=tiles, stain="reinhard")
    lora = {"name": "lora", "rank": 2}
    how = {"shots": [2], "draws": 1, "strategy": lora, "encoder_lr": 3e-2, "lr": 1e-2, "epochs": 3}
    code, out = ask((folder, config), "lora", **how)
    assert code == 0
    return folder, out / "2_shots" / "draw_0"


def tell(verb, model, out, *slides, **flags):
    flags = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    given = [verb, *map(str, slides), "--model", str(model), "--out", str(out), *flags]
    code = main(given)
    table = out / "predictions.csv"
    return code, list(csv.DictReader(table.open())) if table.exists() else None


def measurements(path):
    """Return the measurements of a GeoJSON's tiles, (N, K)."""
    tiles = json.loads(path.read_text())["features"]
    return np.array([list(each["properties"]["measurements"].values()) for each in tiles])


@pytest.mark.parametrize(
    ("stem", "arm"), [("pathpt", "PathPT"), ("pathpt_end_to_end", "PathPT, end to end")]
)
def test_loose_slides_are_called_as_the_run_called_them(ran, stem, arm, tmp_path, capsys):
    """So are their tiles: stains, tissue, places and the trained image tower are kept."""
    folder, draw = ran
    slides = [folder / "slides" / name for name in ("s12.tif", "s13.svs")]
    code, rows = tell("heatmap", draw / f"{stem}.safetensors", tmp_path, *slides, workers=0)
    assert code == 0
    said = list(csv.DictReader((draw / "predictions.csv").open()))
    assert [(row["slide_id"], row["called"]) for row in rows] == [
        (row["slide_id"], row[arm]) for row in said
    ]
    for row in rows:
        with h5py.File(tmp_path / f"{row['slide_id']}_tiles.h5") as file:
            p_NK = file["probabilities"][:]
            assert tuple(file["probabilities"].attrs["classes"]) == NAMES
            assert len(file["coords"]) == len(p_NK)
        np.testing.assert_allclose(p_NK.sum(1), 1, atol=1e-5)
        called, share_C = ballot(torch.from_numpy(p_NK).log())
        assert row["called"] == NAMES[called + 1]
        shares = [float(row[f"p_{name}"]) for name in NAMES[1:]]
        assert shares == pytest.approx(share_C.tolist(), abs=1e-6)
        assert float(row["normal"]) == pytest.approx((p_NK.argmax(1) == 0).mean(), abs=1e-6)
        drawn = measurements(tmp_path / f"{row['slide_id']}.geojson")
        np.testing.assert_allclose(drawn, p_NK, atol=1e-5)
        assert (tmp_path / f"{row['slide_id']}.png").stat().st_size > 10_000
    if stem == "pathpt_end_to_end":  # the run drew this arm's first slide
        theirs = measurements(draw.parent.parent / "tile_classes" / "s12.geojson")
        np.testing.assert_allclose(measurements(tmp_path / "s12.geojson"), theirs, atol=1e-4)


def test_what_was_trained_of_the_image_tower_counts(ran, tmp_path):
    """The same file without its LoRA says something else of the tiles."""
    folder, draw = ran
    path, less = draw / "pathpt_end_to_end.safetensors", tmp_path / "less.safetensors"
    model, classes_Kd, model_config, _ = load_pathpt(path)
    assert model_config.strategy["rank"] == 2
    save_pathpt(less, model, classes_Kd, replace(model_config, strategy=None), {})
    found = []
    for each in (path, less):
        assert tell("predict", each, tmp_path, folder / "slides" / "s12.tif", workers=0)[0] == 0
        with h5py.File(tmp_path / "s12_tiles.h5") as file:
            found.append(file["probabilities"][:])
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert not (tmp_path / "s12.png").exists(), "predict draws nothing"


def test_a_case_is_named_by_all_its_tiles_or_not_at_all(ran, tmp_path, capsys):
    folder, draw = ran
    slides = rows_of_files([folder / "slides" / name for name in ("s12.tif", "s13.svs")], None)
    path = draw / "pathpt.safetensors"
    assert name_slides(path, slides, tmp_path, case="P1", workers=0) == 0
    (row,) = csv.DictReader((tmp_path / "predictions.csv").open())
    assert row["slide_id"] == row["case_id"] == "P1"
    p_NK = []
    for each in slides:
        with h5py.File(tmp_path / f"{each.slide_id}_tiles.h5") as file:
            p_NK.append(torch.from_numpy(file["probabilities"][:]))
    called, share_C = ballot(torch.cat(p_NK).log())
    assert row["called"] == NAMES[called + 1]
    shares = [float(row[f"p_{name}"]) for name in NAMES[1:]]
    assert shares == pytest.approx(share_C.tolist(), abs=1e-6)

    gone = rows_of_files([tmp_path / "gone.svs"], None)
    assert name_slides(path, [*slides, *gone], tmp_path / "out", case="P1", workers=0) == 2
    assert not (tmp_path / "out").exists(), "no slide is read in vain, and nothing written"
    assert "P1: one of its slides failed" in capsys.readouterr().err


def test_bad_slides_are_named_and_the_others_done(ran, tmp_path, capsys):
    folder, draw = ran
    (tmp_path / "text.svs").write_text("no slide")
    glass = write_pyramid(tmp_path / "glass.tif", stained_picture(311, 263, tissue=False), 0.5)
    slides = [tmp_path / "text.svs", folder / "slides" / "s12.tif", glass]
    code, rows = tell("predict", draw / "pathpt.safetensors", tmp_path / "out", *slides)
    assert code == 2
    assert [row["slide_id"] for row in rows] == ["s12"]
    said = capsys.readouterr().err
    assert "tapfm: " in said
    assert "text" in said
    assert "glass: no tissue" in said
    model = draw / "pathpt.safetensors"
    assert tell("predict", model, tmp_path / "out", tmp_path / "text.svs") == (2, rows)
    slide = folder / "slides" / "s13.svs"
    code, both = tell("predict", model, tmp_path / "out", slide, workers=0)
    assert code == 0
    assert both[0] == rows[0], "one that is there stays"
    assert [row["slide_id"] for row in both] == ["s12", "s13"]
    (tmp_path / "out" / "predictions.csv").write_text("slide_id,case_id,EGFR,p_EGFR\n")
    assert tell("predict", model, tmp_path / "out", slide) == (2, [])
    assert "has the columns slide_id, case_id, EGFR, p_EGFR, but" in capsys.readouterr().err


def test_another_image_tower_or_file_is_refused(ran, tmp_path, capsys):
    folder, draw = ran
    slide, path = folder / "slides" / "s12.tif", tmp_path / "model.safetensors"
    model, classes_Kd, model_config, image = load_pathpt(draw / "pathpt.safetensors")

    def said(**changes):
        save_pathpt(path, model, classes_Kd, replace(model_config, **changes), image)
        assert tell("predict", path, tmp_path, slide)[0] == 2
        return capsys.readouterr().err

    assert "is another" in said(fingerprint="0" * 16)
    keep = {**model_config.towers, "teacher": "keep", "weights": str(tmp_path / "gone")}
    assert "needs the image tower keep that it was trained with" in said(towers=keep)
    for verb in ("features", "export"):
        given = [str(slide)] if verb == "features" else []
        given += ["--model", str(path), "--out", str(tmp_path / "out")]
        assert main([verb, *given]) == 2
        assert "pathpt.safetensors is for `tapfm predict` and `heatmap`" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:1000])
    assert tell("predict", path, tmp_path, slide)[0] == 2
    assert "not a model that tapfm saved" in capsys.readouterr().err


def test_a_student_needs_no_teacher(ran, tmp_path, monkeypatch):
    """A vision-only encoder's tiles are named without the towers that taught it."""
    folder, _ = ran
    config = folder / "config.yaml"
    how = {"shots": [1], "draws": 1, "images": "demo_vit", "mode": "embedding"}
    code, out = ask((folder, config), "student", **how)
    assert code == 0
    monkeypatch.setattr("tapfm.pathpt.tiles.load_demo", None)
    path = out / "1_shots" / "draw_0" / "pathpt.safetensors"
    assert load_whole(path, "cpu")[3].teacher is None
    code, rows = tell("predict", path, tmp_path, folder / "slides" / "s13.svs", workers=0)
    assert code == 0
    said = {row["slide_id"]: row["PathPT"] for row in csv.DictReader(
        (path.parent / "predictions.csv").open())}  # fmt: skip
    assert rows[0]["called"] == said["s13"]
