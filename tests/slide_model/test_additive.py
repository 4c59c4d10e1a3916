"""A slide's value is the mean of its tiles', in the label's unit or in probability."""

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.model import ModelConfig, SlideModel
from tapfm.tasks import make_task
from tests.bags import tile_set
from tests.tiny import tiny_encoder

T, D, K = 13, 7, 3
every = pytest.mark.parametrize("attention", [True, False])


def made(**options):
    torch.manual_seed(1)
    return make_aggregator({"name": "additive", "width": 6, **options}, D, K).double()


def tiles(scale=3.0):
    drawn = torch.Generator().manual_seed(0)
    z_TD = scale * torch.randn(T, D, generator=drawn, dtype=torch.float64)
    return tile_set(z_TD, torch.zeros(T).double())


def by_hand(aggregator, z_TD):
    """Return the tiles' logits and their weights."""
    p = {name: value.detach().numpy() for name, value in aggregator.named_parameters()}
    z = z_TD.numpy()

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    last = "head" if "head.weight" in p else "tile_head"
    each = linear(last, np.maximum(linear("project", z), 0))
    if "gate.last.weight" not in p:
        return each, np.full(T, 1 / T)
    x = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
    gated = np.tanh(linear("gate.tanh", x)) / (1 + np.exp(-linear("gate.sigmoid", x)))
    u = np.exp(gated @ p["gate.last.weight"][0])
    return each, u / u.sum()


@every
def test_the_slides_logits_are_the_weighted_mean_of_the_tiles(attention):
    aggregator = made(attention=attention)
    output, (each, weights) = aggregator(tiles()), by_hand(aggregator, tiles().z_TD)
    for found, expected in (
        (output.tile_logits_TK, each),
        (output.weights_T, weights),
        (output.logits_K, weights @ each),
    ):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-10)
    flat = np.abs(each.mean(0) - weights @ each).max()
    assert (flat > 1e-3) == attention, "so that the above can fail"


@every
def test_the_slides_probability_is_the_weighted_mean_of_the_tiles(attention):
    aggregator = made(attention=attention, probability=True)
    output, (each, weights) = aggregator(tiles()), by_hand(aggregator, tiles().z_TD)
    expected = weights @ (1 / (1 + np.exp(-each)))
    found = output.logits_K.sigmoid().detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
    of_mean = 1 / (1 + np.exp(-(weights @ each)))
    assert np.abs(of_mean - expected).max() > 1e-4, "the mean of logits is another number"


def test_sure_tiles_leave_logits_and_gradients_finite():
    """A mean of rounded probabilities is 0 or 1 here, and its logit infinite."""
    aggregator, bag = made(probability=True).float(), tiles(1e4)
    z_TD = bag.z_TD.float().requires_grad_()
    output = aggregator(tile_set(z_TD, torch.zeros(T)))
    assert output.tile_logits_TK.abs().max() > 200
    output.logits_K.sum().backward()
    assert output.logits_K.isfinite().all()
    assert z_TD.grad.isfinite().all()


def test_a_tile_has_the_unit_of_the_label():
    """Of a share of cells in percent: tiles in percent, and the slide is their mean."""
    task = {"name": "regression", "mean": (30.0,), "std": (12.0,)}
    torch.manual_seed(1)
    aggregator = make_aggregator({"name": "additive", "attention": False}, D, 1).double()
    output, unit = aggregator(tiles()), make_task(task, ("til",))
    percent_T1 = unit.predict(output.tile_logits_TK)
    torch.testing.assert_close(percent_T1.mean(0), unit.predict(output.logits_K[None])[0])
    assert percent_T1.std() > 1


def test_probabilities_of_classes_are_refused():
    task = {"name": "multiclass", "column": "x", "weight": (1.0, 1.0)}
    config = {"model": "demo_vit", "labels": ("a", "b"), "tile_px": 32, "mpp": 0.5, "task": task}
    spec = {"name": "additive", "probability": True}
    with pytest.raises(SettingsError, match=r"additive as it is set .* multilabel .* multiclass"):
        SlideModel(ModelConfig(aggregator=spec, **config), tiny_encoder())
    SlideModel(ModelConfig(aggregator="additive", **config), tiny_encoder())


def test_the_number_of_parameters():
    head, project = K * 7, 6 * (D + 1)
    gate = 2 * D + 2 * 128 * (D + 1) + 128
    assert sum(p.numel() for p in made().parameters()) == head + project + gate
    assert sum(p.numel() for p in made(attention=False).parameters()) == head + project


def test_a_width_that_cannot_be_is_refused():
    with pytest.raises(SettingsError, match="additive: width must be 1 or more, got 0"):
        made(width=0)
