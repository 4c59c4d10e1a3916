"""`tapfm probe`: gradients equal those of one graph, drift is linear CKA, the rule as printed."""

import csv
import math
import re

import pytest
import torch
import yaml

from tapfm import cli
from tapfm.encoders.checkpoints import PACKAGED
from tapfm.evaluation.drift import cls_by_block, linear_cka
from tapfm.evaluation.probe import (
    SHARE,
    fit_head,
    parts_of,
    slide_gradients,
    suggest,
    training_bags,
)
from tapfm.training.fit import read_config
from tests.bags import tile_set
from tests.cohorts import write_cohort

SHIPPED = PACKAGED / "demo_vit.safetensors"
N, D, E = 37, 11, 7


def features(seed, width):
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed)).double() + 3


def hsic_cka(x_ND, y_NE):
    """Return linear CKA from the two Gram matrices and the centring matrix (HSIC)."""
    centre_NN = torch.eye(N, dtype=torch.float64) - 1 / N
    k_NN, l_NN = x_ND @ x_ND.T, y_NE @ y_NE.T

    def hsic(a_NN, b_NN):
        return torch.trace(a_NN @ centre_NN @ b_NN @ centre_NN) / (N - 1) ** 2

    return (hsic(k_NN, l_NN) / (hsic(k_NN, k_NN) * hsic(l_NN, l_NN)).sqrt()).item()


class TestCka:
    def test_is_hsics(self):
        x_ND, mix_DE = features(0, D), torch.randn(D, E).double()
        for y_NE in (features(1, E), x_ND @ mix_DE + features(2, E)):
            assert linear_cka(x_ND, y_NE) == pytest.approx(hsic_cka(x_ND, y_NE), abs=1e-12)
        assert linear_cka(x_ND, x_ND) == 1, "the same features have not moved, to the bit"

    def test_rotation_shift_and_scale_are_no_drift_and_a_stretch_is(self):
        x_ND, y_NE = features(0, D), features(0, D)[:, :E] + 0.3 * features(1, E)
        before = linear_cka(x_ND, y_NE)
        turn_DD = torch.linalg.qr(features(2, D)[:D])[0]
        for moved_ND in (x_ND @ turn_DD, x_ND + torch.arange(D), -2.5 * x_ND):
            assert linear_cka(moved_ND, y_NE) == pytest.approx(before, abs=1e-12)
        assert linear_cka(y_NE, x_ND) == pytest.approx(before, abs=1e-12)
        assert abs(linear_cka(x_ND * torch.arange(1, D + 1), y_NE) - before) > 0.01

    def test_features_without_spread_have_no_drift_to_speak_of(self):
        assert math.isnan(linear_cka(torch.ones(N, D), features(0, E)))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Return the config of a tiny cohort with the user's own weights."""
    folder = tmp_path_factory.mktemp("probe")
    path = write_cohort(folder / "cohort")
    settings = yaml.safe_load(path.read_text())
    (folder / "own.safetensors").write_bytes(SHIPPED.read_bytes())
    settings["model"]["weights"] = str(folder / "own.safetensors")
    settings["model"]["drop_path"] = 0.0
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["index", "--config", str(path)]) == 0
    return path


def test_a_blocks_gradient_is_that_of_one_graph(config):
    cli = read_config(["--config", str(config), "--model.strategy", "full"])
    module, data = cli.model, cli.datamodule
    model = module.slide_model
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    losses = fit_head(module, training_bags(data, 2), data.seed)
    assert losses[1] < 0.9 * losses[0], "the head was fitted"
    found = {part.name: part for part in slide_gradients(module, training_bags(data, 2))}
    parts = parts_of(model.encoder.vit)
    assert sum(part.parameters for part in found.values()) == sum(
        p.numel() for p in model.encoder.vit.parameters()
    )
    assert list(found) == ["front", *(f"block {n}" for n in range(6)), "norm"]
    relative = dict.fromkeys(parts, 0.0)
    for bag in training_bags(data, 2):
        model.zero_grad()
        z_TD, score_T = model.encode(bag.tiles)
        logits_K = model.aggregator(tile_set(z_TD, score_T)).logits_K
        module.objective.task_loss(logits_K, bag.labels_K).backward()
        for name, each in parts.items():
            flat = [torch.cat([t.flatten() for t in ts]) for ts in ([p.grad for p in each], each)]
            relative[name] += (flat[0].norm() / flat[1].norm()).item() / 2
    assert {name: part.relative for name, part in found.items()} == pytest.approx(
        relative, rel=1e-3
    )
    for name, parameter in model.encoder.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was changed"


def test_what_is_in_front_of_a_change_has_not_drifted(config):
    module = read_config(["--config", str(config)]).model
    model = module.slide_model
    tiles = torch.randint(0, 256, (19, 3, 32, 32), dtype=torch.uint8)
    before = cls_by_block(model, tiles, 5)
    assert [each.shape for each in before] == [(19, 128)] * 6
    with torch.no_grad():
        model.encoder.vit.blocks[4].mlp.fc2.weight.mul_(3)
    drift = [
        1 - linear_cka(*pair) for pair in zip(before, cls_by_block(model, tiles, 5), strict=True)
    ]
    assert drift[:4] == [0, 0, 0, 0]
    assert min(drift[4:]) > 1e-4


def test_the_rule_takes_the_fewest_last_blocks_with_the_share():
    assert SHARE == 0.8
    assert suggest([9, 1, 1, 1]) == 4
    assert suggest([1, 1, 1, 7]) == 2
    assert suggest([0, 0, 0, 1]) == 1
    assert suggest([1] * 10) == 8
    assert suggest([0.0] * 3) == 1, "no gradient at all asks for nothing"


def test_the_verb_says_what_it_found_and_leaves_the_weights_alone(config, tmp_path, capsys):
    own = config.parent.parent / "own.safetensors"
    before = own.read_bytes()
    asked = ["--out", str(tmp_path), "--slides", "3", "--epochs", "1"]
    assert cli.main(["probe", "--config", str(config), *asked]) == 0
    said = capsys.readouterr().out
    assert own.read_bytes() == before
    with (tmp_path / "probe.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["front", *(f"block {n}" for n in range(6)), "norm"]
    assert all(float(row["relative"]) > 0 for row in rows)
    assert all(float(row["drift"]) > 0 for row in rows[1:-1]), "all of it was tuned"
    assert rows[0]["drift"] == rows[-1]["drift"] == ""
    n = suggest([float(row["relative"]) for row in rows[1:-1]])
    assert f"last_n: n = {n} of 6, the fewest last blocks that have 80%" in said
    assert re.search(r"3 slides\. Drift: 1 - linear CKA of CLS on \d+ tiles of the val split", said)
    assert "full fine-tuning at 0.0001 for 1 x 3 slides" in said
    assert (tmp_path / "probe.png").stat().st_size > 10_000
    assert cli.main(["probe", "--config", str(config), "--slides", "0"]) == 2
    assert "must be 1 or more, got 0 and 3" in capsys.readouterr().err
