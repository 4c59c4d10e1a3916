"""Figures of the needle and tissue benchmarks, of predictions made by hand whose AUROC is known.

Where all slides are of one case, every bootstrap draw is the cohort itself, so that the interval is
the value.
"""

import csv
import json
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from benchmarks import demo_seeds, needle, record, tissue, tissue_table
from tapfm.data.bag import Bag, Places
from tests.test_layering import imports

LABEL = "VESICULAR"
Y, ALL, HALF, NONE = [1, 1, 0, 0], [3.0, 2, 1, 0], [3.0, 0, 2, 1], [0.0, 1, 2, 3]
"""Targets, and three models that rank 4, 2 and 0 of the 4 pairs right."""


def said(values, y=Y, cases="pppp", label=LABEL):
    column = [[value] for value in values]
    return {"cases": [*cases], "y_NK": [[each] for each in y], "said_NK": column, "labels": [label]}


def cell(adapted, control, *, row="full", seed=0, a=1.0, best_epoch=None, minutes=9.0):
    models = {"adapted": said(adapted) | {"tile_auroc": {LABEL: 0.75, "NOISE": 0.5}},
              "control": said(control)}  # fmt: skip
    models |= {"best_epoch": said(best_epoch)} if best_epoch else {}
    return {"row": row, "seed": seed, "commit": f"c{seed}", "labels": [LABEL], "minutes": minutes,
            "interpolation": {"a": a}, **models}  # fmt: skip


def frozen(values, y=Y, cases="pppp"):
    """A seed's frozen rows, which have all labels: others rank the other way round."""
    zeros = [0.0] * len(y)
    columns = {"KARYOMEGALY": ([1 - each for each in y], values), LABEL: (y, values),
               "NOISE": (y, zeros)}  # fmt: skip
    y_NK, said_NK = (np.transpose([columns[label][n] for label in tissue_table.LABELS]).tolist()
                     for n in (0, 1))  # fmt: skip
    return {tissue_table.PROBE: {"cases": [*cases], "y_NK": y_NK, "said_NK": said_NK}}


def row_of(cells, frozen_by_seed, fewer=()):
    return tissue_table.summary(cells, frozen_by_seed, ["lora", "full"], fewer)["full"]


# tissue: AUROC and differences


@pytest.mark.parametrize(("values", "expected"), [(ALL, 1.0), (HALF, 0.5), (NONE, 0.0)])
def test_auroc_of_one_case_is_its_value_without_an_interval(values, expected):
    assert tissue_table.figures([said(values)]) == {LABEL: [expected] * 3}


def test_figures_are_averaged_over_seeds_and_paired():
    own, minus = [said(ALL), said(HALF)], [said(HALF), said(NONE)]
    assert tissue_table.figures(own)[LABEL] == [0.75] * 3
    assert tissue_table.figures(own, minus)[LABEL] == [0.5] * 3
    assert tissue_table.figures(own, own)[LABEL] == [0.0] * 3


def test_cases_are_drawn_with_all_their_slides():
    """Draw two cases: a quarter of the draws has the first alone, which is ranked right."""
    own = said([1.0, 0, 0, 1], y=[1, 0, 1, 0], cases="ppqq")
    assert tissue_table.figures([own])[LABEL] == [0.5, 0.0, 1.0]


def test_a_difference_is_of_the_same_draws():
    """Both rank the first case right and the second wrong, on scales of their own."""
    own = said([1.0, 0, 0, 1], y=[1, 0, 1, 0], cases="ppqq")
    other = said([9.0, 5, 5, 9], y=[1, 0, 1, 0], cases="ppqq")
    assert tissue_table.figures([own], [other])[LABEL] == [0.0] * 3


@pytest.mark.parametrize("other", [{"cases": "ppqp"}, {"y": [1, 0, 1, 0]}, {"y": [1, 1, 0]}])
def test_slides_that_differ_are_not_compared(other):
    with pytest.raises(ValueError, match="their difference is not paired"):
        tissue_table.figures([said(ALL, cases="ppqq")], [said(ALL, **{"cases": "ppqq"} | other)])


def test_of_one_patient_does_not_see_that_patients_differ():
    """Patient p is above q as a whole; r has one class and no AUROC."""
    own = said([9, 8, 8, 3, 2, 4, 5], y=[1, 0, 0, 1, 0, 1, 1], cases="pppqqrr")
    half = said([9, 9, 9, 3, 2, 4, 5], y=[1, 0, 0, 1, 0, 1, 1], cases="pppqqrr")
    assert tissue_table.of_one_patient([own]) == {LABEL: 1.0}
    assert tissue_table.of_one_patient([own, half]) == {LABEL: (1 + 1 + 0.5 + 1) / 4}
    assert tissue_table.figures([own])[LABEL][0] == 0.5


