"""Mamba in chunks is the recurrence, step by step; what each scan sees; its cost is linear."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slides.errors import SettingsError
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators import mamba as parts
from tests.bags import tile_set

D, K, H, P, N = 7, 3, 2, 4, 5
WHOLE = pytest.mark.parametrize("local", [False, True])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequence(count):
    """Return x, log a, B and C of so many tiles; some decays are near 1, some near 0."""
    log_a_TH = -2 * drawn(count, H, seed=1).square()
    return drawn(count, H, P), log_a_TH, drawn(count, N, seed=2), drawn(count, N, seed=3)


def step_by_step(x, log_a, B, C, chunk, local):
    """Return the recurrence, a tile after the other; behind a tile, anew in each chunk."""
    a = log_a.exp()
    write = torch.einsum("thp,tn->thpn", x, B)
    ahead, behind = [], [None] * len(x)
    state = torch.zeros_like(write[0])
    for t in range(len(x)):
        state = a[t][:, None, None] * state + write[t]
        ahead.append(state)
    for t in reversed(range(len(x))):
        ends = t + 1 == len(x) or (t + 1) % chunk == 0
        after = torch.zeros_like(state) if ends else behind[t + 1] + write[t + 1]
        behind[t] = a[t][:, None, None] * after
    seen = torch.stack(ahead) + (torch.stack(behind) if local else 0)
    return torch.einsum("thpn,tn->thp", seen, C)


@WHOLE
@pytest.mark.parametrize(("count", "chunk"), [(1, 8), (8, 8), (23, 8), (64, 16), (5, 64), (40, 1)])
def test_chunks_are_the_recurrence(count, chunk, local):
    whole = sequence(count)
    found, expected = parts.scan(*whole, chunk, local), step_by_step(*whole, chunk, local)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_chunk_alone_and_one_direction_are_other_numbers():
    """So the test above can fail."""
    whole = sequence(23)
    cut = torch.cat([parts.scan(*(each[n:n + 8] for each in whole), 8, False)
                     for n in (0, 8, 16)])  # fmt: skip
    assert (cut - step_by_step(*whole, 8, False)).abs().max() > 0.01
    both = parts.scan(*whole, 8, True) - parts.scan(*whole, 8, False)
    assert both[:7].abs().max() > 0.01
    assert both[7].abs().max() == 0, "the last of a chunk has no tile behind it"


@WHOLE
def test_the_gradient_is_the_recurrences(local):
    def gradients(how):
        whole = [each.requires_grad_() for each in sequence(23)]
        (how(*whole, 8, local) * drawn(23, H, P, seed=9)).sum().backward()
        return [each.grad for each in whole]

    for found, expected in zip(gradients(parts.scan), gradients(step_by_step), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_long_sequences_and_strong_decay_stay_finite_in_float32():
    x, log_a, B, C = (each.float() for each in sequence(300))
    whole = [each.requires_grad_() for each in (x, 40 * log_a, B, C)]
    found = parts.scan(*whole, 64, True)
    found.sum().backward()
    assert found.isfinite().all()
    assert all(each.grad.isfinite().all() for each in (x, B, C))


def made(scan, **options):
    torch.manual_seed(1)
    spec = {"name": "mamba", "width": 32, "chunk": 4, "scan": scan, **options}
    return make_aggregator(spec, D, K).double()


def layer_by_hand(layer, x):
    """Return one layer of forward scan, tile by tile in numpy."""
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    x, inner, state = x.numpy(), 64, 16

    def silu(u):
        return u / (1 + np.exp(-u))

    mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    h = (x - mean) / np.sqrt(var + 1e-5) * p["norm.weight"] + p["norm.bias"]
    gate, xbc, step = np.split(h @ p["enter.weight"].T, [inner, 2 * inner + 2 * state], axis=1)
    memory = np.zeros((inner, state))
    out = []
    for t in range(len(x)):
        past = [xbc[t - 3 + k] if t - 3 + k >= 0 else 0 * xbc[0] for k in range(4)]
        seen = sum(p["memories.0.conv.weight"][:, 0, k] * past[k] for k in range(4))
        u, B, C = np.split(silu(seen + p["memories.0.conv.bias"]), [inner, inner + state])
        d = np.log1p(np.exp(step[t] + p["memories.0.step_bias_H"]))
        a = np.exp(-d * np.exp(p["memories.0.log_decay_H"]))
        memory = a * memory + d * np.outer(u, B)
        y = (memory @ C + p["memories.0.skip_H"] * u) * silu(gate[t])
        out.append(y / np.sqrt((y**2).mean() + 1e-5) * p["norm_out.weight"])
    return x + np.array(out) @ p["leave.weight"].T


def test_a_layer_by_hand():
    layer, x = made("forward").layers[0], drawn(11, 32)
    np.testing.assert_allclose(layer(x).detach().numpy(), layer_by_hand(layer, x), atol=1e-10)
    turned = layer_by_hand(layer, x.flip(0))[::-1]
    assert np.abs(layer(x).detach().numpy() - turned).max() > 1e-3


def test_the_second_order_is_a_transposed_matrix_and_comes_back():
    order, back = parts.strided(20, 10, torch.device("cpu"))
    assert order.tolist() == torch.arange(20).reshape(2, 10).T.flatten().tolist()
    order, back = parts.strided(23, 10, torch.device("cpu"))
    assert order[:5].tolist() == [0, 10, 20, 1, 11]
    assert order[back].tolist() == list(range(23))


@pytest.mark.parametrize(
    ("scan", "layers", "seen"),
    [("forward", 2, 14), ("local", 1, 16), ("local", 2, 20), ("reordered", 1, 17)],
)
def test_which_tiles_a_tile_sees(scan, layers, seen):
    """Tile 13 of 20, in the fourth chunk of 4; in the second order it comes behind 1, 5 and 9."""
    aggregator, x = made(scan, layers=layers, rate=4), drawn(20, 32).requires_grad_()
    y = x
    for layer in aggregator.layers:
        y = layer(y)
    y[13].sum().backward()
    found = set(x.grad.abs().sum(1).nonzero()[:, 0].tolist())
    assert found == set(range(seen)) - ({14, 15} if scan == "reordered" else set())


def test_slides_of_a_case_come_one_after_the_other():
    cells = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 0], [0, 2]])
    order = parts.row_by_row(cells, torch.tensor([0, 0, 0, 1, 1]))
    assert order.tolist() == [1, 0, 2, 3, 4]


@pytest.mark.parametrize("scan", parts.SCANS)
def test_work_is_linear_in_the_tiles(scan):
    def flops(count):
        bag = tile_set(torch.randn(count, D, dtype=torch.float64), torch.zeros(count).double())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(scan)(bag)
        return counter.get_total_flops()

    assert flops(480) - flops(240) == 2 * (flops(240) - flops(120)) > 0


def test_the_number_of_parameters():
    inner, state, heads, width = 1024, 16, 16, 512
    memory = 5 * (inner + 2 * state) + 3 * heads
    layer = 2 * width + width * (2 * inner + 2 * state + heads) + inner + inner * width
    ends = 1025 * width + 2 * width + (width + 1) * 128 + 128 + (width + 1) * K
    for scan, orders in (("reordered", 2), ("local", 1), ("forward", 1)):
        model = make_aggregator({"name": "mamba", "scan": scan}, 1024, K)
        count = sum(p.numel() for p in model.parameters())
        assert count == ends + 2 * (layer + orders * memory)
    assert count == 3_802_787


def test_options_that_cannot_be_are_all_named():
    with pytest.raises(SettingsError, match=r"chunk must be 1 or more, got 0(.|\n)*mean reordered"):
        made("reorder", chunk=0)
    with pytest.raises(SettingsError, match="width must be a multiple of 32, got 48"):
        made("local", width=48)
