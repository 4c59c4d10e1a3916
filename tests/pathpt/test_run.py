"""`tapfm pathpt` from slides to table, and invalid questions."""

import csv
import json
import re

import numpy as np
import pytest
import torch
import yaml

from slides.cohort.table import SlideRow, read_cohort
from slides.demo.cohort import LABELS, plan_demo
from slides.demo.tissue_painter import (
    COMPARTMENTS,
    GLASS,
    TUMOUR,
    Specimen,
    compartments,
    paint,
    site_stain,
)
from slides.streaming.tile_source import TileSource
from tapfm import cli
from tapfm.adapt.strategies import make_strategy
from tapfm.config import read_source
from tapfm.pathpt.few import draw_slides
from tapfm.pathpt.model import load_pathpt
from tapfm.pathpt.question import Question, QuestionError, TileClass, read_question, subtypes
from tapfm.pathpt.spatial import places
from tapfm.pathpt.text.words import load_demo
from tests.cohorts import write_cohort
from tests.test_configs import ROOT

SMALL = {
    "classes": [
        {"name": "normal tissue", "synonyms": ["stroma"]},
        {"name": "tumour with smooth chromatin", "where": {"EGFR": 0, "KRAS": 0}},
        {"name": "tumour with prominent nucleoli", "where": {"EGFR": 1, "KRAS": 0}},
    ],
    "templates": ["an image of {} .", "{} ."],
    "shots": [1, 2],
    "draws": 2,
    "context": 4,
    "epochs": 2,
    "trust_from": 1,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pathpt")
    tiles = {"tile_px": 112, "mpp": 0.5, "tissue": {"min_area_um2": 1000.0}}
    return folder, write_cohort(folder, tiles=tiles)


def ask(cohort, name, **changes):
    folder, config = cohort
    question = folder / f"{name}.yaml"
    question.write_text(yaml.safe_dump({**SMALL, **changes}))
    out = folder / "out"  # shared, so that features are
    arguments = ["pathpt", "--config", config, "--question", question, "--out", out, "--drawn", 1]
    return cli.main([str(each) for each in arguments]), out


def test_the_whole_job_end_to_end_training_included(cohort, capsys):
    code, out = ask(cohort, "lora", strategy={"name": "lora", "rank": 2}, encoder_lr=1e-3)
    assert code == 0
    table = capsys.readouterr().out
    arms = ["zero-shot, chosen prompts", "frozen, mean-pool MLP", "frozen, gated attention",
            "PathPT", "PathPT, end to end"]  # fmt: skip
    for shots in (1, 2):
        assert all(f"| {shots} | {arm}" in table for arm in arms)
    assert table.count("(best frozen)") == 2
    scores = json.loads((out / "scores.json").read_text())
    assert scores["slides"] == 2
    for shots in (1, 2):
        for arm in arms:
            calls = []
            for n in range(2):
                path = out / f"{shots}_shots" / f"draw_{n}" / "predictions.csv"
                rows = list(csv.DictReader(path.open()))
                assert [row["slide_id"] for row in rows] == ["s12", "s13"]
                assert [row["subtype"] for row in rows] == [
                    SMALL["classes"][1]["name"], SMALL["classes"][2]["name"]]  # fmt: skip
                calls += [row[arm] == row["subtype"] for row in rows]
            figure = scores["shots"][str(shots)][arm]["balanced_accuracy"]
            assert figure["value"] == pytest.approx(np.mean(calls))

    # what was saved gives the picture's numbers without a text tower
    here = out / "2_shots" / "draw_0"
    model, classes_Kd, model_config, image = load_pathpt(here / "pathpt_end_to_end.safetensors")
    assert model_config.classes == tuple(each["name"] for each in SMALL["classes"])
    assert image
    assert all("lora" in name for name in image)
    _, _, _, untouched = load_pathpt(here / "pathpt.safetensors")
    assert not untouched
    drawn = json.loads((out / "tile_classes" / "s12.geojson").read_text())["features"]
    p_NK = np.array([list(each["properties"]["measurements"].values()) for each in drawn])
    teacher = load_demo()
    make_strategy({"name": "lora", "rank": 2}).prepare(teacher.encoder.vit)
    assert not teacher.encoder.vit.load_state_dict(image, strict=False).unexpected_keys
    source = read_source([cohort[1]])
    tile_source, slide = TileSource.of(source), next(r for r in source.rows if r.slide_id == "s12")
    index = tile_source.index(slide)
    with torch.no_grad():
        z_Nd = teacher.encode_image(torch.cat(list(tile_source.tiles(slide).split(16))))
        logits_NK = model(z_Nd, places(index.coords0, index.size0), classes_Kd)
    np.testing.assert_allclose(p_NK, logits_NK.softmax(1), atol=1e-5)
    assert (out / "tile_classes" / "s12.png").exists()
    assert len(list(out.rglob("features_demo_vit_*/*.h5"))) == 8, "no others"


def test_a_vision_only_encoder_learns_from_the_teachers_labels(cohort, capsys):
    """Its features are standardised, with free class vectors; the teacher's files are reused."""
    _, out = ask(cohort, "first", draws=1, shots=[1])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")}
    code, _ = ask(cohort, "student", draws=1, shots=[2], images="demo_vit", mode="embedding")
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.h5")} == before
    model, classes_Kd, model_config, image = load_pathpt(
        out / "2_shots" / "draw_0" / "pathpt.safetensors"
    )
    assert model_config.dim == classes_Kd.shape[1] == load_demo().encoder.dim
    assert (model.std_d != 1).all()
    assert not image


def test_a_slide_that_cannot_be_read_is_left_out_and_said_or_stops_the_run(tmp_path, capsys):
    tiles = {"tile_px": 112, "mpp": 0.5, "tissue": {"min_area_um2": 1000.0}}
    config = write_cohort(tmp_path, tiles=tiles, on_error="skip")
    (tmp_path / "slides" / "s4.tif").write_bytes(b"no slide")
    small = {"draws": 1, "shots": [1]}
    code, out = ask((tmp_path, config), "skip", **small)
    assert code == 0
    assert re.search(r"left out: .*s4", capsys.readouterr().err)
    assert not list(out.rglob("s4.h5"))
    assert ask((tmp_path, config), "two", draws=1, shots=[2])[0] == 2, "s0 alone is of the subtype"
    assert "has 1 cases of it" in capsys.readouterr().err
    config.write_text(config.read_text().replace("on_error: skip", "on_error: stop"))
    assert ask((tmp_path, config), "stop", **small)[0] == 2
    assert "s4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shots": [3]}, r"3 slides of 'tumour with smooth chromatin' were asked for, .* 2 cases"),
        ({"images": "demo_vit"}, r"demo_vit has no text tower of its own: set mode: embedding"),
        ({"templates": ["no place"]}, r"templates: each needs one {}"),
        ({"temperature": 3}, r"unknown temperature. There are .*context"),
        ({"classes": "tumour"}, r"classes is needed, a list with a name and a where for each"),
        ({"shots": 5}, r"bad.yaml: 'int' object is not iterable"),
        ({"classes": SMALL["classes"][:2]}, r"two subtypes or more"),
        ({"classes": [{"name": "macro"}]}, r"class 'macro' has the name of the mean over all"),
        ({"mode": "soft", "teacher": "conch"}, r"teacher: 'conch' .*mode: 'soft' is none of"),
        ({"teacher": "keep"}, r"keep: no weights given, and nothing is downloaded unasked"),
        ({"epochs": 0, "lr": 0}, r"shots, draws, context, epochs: 1 or more; lr and scale"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_question_that_cannot_be_asked_is_answered_with_a_reason(cohort, capsys, changes, said):
    code, _ = ask(cohort, "bad", **changes)
    assert code == 2
    assert re.search(said, capsys.readouterr().err)


def test_words_the_demo_tower_was_never_taught_are_refused(cohort, capsys):
    classes = [{**SMALL["classes"][0], "synonyms": ["pleura"]}, *SMALL["classes"][1:]]
    assert ask(cohort, "words", classes=classes)[0] == 2
    assert "does not know pleura" in capsys.readouterr().err


def row(slide, case, labels, split="train"):
    return SlideRow(case, slide, None, split, None, "", "", labels)


def test_subtypes_by_where_unknown_and_twice():
    question = Question(
        (TileClass("n"), TileClass("a", where={"X": 1}), TileClass("b", where={"X": 0, "Y": 1})),
        ("{}",),
    )
    nan = float("nan")
    rows = [row("1", "1", (1, nan)), row("2", "2", (0, 1)), row("3", "3", (0, 0)),
            row("4", "4", (nan, 1))]  # fmt: skip
    found = subtypes(question, ["X", "Y"], rows)
    assert found == {"1": 0, "2": 1, "3": None, "4": None}
    both = Question(
        (TileClass("n"), TileClass("a", where={"X": 1}), TileClass("b", where={"Y": 1})), ("{}",)
    )
    with pytest.raises(QuestionError, match="s: a and b fit it both"):
        subtypes(both, ["X", "Y"], [row("s", "s", (1, 1))])


def test_a_draw_takes_as_many_cases_of_each_subtype_and_no_test_slide():
    rows = [row(f"{c}{s}", f"{c}", (), "train") for c in range(12) for s in "AB"]
    rows += [row("t", "t", (), "test")]
    subtype = {each.slide_id: (0 if each.case_id in "01234t" else 1) for each in rows}
    drawn = draw_slides(rows, subtype, ["a", "b"], 4, [0, 4, 0])
    assert [subtype[name] for name in drawn] == [0] * 4 + [1] * 4
    assert "t" not in drawn
    assert len({name[:-1] for name in drawn}) == 8, "a patient gives one slide"
    assert drawn == draw_slides(rows, subtype, ["a", "b"], 4, [0, 4, 0])
    assert drawn != draw_slides(rows, subtype, ["a", "b"], 4, [0, 4, 1])


def test_the_demos_question_is_read_and_its_tower_knows_every_word():
    path = ROOT / "configs" / "pathpt" / "demo.yaml"
    assert len(path.read_text().splitlines()) <= 50
    question = read_question(path)
    teacher = load_demo()
    for sentences in question.sentences():
        vectors = teacher.encode_text(sentences)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(sentences)))
    assert set(question.columns) <= set(LABELS)