# tissue: a row's figures


def test_a_row_is_compared_with_its_control_and_with_the_linear_probe():
    cells = [cell(ALL, HALF, seed=1), cell(HALF, NONE, seed=0, minutes=None)]
    found = row_of(cells, {1: frozen(HALF), 0: frozen(NONE)})
    assert found["seeds"] == [0, 1]
    assert found["figures"] == {LABEL: [0.75] * 3}
    assert found["control"] == {LABEL: [0.25] * 3}
    assert found["gain"] == {LABEL: [0.5] * 3}
    assert found["over_probe"] == {LABEL: [0.5] * 3}
    assert found["a"] == [1.0, 1.0]
    assert found["tile_auroc"] == {LABEL: 0.75}
    assert found["minutes"] == [9.0]
    assert found["commits"] == ["c0", "c1"]


def test_frozen_rows_have_figures_of_all_labels():
    found = tissue_table.summary([], {3: frozen(ALL)}, ["full"], [])
    assert [*found] == [tissue_table.PROBE]
    assert found[tissue_table.PROBE]["seeds"] == [3]
    assert [each[0] for each in found[tissue_table.PROBE]["figures"].values()] == [0.0, 1.0, 0.5]


def test_a_row_of_fewer_patients_or_of_a_seed_without_frozen_rows_has_no_probe():
    cells = [cell(ALL, HALF), cell(ALL, HALF, seed=1)]
    both = {0: frozen(NONE), 1: frozen(NONE)}
    assert "over_probe" in row_of(cells, both)
    assert "over_probe" not in row_of(cells, both, fewer=["full"])
    assert "over_probe" not in row_of(cells, {0: frozen(NONE)})


def test_a_probe_of_other_slides_is_not_compared():
    with pytest.raises(ValueError, match="not paired"):
        row_of([cell(ALL, HALF)], {0: frozen(ALL, cases="ppqq")})


def test_gain_of_the_best_epochs():
    """The saved model counts where a = 1; where a < 1 and no best epoch was kept, none is known."""
    whole = cell(ALL, HALF, seed=0)
    less = cell(HALF, HALF, seed=1, a=0.0, best_epoch=NONE)
    old = cell(HALF, HALF, seed=1, a=0.5)
    assert row_of([whole], {})["best_epoch_gain"] == {LABEL: [0.5] * 3}
    assert row_of([whole, less], {})["best_epoch_gain"] == {LABEL: [0.0] * 3}
    found = row_of([whole, old], {})
    assert "best_epoch_gain" not in found
    assert found["gain"] == {LABEL: [0.25] * 3}


def test_of_seed():
    own = tissue_table.labelled(cell(HALF, NONE, seed=2, a=0.5, best_epoch=ALL))
    assert tissue_table.of_seed(own) == {
        "seed": 2, "gain": {LABEL: [0.5] * 3}, "of_one": {LABEL: 0.5},
        "control_of_one": {LABEL: 0.0}, "best_epoch": {LABEL: [1.0] * 3},
        "best_epoch_of_one": {LABEL: 1.0},
    }  # fmt: skip
    whole = tissue_table.of_seed(tissue_table.labelled(cell(ALL, NONE)))
    assert [*whole] == ["seed", "gain", "of_one", "control_of_one"]


def test_a_row_of_fewer_seeds_does_not_replace_an_older_one():
    old = {"lora": {"seeds": [0, 1, 2]}, "gone": {"seeds": [0]}}
    new = {"lora": {"seeds": [0, 1]}, "VESICULAR: full": {"seeds": [1]}}
    found = tissue_table.merged(old, new, tissue.ROWS)
    assert found["lora"] == old["lora"]
    assert list(found) == ["gone", "VESICULAR: full", "lora"]
    again = tissue_table.merged(old, {"lora": {"seeds": [0, 1, 2], "a": []}}, tissue.ROWS)
    assert again["lora"]["a"] == []


def test_table_has_what_each_label_gained_and_the_difference_to_the_linear_probe():
    rows = tissue_table.summary([cell(ALL, HALF)], {0: frozen(NONE)}, ["full"], [])
    rows["full"]["gain"] |= {"NOISE": [-0.25, -0.5, 0.125]}
    about = {"machine": "M", "date": "D", "commit": "abc", "torch": "2", "timm": "1"}
    head, _, probe, full, *_, last = tissue_table.markdown({**about, "rows": rows}).splitlines()
    table = [[each.strip() for each in line.split("|")[1:-1]] for line in (head, probe, full)]
    assert table[0][5:10] == [
        "KARYOMEGALY gained", "VESICULAR gained", "NOISE gained",
        "KARYOMEGALY minus linear probe", "VESICULAR minus linear probe",
    ]  # fmt: skip
    assert table[1][5:10] == [""] * 5
    assert table[2][5:10] == ["", "+0.500 [+0.500, +0.500]", "-0.250 [-0.500, +0.125]",
                              "", "+1.000 [+1.000, +1.000]"]  # fmt: skip
    assert len(table[0]) == len(table[1]) == len(table[2])
    assert last == "M; D, torch 2, timm 1; table: commit abc."


