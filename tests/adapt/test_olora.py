"""A change that stays orthogonal to earlier ones: exact, with the gradient of plain autograd."""

import pytest
import torch
import torch.nn.functional as F

from tapfm.adapt.lowrank import adapted, merged, rows_a
from tapfm.adapt.strategies import StrategyError, make_strategy
from tests.tiny import random_tiles, tiny_encoder

SPEC = {"name": "olora", "rank": 2, "alpha": 3.0, "room": 6}


def trained(spec, seed, earlier=None):
    """Return an encoder whose change was learned: drawn, here; with the tensors of its vit."""
    encoder, strategy = tiny_encoder(), make_strategy(spec)
    strategy.prepare(encoder.vit)
    if earlier is not None:
        strategy.follow(encoder.vit, earlier)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.vit.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn))
    return encoder, strategy, dict(encoder.vit.state_dict())


def linears(encoder):
    return [linear for _, linear in adapted(encoder.vit)]


@pytest.fixture
def chain():
    """A run of lora and two of olora that go on from it, one after the other."""
    first = trained({"name": "lora", "rank": 2}, 1)
    second = trained(SPEC, 2, first[2])
    return first, second, trained(SPEC, 3, second[2])


def test_it_reads_nothing_that_an_earlier_change_reads(chain):
    for one, two, three in zip(*(linears(each[0]) for each in chain), strict=True):
        earlier = [one.lora_A.weight, rows_a(two)]
        for now, before in ((two, earlier[:1]), (three, earlier)):
            for a in before:
                assert (rows_a(now) @ a.T).abs().max() < 1e-6  # Q is kept in float32
        x = torch.randn(3, 2, dtype=torch.float64) @ one.lora_A.weight  # in the first one's span
        plain = F.linear(x, three.weight, three.bias)
        torch.testing.assert_close(three(x), plain, rtol=0, atol=1e-5)
        assert (one(x) - F.linear(x, one.weight, one.bias)).abs().max() > 1e-2
        assert (three.lora_A.weight @ one.lora_A.weight.T).abs().max() > 1e-2, "A alone does not"


def test_value_and_gradient_are_those_of_the_plain_weight(chain):
    """W + s B A (I - Q Q') is written out here, and differentiated by autograd."""
    linear = linears(chain[2][0])[0]
    q, basis_change = linear.lora_apart.double(), torch.randn(5, linear.out_features).double()
    x = torch.randn(5, linear.in_features, dtype=torch.float64)
    a = linear.lora_A.weight.detach().clone().requires_grad_()
    b = linear.lora_B.weight.detach().clone().requires_grad_()
    weight = linear.weight + 1.5 * b @ a @ (torch.eye(len(q), dtype=torch.float64) - q @ q.T)
    expected = F.linear(x, weight, linear.bias)
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(merged(linear), weight.detach(), rtol=0, atol=1e-10)
    (linear(x) * basis_change).sum().backward()
    (expected * basis_change).sum().backward()
    torch.testing.assert_close(linear.lora_A.weight.grad, a.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(linear.lora_B.weight.grad, b.grad, rtol=0, atol=1e-10)
    assert (a.grad @ q).abs().max() < 1e-5, "A does not move within the earlier span"


def test_without_an_earlier_run_it_is_lora():
    one = trained({"name": "lora", "rank": 2, "alpha": 3.0}, 4)[0]
    other, tiles = trained(SPEC, 4)[0], random_tiles(3)
    torch.testing.assert_close(other(tiles)[0], one(tiles)[0], rtol=0, atol=1e-12)


def test_the_export_is_the_adapted_encoder(chain):
    encoder, strategy, _ = chain[2]
    plain = tiny_encoder()
    plain.vit.load_state_dict(strategy.export(encoder.vit))
    tiles = random_tiles(3)
    torch.testing.assert_close(plain(tiles)[0], encoder(tiles)[0], rtol=0, atol=1e-10)


def test_what_it_cannot_go_on_from_is_said(chain):
    vit = tiny_encoder().vit
    strategy = make_strategy({**SPEC, "room": 3})
    strategy.prepare(vit)
    strategy.follow(vit, chain[0][2])
    with pytest.raises(StrategyError, match="span 4 directions of a layer, and room is 3"):
        strategy.follow(vit, chain[1][2])
    with pytest.raises(StrategyError, match="that run has no low-rank change"):
        strategy.follow(vit, {"norm.weight": torch.ones(3)})
    with pytest.raises(StrategyError, match="room must be 1 or more"):
        make_strategy({**SPEC, "room": 0})
