"""A backward of some tiles: right on average, and exact where all are taken."""

import pytest
import torch
from tiny import random_tiles, tiny_encoder

from tapfm.chunked import adapt_bag
from tapfm.sampling import _chances, chosen, draw_tiles

CPU = torch.device("cpu")
T, D = 40, 24


@pytest.fixture
def grads():
    """Rows of very different size, a few of them 0, as attention leaves them."""
    draw = torch.Generator().manual_seed(0)
    size_T = (2 * torch.randn(T, generator=draw, dtype=torch.float64)).exp()
    size_T[:5] = 0
    z_TD = torch.randn(T, D, generator=draw, dtype=torch.float64) * size_T[:, None]
    return z_TD, torch.randn(T, generator=draw, dtype=torch.float64) * size_T


def estimate(grads, budget, seed):
    """The sum over tiles of each row: what the gradient is linear in."""
    weight_T = draw_tiles(*grads, budget, seed)
    return (grads[0] * weight_T[:, None]).sum(0), weight_T


def test_it_is_right_on_average_and_takes_as_many_as_asked(grads):
    exact = grads[0].sum(0)
    draws = [estimate(grads, budget=8, seed=seed) for seed in range(4000)]
    counts = {int((weight_T > 0).sum()) for _, weight_T in draws}
    assert counts <= {7, 8, 9}
    values = torch.stack([value for value, _ in draws])
    error = values.std(0) / len(draws) ** 0.5
    assert ((values.mean(0) - exact).abs() < 4 * error).all()
    assert all((weight_T[:5] == 0).all() for _, weight_T in draws), "no gradient, no backward"


def test_large_rows_make_it_better_than_equal_chances(grads):
    exact = grads[0].sum(0)

    def spread(rows):
        return float(torch.stack([(r - exact).norm() for r in rows]).square().mean())

    ours = spread([estimate(grads, 8, seed)[0] for seed in range(500)])
    equal = []
    for seed in range(500):
        taken = torch.randperm(T, generator=torch.Generator().manual_seed(seed))[:8]
        equal.append(grads[0][taken].sum(0) * T / 8)
    assert ours < 0.2 * spread(equal)


@pytest.mark.parametrize("budget", [35, 36, 1000])
def test_with_room_for_all_it_is_the_gradient_itself(grads, budget):
    value, weight_T = estimate(grads, budget, seed=1)
    assert torch.equal(weight_T, (grads[0].norm(dim=1) > 0).double())
    assert torch.equal(value, grads[0].sum(0))


def test_chances_by_hand():
    norm_T = torch.tensor([8.0, 1.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    assert _chances(norm_T, 2).tolist() == [1.0, 0.25, 0.25, 0.0, 0.5]
    assert _chances(norm_T, 1).tolist() == [x / 12 for x in (8, 1, 1, 0, 2)]
    assert _chances(norm_T, 4).tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert _chances(torch.zeros(3, dtype=torch.float64), 2).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1, 4, 17])
def test_chosen_tiles(size):
    tiles = random_tiles(17)
    weight_T = (torch.arange(17) % 3 == 1) * 2.0
    assert torch.equal(chosen(tiles.split(size), weight_T), tiles[1::3])
    assert chosen(tiles.split(size), torch.zeros(17)).shape == (0, *tiles.shape[1:])


def test_the_encoders_gradient_is_that_of_the_weighed_tiles():
    """Against autograd of the weighed sum over all tiles."""
    tiles, encoder = random_tiles(11), tiny_encoder()
    draw = torch.Generator().manual_seed(3)
    grad_z = torch.randn(11, encoder.dim, generator=draw, dtype=torch.float64)
    grad_s = torch.randn(11, generator=draw, dtype=torch.float64)
    weight_T = draw_tiles(grad_z, grad_s, budget=4, seed=5)
    z, score = encoder(tiles)
    ((z * grad_z).sum(1) + score * grad_s).mul(weight_T).sum().backward()
    expected = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    rows = weight_T > 0
    adapt_bag(
        encoder, chosen(tiles.split(4), weight_T).split(4), (grad_z * weight_T[:, None])[rows],
        (grad_s * weight_T)[rows], seed=0, device=CPU,
    )  # fmt: skip
    for p, gradient in zip(encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
