"""`tapfm test` compares comparable runs, and measures whether tile weights find the tumour."""

import json
import re
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from slides.errors import FeatureFileError
from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.encoders.fingerprint import state_fingerprint
from tapfm.evaluation.evaluate import check_same_data, tile_auroc
from tapfm.evaluation.predicted_rows import slide_feature_rows
from tapfm.frozen.baselines import RgbStatistics
from tapfm.frozen.features import read_features
from tapfm.inference.prediction import Prediction
from tapfm.slide_model.model import CheckpointError
from tapfm.training.fit import read_config
from tests.cohorts import LABELS, spoil, write_cohort

VAL = ["s7", "s8", "s9"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return two short runs of a tiny cohort, tested; the first has prompts in its encoder."""
    folder = tmp_path_factory.mktemp("cohort")
    config = write_cohort(folder)
    for arm, strategy in (("tapfm", "vpt_deep"), ("tapfm_gated", "full")):
        arguments = ["--trainer.max_epochs", "1", "--model.aggregator", arm, "--name", arm]
        assert main(["fit", "--config", str(config), "--model.strategy", strategy, *arguments]) == 0
    assert main(["test", "--run", str(folder / "runs"), "--overlays", "1"]) == 0
    return folder / "runs"


def test_everything_is_there(run):
    report = run / "report_test"
    figures = json.loads((report / "metrics_test.json").read_text())
    text = json.dumps(figures)
    for row in (
        "frozen, linear probe",
        "frozen, mean-pool MLP",
        "frozen, gated attention",
        "end to end, tapfm_gated",
    ):
        assert row in text
    for row in figures["arms"].values():  # thresholds of every row, frozen or not, from validation
        assert row["operating_points"]["EGFR"]["balanced"]["threshold"] is not None
    probe = pd.read_csv(run / "frozen" / "frozen_linear_probe" / "predictions_val.csv")
    assert probe["slide_id"].tolist() == VAL
    for name in ("predictions_test.csv", "report.md", "roc.png", "curves.png", "report.html"):
        assert (report / name).stat().st_size > 100, name
    for arm in ("tapfm", "tapfm_gated"):
        table = pd.read_csv(run / arm / "predictions_test.csv")
        assert table["slide_id"].tolist() == ["s10", "s11", "s12", "s13"]
        assert [f"p_{label}" in table for label in LABELS] == [True, True]
        assert pd.read_csv(run / arm / "predictions_val.csv")["slide_id"].tolist() == VAL
        assert len(list((run / arm / "weights_test").glob("*.h5"))) == 4
        assert len(list((run / arm / "overlays_test").glob("*.png"))) == 1
        assert len(list((run / arm / "cases_test").glob("*/tile_8.jpg"))) >= 2


def test_frozen_features_are_the_base_encoders_whatever_the_strategy(run):
    (feature,) = (run / "frozen").rglob("features_demo_vit_*/s0.h5")
    base = backbones.load("demo_vit", tile_px=32)
    made_by = state_fingerprint(base.row, base.vit.state_dict(), 32)
    assert feature.parent.name == f"features_demo_vit_{made_by[:8]}"


def test_frozen_features_are_kept_and_not_reused_for_other_weights(run):
    """They are in the layout of `tapfm features`, under the fingerprint of their weights."""
    kept = run / "frozen" / "20x_32px_0px_overlap"
    (feature,) = kept.glob("features_demo_vit_*/s0.h5")
    before = feature.stat().st_mtime_ns
    assert main(["test", "--run", str(run), "--overlays", "0"]) == 0
    assert feature.stat().st_mtime_ns == before
    config = run / "tapfm" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("weights: null", "weights: random"))
    assert main(["test", "--run", str(run), "--overlays", "0"]) == 0
    config.write_text(text)
    assert len(list(kept.glob("features_demo_vit_*/s0.h5"))) == 2
    assert feature.stat().st_mtime_ns == before


def test_rgb_numbers_are_of_the_tiles_and_read_from_them_once(run, monkeypatch):
    data = read_config(["--config", str(run / "tapfm" / "config.yaml")]).datamodule
    kept = run / "frozen" / "20x_32px_0px_overlap" / "features_rgb"
    for bag in data.streamed([row for part in ("train", "val", "test") for row in data.rows(part)]):
        z_T6 = torch.cat([RgbStatistics().encode(tiles)[0] for tiles in bag.tiles.split(3)])
        assert torch.equal(read_features(kept / f"{bag.slide_id}.h5"), z_T6)
    monkeypatch.setattr(RgbStatistics, "encode", None)
    assert main(["test", "--run", str(run), "--overlays", "0"]) == 0


def test_a_probe_on_slides_vectors_is_a_row_paired_with_the_runs(run, tmp_path):
    """The vectors hold the labels, so that the probe must find them, and noise."""
    data = read_config(["--config", str(run / "tapfm" / "config.yaml")]).datamodule
    drawn, folder, said = np.random.default_rng(0), tmp_path / "slide_features_own", []
    folder.mkdir()
    for row in data.used:
        with h5py.File(folder / f"{row.slide_id}.h5", "w") as file:
            known = np.nan_to_num(np.array(row.labels), nan=0.5)
            vector_E = np.concatenate([8 * known, drawn.standard_normal(3)]).astype(np.float32)
            file.create_dataset("features", data=vector_E).attrs["encoder"] = "titan"
    twice = [folder, shutil.copytree(folder, tmp_path / "again")]
    row, other = slide_feature_rows(data, twice, tmp_path, "test", said.append)
    assert other.title == f"titan of {tmp_path / 'again'}, linear probe", "rows are told apart"
    assert (other.p_NK == row.p_NK).all()
    assert (row.title, row.end_to_end) == ("titan, linear probe", False)
    table = pd.read_csv(tmp_path / "titan_linear_probe" / "predictions_test.csv")
    assert table["slide_id"].tolist() == list(row.slide_ids) == ["s10", "s11", "s12", "s13"]
    known = ~np.isnan(row.y_NK)
    assert ((row.p_NK > 0.5) == (row.y_NK > 0.5))[known].all()
    assert row.validation is not None
    assert said[0].startswith("titan, linear probe: chosen on validation")
    (folder / "s11.h5").unlink()
    with pytest.raises(FeatureFileError, match=r"s11: there is no s11.h5"):
        slide_feature_rows(data, [folder], tmp_path, "test", said.append)


def test_runs_on_other_data_are_not_compared(run, capsys):
    config = run / "tapfm_gated" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("mpp: 0.5", "mpp: 0.6"))
    assert main(["test", "--run", str(run)]) == 2
    config.write_text(text)
    assert "tapfm have other data (tiles differ)" in capsys.readouterr().err


def test_data_are_other_by_what_is_tested_not_by_how_a_run_was_trained(run, tmp_path):
    """A key that an older config lacks has its default."""
    config = yaml.safe_load((run / "tapfm" / "config.yaml").read_text())

    def differ(one, other):
        for name, changes in (("one", one), ("other", other)):
            (tmp_path / name).mkdir(exist_ok=True)
            data = {key: value for key, value in (config["data"] | changes).items() if value != ""}
            (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        try:
            check_same_data(tmp_path / "other", tmp_path / "one")
        except CheckpointError as error:
            return re.search(r"\((.*) differ\)", str(error))[1]

    for key, value in {
        "tiles_per_slide": 12, "turns": False, "colour": 0.0, "stain_jitter": 0.1,
        "sampling": "spatial", "sampler": "balanced", "host_gb": 8.0, "on_error": "skip",
        "workers": 3, "cache_dir": "cache", "index_dir": "elsewhere",
    }.items():  # fmt: skip
        assert differ({}, {key: value}) is None, key
    for key, value in {
        "table": "other.csv", "slides_dir": "slides", "labels": ["EGFR"], "task": "regression",
        "bags": "case", "pool": "mean", "stain": "macenko", "tiles": {"mpp": 1.0},
        "features_dir": "f",
    }.items():  # fmt: skip
        assert differ({}, {key: value}) == key
    assert differ({"pool": "mean"}, {"pool": ""}) == "pool"
    assert differ({"pool": ""}, {"pool": "mean"}) == "pool"
    assert differ({"pool": ""}, {}) is None


def test_nothing_to_test_says_what_to_run(tmp_path, capsys):
    assert main(["test", "--run", str(tmp_path)]) == 2
    assert "Run `tapfm fit` first" in capsys.readouterr().err


def test_a_split_that_the_table_does_not_have_is_named(tmp_path, capsys):
    config = write_cohort(tmp_path)
    table = tmp_path / "cohort.csv"
    lines = [line for line in table.read_text().splitlines() if ",test" not in line]
    table.write_text("\n".join(lines) + "\n")
    assert main(["fit", "--config", str(config), "--trainer.max_epochs", "1"]) == 0
    assert main(["test", "--run", str(tmp_path / "runs")]) == 2
    said = "cohort.csv: no slide of split test; there are train, val. Give one of them, as `--split"
    assert said in capsys.readouterr().err


@pytest.fixture
def broken_below_the_index(tmp_path):
    """A cohort whose s10 (test) and s8 (val) were indexed, then lost half of their bytes."""

    def make(on_error):
        config = write_cohort(tmp_path, on_error=on_error)
        assert main(["index", "--config", str(config)]) == 0
        for name in ("s8.tif", "s10.tif"):
            spoil(tmp_path / "slides" / name)
        return config

    return make


def test_a_slide_that_breaks_while_it_is_read_is_skipped_and_listed(
    broken_below_the_index, tmp_path, capsys
):
    config = broken_below_the_index("skip")
    assert main(["fit", "--config", str(config), "--trainer.max_epochs", "1"]) == 0
    run = tmp_path / "runs" / "tapfm_gated"
    assert list(json.loads((run / "skipped.json").read_text())) == ["s8"]
    assert main(["test", "--run", str(run.parent), "--overlays", "0"]) == 0
    table = pd.read_csv(run / "predictions_test.csv")
    assert table["slide_id"].tolist() == ["s11", "s12", "s13"]
    report = (run.parent / "report_test" / "report.md").read_text()
    assert "s10" in report
    assert "s8" in report


def test_a_slide_that_breaks_while_it_is_read_stops_the_run_by_name(broken_below_the_index, capsys):
    config = broken_below_the_index("stop")
    assert main(["fit", "--config", str(config), "--trainer.max_epochs", "1"]) == 2
    assert "s8" in capsys.readouterr().err


def test_tile_auroc_by_hand(run, tmp_path):
    """Weights that rise with the tumour's share find it; reversed, they do not."""
    data = read_config(["--config", str(run / "tapfm" / "config.yaml")]).datamodule
    row = data.cohort.split("test")[0]
    index = data.tile_source.index(row)
    right = index.coords0[:, 0] >= np.median(index.coords0[:, 0])
    mask = np.zeros((index.height0, index.width0), np.uint8)
    for x0, y0 in index.coords0[right]:
        mask[y0 : y0 + index.size0, x0 : x0 + index.size0] = 2
    Image.fromarray(mask).save(tmp_path / f"{row.slide_id}.png")
    facts = {"downsample": 1, "classes": {"tumour": 2}}
    (tmp_path / f"{row.slide_id}.json").write_text(json.dumps(facts))

    def found(weights_T):
        prediction = Prediction(row.slide_id, row.case_id, np.zeros(2), np.zeros(2), weights_T)
        return tile_auroc(data, [prediction], tmp_path)

    assert found(right.astype(float)) == {row.slide_id: 1.0}
    assert found(1 - right.astype(float)) == {row.slide_id: 0.0}
    assert tile_auroc(data, [], tmp_path) == {}


def test_a_frozen_run_is_tested_on_the_features_that_it_has(tmp_path, monkeypatch, capsys):
    """Bit for bit as if its tiles were encoded again, and none is; so is a run's `--features`."""
    config = write_cohort(tmp_path)
    shared = ["--features", str(tmp_path / "elsewhere")]
    fit = ["fit", "--config", str(config), "--model.strategy", "frozen", *shared]
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    run = tmp_path / "runs" / "tapfm_gated_frozen"
    with monkeypatch.context() as patched:
        patched.setattr("tapfm.evaluation.predicted_rows.known_bags", lambda *_: None)
        assert main(["test", "--run", str(run.parent), "--overlays", "0"]) == 0
    assert not list((run.parent / "frozen").rglob("features_demo_vit_*"))
    encoded = [(run / f"predictions_{part}.csv").read_text() for part in ("val", "test")]
    monkeypatch.setattr("tapfm.slide_model.model.encode_bag", None)
    monkeypatch.setattr("tapfm.frozen.features.encode_bag", None)
    for part in ("val", "test"):
        (run / f"predictions_{part}.csv").unlink()
    assert main(["test", "--run", str(run.parent), "--overlays", "0"]) == 0
    assert [(run / f"predictions_{part}.csv").read_text() for part in ("val", "test")] == encoded


def test_a_slide_that_could_not_be_indexed_has_the_reason_of_indexing(tmp_path, capsys):
    config = write_cohort(tmp_path, on_error="skip")
    (tmp_path / "slides" / "s11.svs").write_text("no slide")
    assert main(["fit", "--config", str(config), "--trainer.max_epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  slides +7 +3 +4$", said, re.M)
    assert re.search(r"^  EGFR 1 +3 +2 +2$", said, re.M)
    assert f"next: tapfm test --run {tmp_path / 'runs'}" in said
    assert main(["test", "--run", str(tmp_path / "runs"), "--overlays", "0"]) == 0
    figures = json.loads((tmp_path / "runs" / "report_test" / "metrics_test.json").read_text())
    (left,) = [each for each in figures["skipped"] if each["slide_id"] == "s11"]
    assert "NotASlideError" in left["reason"]
