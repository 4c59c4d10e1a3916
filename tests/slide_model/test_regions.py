"""Tiles of three scales on one lattice: which region each is in, and the whole by hand."""

import math

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.data.bag import Places
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.slide_model.aggregators.regions import regions_of
from tests.transformer_layers import through

D, K, WIDTH, HEADS, STEP = 7, 3, 8, 2, 448


def made(**options):
    torch.manual_seed(1)
    return make_aggregator({"name": "regions", "width": WIDTH, "heads": HEADS, **options}, D, K)


def pyramid(rows=2, columns=3, drift=0, left_out=()):
    """Return tiles of 5, 10 and 20x over so many coarse ones, with their coarse tile and scale.

    `drift` pixels is what a coarse step is more than twice the finer one, as rounding leaves it.
    """
    xy, steps, truth = [], [], []
    for scale, per_side in ((2, 1), (1, 2), (0, 4)):
        step = STEP * 2**scale + drift * scale
        for row in range(rows * per_side):
            for column in range(columns * per_side):
                xy.append([column * step, row * step])
                steps.append(step)
                truth.append((row // per_side, column // per_side, scale))
    keep = [n for n in range(len(xy)) if n not in left_out]
    where = Places(coords0_T2=torch.tensor(xy)[keep], slide_of_T=torch.zeros(len(keep)).long(),
                   grid_px0_T=torch.tensor(steps).double()[keep], mpp=0.5)  # fmt: skip
    return where, [truth[n] for n in keep]


def tiles_at(where, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    z_TD = torch.randn(len(where), D, generator=drawn, dtype=torch.float64)
    return TileSet.of(where, z_TD, torch.zeros(len(where)).double())


@pytest.mark.parametrize("drift", [0, 3])
def test_a_region_is_a_coarse_tile_with_the_finer_ones_in_it(drift):
    where, truth = pyramid(20, 3, drift)
    region_T, slot_T, scale_T, place_T2 = regions_of(tiles_at(where), 4, 3)
    found = {}
    for region, (row, column, _) in zip(region_T.tolist(), truth, strict=True):
        found.setdefault(region, set()).add((row, column))
    assert len(found) == 60
    assert all(len(each) == 1 for each in found.values())
    assert scale_T.tolist() == [scale for *_, scale in truth]
    for region in range(60):
        assert sorted(slot_T[region_T == region].tolist()) == list(range(21))
    coarse = place_T2[scale_T == 2]
    torch.testing.assert_close(coarse, torch.full_like(coarse, 0.5), rtol=0, atol=0.1)


def test_tissue_need_not_begin_with_a_whole_region():
    """The first fine tiles lie left of the first coarse one: a region of their own."""
    where, _ = pyramid(1, 2, left_out=(0,))  # the first coarse tile is not tissue enough
    region_T, *_ = regions_of(tiles_at(where), 4, 3)
    assert region_T.max() == 1
    assert region_T.bincount().tolist() == [20, 21]


def test_of_one_scale_a_region_is_a_square_of_tiles():
    cells = torch.cartesian_prod(torch.arange(8), torch.arange(6))
    where = Places.of([cells.flip(1) * STEP + 5000], [STEP], 0.5)
    region_T, _, scale_T, _ = regions_of(tiles_at(where), 4, 3)
    expected = (cells[:, 0] // 4) + 2 * (cells[:, 1] // 4)  # columns first: x, then y
    assert region_T.tolist() == expected.tolist()
    assert not scale_T.any()


def by_hand(a, tiles, truth, corner_side):
    """Return logits and tile weights, region by region, by torch's multi-head attention."""
    regions = sorted({(column, row) for row, column, _ in truth})
    tokens, looks, members = [], [], []
    for column, row in regions:
        own = [n for n, each in enumerate(truth) if each[:2] == (row, column)]
        x = [a.token_W]
        for n in own:
            step = tiles.grid_px0_T[n]
            at = (tiles.coords0_T2[n].double() + step / 2) / corner_side
            at = at - torch.tensor([column, row])
            turned = [u * k * math.pi for u in at.tolist() for k in range(1, 5)]
            wave = [*map(math.sin, turned), *map(math.cos, turned)]
            wave = torch.tensor(wave, dtype=torch.float64)
            x.append(a.project(tiles.z_TD[n]) + a.scale_SW[truth[n][2]] + a.place(wave))
        x = torch.stack(x)[:, None]
        x, looked = through(a.layers, x, HEADS)
        share = looked[0, :, 0, 1:]
        looks.append((share / share.sum(1, keepdim=True)).mean(0))
        tokens.append(a.norm_regions(x[0, 0]))
        members.append(own)
    w = a.gate(torch.stack(tokens)).softmax(0)
    weights = torch.zeros(len(truth)).double()
    for share, look, own in zip(w, looks, members, strict=True):
        weights[own] = share * look
    return a.head(a.norm(w @ torch.stack(tokens))), weights


def test_the_whole_by_hand_with_regions_of_several_sizes():
    where, truth = pyramid(left_out=(3, 8, 30, 31, 100))
    tiles, aggregator = tiles_at(where), made().double()
    output, (logits, weights) = aggregator(tiles), by_hand(aggregator, tiles, truth, 4 * STEP)
    torch.testing.assert_close(output.logits_K, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(output.weights_T, weights, rtol=0, atol=1e-10)
    flat = [(row, column, 0) for row, column, _ in truth]
    other, _ = by_hand(aggregator, tiles, flat, 4 * STEP)
    assert (other - logits).abs().max() > 1e-4, "so that the above can fail"


def test_the_number_of_parameters():
    block = 12 * WIDTH**2 + 9 * WIDTH + 4 * WIDTH + 2 * WIDTH
    gate = 2 * WIDTH + 2 * 128 * (WIDTH + 1) + 128
    ends = (D + 1) * WIDTH + 3 * WIDTH + 16 * WIDTH + WIDTH + 4 * WIDTH + (WIDTH + 1) * K
    assert sum(p.numel() for p in made().parameters()) == 2 * block + gate + ends


def test_slides_of_a_case_share_no_region():
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1) * STEP
    where = Places.of([cells, cells], [STEP, STEP], 0.5)
    region_T, *_ = regions_of(tiles_at(where), 4, 3)
    np.testing.assert_array_equal(region_T, where.slide_of_T)


def test_options_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match="multiple of heads, got 8 and 3"):
        made(heads=3)
    with pytest.raises(SettingsError, match="span must be 1 or more, got 0"):
        made(span=0)
