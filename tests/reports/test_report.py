"""The report has the figures of `stats.metrics`: rows on the same slides, against the right row.

Figures in the table, the JSON and the CSV are checked against `stats.metrics` called directly.
"""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tapfm.reports.report import write_results
from tapfm.reports.rows import ResultRow, ResultRowError, read_result_row
from tapfm.stats.delong import delong_difference
from tapfm.stats.metrics import auroc, evaluate, paired_difference
from tapfm.stats.thresholds import choose_threshold
from tapfm.tasks.multilabel import Multilabel

LABELS = ["NUCA", "VACU"]
SLIDES, DRAWS = 37, 101


def arms(seed=0, unknown=True):
    """Return a weak and a middling frozen row, and two end-to-end ones; slides in other orders."""
    rng = np.random.default_rng(seed)
    y = (rng.random((SLIDES, 2)) < (0.3, 0.5)).astype(float)
    truth = y.copy()
    if unknown:
        y[rng.random(y.shape) < 0.1] = np.nan
    found = []
    for title, skill, end_to_end in [
        ("RGB", 0.0, False),
        ("frozen, MLP", 2.0, False),
        ("frozen, attention", 0.3, False),
        ("tapfm", 1.6, True),
        ("tapfm_gated", 3.0, True),
    ]:
        p = 1 / (1 + np.exp(-skill * truth - rng.standard_normal(y.shape)))
        order = rng.permutation(SLIDES)
        slides = [f"s{n:02d}" for n in order]
        cases = [f"c{n // 2}" for n in order]
        found.append(ResultRow(title, end_to_end, slides, cases, y[order], p[order]))
    return found


def in_order(arm):
    order = np.argsort(arm.slide_ids)
    return arm.y_NK[order], arm.p_NK[order], [arm.case_ids[n] for n in order]


def cells(text, label, title):
    """Return the interval cells of one row of the table."""
    block = re.split(r"\n-+\n", text)
    (lines,) = [part.splitlines() for part in block if part.startswith(label)]
    (line,) = [line for line in lines if re.search(rf"\s{re.escape(title)}( \*)?  ", line)]
    return re.findall(r"([-+]?[\d.]+) \[([-+]?[\d.]+), ([-+]?[\d.]+)\]", line)


def test_table_json_and_metrics_agree(tmp_path):
    rows = arms()
    text = write_results(tmp_path, "test", LABELS, rows, draws=DRAWS, seed=5)
    saved = json.loads((tmp_path / "metrics_test.json").read_text())
    assert saved["reference"] == "frozen, MLP"
    assert (saved["slides"], saved["cases"], saved["draws"]) == (SLIDES, 19, DRAWS)
    _, best_p, _ = in_order(rows[1])
    for arm in rows:
        y, p, cases = in_order(arm)
        expected = evaluate(LABELS, y, p, cases, DRAWS, 5)
        gains = paired_difference(LABELS, y, p, best_p, cases, DRAWS, 5)
        for label in ["macro", *LABELS]:
            shown = cells(text, label, arm.title)
            wanted = [expected[label]["auroc"], expected[label]["auprc"]]
            found = saved["arms"][arm.title]["figures"][label]
            assert found["auroc"]["value"] == pytest.approx(wanted[0].value)
            assert found["auprc"]["high"] == pytest.approx(wanted[1].high)
            if arm.end_to_end:
                wanted.append(gains[label])
                found = saved["arms"][arm.title]["auroc_difference"][label]
                assert found["low"] == pytest.approx(gains[label].low)
            else:
                assert saved["arms"][arm.title]["auroc_difference"] is None
            assert len(shown) == len(wanted)
            for (value, low, high), interval in zip(shown, wanted, strict=True):
                numbers = (interval.value, interval.low, interval.high)
                assert (float(value), float(low), float(high)) == pytest.approx(numbers, abs=5e-4)


def test_two_dollars_in_a_name_are_no_formula(tmp_path):
    rows = arms()
    rows[4] = replace(rows[4], title="end to end, $x_$", metrics_csv=tmp_path / "metrics.csv")
    rows[4].metrics_csv.write_text("step,train/loss\n1,2\n")
    write_results(tmp_path, "test", ["NUCA $^$", "VACU"], rows, draws=DRAWS)
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_numbers_are_written_before_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("tapfm.reports.report.save_figure", None)
    with pytest.raises(TypeError):
        write_results(tmp_path, "test", LABELS, arms(), draws=DRAWS)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["metrics_test.json", "predictions_test.csv"]


