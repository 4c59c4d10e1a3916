"""The head start: a linear probe in the head, saved as the run's first, and not had twice."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from cohorts import write_cohort
from safetensors.torch import load_file

from tapfm import backbones, head_start
from tapfm import model as models
from tapfm.aggregators import AGGREGATORS, make_aggregator
from tapfm.baselines import bag_statistics
from tapfm.cli import main
from tapfm.head_start import Remembered, embed, judge, solve_head, standardise
from tapfm.tasks import make_task

TASK = make_task({"name": "multilabel"}, ("A",))


def slides(count, seed):
    """Ten tiles each, far from 0, that lean along the first axis where the label is 1."""
    drawn = torch.Generator().manual_seed(seed)
    found = []
    for place in range(count):
        z_TD, label = 50 + torch.randn(10, 8, generator=drawn), float(place % 2)
        z_TD[:, 0] += 2 * label
        score_T = torch.randn(10, generator=drawn)
        found.append(Remembered(str(place), "", z_TD, torch.tensor([label]), score_T))
    return found


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_aggregator_says_what_the_probe_says(name):
    torch.manual_seed(0)
    aggregator, train, val = make_aggregator(name, 8, 1), slides(60, 1), slides(40, 2)
    standardise(aggregator, train)
    embedded = embed(aggregator, train), embed(aggregator, val)
    probe = solve_head(aggregator, *embedded, TASK)
    figure, _ = judge(aggregator, embedded[1], TASK)
    assert figure == pytest.approx(probe.val_score)
    assert figure > 0.85
    mean_D, std_D = bag_statistics(train)
    torch.testing.assert_close(aggregator.center_D, mean_D)
    torch.testing.assert_close(aggregator.scale_D, std_D, rtol=1e-5, atol=0)
    with torch.no_grad():
        b_D, weights_T = aggregator.embed(val[0].z_TD, val[0].score_T)
        said_K = probe.weight_KD @ ((b_D - probe.mean_D) / probe.std_D) + probe.bias_K
        logits_K, same_T = aggregator(val[0].z_TD, val[0].score_T)
    torch.testing.assert_close(logits_K, said_K, rtol=1e-4, atol=1e-4)
    assert torch.equal(weights_T, same_T)


def test_a_slide_of_few_known_labels_counts_as_the_others():
    """As it does after an epoch: of two models of one figure the lower loss is better."""
    torch.manual_seed(0)
    task, val = make_task({"name": "multilabel"}, ("A", "B")), slides(9, 3)
    y_NK = torch.tensor([0.0, 1.0]).repeat(9, 1)
    y_NK[:4, 1], y_NK[8] = torch.nan, torch.nan
    val = [replace(slide, y_K=y_K) for slide, y_K in zip(val, y_NK, strict=True)]
    aggregator = make_aggregator("gated", 8, 2)
    with torch.no_grad():
        p_NK = torch.stack([aggregator(s.z_TD, s.score_T)[0] for s in val]).sigmoid()
    right_NK = torch.where(y_NK == 1, p_NK, 1 - p_NK).where(~y_NK.isnan(), torch.nan)
    of_N = -right_NK.log().nanmean(1).nan_to_num()
    assert judge(aggregator, embed(aggregator, val), task)[1] == pytest.approx(
        of_N.mean().item(), rel=1e-5
    )


def test_a_run_begins_there(tmp_path, monkeypatch, capsys):
    """One that then stands still saves the head start, and a resumed one has no second."""
    config, starts = write_cohort(tmp_path), []
    real = head_start.standardise
    monkeypatch.setattr(head_start, "standardise", lambda *each: starts.append(each) or real(*each))
    still = ["--model.steps.encoder_lr", "0", "--model.steps.head_lr", "1e-12"]
    fit = ["fit", "--config", str(config), *still, "--model.steps.head_start", "true"]
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    assert "head start: 28 views of slides, chosen on validation: C" in capsys.readouterr().out
    run = tmp_path / "runs" / "tapfm_gated"
    facts = models.read_recipe(run / "best.safetensors")[1]
    assert facts["epoch"] == -1

    saved, base = load_file(run / "best.safetensors"), backbones.load("demo_vit", tile_px=32)
    for name, value in base.state_dict().items():
        assert torch.equal(saved[f"encoder.{name}"], value), name
    figures = pd.read_csv(run / "metrics.csv")["val/auroc"].dropna()
    assert figures.tolist() == pytest.approx([facts["val_auroc"]], abs=1e-6)
    train = torch.stack([slide.z_TD for slide in starts[0][1]])
    assert train.shape == (4 * 7, 11, 128), "views of slides, tiles of a step, features"
    assert not torch.equal(train[0], train[7]), "another view of the same slide"
    standard = (train - saved["aggregator.center_D"]) / saved["aggregator.scale_D"]
    assert standard.mean((0, 1)).abs().max() < 1e-3
    assert standard.flatten(0, 1).std(0, correction=0).numpy() == pytest.approx(1, abs=1e-3)

    assert main([*fit, "--trainer.max_epochs", "2"]) == 0
    assert len(starts) == 1