# tissue: planted tiles, and cohorts of fewer patients


def slide_of(columns, rows, side0):
    """A bag of a slide whose tiles are `side0` level-0 pixels apart, a row at a time."""
    coords = np.array([[int(c * side0), int(r * side0)] for r in range(rows)
                       for c in range(columns)])  # fmt: skip
    places = Places.of([coords], [side0], 0.5)
    return Bag("S", "p", tiles=None, places=places, labels_K=torch.ones(1), seed=0)


@pytest.mark.parametrize("side0", [108.5, 112.0, 114.5])
def test_planted_tiles_are_found_by_column_and_row(side0):
    """Tiles are read a little off the planted ones; (2, 0) and (1, 1) are planted, of 3 x 2."""
    planted = {(2, 0), (1, 1)}
    said_T = np.array([0.0, 1, 5, 2, 4, 3])
    assert tissue.tile_auroc(slide_of(3, 2, side0), said_T, planted) == 1.0
    said_T[[2, 3]] = said_T[[3, 2]]
    assert tissue.tile_auroc(slide_of(3, 2, side0), said_T, planted) == 5 / 8
    assert np.isnan(tissue.tile_auroc(slide_of(3, 2, side0), said_T, set()))


def read(path):
    with path.open() as file:
        return [*csv.DictReader(file)]


def test_a_part_has_whole_training_patients_and_all_others(tmp_path):
    splits = {f"T{n}": "train" for n in range(7)} | {"V": "val", "W": "test"}
    lines = [f"{case},{case}_{k},slides/{case}_{k}.tif,{split}"
             for case, split in splits.items() for k in range(3)]  # fmt: skip
    whole = tmp_path / "cohort.csv"
    whole.write_text("\n".join(["case_id,slide_id,slide_path,split", *lines, ""]))
    parts = {}
    for patients in (2, 5, 7):
        part = tmp_path / "elsewhere.csv"
        record.write_part(whole, part, patients, seed=3)
        rows = parts[patients] = read(part)
        cases = {row["case_id"] for row in rows}
        assert len(cases) == patients + 2
        assert {"V", "W"} < cases
        assert len(rows) == 3 * len(cases)
        assert all(row["slide_path"] == f"{tmp_path}/slides/{row['slide_id']}.tif" for row in rows)
    assert all(row in parts[5] for row in parts[2]), "more patients are those and others"
    record.write_part(whole, part, 2, seed=4)
    assert read(part) != parts[2]


@pytest.mark.parametrize("name", ["record", "demo_seeds"])
def test_a_part_of_a_cohort_needs_no_command_of_another_benchmark(name):
    taken = {each for each in imports(record.HERE / f"{name}.py") if each.startswith("benchmarks")}
    assert taken <= {"benchmarks.record"}
    assert demo_seeds.write_part is record.write_part


# needle


def lines_of(p_of_fold):
    """Lines of fold, slide, case, label, prediction: in each fold a positive, then a negative."""
    return [
        [fold, f"s{fold}{y}", f"c{fold}", y, p]
        for fold, both in enumerate(p_of_fold)
        for y, p in zip((1, 0), both, strict=True)
    ]


RIGHT, WRONG = lines_of([(0.9, 0.1)] * 5), lines_of([(0.2, 0.8)] * 5)
ABOUT = {"machine": "M", "date": "D", "commit": "abc", "torch": "2", "timm": "1"}


def fit(row, own, control, seed=0, tile_auroc=0.75, a=1.0):
    titles = {needle.ATTENTION: (False, WRONG), f"{row}, frozen, same head": (False, control),
              row: (True, own)}  # fmt: skip
    return {"row": row, "seed": seed, "commit": f"c{seed}", "tile_auroc": {row: tile_auroc},
            "saved": [{"a": a, "source": "best epoch", "reason": "", "curve": []}] * 5,
            "trained": {title: trained for title, (trained, _) in titles.items()},
            "predicted": {title: lines for title, (_, lines) in titles.items()}}  # fmt: skip