def test_what_stands_behind_the_rows_is_in_the_json_and_below_the_table(tmp_path):
    """Only a row with validation predictions has thresholds; only an end-to-end one a p."""
    rows = arms()
    y, p, _ = in_order(rows[4])
    rows[4] = replace(rows[4], validation=(y, p))
    groups = {"site": {f"s{n:02d}": "ab"[n % 2] for n in range(SLIDES)}}
    write_results(tmp_path, "test", LABELS, rows, draws=DRAWS, groups=groups)
    saved = json.loads((tmp_path / "metrics_test.json").read_text())["arms"]
    assert saved["tapfm"]["operating_points"] is None
    assert saved["tapfm"]["calibration"]["NUCA"]["platt"] is None
    point = saved["tapfm_gated"]["operating_points"]["NUCA"]["balanced"]
    assert point["chosen_on"] == "val"
    assert point["threshold"] == choose_threshold(y[:, 0], p[:, 0], "balanced")
    assert saved["tapfm_gated"]["calibration"]["NUCA"]["platt"]["slope"] > 0
    assert saved["frozen, MLP"]["delong"]["NUCA"]["p"] is None
    best = in_order(rows[1])[1]
    cases = in_order(rows[4])[2]
    expected = delong_difference(y[:, 0], p[:, 0], best[:, 0], cases).p
    assert saved["tapfm_gated"]["delong"]["NUCA"]["p"] == pytest.approx(expected)
    assert saved["RGB"]["subgroups"]["site"]["b"]["slides"] == SLIDES // 2
    markdown = (tmp_path / "report.md").read_text()
    for part in ("## Yes or no", "## Calibration", "## DeLong", "## By site"):
        assert part in markdown


