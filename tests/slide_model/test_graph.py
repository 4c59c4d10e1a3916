"""A graph of touching tiles against neighbours that are looked up one at a time."""

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.data.bag import Places
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.slide_model.aggregators.graph import neighbour_means, touching
from tests.bags import STEP0

D, K, WIDTH = 7, 3, 6
ONE = torch.zeros(29, dtype=torch.int64)


def made(**options):
    torch.manual_seed(1)
    return make_aggregator({"name": "graph", "width": WIDTH, **options}, D, K).double()


def holes(count=29, side=8, seed=0):
    """Return distinct cells (T, 2) of a lattice that has more cells than that, in any order."""
    cells = torch.randperm(side * side, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([cells // side, cells % side], 1)


def looked_up(cells, slides):
    """Return the pairs, by comparing every tile with every other."""
    near = (cells[:, None] - cells[None]).abs().amax(2) == 1
    return {tuple(pair) for pair in (near & (slides[:, None] == slides)).nonzero().tolist()}


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_pairs_are_those_that_touch_on_a_lattice_with_holes():
    found = touching(holes(), ONE).tolist()
    assert len(found) == len({*map(tuple, found)})
    assert {*map(tuple, found)} == looked_up(holes(), ONE)


def test_the_end_of_a_row_does_not_touch_the_next_rows_start():
    cells = torch.tensor([[0, 0], [0, 4], [1, 0], [3, 4], [4, 0]])
    assert {*map(tuple, touching(cells, ONE[:5]).tolist())} == {(0, 2), (2, 0)}


def test_slides_of_a_case_do_not_touch():
    cells, slides = torch.cat([holes(), holes(17, seed=4)]), torch.tensor([0] * 29 + [1] * 17)
    found = {*map(tuple, touching(cells, slides).tolist())}
    assert found == looked_up(cells, slides)
    assert found < looked_up(cells, torch.zeros(46)), "one above the other, they would"


def by_hand(aggregator, z, cells, layers=2):
    """Return logits and tile weights, neighbours summed one at a time."""
    p = {name: value.detach().numpy() for name, value in aggregator.named_parameters()}

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    h = np.maximum(linear("project", z.numpy()), 0)
    there = {tuple(cell): n for n, cell in enumerate(cells.tolist())}
    for layer in range(layers):
        means = np.zeros_like(h)
        for (row, column), n in there.items():
            near = [there.get((row + y, column + x)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
            near = [other for other in near if other not in (None, n)]
            means[n] = h[near].mean(0) if near else 0
        h = np.maximum(linear(f"own.{layer}", h) + linear(f"around.{layer}", means), 0)
    gated = np.tanh(linear("gate.tanh", norm(h))) / (1 + np.exp(-linear("gate.sigmoid", norm(h))))
    u = np.exp(gated @ p["gate.last.weight"][0])
    return linear("head", norm(u / u.sum() @ h)), u / u.sum()


def test_the_whole_by_hand():
    cells, z_TD = holes(), drawn(29, D)
    where = Places.of([cells.flip(1) * STEP0], [STEP0], 0.5)
    output = made()(TileSet.of(where, z_TD, drawn(29)))
    logits, weights = by_hand(made(), z_TD, cells)
    np.testing.assert_allclose(output.logits_K.detach().numpy(), logits, rtol=0, atol=1e-10)
    np.testing.assert_allclose(output.weights_T.detach().numpy(), weights, rtol=0, atol=1e-10)
    other, _ = by_hand(made(), z_TD, cells[torch.randperm(29)])
    assert np.abs(other - logits).max() > 1e-4, "so that the above can fail"


def test_a_tile_without_neighbours_takes_in_nothing():
    h_TW = drawn(3, WIDTH)
    pairs = touching(torch.tensor([[0, 0], [0, 1], [5, 5]]), ONE[:3])
    found = neighbour_means(h_TW, pairs)
    torch.testing.assert_close(found[:2], h_TW[:2].flip(0))
    assert not found[2].any()


def test_the_number_of_parameters():
    layers = 2 * (2 * WIDTH * WIDTH + WIDTH)
    gate, ends = 2 * WIDTH + 2 * 128 * (WIDTH + 1) + 128, WIDTH * (D + 1) + 2 * WIDTH + K * 7
    assert sum(p.numel() for p in made().parameters()) == layers + gate + ends


def test_options_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match="graph: layers must be 1 or more, got 0"):
        made(layers=0)
