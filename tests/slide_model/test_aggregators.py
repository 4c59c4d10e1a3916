"""Tile weights are the formulas of METHOD; equal tiles weigh the same; the paper's is the start."""

import numpy as np
import pytest
import torch

from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.layers.attention import effective_tiles, minmax
from tests.bags import tile_set

T, D, K = 13, 7, 3


def bag(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z_TD = torch.randn(T, D, generator=generator, dtype=dtype)
    return z_TD, -torch.rand(T, generator=generator, dtype=dtype) / 1000


def weights_of(aggregator, z_TD, score_T):
    return aggregator.double()(tile_set(z_TD, score_T)).weights_T


def test_tapfm_weights_by_hand():
    z_TD, score_T = bag()
    s = score_T.numpy()
    logits = (s - s.min()) / (s.max() - s.min()) / 0.1
    expected = np.exp(logits) / np.exp(logits).sum()
    weights_T = make_aggregator("tapfm", D, K).double()(tile_set(z_TD, score_T)).weights_T
    np.testing.assert_allclose(weights_T.detach().numpy(), expected, rtol=1e-12)


def test_logits_by_hand():
    aggregator = make_aggregator("tapfm", D, K).double()
    z_TD, score_T = bag()
    output = aggregator(tile_set(z_TD, score_T))
    logits_K, weights_T = output.logits_K, output.weights_T
    b = (weights_T[:, None] * z_TD).sum(0)
    b = (b - b.mean()) / (b.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(logits_K, aggregator.head.weight @ b + aggregator.head.bias)


def test_gated_start_is_the_papers():
    z_TD, score_T = bag()
    torch.manual_seed(0)
    paper = weights_of(make_aggregator({"name": "tapfm", "temperature": 0.3}, D, K), z_TD, score_T)
    ours = make_aggregator({"name": "tapfm_gated", "temperature": 0.3}, D, K)
    torch.testing.assert_close(weights_of(ours, z_TD, score_T), paper, rtol=0, atol=0)
    torch.nn.init.ones_(ours.gate.last.weight)  # and can leave it
    assert not torch.allclose(weights_of(ours, z_TD, score_T), paper)


def test_gated_ignores_the_score():
    z_TD, score_T = bag()
    aggregator = make_aggregator("gated", D, K)
    weights = weights_of(aggregator, z_TD, score_T)
    torch.testing.assert_close(weights_of(aggregator, z_TD, 5 * score_T.flip(0)), weights)
    assert weights.std() > 0


def test_a_real_spread_is_not_rounded_away():
    score_T = -0.3 + 1e-5 * torch.rand(T, generator=torch.Generator().manual_seed(0))
    assert minmax(score_T).max() == 1
    assert minmax(score_T).min() == 0


def test_minmax_gradient_is_exact():
    torch.autograd.gradcheck(minmax, torch.randn(T, dtype=torch.float64, requires_grad=True))


def test_effective_tiles():
    assert effective_tiles(torch.full((T,), 1 / T)).item() == pytest.approx(T)
    assert effective_tiles(torch.eye(T)[0]).item() == 1


def test_unknown_name_and_bad_temperature_are_refused():
    with pytest.raises(ValueError, match="'abmil' is none of tapfm, gated, tapfm_gated"):
        make_aggregator("abmil", D, K)
    with pytest.raises(ValueError, match="above 0, got 0"):
        make_aggregator({"name": "tapfm", "temperature": 0.0}, D, K)


def test_the_mean_is_a_linear_probe_of_the_mean_tile():
    torch.manual_seed(0)
    aggregator, z_TD = make_aggregator("mean", 6, 2), torch.randn(9, 6)
    aggregator.center_D.copy_(torch.arange(6.0))
    aggregator.scale_D.fill_(2)
    output = aggregator(tile_set(z_TD, torch.randn(9)))
    mean_D = (z_TD.mean(0) - torch.arange(6.0)) / 2
    expected_K = aggregator.head.weight @ mean_D + aggregator.head.bias
    torch.testing.assert_close(output.logits_K, expected_K)
    torch.testing.assert_close(output.tile_logits_TK.mean(0), expected_K)
    torch.testing.assert_close(output.weights_T, torch.full((9,), 1 / 9))
    assert not aggregator.learns_weights