def test_lines_are_aligned_and_markdown_says_the_same(tmp_path):
    text = write_results(tmp_path, "test", LABELS, arms(), draws=DRAWS)
    table = text.split("\n\n")[0].splitlines()
    start = table[0].index("AUROC [95 %]")
    for line in table[1:]:
        assert line.startswith("-") or re.match(r"  \d\.\d{3} \[", line[start - 2 :])
    assert max(len(line) for line in text.splitlines()) <= 120
    markdown = (tmp_path / "report.md").read_text()
    for value in re.findall(r"[-+]?\d\.\d{3} \[[^]]*\]", text):
        assert value in markdown
    table = markdown.partition("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) == 2 + 3 * 5
    assert "![roc](roc.png)" in markdown
    assert "curves.png" not in markdown  # no arm has curves


def test_reference_is_the_best_frozen_row_on_this_split_whatever_the_order(tmp_path):
    rows = arms()
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        text = write_results(tmp_path, "test", LABELS, [rows[n] for n in order], draws=DRAWS)
        assert "frozen, MLP *" in text
        assert "* frozen, MLP: the highest macro AUROC on this split" in text
        assert "RGB *" not in text
    better_rgb = replace(rows[0], p_NK=np.nan_to_num(rows[0].y_NK, nan=0.5))
    text = write_results(tmp_path, "test", LABELS, [better_rgb, *rows[1:]], draws=DRAWS)
    assert "RGB *" in text


def test_without_a_frozen_row_no_difference_is_claimed(tmp_path):
    text = write_results(tmp_path, "val", LABELS, arms()[3:], draws=DRAWS)
    assert "No row without end-to-end training" in text
    saved = json.loads((tmp_path / "metrics_val.json").read_text())
    assert saved["reference"] is None
    assert saved["arms"]["tapfm"]["auroc_difference"] is None


def test_predictions_hold_every_row_of_the_table(tmp_path):
    rows = arms()
    write_results(tmp_path, "test", LABELS, rows, draws=DRAWS)
    with (tmp_path / "predictions_test.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["slide_id"] for line in lines] == sorted(rows[0].slide_ids)
    for arm in rows:
        y, p, cases = in_order(arm)
        assert [line["case_id"] for line in lines] == cases
        for k, label in enumerate(LABELS):
            shown = [float(line[f"p_{label} ({arm.title})"]) for line in lines]
            np.testing.assert_allclose(shown, p[:, k], atol=1e-6)
            known = [float(line[label] or "nan") for line in lines]
            np.testing.assert_array_equal(known, y[:, k])


def test_rows_are_compared_on_the_slides_they_share_and_the_others_are_listed(tmp_path):
    rows = arms()
    short = rows[4]
    lost = sorted(short.slide_ids[:2])
    short = ResultRow("tapfm_gated", True, short.slide_ids[2:], short.case_ids[2:], short.y_NK[2:],
                short.p_NK[2:])  # fmt: skip
    skipped = [(lost[0], "unreadable region at (448, 0)"), ("s99", "no tissue")]
    text = write_results(tmp_path, "test", LABELS, [*rows[:4], short], skipped, draws=DRAWS)
    assert "test split: 35 slides" in text
    assert "3 slides left out:" in text
    assert f"  {lost[0]}: unreadable region at (448, 0)" in text  # the first reason stands
    assert f"  {lost[1]}: no prediction by tapfm_gated" in text
    assert "  s99: no tissue" in text
    assert "- s99: no tissue" in (tmp_path / "report.md").read_text()
    saved = json.loads((tmp_path / "metrics_test.json").read_text())
    assert [each["slide_id"] for each in saved["skipped"]] == [lost[0], "s99", lost[1]]
    y, p, _ = in_order(rows[0])
    kept = [n for n in range(SLIDES) if f"s{n:02d}" not in lost]
    found = saved["arms"]["RGB"]["figures"]["NUCA"]["auroc"]["value"]
    assert found == pytest.approx(auroc(y[kept, 0], p[kept, 0]))


def test_a_label_of_one_class_and_a_perfect_ranking_are_said_for_what_they_are(tmp_path):
    rows = arms(unknown=False)
    rows = [replace(arm, y_NK=np.where([True, False], arm.y_NK, 0)) for arm in rows]
    perfect = replace(rows[3], p_NK=rows[3].y_NK * 0.5 + 0.25)
    text = write_results(tmp_path, "test", LABELS, [*rows[:3], perfect], draws=DRAWS)
    assert "one class only" in text
    assert "macro: mean over NUCA." in text
    assert "1.000 [1.000, 1.000]" in text
    assert "what resampling a perfect ranking gives" in text
    saved = (tmp_path / "metrics_test.json").read_text()
    assert "NaN" not in saved
    assert json.loads(saved)["arms"]["RGB"]["figures"]["VACU"]["auroc"]["value"] is None


def test_intervals_on_few_draws_are_marked(tmp_path):
    rows = arms(unknown=False)
    marked = []  # one positive slide of NUCA, every second one of VACU
    for arm in rows:
        y = [[slide == "s00", int(slide[1:]) % 2] for slide in arm.slide_ids]
        marked.append(replace(arm, y_NK=np.array(y, float)))
    text = write_results(tmp_path, "test", LABELS, marked, draws=DRAWS)
    assert "] †" in text
    assert "† draws that lack a class are left out; as few as" in text
    assert "†" not in write_results(tmp_path, "test", LABELS, arms(), draws=DRAWS)


def test_disagreements_are_named(tmp_path):
    rows = arms()
    y = rows[1].y_NK.copy()
    row = list(rows[1].slide_ids).index("s11")
    y[row] = 1 - np.nan_to_num(y[row])
    with pytest.raises(
        ResultRowError, match="s11: case or labels differ between 'RGB' and 'frozen, M"
    ):
        write_results(tmp_path, "test", LABELS, [rows[0], replace(rows[1], y_NK=y)])
    with pytest.raises(ValueError, match="rows with different titles"):
        write_results(tmp_path, "test", LABELS, [rows[0], rows[0]])
    with pytest.raises(ValueError, match="rows with different titles"):
        write_results(tmp_path, "test", LABELS, [])
    twice = replace(rows[0], slide_ids=["s01", "s01", *rows[0].slide_ids[2:]])
    with pytest.raises(ValueError, match="RGB: predicted twice: s01"):
        write_results(tmp_path, "test", LABELS, [twice])
    other = replace(rows[1], slide_ids=[f"t{n}" for n in range(SLIDES)])
    with pytest.raises(ValueError, match="no slide was predicted by all of RGB, frozen, MLP"):
        write_results(tmp_path, "test", LABELS, [rows[0], other])


def test_read_arm_reads_a_runs_predictions(tmp_path):
    path = tmp_path / "predictions_test.csv"
    path.write_text("slide_id,case_id,A,p_A,p_53,p_p_53\ns1,c1,1,0.75,,0.5\ns2,c1,0,0.25,1,0.125\n")
    arm = read_result_row(
        "tapfm", path, Multilabel(("A", "p_53")), end_to_end=True
    )  # a gene may be so
    assert (arm.title, arm.end_to_end, arm.slide_ids, arm.case_ids, arm.metrics_csv) == (
        "tapfm", True, ["s1", "s2"], ["c1", "c1"], None,
    )  # fmt: skip
    np.testing.assert_array_equal(arm.y_NK, [[1, np.nan], [0, 1]])
    np.testing.assert_array_equal(arm.p_NK, [[0.75, 0.5], [0.25, 0.125]])
    path.write_text("slide,score\na,1\n")
    said = "columns are slide, score, and slide_id, case_id, A, p_A are needed"
    with pytest.raises(ValueError, match=said):
        read_result_row("tapfm", path, Multilabel(("A",)), end_to_end=True)


def test_pictures_are_written(tmp_path):
    curves = tmp_path / "metrics.csv"
    curves.write_text("step,train/loss,val/auroc\n1,0.5,\n2,,0.75\n")
    rows = arms()
    rows[3] = replace(rows[3], metrics_csv=curves)
    write_results(tmp_path / "report", "test", LABELS, rows, draws=DRAWS)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {
        "curves.png", "metrics_test.json", "predictions_test.csv", "reliability.png", "report.md",
        "roc.png",
    }  # fmt: skip
    for name in ("curves.png", "reliability.png", "roc.png"):
        assert Image.open(tmp_path / "report" / name).size[0] > 700
    assert "![curves](curves.png)" in (tmp_path / "report" / "report.md").read_text()
