"""The warm start: a linear probe in the head or trained attention, saved first, never twice."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.frozen import warm_heads
from tapfm.frozen.fitter import Candidate, Schedule
from tapfm.frozen.frozen_slide import FrozenSlide, feature_statistics, standardise
from tapfm.frozen.warm_heads import figures, fit_attention, solve_head
from tapfm.slide_model import model as models
from tapfm.slide_model.aggregators import AGGREGATORS, make_aggregator
from tapfm.tasks import make_task
from tapfm.training.fit import read_config
from tests.bags import places
from tests.cohorts import write_cohort

TASK = make_task({"name": "multilabel"}, ("A",))


def slide(name, z_TD, label, score_T):
    target_Y = torch.tensor([label])
    return FrozenSlide.of(name, "", z_TD, target_Y, score_T, places(len(z_TD)))


def slides(count, seed):
    """Ten tiles each, far from 0, that lean along the first axis where the label is 1."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for place in range(count):
        z_TD, label = 50 + torch.randn(10, 8, generator=drawn), float(place % 2)
        z_TD[:, 0] += 2 * label
        score_T = torch.randn(10, generator=drawn)
        found.append(slide(str(place), z_TD, label, score_T))
    return found


LINEAR = [name for name in AGGREGATORS if make_aggregator(name, 8, 1).linear_head]


@pytest.mark.parametrize("name", LINEAR)
def test_the_aggregator_says_what_the_probe_says(name):
    torch.manual_seed(0)
    aggregator, train, val = make_aggregator(name, 8, 1), slides(60, 1), slides(40, 2)
    mean_D, std_D = feature_statistics(train)
    standardise(aggregator, mean_D, std_D)
    probe = solve_head(aggregator, train, val, TASK)
    figure, *_ = figures(aggregator, val, TASK)
    assert figure == pytest.approx(probe.figure)
    assert figure > 0.85
    z_NTD = torch.stack([each.z_TD for each in train]).double()
    expected_D = (z_NTD - z_NTD.mean((0, 1))).square().mean((0, 1)).sqrt()
    torch.testing.assert_close(aggregator.center_D, z_NTD.mean((0, 1)).float())
    torch.testing.assert_close(aggregator.scale_D, expected_D.float(), rtol=1e-5, atol=0)
    with torch.no_grad():
        output = aggregator(val[0].tiles)
        b_D = output.embedding_E
        expected_K = probe.weight_KD @ ((b_D - probe.mean_D) / probe.std_D) + probe.bias_K
        cancels = ((probe.weight_KD / probe.std_D).abs() @ b_D.abs()).item()  # 3e5 for moozy
    rounding = torch.finfo(torch.float32).eps * cancels
    torch.testing.assert_close(output.logits_K, expected_K, rtol=1e-4, atol=1e-4 + rounding)


