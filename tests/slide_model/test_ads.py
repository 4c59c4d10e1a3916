"""ADS: tiles are emphasised, grouped in training alone, and pooled; here in numpy, by group."""

import math

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.cli import main
from tapfm.data.bag import Moment
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.ads import groups
from tapfm.training.module import SlideModule
from tests.bags import tile_set
from tests.cohorts import write_cohort
from tests.training.test_objective import one_graph, two_passes

T, D, K, R = 13, 7, 3, 4
SMALL = {"name": "ads", "ratio": R, "width": 5}
KEEPS = pytest.mark.parametrize("keep", ["random", "max"])
COUNTS = pytest.mark.parametrize("count", [1, 3, 4, 8, T])


def made(keep="random", seed=11, training=True):
    torch.manual_seed(1)
    aggregator = make_aggregator({**SMALL, "keep": keep}, D, K).double().train(training)
    aggregator.set_moment(Moment(0.5, 1, seed))
    return aggregator


def tiles(count=T):
    drawn = torch.Generator().manual_seed(0)
    z_TD = 3 * torch.randn(count, D, generator=drawn, dtype=torch.float64)
    return tile_set(z_TD, torch.zeros(count).double())


def softmax(values):
    return np.exp(values) / np.exp(values).sum()


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gate(y, p):
    mean, spread = y.mean(1, keepdims=True), np.sqrt(y.var(1, keepdims=True) + 1e-5)
    x = (y - mean) / spread * p["gate.norm.weight"] + p["gate.norm.bias"]
    units = np.tanh(linear(x, p, "gate.tanh")) / (1 + np.exp(-linear(x, p, "gate.sigmoid")))
    return linear(units, p, "gate.last")[:, 0]


def by_hand(aggregator, z, keep="none", channels_shared=True):
    """Return logits and tile weights; "none" of `keep` is prediction."""
    p = {name: value.detach().numpy() for name, value in aggregator.named_parameters()}
    w = softmax(linear(gelu(linear(z, p, "emphasis.0")), p, "emphasis.2")[:, 0])
    h = gelu(linear(z * (1 + w[:, None]), p, "before.0"))
    drawn = np.random.default_rng(aggregator.seed)
    members = [[t] for t in range(len(z))]
    if keep != "none":
        order = drawn.permutation(len(z)).tolist()
        members = [order[at : at + R] for at in range(0, len(z), R)]
    rows, kept = [], drawn.choice(R * D, D, replace=False)
    for group in members:
        whole = (group * R)[:R]
        flat = np.concatenate([h[t] for t in whole])
        rows.append({"none": h[group[0]], "max": h[whole].max(0), "random": flat[kept]}[keep])
        kept = kept if channels_shared else drawn.choice(R * D, D, replace=False)
    y = linear(np.stack(rows), p, "after")
    each = np.array([len(group) for group in members])
    shares = each * np.exp(gate(y, p))
    shares /= shares.sum()
    weights = np.zeros(len(z))
    for group, share in zip(members, shares, strict=True):
        weights[group] = share / len(group)
    return linear(shares @ y, p, "head"), weights


def close(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-10)


@KEEPS
@COUNTS
def test_training_by_hand(keep, count):
    """Whole groups, a last one of fewer tiles, and bags smaller than a group."""
    aggregator = made(keep)
    output = aggregator(tiles(count))
    logits_K, weights_T = by_hand(aggregator, tiles(count).z_TD.numpy(), keep)
    close(output.logits_K, logits_K)
    close(output.weights_T, weights_T)
    close(output.log_weights, np.log(weights_T))
    assert output.weights_T.sum().item() == pytest.approx(1, abs=1e-12)


@KEEPS
@COUNTS
def test_prediction_by_hand_has_no_groups_and_draws_nothing(keep, count):
    aggregator = made(keep, training=False)
    output = aggregator(tiles(count))
    logits_K, weights_T = by_hand(aggregator, tiles(count).z_TD.numpy())
    close(output.logits_K, logits_K)
    close(output.weights_T, weights_T)
    aggregator.set_moment(Moment(0.9, 2, seed=12))
    assert torch.equal(aggregator(tiles(count)).logits_K, output.logits_K)
    assert len(output.weights_T.unique()) == count


