"""The verdict on adapted runs: what is said, and that it is the paired difference of the table."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from tapfm.reports.outcome_report import write_outcomes
from tapfm.reports.report import write_results
from tapfm.reports.rows import ResultRow
from tapfm.reports.verdict import outcome_of, robustness_sentence, sentence
from tapfm.stats.bootstrap import Interval, percentiles, with_point
from tapfm.stats.metrics import paired_difference
from tests.reports.test_report import DRAWS, LABELS, arms, in_order
from tests.reports.test_task_pages import SLIDES, TASKS, said_of, target_of

CHOICE = {"a": 0.5, "source": "best epoch", "reason": "least", "curve": []}


@pytest.mark.parametrize(
    ("ends", "a", "outcome", "said"),
    [
        ((0.052, 0.01, 0.094), 0.75, "gained",
         "r: adapting gained +0.052 [+0.010, +0.094] AUROC over the frozen encoder with the same "
         "head; saved: a = 0.75 of the best epoch."),
        ((0.012, -0.031, 0.055), 0.5, "nothing",
         "r: adapting gained nothing that this cohort can show: +0.012 [-0.031, +0.055] AUROC over "
         "the frozen encoder with the same head; saved: a = 0.5 of the best epoch."),
        ((0.0, 0.0, 0.0), 0.0, "frozen",
         "r: nothing was kept (a = 0): the frozen encoder is what was saved; use it."),
        ((-0.05, -0.09, -0.01), 1.0, "lost",
         "r: adapting lost: -0.050 [-0.090, -0.010] AUROC over the frozen encoder with the same "
         "head; saved: a = 1 of the best epoch. Use control.safetensors, the frozen encoder."),
        ((0.0, 0.0, 0.0), 1.0, "nothing",
         "r: adapting gained nothing that this cohort can show: +0.000 [+0.000, +0.000] AUROC over "
         "the frozen encoder with the same head; saved: a = 1 of the best epoch."),
        ((math.nan,) * 3, 1.0, "undefined",
         "r: what adapting gained is unknown: AUROC is undefined here; saved: a = 1 of the best "
         "epoch."),
    ],
)  # fmt: skip
def test_each_outcome_in_words(ends, a, outcome, said):
    gain = Interval(*ends, 0 if math.isnan(ends[0]) else 100)
    assert outcome_of(gain, [a]) == outcome
    assert sentence("r", "AUROC", gain, 100, [CHOICE | {"a": a}]) == said


def test_a_gain_that_costs_robustness_is_named():
    def drop(value, low, high):
        ends = {"value": value, "low": low, "high": high, "draws": 9}
        return {"run": ends, "control": ends, "more": ends}

    index = {"ri": {"run": 0.7, "control": 0.72}, "mari": {"run": 0.7, "control": 0.7}}
    kept = {"cka": 0.934, "left_out": {}, "drop": drop(0.01, -0.02, 0.03), **index}
    assert robustness_sentence("AUROC", "gained", kept) == (
        "Robustness: linear CKA to the frozen encoder's features 0.93; stain draws take +0.010 "
        "[-0.020, +0.030] of AUROC, +0.010 [-0.020, +0.030] of the frozen encoder's, +0.010 "
        "[-0.020, +0.030] more; RI 0.70, frozen 0.72; MaRI 0.70, frozen 0.70."
    )
    for change in (
        {"drop": drop(0.05, 0.01, 0.09)},
        {"ri": {"run": 0.6, "control": 0.7}},
        {"mari": {"run": 0.6, "control": 0.7}},
    ):
        said = robustness_sentence("AUROC", "gained", kept | change)
        assert said.startswith("It gained and lost robustness: ")
        said = robustness_sentence("AUROC", "nothing", kept | change)
        assert said.startswith("It lost robustness: ")
    bare = {"cka": 1.0, "left_out": {"RI and MaRI": "no sites", "stain draws": "another stain"}}
    assert robustness_sentence("AUROC", "gained", bare) == (
        "Robustness: linear CKA to the frozen encoder's features 1.00; no RI and MaRI: no sites; "
        "no stain draws: another stain."
    )


def test_a_difference_without_draws_is_no_gain():
    alone = Interval(0.2, math.nan, math.nan, 0)
    assert outcome_of(alone, [1]) == "nothing"
    assert "+0.200 [no interval]" in sentence("r", "R²", alone, 100, [CHOICE])


def test_several_runs_of_a_study_name_every_share():
    few = [CHOICE | {"a": a} for a in (0, 0.5, 1)]
    said = sentence("lora", "R²", Interval(0.1, 0.05, 0.2, 9), 0, few)
    assert said.endswith("with the same head; saved: a = 0, 0.5, 1 in its 3 runs.")
    assert "nothing was kept" in sentence("lora", "R²", Interval(0, 0, 0, 9), 0, [few[0]] * 2)


def test_labels_have_the_paired_difference_to_their_own_control(tmp_path):
    rows = arms()
    rows[4] = replace(rows[4], title="end to end, x", control="RGB", choice=CHOICE)
    text = write_results(tmp_path, "test", LABELS, rows, draws=DRAWS, seed=5)
    (found,) = json.loads((tmp_path / "metrics_test.json").read_text())["verdicts"]
    (y, p, cases), (_, base, _) = in_order(rows[4]), in_order(rows[0])
    gain = paired_difference(LABELS, y, p, base, cases, DRAWS, 5)["macro"]
    ends = found["difference"]
    wanted = pytest.approx([gain.value, gain.low, gain.high], abs=1e-12)
    assert [ends[k] for k in ("value", "low", "high")] == wanted
    assert gain.low > 0, "or the test shows nothing"
    assert (found["run"], found["outcome"], found["choice"]) == ("x", "gained", CHOICE)
    assert " ".join(text.split()).startswith(found["sentence"])
    assert found["sentence"].startswith(f"x: adapting gained {gain.value:+.3f} [")
    page = (tmp_path / "report.md").read_text()
    assert page.startswith(f"# Results, test split\n\n**{found['sentence']}**\n\n| label")


@pytest.mark.parametrize("name", TASKS)
def test_every_other_task_by_its_own_figure(tmp_path, name):
    task, rng = TASKS[name], np.random.default_rng(1)
    v, names = rng.standard_normal(SLIDES), [f"s{n:02d}" for n in range(SLIDES)]
    target = target_of(task, v)
    control, run = (
        ResultRow(title, trained, names, names, target, said_of(task, heard))
        for title, trained, noise in (("frozen encoder, same head, x", False, 3.0),
                                      ("end to end, x", True, 0.3))
        for heard in [v + noise * rng.standard_normal(SLIDES)]
    )  # fmt: skip
    run = replace(run, control=control.title, choice=CHOICE)
    text = write_outcomes(tmp_path, "test", task, [control, run], draws=200)
    (found,) = json.loads((tmp_path / "metrics_test.json").read_text())["verdicts"]
    times = with_point(names, 200, 0).astype(float)
    drawn = [
        next(iter(task.measure(target, row.p_NK, times).values()))[task.monitor]
        for row in (run, control)
    ]
    gain = percentiles(drawn[0] - drawn[1])
    ends = found["difference"]
    assert [ends[k] for k in ("value", "low", "high")] == [gain.value, gain.low, gain.high]
    assert found["figure"] in {"macro AUROC", "R²", "concordance"}
    assert f"{found['figure']} over the frozen encoder" in found["sentence"]
    assert " ".join(text.split()).startswith(found["sentence"])
    assert f"**{found['sentence']}**" in (tmp_path / "report.md").read_text()
