"""A run on slides goes on from another: its encoder, its directions, and what was forgotten."""

import json

import torch
import yaml

from tapfm.adapt.lowrank import adapted, merged, rows_a
from tapfm.cli import main
from tapfm.data.feature_files import read_slide
from tapfm.slide_model import model as models
from tapfm.slide_model.aggregators.contract import OneSlide
from tests.cohorts import write_cohort


def test_a_run_on_slides_goes_on_from_anothers_encoder_and_says_what_was_forgotten(
    tmp_path, capsys
):
    config, runs = str(write_cohort(tmp_path)), tmp_path / "runs"
    once = ["fit", "--config", config, "--trainer.max_epochs", "1"]
    lora = {"rank": 2, "targets": ["q", "v"]}
    first = ["--name", "first", "--model.strategy", json.dumps({"name": "lora", **lora})]
    assert main([*once, *first]) == 0
    second = ["--name", "second", "--model.strategy", json.dumps({"name": "olora", **lora})]
    assert main([*once, *second, "--continue-from", str(runs / "first")]) == 0
    said = capsys.readouterr().out
    assert f"{runs / 'first'} on its own slides, before and after" in said
    found = json.loads((runs / "second" / "forgetting.json").read_text())["figures"]
    assert set(found) == {"val", "test"}
    saved = yaml.safe_load((runs / "second" / "config.yaml").read_text())["model"]
    assert saved["weights"] == str(runs / "first" / "encoder" / "model.safetensors")
    old, new = (models.load(runs / name / "best.safetensors") for name in ("first", "second"))
    pairs = list(zip(adapted(old.encoder.vit), adapted(new.encoder.vit), strict=True))
    assert pairs
    for (name, before), (other, after) in pairs:
        assert name == other
        torch.testing.assert_close(after.weight, merged(before), rtol=0, atol=1e-6)
        assert (rows_a(after) @ before.lora_A.weight.T).abs().max() < 1e-5
        assert after.lora_B.weight.any(), "it learned"
    assert not torch.equal(pairs[0][0][1].weight, pairs[0][1][1].weight), "the first did as well"


def test_a_run_on_slides_is_a_slide_encoder_for_features_of_its_own_encoder(tmp_path, capsys):
    """As `tapfm features` writes them; those of the published encoder are others."""
    config, run = str(write_cohort(tmp_path)), tmp_path / "runs" / "first"
    lora = json.dumps({"name": "lora", "rank": 2})
    once = ["fit", "--config", config, "--trainer.max_epochs", "1", "--name", "first"]
    assert main([*once, "--model.strategy", lora]) == 0
    best, job = run / "best.safetensors", tmp_path / "job"
    for model in (str(best), "demo_vit"):
        assert main(["features", "--config", config, "--model", model, "--out", str(job)]) == 0
    own, plain = sorted(job.glob("*/features_*"), key=lambda path: -len(path.name))
    embed = ["embed", "--config", config, "--slide-encoder", str(run), "--features"]
    assert main([*embed, str(own)]) == 0
    found = read_slide(own, "s0", lambda: 0.5)
    vector = read_slide(own.parent / "slide_features_first", "s0", lambda: 0.5)
    assert (vector.encoder, len(vector)) == ("first", 1)
    aggregator, score_T = models.load(best).aggregator, found.score_T
    expected = aggregator(OneSlide.of_features(found.z_TD, score_T)).embedding_E.detach()
    torch.testing.assert_close(vector.z_TD[0], expected)
    assert main([*embed, str(plain), "--out", str(tmp_path / "o")]) == 2
    assert "has features of demo_vit, and first is for 128 features of demo_vit_" in (
        capsys.readouterr().err
    )
