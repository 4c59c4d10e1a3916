"""Augmentation turns and mirrors tiles exactly, and colours all tiles of a slide alike.

The eight orientations are checked against numpy's; colour against optical density worked out in
float64 with the full matrix, pixel by pixel.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from slides.streaming.augment import (
    HAEMATOXYLIN_EOSIN,
    draw_augmentation,
    orient,
    recolour_,
    rescale_,
)

SIDE = 7


def random_tiles(count=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, SIDE, SIDE)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def augment(tiles, generator, *options, **named):
    """Return a slide's tiles augmented in one call."""
    return draw_augmentation(len(tiles), generator, *options, **named)(tiles)


def orientations(tile_CSS):
    """Return all eight orientations, by numpy."""
    both = (tile_CSS.numpy(), tile_CSS.numpy()[..., ::-1])
    return [np.rot90(tile, turns, (-2, -1)) for tile in both for turns in range(4)]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_each_orientation_is_numpys(turns, mirror):
    tiles = random_tiles(3).to(memory_format=torch.channels_last)  # strides must not be kept
    got = orient(tiles, torch.full((3,), turns), torch.full((3,), mirror))
    expected = np.stack([orientations(tile)[turns + 4 * mirror] for tile in tiles])
    np.testing.assert_array_equal(got.numpy(), expected)
    assert got.is_contiguous()


@given(seed=st.integers(0, 2**40), flips=st.booleans(), rotations=st.booleans())
def test_tiles_stay_what_they_are(seed, flips, rotations):
    """Each result is one of the allowed orientations, at its own place."""
    tiles = random_tiles(5)
    allowed = [f * 4 + r for f in range(1 + flips) for r in range(1 + 3 * rotations)]
    for before, after in zip(tiles, augment(tiles, rng(seed), flips, rotations), strict=True):
        choices = orientations(before)
        assert any(np.array_equal(after.numpy(), choices[choice]) for choice in allowed)


def test_all_eight_orientations_occur_about_equally():
    tiles = random_tiles(1).expand(800, -1, -1, -1)
    choices = orientations(tiles[0])
    counts = np.zeros(8, int)
    for tile in augment(tiles, rng()).numpy():
        counts[[np.array_equal(tile, choice) for choice in choices]] += 1
    assert counts.sum() == 800
    assert counts.min() > 60  # 100 +- 9.4: four standard deviations


def test_it_is_a_function_of_the_generator_alone():
    tiles = random_tiles()
    before = tiles.clone()
    torch.manual_seed(1)
    first = augment(tiles, rng(3), colour=0.2)
    torch.manual_seed(2)
    assert torch.equal(augment(tiles, rng(3), colour=0.2), first)
    assert not torch.equal(augment(tiles, rng(4), colour=0.2), first)
    assert torch.equal(tiles, before)


def test_turning_one_kind_off_leaves_the_others():
    tiles = random_tiles()
    coloured = augment(tiles, rng(5), flips=False, rotations=False, colour=0.3)
    turned = augment(tiles, rng(5))
    both = augment(tiles, rng(5), colour=0.3)
    # Orientation and colour commute, so each must be found in the other's company.
    lone = torch.Generator().manual_seed(5)
    draws = torch.rand(5, generator=lone, dtype=torch.float64) * 2 - 1
    recolour_(turned, 0.3 * draws)
    assert torch.equal(both, turned)
    recolour_(tiles, 0.3 * draws)
    assert torch.equal(coloured, tiles)


def slow_recolour(tiles, amount):
    """Return the recolouring by its definition, in float64 on (T, S, S, 3)."""
    stains = np.array(HAEMATOXYLIN_EOSIN)
    stains = np.vstack([stains, np.cross(*stains)])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    density = -np.log(np.maximum(tiles.numpy().transpose(0, 2, 3, 1), 0.5) / 255)
    amounts = density @ np.linalg.inv(stains) * (1 + amount[:3])
    light = 255 * np.exp(-(amounts @ stains)) * (1 + amount[4])
    light = (light - 127.5) * (1 + amount[3]) + 127.5
    return np.clip(light, 0, 255).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("amount", [(0.2, 0, 0, 0, 0), (-0.1, 0.3, 0.2, -0.2, 0.1)])
def test_colour_is_its_definition(amount):
    tiles = random_tiles()
    expected = slow_recolour(tiles, np.array(amount))
    recolour_(tiles, torch.tensor(amount))
    assert np.abs(tiles.numpy() - expected).max() <= 0.51  # rounding to bytes, float32 inside