def needles(count, seed, tiles=60):
    """Two tiles lean far where the label is 1, each its own way in what the others share."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for place in range(count):
        z_TD, label = 50 + 3 * torch.randn(tiles, 8, generator=drawn), float(place % 2)
        if label:
            z_TD[torch.randperm(tiles, generator=drawn)[:2], 0] += 15
        score_T = torch.randn(tiles, generator=drawn)
        found.append(slide(str(place), z_TD, label, score_T))
    return found


@pytest.mark.parametrize("name", ["gated", "tapfm_gated", "hierarchical"])
def test_trained_attention_finds_what_the_mean_tile_hides(name, monkeypatch):
    monkeypatch.setattr(warm_heads, "SCHEDULE", Schedule(30, 8))
    torch.manual_seed(1)
    train, val, unseen = needles(120, 1), needles(60, 2), needles(60, 3)
    fresh = make_aggregator(name, 8, 1)
    standardise(fresh, *feature_statistics(train))
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    fitted = fit_attention(fresh, train, val, TASK, seed=0)
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())
    figure, _, loss = figures(fitted.model, val, TASK)
    assert loss == pytest.approx(fitted.loss)
    solved = make_aggregator(name, 8, 1)
    standardise(solved, *feature_statistics(train))
    solve_head(solved, train, val, TASK)
    probe, _, its_loss = figures(solved, unseen, TASK)
    figure, _, loss = figures(fitted.model, unseen, TASK)
    assert figure > max(0.9, probe + 0.05)
    assert loss < its_loss
    if name == "gated":
        again = fit_attention(fresh, train, val, TASK, seed=0)
        for key, value in again.model.state_dict().items():
            assert torch.equal(value, fitted.model.state_dict()[key]), key


def test_an_epoch_sees_one_view_of_each_slide(monkeypatch):
    monkeypatch.setattr(warm_heads, "SCHEDULE", Schedule(4, 15))
    monkeypatch.setattr(warm_heads, "GRID", (Candidate(1e-3),))
    train = [*slides(6, 1), *slides(6, 4)]  # twice the same six
    fresh, seen = make_aggregator("gated", 8, 1), []
    forward = type(fresh).forward
    monkeypatch.setattr(
        type(fresh), "forward", lambda self, tiles: seen.append(tiles.z_TD) or forward(self, tiles)
    )
    fit_attention(fresh, train, slides(8, 2), TASK, seed=0)
    number = {id(slide.z_TD): n for n, slide in enumerate(train)}
    trained = [number[id(z)] for z in seen if id(z) in number]  # the others choose
    epochs = [sorted(trained[at : at + 6]) for at in range(0, 24, 6)]
    assert len(trained) == 24
    assert epochs == 2 * [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_cox_learns_from_slides_beside_each_other():
    """A slide alone has none to be compared with; its loss would be 0 whatever the risk."""
    task = make_task({"name": "survival", "time": "t", "event": "e", "edges": (), "horizon": 1.0,
                      "with_loss": "cox"}, ("log_relative_hazard",))  # fmt: skip

    def timed(slides):
        times = [3.0 - 2 * float(slide.target_Y[0]) + 0.01 * n for n, slide in enumerate(slides)]
        return [replace(slide, target_Y=torch.tensor([time, 1.0, n]))
                for n, (slide, time) in enumerate(zip(slides, times, strict=True))]  # fmt: skip

    torch.manual_seed(0)
    fresh, train, val = make_aggregator("gated", 8, 1), timed(slides(60, 1)), timed(slides(40, 2))
    standardise(fresh, *feature_statistics(train))
    first = figures(fresh, val, task)
    fitted = fit_attention(fresh, train, val, task, seed=0)
    figure, each, loss = figures(fitted.model, val, task)
    assert each == 0.0
    assert loss < first[2] - 0.1
    assert figure > 0.7


def test_a_slide_of_few_known_labels_counts_as_the_others():
    """As it does after an epoch: of two models of one figure the lower loss is better."""
    torch.manual_seed(0)
    task, val = make_task({"name": "multilabel"}, ("A", "B")), slides(9, 3)
    y_NK = torch.tensor([0.0, 1.0]).repeat(9, 1)
    y_NK[:4, 1], y_NK[8] = torch.nan, torch.nan
    val = [replace(slide, target_Y=y_K) for slide, y_K in zip(val, y_NK, strict=True)]
    aggregator = make_aggregator("gated", 8, 2)
    with torch.no_grad():
        p_NK = torch.stack([aggregator(s.tiles).logits_K for s in val]).sigmoid()
    right_NK = torch.where(y_NK == 1, p_NK, 1 - p_NK).where(~y_NK.isnan(), torch.nan)
    of_N = -right_NK.log().nanmean(1).nan_to_num()
    assert figures(aggregator, val, task)[1] == pytest.approx(of_N.mean().item(), rel=1e-5)


def test_a_run_begins_there(tmp_path, monkeypatch, capsys):
    """One that then stands still saves the warm start, and a resumed one has no second."""
    config, starts = write_cohort(tmp_path), []
    real = warm_heads.feature_statistics

    def noting(train, **shared):
        starts.append(train)
        return real(train, **shared)

    monkeypatch.setattr(warm_heads, "feature_statistics", noting)
    still = ["--model.steps.encoder_lr", "0", "--model.steps.head_lr", "1e-12"]
    fit = ["fit", "--config", str(config), *still, "--model.steps.warm_start", "true"]
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "warm start: 28 views of slides; a linear probe, chosen on validation: C" in printed
    assert "; attention trained on them, lr " in printed
    run = tmp_path / "runs" / "tapfm_gated"
    facts = models.read_model_config(run / "best.safetensors")[1]
    assert facts["epoch"] == -1

    saved, base = load_file(run / "best.safetensors"), backbones.load("demo_vit", tile_px=32)
    for name, value in base.state_dict().items():
        assert torch.equal(saved[f"encoder.{name}"], value), name
    figures = pd.read_csv(run / "metrics.csv")["val/auroc"].dropna()
    assert figures.tolist() == pytest.approx([facts["val_auroc"]], abs=1e-6)
    train = torch.stack([slide.z_TD for slide in starts[0]])
    assert train.shape == (4 * 7, 11, 128), "views of slides, tiles of a step, features"
    assert not torch.equal(train[0], train[7]), "another view of the same slide"
    standard = (train - saved["aggregator.center_D"]) / saved["aggregator.scale_D"]
    assert standard.mean((0, 1)).abs().max() < 1e-3
    assert standard.flatten(0, 1).std(0, correction=0).numpy() == pytest.approx(1, abs=1e-3)

    assert main([*fit, "--trainer.max_epochs", "2", "--extend", "true"]) == 0
    assert len(starts) == 1


def test_slides_that_never_vary_are_seen_once_and_as_they_are(tmp_path, capsys):
    config = write_cohort(tmp_path)
    same = ["--data.turns", "false", "--data.colour", "0", "--data.tiles_per_slide", "null"]
    start = ["--model.steps.warm_start", "true", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", str(config), *same, *start]) == 0
    assert "warm start: 7 views of slides; " in capsys.readouterr().out
    for options, alike in ((same, True), (same[2:], False)):
        data = read_config(["--config", str(config), *options]).datamodule
        assert data.varies != alike
        data.prepare_data()
        seen = {bag.slide_id: next(iter(bag.tiles.split(99))) for bag in data.seen_in_training(1)}
        for bag in data.streamed(data.rows("train")):
            assert torch.equal(next(iter(bag.tiles.split(99))), seen[bag.slide_id]) == alike


def test_a_model_without_a_linear_head_is_trained_and_not_solved(tmp_path, capsys):
    config = write_cohort(tmp_path, turns=False, colour=0.0, tiles_per_slide=None)
    start = ["--model.steps.warm_start", "true", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", str(config), "--model.aggregator", "dsmil", *start]) == 0
    printed = capsys.readouterr().out
    assert "warm start: 7 views of slides; attention trained on them, lr " in printed
    assert "linear probe" not in printed
    assert ", which is taken" in printed
