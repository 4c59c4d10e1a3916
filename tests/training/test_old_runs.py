"""A run of version 0.1.0 is tested, predicted with, and continued where it stopped.

`run_0_1_0.zip` holds the folder of such a run, stopped at slide 10 of 21, and whole_metrics.csv of
the same run never stopped; COHORT stands for the cohort's folder.
"""

import json
import zipfile

import pandas as pd
import pytest
import yaml

from tapfm.cli import main
from tapfm.training.old_keys import changed_keys, rename_old_keys
from tapfm.training.optim import Steps
from tests.cohorts import write_cohort
from tests.conftest import ROOT
from tests.training.test_fit import tapfm

OLD = ["--model.strategy", "{name: lora, dropout: 0.1}", "--model.steps.head_start", "true",
       "--model.temperature", "0.7"]  # fmt: skip
NEW = ["--model.strategy", "{name: lora, dropout: 0.1}", "--model.steps.warm_start", "true",
       "--model.aggregator", "{name: tapfm_gated, temperature: 0.7}"]  # fmt: skip


CHOICE = ["--model.steps.interpolate", "[0, 0.25, 0.5, 0.75, 1]"]  # what is saved, as by default


@pytest.fixture
def old_run(tmp_path):
    """The run's folder beside a cohort written anew, and the cohort's config."""
    config, run = write_cohort(tmp_path, workers=0), tmp_path / "runs" / "killed"
    with zipfile.ZipFile(ROOT / "tests" / "training" / "run_0_1_0.zip") as archive:
        archive.extractall(run)
    saved = run / "config.yaml"
    saved.write_text(saved.read_text().replace("COHORT", str(tmp_path)))
    return run, config


@pytest.mark.parametrize("keys", [OLD, NEW], ids=["old keys", "new keys"])
def test_it_is_continued(old_run, keys):
    run, config = old_run
    done = tapfm("fit", "--config", str(config), *keys, *CHOICE, "--name", "killed")
    for line in ("model.steps.head_start is now model.steps.warm_start",
                 "model.aggregator: {name: tapfm_gated, temperature: 0.7}"):  # fmt: skip
        assert (line in done.stdout) == (keys is OLD)
    resumed, whole = (pd.read_csv(run / f"{name}.csv") for name in ("metrics", "whole_metrics"))
    assert len(resumed) == 21 + 3
    assert "train/loss" in resumed
    pd.testing.assert_frame_equal(resumed, whole, rtol=1e-5, atol=0)
    saved = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert saved["aggregator"] == {"name": "tapfm_gated", "temperature": 0.7}
    assert saved["steps"]["warm_start"] is True
    assert saved["temperature"] is None


def test_other_settings_are_refused_by_their_names_of_today(old_run, capsys):
    _, config = old_run
    other = [*OLD[:-1], "0.6", *CHOICE, "--model.regularisers", "[aem]", "--name", "killed"]
    assert main(["fit", "--config", str(config), *other]) == 2
    said = capsys.readouterr().err
    assert "model.aggregator.temperature was 0.7, is 0.6" in said
    assert "model.regularisers was None, is ['aem']" in said
    assert said.count(" was ") == 2


def test_it_is_tested_and_predicts(old_run):
    run, config = old_run
    best, known = run / "best.safetensors", pd.read_csv(run / "predictions_test.csv")
    (run / "predictions_test.csv").unlink()
    slides = [str(next(run.parents[1].glob(f"slides/s{number}.*"))) for number in range(10, 14)]
    assert main(["predict", *slides, "--model", str(best), "--out", str(run / "out")]) == 0
    columns = ["slide_id", "p_EGFR", "p_KRAS"]
    predicted = pd.read_csv(run / "out" / "predictions.csv")[columns]
    pd.testing.assert_frame_equal(predicted, known[columns], rtol=0, atol=1e-6)
    assert main(["index", "--config", str(config)]) == 0
    assert main(["test", "--run", str(run.parent)]) == 0
    tested = pd.read_csv(run / "predictions_test.csv")
    pd.testing.assert_frame_equal(tested, known, rtol=0, atol=1e-6)
    found = json.loads((run.parent / "report_test" / "metrics_test.json").read_text())
    assert any("killed" in title for title in found["arms"])


def test_an_old_key_that_was_ignored_is_ignored_and_says_so():
    model = {"aggregator": "gated", "temperature": 0.7, "steps": {"head_start": False}}
    assert rename_old_keys(model) == [
        "model.temperature is of the CLS score, which gated does not look at"
    ]
    assert model == {
        "aggregator": "gated",
        "temperature": None,
        "steps": {"head_start": None, "warm_start": False},
    }


def test_a_key_that_is_missing_counts_as_its_default():
    steps = {"warm_start": False}
    then = {"model": {"steps": steps}, "data": {"table": "t", "turns": True}}
    now = {"model": {"steps": steps}, "data": {"table": "t", "turns": False, "colour": 0.0}}
    assert changed_keys(then, now, {"data.colour": 0.0}) == ["data.turns was True, is False"]
    assert len(changed_keys(then, now, {"data.colour": 0.1})) == 2


def test_an_old_key_that_is_off_does_not_turn_off_the_new_one():
    model = {"steps": {"head_start": False, "warm_start": True}, "aggregator": "tapfm"}
    assert rename_old_keys(model) == []
    assert model["steps"] == {"head_start": None, "warm_start": True}
    assert Steps(head_start=False, warm_start=True).warm_start
    assert Steps(head_start=True).warm_start
