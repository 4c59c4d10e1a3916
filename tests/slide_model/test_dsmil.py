"""DSMIL's two streams are the paper's equations; here they are in numpy, a label at a time."""

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.model import ModelConfig, SlideModel
from tapfm.tasks.losses import MaskedBCE
from tests.bags import tile_set
from tests.tiny import tiny_encoder

T, D, K, A = 13, 7, 3, 5
TARGET = torch.tensor([1.0, torch.nan, 0.0])


def made(units=A):
    torch.manual_seed(1)
    return make_aggregator({"name": "dsmil", "units": units}, D, K).double()


def tiles():
    drawn = torch.Generator().manual_seed(0)
    return tile_set(
        3 + 2 * torch.randn(T, D, generator=drawn, dtype=torch.float64), torch.zeros(T).double()
    )


def by_hand(aggregator, z_TD, critical=-1):
    """Return instance logits, bag logits and attention; `critical` -2 takes the second tile."""
    p = {name: value.detach().numpy() for name, value in aggregator.named_parameters()}
    z = z_TD.numpy()
    h = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
    instance, bag, attention = [], [], []
    for k in range(K):
        scores = h @ p["instance_head.weight"][k] + p["instance_head.bias"][k]
        m = np.argsort(scores)[critical]
        q = h @ p["query.weight"].T
        u = np.exp(q @ q[m] / np.sqrt(q.shape[1]))
        u /= u.sum()
        b = u @ (h @ p["value.weight"].T)
        instance.append(scores.max())
        bag.append(p["bag_head.weight"][k] @ b + p["bag_head.bias"][k])
        attention.append(u)
    return np.array(instance), np.array(bag), np.array(attention)


def test_both_streams_by_hand():
    aggregator = made()
    output = aggregator(tiles())
    instance_K, bag_K, a_KT = by_hand(aggregator, tiles().z_TD)
    for found, expected in (
        (output.extras["instance_K"], instance_K),
        (output.extras["bag_K"], bag_K),
        (output.logits_K, (instance_K + bag_K) / 2),
        (output.log_weights.exp(), a_KT),
        (output.weights_T, a_KT.mean(0)),
        (output.tile_logits_TK.max(0).values, instance_K),
    ):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-10)


def test_another_critical_tile_is_another_bag():
    """So the test above can fail."""
    aggregator = made()
    output = aggregator(tiles())
    _, bag_K, a_KT = by_hand(aggregator, tiles().z_TD, critical=-2)
    assert np.abs(output.extras["bag_K"].detach().numpy() - bag_K).min() > 1e-6
    assert np.abs(output.log_weights.exp().detach().numpy() - a_KT).max() > 1e-4


def test_half_the_loss_is_each_streams():
    aggregator, loss = made(), MaskedBCE([1.0, 2.0, 3.0]).double()
    terms = aggregator.losses(aggregator(tiles()), TARGET, loss)
    instance_K, bag_K, _ = (torch.from_numpy(each) for each in by_hand(aggregator, tiles().z_TD))
    assert terms["instance_loss"].item() == pytest.approx(loss(instance_K, TARGET).item() / 2)
    assert terms["bag_loss"].item() == pytest.approx(loss(bag_K, TARGET).item() / 2)


@pytest.mark.parametrize("units", [1, 128])
def test_the_number_of_parameters(units):
    norm, heads, query, value = 2 * D, 2 * K * (D + 1), D * units, D * D
    assert sum(p.numel() for p in made(units).parameters()) == norm + heads + query + value


def test_cox_is_refused_since_it_remembers_one_risk_a_slide():
    task = {"name": "survival", "time": "t", "event": "e", "edges": (), "horizon": 1.0}
    config = ModelConfig("demo_vit", "dsmil", ("log_relative_hazard",), 32, 0.5)
    cox = {**task, "with_loss": "cox"}
    with pytest.raises(SettingsError, match=r"dsmil .* cox: .* remembers one risk of each slide"):
        SlideModel(ModelConfig(**{**vars(config), "task": cox}), tiny_encoder())
    hazard = {**task, "edges": (1.0,)}
    for name, own in (("dsmil", hazard), ("gated", cox)):
        spec = {"aggregator": {"name": name}, "task": own}
        SlideModel(ModelConfig(**{**vars(config), **spec}), tiny_encoder())


def test_units_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match="dsmil: units must be 1 or more, got 0"):
        made(0)
