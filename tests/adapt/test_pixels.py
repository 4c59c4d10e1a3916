"""Pixels as adapters get them: a tile's own colours, its painted stains, and no other tile.

Reference: tiles painted by Beer and Lambert's law from known amounts of stain.
"""

from dataclasses import replace

import pytest
import torch

from slides.streaming.augment import orient
from tapfm.adapt.pixels import STAINS, Colours, StainMaps, optical_density, placed, stem
from tapfm.encoders.backbones import Encoder
from tests.tiny import random_tiles, tiny_encoder

H_AND_E = ("haematoxylin", "eosin")


def painted(amounts):
    """Light (C, 3, S, S) that the amounts (C, stains, S, S) of all stains let through."""
    density = torch.tensor(list(STAINS.values()), dtype=torch.float64)
    return 10 ** -torch.einsum("cmhw,mr->crhw", amounts, density)


def amounts(tiles=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tiles, 3, 31, 29, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("stats", [((0.7, 0.5, 0.6), (0.2, 0.1, 0.3)), ((0.5,) * 3, (0.5,) * 3)])
def test_colours_are_the_tiles_own_whatever_the_encoders_normalisation(stats):
    encoder = tiny_encoder()
    encoder = Encoder(encoder.vit, replace(encoder.row, stats=stats)).double()
    tiles = random_tiles(2)
    seen = Colours(encoder.vit)(encoder.normalise(tiles))
    torch.testing.assert_close(seen, tiles / 255.0, rtol=0, atol=1e-7, check_dtype=False)


def test_density_is_that_of_the_light():
    light = torch.tensor([1.0, 0.1, 0.01, 0.0, 1.2])
    found = optical_density(light)
    assert found.tolist() == pytest.approx([0, 1, 2, 2.40654, 0], abs=1e-5)


@pytest.mark.parametrize("stains", [H_AND_E, ("haematoxylin", "dab"), ("eosin",)])
def test_stains_are_found_where_they_were_painted(stains):
    true = amounts() * 0.4  # dark, but light enough for 8 bits
    maps = StainMaps(stains, dtype=torch.float64)(optical_density(painted(true)))
    chosen = true[:, [list(STAINS).index(stain) for stain in stains]]
    pixels = 31 * 29
    bright = chosen.flatten(2).sort(dim=2).values[:, :, pixels - 1 - pixels // 100]
    expected = (chosen / bright[..., None, None]).clamp(max=1)
    torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-9)


def test_a_stain_that_is_not_there_stays_away():
    """Noise in a tile without eosin must not be blown up to a full map."""
    true = amounts()
    true[:, 1] *= 0.01
    true[:, 2] = 0
    maps = StainMaps(H_AND_E, dtype=torch.float64)(optical_density(painted(true * 0.5)))
    assert maps[:, 0].amax() == 1
    assert maps[:, 1].amax() < 0.05
    white = StainMaps(H_AND_E)(optical_density(torch.ones(1, 3, 8, 8)))
    assert white.abs().max() == 0


def test_maps_turn_with_the_tile():
    """Image and maps cannot drift apart under augmentation: the maps are made of the image."""
    tiles = random_tiles(4)
    turns, mirror = torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, False])
    make = StainMaps(H_AND_E, dtype=torch.float64)

    def maps(bytes_):
        return make(optical_density(bytes_.double() / 255))

    assert torch.equal(maps(orient(tiles, turns, mirror)), orient(maps(tiles), turns, mirror))
    assert not torch.equal(maps(orient(tiles, turns, mirror)), maps(tiles))


def test_autocast_leaves_the_maps_alone():
    make, density = StainMaps(H_AND_E), optical_density(random_tiles(2).float() / 255)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make(density), maps := make(density))
    assert maps.dtype == torch.float32
    assert torch.equal(maps, make(density))


def test_the_stem_looks_at_one_tile_at_a_time():
    torch.manual_seed(0)
    layers = stem(24, dtype=torch.float64).train()
    tiles = torch.rand(3, 3, 64, 48, dtype=torch.float64)
    together = layers(tiles)
    assert together.shape == (3, 24, 4, 3)
    alone = torch.cat([layers(tile[None]) for tile in tiles])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_what_is_placed_beside_a_model_is_of_its_kind():
    vit = tiny_encoder(dtype=torch.float32).vit.to("meta")
    assert placed(vit) == {"device": torch.device("meta"), "dtype": torch.float32}