def test_another_keep_no_groups_or_channels_of_each_groups_own_are_another_bag():
    """So the tests above can fail."""
    aggregator, z = made("random"), tiles().z_TD.numpy()
    found = aggregator(tiles()).logits_K.detach().numpy()
    for other in (
        by_hand(aggregator, z, "max"),
        by_hand(aggregator, z),
        by_hand(aggregator, z, "random", channels_shared=False),
    ):
        assert np.abs(found - other[0]).max() > 1e-4


@COUNTS
def test_groups_are_a_shuffle_cut_up_and_the_last_repeats_its_tiles(count):
    rows_GR, group_T = groups(count, R, np.random.default_rng(3))
    assert rows_GR.shape == (-(-count // R), R)
    whole = rows_GR[: count // R].flatten().tolist()
    assert len(set(whole)) == len(whole) == count // R * R
    if rest := count % R:
        last = rows_GR[-1].tolist()
        assert last == (last[:rest] * R)[:R]
        assert sorted(whole + last[:rest]) == list(range(count))
    for number, row in enumerate(rows_GR):
        assert set(np.flatnonzero(group_T == number)) == set(row.tolist())


def step_of(seed):
    """Return groups that share channels: of equal tiles each group is the same vector."""
    taken = []
    aggregator = made(seed=seed)
    aggregator.after.register_forward_pre_hook(lambda module, given: taken.append(given[0]))
    aggregator(tile_set(tiles().z_TD[:1].repeat(T, 1), torch.zeros(T).double()))
    return taken[0]


def test_channels_are_those_of_all_groups_of_a_step_and_others_in_the_next():
    first_GD, again_GD, next_GD = (step_of(seed) for seed in (11, 11, 12))
    assert len(first_GD) == 4
    torch.testing.assert_close(first_GD, first_GD[:1].expand(4, D), rtol=0, atol=1e-14)
    assert torch.equal(first_GD, again_GD)
    assert (first_GD[0] - next_GD[0]).abs().max() > 1e-3


@KEEPS
def test_pass_2_has_the_gradient_of_one_graph_and_of_no_other_step(keep, monkeypatch):
    name = {"name": "ads", "keep": keep}
    found, _ = two_passes(name, [], [])
    expected = one_graph(name, [], [])
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-10
    monkeypatch.setattr("tests.training.test_objective.MOMENT", Moment(0.25, 1, seed=12))
    other = one_graph(name, [], [])
    assert ((found - other).norm() / expected.norm()).item() > 1e-3


def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, monkeypatch):
    config, step, steps = write_cohort(tmp_path), SlideModule.training_step, []
    fit = ["fit", "--config", str(config), "--model.aggregator", "ads", "--name"]
    assert main([*fit, "whole"]) == 0

    def stopping(self, bag, index):
        steps.append(self.slide_model.aggregator.seed)
        if len(steps) == 12:
            raise KeyError("stopped")
        return step(self, bag, index)

    monkeypatch.setattr(SlideModule, "training_step", stopping)
    with pytest.raises(KeyError, match="stopped"):
        main([*fit, "stopped"])
    monkeypatch.setattr(SlideModule, "training_step", step)
    assert main([*fit, "stopped"]) == 0
    assert len(set(steps)) == len(steps), "each step draws anew"
    for name in ("metrics.csv", "best.safetensors"):
        whole, resumed = ((tmp_path / "runs" / run / name).read_bytes()
                          for run in ("whole", "stopped"))  # fmt: skip
        assert whole == resumed, name


def test_the_number_of_parameters():
    units = 128
    emphasis, layers, head = (D + 2) * 5, 2 * D * (D + 1), K * (D + 1)
    gates = 2 * D + 2 * units * (D + 1) + units
    assert sum(p.numel() for p in made().parameters()) == emphasis + layers + gates + head


def test_options_that_cannot_be_are_all_named():
    with pytest.raises(SettingsError, match=r"ratio must be 2 or more, got 1(.|\n)*max, random"):
        make_aggregator({"name": "ads", "ratio": 1, "keep": "mean"}, D, K)