def test_predictions_of_a_fold():
    lines = [*lines_of([(0.5, 0.25)] * 5), [2, "s9", "c9", 0, 0.125]]
    found = needle.by_fold("a row", lines, True)
    assert [*found] == [0, 1, 2, 3, 4]
    assert [len(each.slide_ids) for each in found.values()] == [2, 2, 3, 2, 2]
    third = found[2]
    assert (third.title, third.end_to_end) == ("a row", True)
    assert third.slide_ids == ("s21", "s20", "s9")
    assert third.case_ids == ("c2", "c2", "c9")
    assert third.y_NK.tolist() == [[1], [0], [0]]
    assert third.p_NK.tolist() == [[0.5], [0.25], [0.125]]


def test_planted_tiles_are_found_by_their_corner(tmp_path, monkeypatch):
    """Rank one of two positive slides right and one in half; a negative has no AUROC."""
    corners = [(0, 0), (224, 0), (0, 448)]
    truth = [{"slide_id": slide, "x": str(x), "y": str(y), "target": str(int(n == target))}
             for slide, target in (("P", 1), ("Q", 2), ("N", 9))
             for n, (x, y) in enumerate(corners)]  # fmt: skip
    monkeypatch.setattr(needle, "truth_rows", lambda: truth)
    folder = tmp_path / "cell" / "run" / "weights_test"
    folder.mkdir(parents=True)
    for slide, weights in {
        "P": [0.25, 0.5, 0.25],
        "Q": [0.5, 0.125, 0.375],
        "N": [1, 0, 0],
    }.items():
        with h5py.File(folder / f"{slide}.h5", "w") as file:
            file["weights"], file["coords"] = np.array(weights)[::-1], np.array(corners)[::-1]
    found = needle.tile_aurocs([SimpleNamespace(row="a row", folder=tmp_path / "cell")])
    assert found == {"a row": (1 + 0.5) / 2}


def test_figures_of_needle_are_averaged_over_seeds_and_paired():
    fits = [fit("lora", RIGHT, WRONG, 0, 0.75), fit("lora", RIGHT, RIGHT, 1, 0.25)]
    found = needle.result_of(fits, ABOUT)
    assert (found["slides"], found["cases"], found["seeds"]) == (10, 5, [0, 1])
    assert [*found["arms"]] == [needle.ATTENTION, "lora, frozen, same head", "lora"]
    value = {title: arm["figures"]["pooled"]["macro"].value for title, arm in found["arms"].items()}
    assert value == {needle.ATTENTION: 0.0, "lora, frozen, same head": 0.5, "lora": 1.0}
    gain = found["arms"]["lora"]["differences"]["lora, frozen, same head"]["pooled"]["macro"]
    assert (gain.value, gain.low, gain.high) == (0.5, 0.5, 0.5)
    assert found["tile_auroc"] == {"lora": 0.5}
    assert found["commits"] == ["c0", "c1"]
    assert found["machine"] == "M"


def test_the_first_table_of_needle_needs_no_older_one(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(needle, "RESULTS", tmp_path)
    monkeypatch.setattr(needle, "KEPT", tmp_path / "needle")
    monkeypatch.setattr(needle, "rewrite", lambda name, table: written.append((name, table)))
    record.write_compact(needle.kept("lora", 0), fit("tapfm_gated_lora", RIGHT, WRONG))
    needle.tabulate(ABOUT)
    first = json.loads((tmp_path / "needle.json").read_text())
    assert first["arms"]["tapfm_gated_lora"]["seeds"] == [0]
    [(name, table)] = written
    assert name == "needle"
    assert table == needle.markdown(first)
    assert "| tapfm_gated_lora | 1 | 1.000" in table


def test_a_row_of_needle_that_is_not_kept_stays_with_its_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(needle, "RESULTS", tmp_path)
    monkeypatch.setattr(needle, "KEPT", tmp_path / "needle")
    monkeypatch.setattr(needle, "rewrite", lambda name, table: None)
    record.write_compact(needle.kept("full", 0), fit("full", RIGHT, WRONG, tile_auroc=0.5))
    record.write_compact(needle.kept("lora", 0), fit("lora", RIGHT, WRONG, tile_auroc=0.25))
    needle.tabulate(ABOUT)
    needle.kept("full", 0).unlink()
    record.write_compact(needle.kept("lora", 0), fit("lora", WRONG, WRONG))
    needle.tabulate(ABOUT)
    found = json.loads((tmp_path / "needle.json").read_text())
    assert {"lora", "full", "full, frozen, same head"} < found["arms"].keys()
    value = {row: found["arms"][row]["figures"]["pooled"]["macro"]["value"]
             for row in ("lora", "full")}  # fmt: skip
    assert value == {"lora": 0.0, "full": 1.0}
    assert [each.partition(":")[0] for each in found["verdicts"]] == ["lora", "full"]
    assert found["tile_auroc"] == {"lora": 0.75, "full": 0.5}