def test_the_colour_test_can_fail():
    tiles = random_tiles()
    expected = slow_recolour(tiles, np.array((0.2, 0, 0, 0, 0)))
    recolour_(tiles, torch.tensor((0, 0.2, 0, 0, 0)))
    assert np.abs(tiles.numpy() - expected).max() > 5


def test_no_colour_change_changes_no_byte():
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    before = tiles.clone()
    recolour_(tiles, torch.zeros(5))
    assert torch.equal(tiles, before)


def test_stain_leaves_glass_white_and_darkens_tissue():
    tiles = torch.tensor([255, 180], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 3, SIDE, SIDE)
    recolour_(tiles, torch.tensor([0.3, 0.3, 0.3, 0, 0]))
    assert (tiles[0] == 255).all()
    assert (tiles[1] < 180).all()


def test_a_slide_is_coloured_as_one():
    """Equal pixels stay equal in all tiles, also across chunks."""
    tiles = random_tiles(1).repeat(37, 1, 1, 1)
    after = augment(tiles, rng(), flips=False, rotations=False, colour=0.3)
    assert (after == after[:1]).all()
    assert not torch.equal(after, tiles)


@pytest.mark.parametrize(
    ("tiles", "options", "text"),
    [
        (torch.zeros(2, 3, 4, 4), {}, "must be uint8"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), {}, r"\(T, 3, S, S\)"),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), {}, "only square tiles"),
        (random_tiles(), {"colour": 1.5}, r"colour must be in \[0, 1\)"),
    ],
)
def test_what_cannot_be_augmented_is_refused(tiles, options, text):
    with pytest.raises(ValueError, match=text):
        augment(tiles, rng(), **options)


def slow_rescale(tiles, zoom):
    """Return the tiles enlarged about their centres, by scipy, mirrored beyond the edge."""
    centre = (SIDE - 1) / 2
    where = (np.indices((SIDE, SIDE)) - centre) / zoom + centre
    flat = tiles.numpy().reshape(-1, SIDE, SIDE).astype(float)
    out = [map_coordinates(each, where, order=1, mode="reflect") for each in flat]
    return np.stack(out).reshape(tiles.shape)


@pytest.mark.parametrize("zoom", [1.2, 0.8])
def test_scale_is_its_definition(zoom):
    tiles, got = random_tiles(), random_tiles()
    rescale_(got, zoom)
    assert np.abs(got.numpy() - slow_rescale(tiles, zoom)).max() <= 0.51  # rounding to bytes
    assert np.abs(got.numpy() - slow_rescale(tiles, 1 / zoom)).max() > 5, "this can fail"


def test_scale_is_drawn_within_its_strength_and_changes_nothing_else():
    drawn = [draw_augmentation(3, rng(seed), colour=0.1, scale=0.25) for seed in range(200)]
    zooms = np.array([each.zoom for each in drawn])
    assert 1 / 1.25 <= zooms.min() < 0.83 < 1.2 < zooms.max() <= 1.25
    assert abs(np.log(zooms).mean()) < 0.04  # as often smaller as larger: .13 / sqrt(200) is .009
    for each, seed in zip(drawn, range(200), strict=True):
        without = draw_augmentation(3, rng(seed), colour=0.1)
        assert torch.equal(each.amount_5, without.amount_5)
        assert torch.equal(each.turns_T, without.turns_T)
        assert without.zoom == 1
    tiles = random_tiles(3)
    alone = drawn[0](tiles[1:2], slice(1, 2))
    assert torch.equal(alone, drawn[0](tiles)[1:2]), "a tile is the same in any company"


def test_no_tiles_are_no_tiles():
    assert augment(random_tiles(0), rng(), colour=0.1, scale=0.1).shape == (0, 3, SIDE, SIDE)


def test_stain_jitter_moves_haematoxylin_and_eosin_alone():
    """It adds to colour jitter; neither changes the other's draw."""
    tiles = random_tiles()
    lone = rng(5)
    draws = torch.rand(5, generator=lone, dtype=torch.float64) * 2 - 1
    torch.randint(0, 4, (23,), generator=lone), torch.randint(0, 2, (23,), generator=lone)
    stains = torch.rand(2, generator=lone, dtype=torch.float64) * 2 - 1
    for colour in (0.0, 0.3):
        got = augment(tiles, rng(5), flips=False, rotations=False, colour=colour, stain=0.2)
        amount = colour * draws
        amount[:2] += 0.2 * stains
        expected = tiles.clone()
        recolour_(expected, amount)
        assert torch.equal(got, expected)
        assert not torch.equal(got, tiles)
