"""`tapfm test` compares each adapted run with the frozen encoder that the run saved beside it."""

import json
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from tapfm.cli import main
from tapfm.slide_model import model as models
from tests.cohorts import write_cohort

CURVE = [{"a": a, "loss": 0.5, "error": 0.1, "figure": 0.6, "head": "gated"} for a in (0, 0.5, 1)]


def saved(run, best, control, a):
    """Write what a run leaves that kept this share: `best` may be the control."""
    facts = {
        "trained": {"name": "lora"},
        "interpolation": {"a": a, "source": "best epoch", "reason": "least", "curve": CURVE},
    }
    models.save(best, run / "best.safetensors", **facts)
    models.save(control, run / "control.safetensors", **facts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return three runs: of a half kept, of nothing kept, and of no choice, as 0.1.0 left it."""
    folder = tmp_path_factory.mktemp("verdict")
    config = write_cohort(folder)
    fit = ["fit", "--config", str(config), "--trainer.max_epochs", "1", "--name", "old"]
    assert main([*fit, "--model.strategy", "lora"]) == 0
    runs = folder / "runs"
    adapted = models.load(runs / "old" / "best.safetensors")
    alike = replace(adapted.model_config, strategy={"name": "frozen"})
    control = models.build(alike)
    control.aggregator.load_state_dict(adapted.aggregator.state_dict())
    for name, best, a in (("half", adapted, 0.5), ("none", control, 0)):
        shutil.copytree(runs / "old", runs / name)
        saved(runs / name, best, control, a)
    return runs


@pytest.fixture(scope="module")
def tested(runs):
    assert main(["test", "--run", str(runs), "--overlays", "0"]) == 0
    return json.loads((runs / "report_test" / "metrics_test.json").read_text())


def test_runs_and_their_controls_are_rows(runs, tested):
    rows = {title: row["end_to_end"] for title, row in tested["arms"].items()}
    assert dict(list(rows.items())[4:]) == {  # behind the baselines
        "frozen encoder, same head, half": False,
        "end to end, half": True,
        "frozen encoder, same head, none": False,
        "end to end, none": True,
        "end to end, old": True,
    }
    tables = {
        path: pd.read_csv(runs / path / "predictions_test.csv")
        for path in ("half", "half/control", "none", "none/control", "old")
    }
    pd.testing.assert_frame_equal(tables["half/control"], tables["none"])
    pd.testing.assert_frame_equal(tables["none/control"], tables["none"])
    pd.testing.assert_frame_equal(tables["half"], tables["old"])
    assert (tables["half"]["p_EGFR"] != tables["none"]["p_EGFR"]).all()


def test_each_adapted_run_has_its_verdict(tested):
    half, none = tested["verdicts"]
    assert (half["run"], half["control"]) == ("half", "frozen encoder, same head, half")
    macro = [tested["arms"][half[key]]["figures"]["macro"]["auroc"]["value"]
             for key in ("row", "control")]  # fmt: skip
    assert half["difference"]["value"] == pytest.approx(macro[0] - macro[1])
    assert half["sentence"].endswith("saved: a = 0.5 of the best epoch.")
    assert none["outcome"] == "frozen"
    assert [none["difference"][key] for key in ("value", "low", "high")] == [0, 0, 0]
    assert none["sentence"] == (
        "none: nothing was kept (a = 0): the frozen encoder is what was saved; use it."
    )


def two_sites(rows, kind):
    """Return the two sites, x and y, of every case and slide by its number."""
    names = {name for row in rows for name in (row.case_id, row.slide_id)}
    return {name: "xy"[int(re.sub(r"\D", "", name)) % 2] for name in names}


def test_the_verdicts_are_printed_first_and_robustness_beside_them(
    runs, tested, capsys, monkeypatch
):
    monkeypatch.setattr("tapfm.evaluation.evaluate.groups_of", two_sites)
    monkeypatch.setattr("tapfm.evaluation.site_leakage.FEW", 3)  # there are 4 slides
    assert main(["test", "--run", str(runs), "--overlays", "0", "--robustness"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = json.loads((runs / "report_test" / "metrics_test.json").read_text())["verdicts"]
    assert printed.startswith(" ".join(each["sentence"] for each in found))
    assert "frozen, linear probe: " in printed
    half, none = found
    assert half["sentence"].startswith(tested["verdicts"][0]["sentence"] + " ")
    assert none == tested["verdicts"][1], "the same encoder"
    facts = half["robustness"]
    assert 0.5 < facts["cka"] < 1
    assert facts["tiles"] == 149
    assert list(facts["left_out"]) == ["RI and MaRI"]
    run, control, more = (facts["drop"][kind]["value"] for kind in ("run", "control", "more"))
    assert more == pytest.approx(run - control)
    page = (runs / "report_test" / "report.html").read_text()
    assert "linear CKA to the frozen features" in page
    assert tested["verdicts"][0]["sites"] is None, "the table has no sites"
    sites = half["sites"]
    assert (sites["sites"], sites["chance"]) == (2, 0.5)
    assert sites["more"]["value"] == pytest.approx(
        sites["run"]["value"] - sites["control"]["value"]
    )
    assert "embeddings tell the site of" in half["sentence"]
    assert "site told by the nearest slides" in page
