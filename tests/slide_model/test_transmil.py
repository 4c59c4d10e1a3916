"""TransMIL's parts against plain references: attention, its approximation, and the convolution."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.data.bag import Places
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators import transmil as parts
from tapfm.slide_model.aggregators.contract import TileSet
from tests.bags import STEP0, tile_set

D, K, WIDTH, HEADS = 7, 3, 8, 2
SPEC = {"name": "transmil", "width": WIDTH, "heads": HEADS}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(**options):
    torch.manual_seed(1)
    return make_aggregator({**SPEC, **options}, D, K).double()


def holes(count=29, side=9, seed=0):
    """Return distinct cells (T, 2) of a lattice that has more cells than that, in any order."""
    cells = torch.randperm(side * side, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([cells // side, cells % side], 1)


def at(cells, seed=0):
    """Return tiles at these cells of one slide."""
    xy0_T2 = cells.flip(1) * STEP0 + 1000
    where = Places.of([xy0_T2], [STEP0], 0.5)
    return TileSet.of(where, drawn(len(cells), D, seed=seed), drawn(len(cells)))


def apart(count, seed=0):
    """Return queries, keys and values (H, N, E) whose attention has no small singular values."""
    near = 6 * torch.eye(count, dtype=torch.float64)
    q, k = near + 0.5 * drawn(HEADS, count, count, seed=seed), near / 6
    return q, k.expand_as(q), drawn(HEADS, count, 4, seed=seed + 1)


def test_as_many_landmarks_as_tokens_are_full_attention():
    q, k, v = apart(11)
    torch.testing.assert_close(parts.nystrom(q, k, v, 11), exact(q, k, v), rtol=0, atol=1e-6)


def test_flat_attention_takes_more_iterations_than_the_papers(monkeypatch):
    """What six leave is of the small singular values; so the test above can fail."""
    q, k, v = 3 * drawn(HEADS, 11, 4), drawn(HEADS, 11, 4, seed=1), drawn(HEADS, 11, 4, seed=2)

    def error():
        return (parts.nystrom(q, k, v, 11) - exact(q, k, v)).abs().max().item()

    assert 1e-4 < error() < 0.1
    monkeypatch.setattr(parts, "ITERATIONS", 40)
    assert error() < 1e-6


def exact(q, k, v):
    return torch.softmax(torch.einsum("hne,hme->hnm", q, k), -1) @ v


def test_fewer_landmarks_are_the_papers_product_of_three():
    q, k, v = drawn(1, 9, 3), drawn(1, 9, 3, seed=1), drawn(1, 9, 3, seed=2)
    means = np.kron(np.eye(3), np.full((1, 3), 1 / 3))  # of runs of three tokens

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    Q, K_, V = (each[0].numpy() for each in (4 * q, 4 * k, v))
    Qm, Km = means @ Q, means @ K_
    inverse = np.linalg.pinv(softmax(Qm @ Km.T))
    expected = softmax(Q @ Km.T) @ inverse @ softmax(Qm @ K_.T) @ V
    found = parts.nystrom(4 * q, 4 * k, v, 3)[0]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
    assert np.abs(expected - exact(4 * q, 4 * k, v)[0].numpy()).max() > 0.01


def test_runs_of_tokens_are_as_long_as_can_be_alike():
    x = torch.arange(7.0)[None, :, None]
    assert parts.run_means(x, 3)[0, :, 0].tolist() == [1.0, 3.5, 5.5]


def convolved(kernels, x_TW, cells):
    """Return x plus its three convolutions, tile by tile, looking up neighbours one at a time."""
    x, there = x_TW.detach().numpy(), {tuple(cell): n for n, cell in enumerate(cells.tolist())}
    found = x.copy()
    for kernel in kernels:
        weight, bias = kernel.weight.detach().numpy()[:, 0], kernel.bias.detach().numpy()
        reach = weight.shape[-1] // 2
        found += bias
        for (row, column), n in there.items():
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    other = there.get((row + dy, column + dx))
                    if other is not None:
                        found[n] += weight[:, dy + reach, dx + reach] * x[other]
    return found


def test_neighbours_are_those_of_a_lattice_with_holes():
    layer, cells, x_TW = made().neighbours, holes(), drawn(29, WIDTH)
    found = layer(x_TW, cells).detach().numpy()
    np.testing.assert_allclose(found, convolved(layer.kernels, x_TW, cells), rtol=0, atol=1e-12)
    turned = convolved(layer.kernels, x_TW, cells.flip(1))
    assert np.abs(found - turned).max() > 1e-3, "rows are no columns"


def test_gaps_beyond_a_kernels_reach_cost_nothing_and_change_nothing():
    layer, cells, x_TW = made().neighbours, holes() * torch.tensor([3, 7]), drawn(29, WIDTH)
    closed = parts.packed(cells, torch.zeros(29, dtype=torch.int64))
    assert closed[:, 0].max() == 3 * 8
    assert closed[:, 1].max() == 4 * 8
    found = layer(x_TW, closed).detach().numpy()
    np.testing.assert_allclose(found, convolved(layer.kernels, x_TW, cells), rtol=0, atol=1e-12)


def test_slides_of_a_case_are_no_neighbours():
    layer, (one, other) = made().neighbours, (holes(29), holes(17, seed=3))
    x_TW, slide_of_T = drawn(46, WIDTH), torch.tensor([0] * 29 + [1] * 17)
    found = layer(x_TW, parts.packed(torch.cat([one, other]), slide_of_T))
    alone = [layer(x_TW[:29], one), layer(x_TW[29:], other)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-12)
    mixed = layer(x_TW, torch.cat([one, other]))
    assert (mixed[:29] - alone[0]).abs().max() > 1e-3


def by_hand(aggregator, tiles, cells):
    """Return logits and tile weights by torch's own attention and the convolution above."""
    a = aggregator

    def attend(layer, x):
        qkv = torch.nn.functional.layer_norm(x, (WIDTH,), layer.norm.weight, layer.norm.bias)
        q, k, v = (qkv @ layer.qkv.weight.T).chunk(3, 1)
        heads = [each.view(len(x), HEADS, -1).transpose(0, 1) for each in (q, k, v)]
        seen = torch.nn.functional.scaled_dot_product_attention(*heads)
        logits = heads[0][:, 0, None] @ heads[1].mT / math.sqrt(WIDTH // HEADS)
        first = logits[:, 0, 1:].softmax(-1).mean(0)
        return x + layer.out(seen.transpose(0, 1).reshape(len(x), WIDTH)), first

    x = torch.cat([a.class_token_W[None], a.project(tiles.z_TD).relu()])
    x, _ = attend(a.first, x)
    near = torch.from_numpy(convolved(a.neighbours.kernels, x[1:], cells))
    x, first = attend(a.last, torch.cat([x[:1], near]))
    return a.head(a.norm(x[0])), first


def test_the_whole_by_hand():
    cells = holes()
    aggregator, tiles = made(), at(cells)
    output, (logits_K, weights_T) = aggregator(tiles), by_hand(aggregator, at(cells), cells)
    torch.testing.assert_close(output.logits_K, logits_K, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.weights_T, weights_T.detach(), rtol=0, atol=1e-10)
    assert not output.weights_T.requires_grad
    few = made(landmarks=5)(tiles)
    assert (few.logits_K - logits_K).abs().max() > 1e-6, "an approximation is another number"


def test_the_number_of_parameters():
    layer = 2 * 512 + 3 * 512 * 512 + 512 * 512 + 512
    kernels = (9 + 25 + 49 + 3) * 512
    token, ends = 512, (1024 + 1) * 512 + 2 * 512 + (512 + 1) * K
    expected = 2 * layer + kernels + token + ends
    count = sum(p.numel() for p in make_aggregator("transmil", 1024, K).parameters())
    assert count == expected == 2_672_131


def test_options_that_cannot_be_are_all_named():
    with pytest.raises(SettingsError, match=r"heads must be 1 or more, got 0(.|\n)*landmarks must"):
        made(heads=0, landmarks=-1)
    with pytest.raises(SettingsError, match="width must be a multiple of heads, got 8 and 3"):
        made(heads=3)


def test_features_without_a_lattice_are_refused():
    tiles = tile_set(drawn(5, D), drawn(5))
    for missing in ("coords0_T2", "grid_px0_T"):
        with pytest.raises(SettingsError, match="transmil looks at where tiles lie"):
            made()(replace(tiles, **{missing: None}))