@pytest.mark.parametrize("seed", range(10))
def test_the_demos_cohort_has_the_slides_that_its_question_asks_for(seed):
    question = read_question(ROOT / "configs" / "pathpt" / "demo.yaml")
    training = {(s.case_id, s.labels) for s in plan_demo(seed) if s.split == "train"}
    for kind in question.classes:
        if kind.where:
            wanted = {LABELS.index(label): value for label, value in kind.where.items()}
            cases = sum(all(y[k] == v for k, v in wanted.items()) for _, y in training)
            assert cases >= max(question.shots), kind.name


def test_the_demos_towers_fit_each_other():
    """Painted tissue of a seed of its own: tumour and normal tiles are told apart by name."""
    specimen = Specimen(99_001, site_stain(99, 0), (1, 0, 0), tumour_fraction=0.4)
    rgb, truth = paint(specimen, 0.5)
    tiles, tumour = [], []
    for y in range(0, rgb.shape[0] - 111, 112):
        for x in range(0, rgb.shape[1] - 111, 112):
            part = truth[y : y + 112, x : x + 112]
            share = (part == TUMOUR).mean()
            if (part != GLASS).mean() > 0.9 and not 0 < share < 0.9:
                tiles.append(
                    torch.from_numpy(rgb[y : y + 112, x : x + 112].copy()).permute(2, 0, 1)
                )
                tumour.append(share > 0)
    assert 5 < sum(tumour) < len(tumour) - 5
    teacher = load_demo()
    with torch.no_grad():
        z_Nd = teacher.encode_image(torch.stack(tiles))
    said = teacher.encode_text(["an image of normal tissue .", "an image of tumour ."])
    right = (z_Nd @ said.T).argmax(1) == torch.tensor(tumour)
    assert right.float().mean() > 0.9


def test_painted_compartments_are_those_of_the_truth():
    specimen = Specimen(7, site_stain(1, 0), (0, 0, 0), tissue_mm2=0.1)
    field = compartments(specimen) == COMPARTMENTS.index("tumour")
    truth = paint(specimen, 2.0)[1] == TUMOUR
    assert truth.shape == field.shape
    assert (truth == field).all()
    assert field.any()


def test_a_column_the_cohort_does_not_have_is_named(cohort, capsys):
    classes = [*SMALL["classes"][:2], {"name": "tumour", "where": {"TP53": 1}}]
    assert ask(cohort, "column", classes=classes)[0] == 2
    assert "TP53" in capsys.readouterr().err
    assert read_cohort(cohort[0] / "cohort.csv", None).labels == ("EGFR", "KRAS")
