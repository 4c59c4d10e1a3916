"""CLAM's attention and both losses by hand in numpy, a label at a time."""

import math

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.model import ModelConfig, SlideModel
from tapfm.tasks.losses import MaskedBCE, MaskedCrossEntropy
from tests.bags import tile_set
from tests.tiny import tiny_encoder

T, D, K, B = 13, 7, 3, 3
TARGET = torch.tensor([1.0, torch.nan, 0.0])
SMALL = {"name": "clam", "width": 6, "units": 5, "group": B}
either = pytest.mark.parametrize("multi", [True, False])


def made(**options):
    torch.manual_seed(1)
    return make_aggregator({**SMALL, **options}, D, K).double()


def tiles(count=T):
    drawn = torch.Generator().manual_seed(0)
    z_TD = 3 * torch.randn(count, D, generator=drawn, dtype=torch.float64)
    return tile_set(z_TD, torch.zeros(count).double())


def by_hand(aggregator, z_TD, target_K, multi, group=B, margin=1.0, least_first=False):
    """Return logits, attention rows and the tiles' loss; with `least_first` the groups change."""
    p = {name: value.detach().numpy() for name, value in aggregator.named_parameters()}

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    h = np.maximum(linear("project", z_TD.numpy()), 0)
    gated = np.tanh(linear("tanh", h)) / (1 + np.exp(-linear("sigmoid", h)))
    scores = linear("attention", gated).T
    a = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    logits, terms = [], []
    for k in range(K):
        row = k if multi else 0
        head = "bag_head" if multi else "head"
        logits.append(p[f"{head}.weight"][k] @ (a[row] @ h) + p[f"{head}.bias"][k])
        order = np.argsort(scores[row])
        most, least = order[-group:], order[:group]
        if least_first:
            most, least = least, most
        taught = [] if np.isnan(target_K[k]) else [(t, int(target_K[k])) for t in most]
        if target_K[k] == 1:
            taught += [(t, 0) for t in least]
        each = []
        for t, y in taught:
            two = linear(f"instance_heads.{k}", h[t])
            raised = two + margin * (np.arange(2) != y)
            each.append(np.log(np.exp(raised).sum()) - two[y])
        if each:
            terms.append(np.mean(each))
    return np.array(logits), a, np.mean(terms)


@either
def test_logits_attention_and_both_losses_by_hand(multi):
    aggregator, loss = made(multi=multi), MaskedBCE([1.0, 2.0, 3.0]).double()
    output = aggregator(tiles())
    logits, a, of_tiles = by_hand(aggregator, tiles().z_TD, TARGET.numpy(), multi)
    terms = aggregator.losses(output, TARGET, loss)
    for found, expected in (
        (output.logits_K, logits),
        (output.weights_T, a.mean(0)),
        (terms["instance_loss"], 0.3 * of_tiles),
        (terms["bag_loss"], 0.7 * loss(torch.from_numpy(logits), TARGET).numpy()),
    ):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-10)
    _, _, wrong = by_hand(aggregator, tiles().z_TD, TARGET.numpy(), multi, least_first=True)
    assert abs(wrong - of_tiles) > 1e-3, "so that the above can fail"


def test_without_a_margin_the_tiles_loss_is_cross_entropy():
    aggregator = made(margin=0.0)
    output = aggregator(tiles())
    most_B = output.extras["scores_RT"][2].topk(B).indices  # label 2 is absent: these are 0
    two_B2 = aggregator.instance_heads[2](aggregator.project(tiles().z_TD).relu()[most_B])
    expected = torch.nn.functional.cross_entropy(two_B2, torch.zeros(B, dtype=torch.int64))
    alone = aggregator.tile_loss(torch.tensor([torch.nan, torch.nan, 0.0]), **output.extras)
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("count", "group"), [(5, 2), (2, 1)])
def test_groups_of_a_small_bag_have_no_tile_in_common(count, group):
    """The published code asks for 8 of each, and fails or teaches one tile both."""
    aggregator = made(group=8)
    found = aggregator.tile_loss(TARGET, **aggregator(tiles(count)).extras)
    *_, expected = by_hand(aggregator, tiles(count).z_TD, TARGET.numpy(), True, group)
    assert found.item() == pytest.approx(expected, abs=1e-10)
    *_, other = by_hand(aggregator, tiles(count).z_TD, TARGET.numpy(), True, count)
    assert abs(other - expected) > 1e-4


def test_one_tile_and_unknown_labels_teach_no_tile_and_keep_a_graph():
    aggregator = made()
    for count, target in ((1, TARGET), (T, torch.full((K,), torch.nan))):
        found = aggregator.tile_loss(target, **aggregator(tiles(count)).extras)
        assert found.item() == 0
        found.backward()


def test_of_classes_the_slides_own_has_both_groups_and_the_others_one():
    loss = MaskedCrossEntropy([1.0] * K)
    assert loss.positives(torch.tensor([2.0])).tolist() == [0, 0, 1]
    assert loss.positives(torch.tensor([torch.nan])).isnan().all()
    aggregator = made()
    terms = aggregator.losses(aggregator(tiles()), torch.tensor([2.0]), loss)
    *_, expected = by_hand(aggregator, tiles().z_TD, np.array([0.0, 0, 1]), True)
    assert terms["instance_loss"].item() == pytest.approx(0.3 * expected, abs=1e-10)


@pytest.mark.parametrize(("multi", "published"), [(False, 790_791), (True, 791_048)])
def test_the_number_of_parameters_is_the_published_codes(multi, published):
    """Of its small model with two classes, on ResNet features."""
    model = make_aggregator({"name": "clam", "multi": multi}, 1024, 2)
    assert sum(p.numel() for p in model.parameters()) == published


def test_tasks_without_classes_are_refused_as_the_model_is_built():
    task = {"name": "regression", "mean": (0.0,), "std": (1.0,)}
    with pytest.raises(SettingsError, match=r"clam .* multilabel or multiclass .* regression"):
        SlideModel(ModelConfig("demo_vit", "clam", ("x",), 32, 0.5, task=task), tiny_encoder())
    SlideModel(ModelConfig("demo_vit", "mean", ("x",), 32, 0.5, task=task), tiny_encoder())


def test_options_that_cannot_be_are_all_named():
    with pytest.raises(SettingsError, match=r"group must be 1 or more(.|\n)*weight must be 0 or"):
        made(group=0, weight=1.0)
    assert math.isclose(made(weight=0.0).options.weight, 0)
