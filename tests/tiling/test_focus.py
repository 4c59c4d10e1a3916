"""The measure grows with the blur, for any contrast, and stays between 0 and 1."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from slides.grid import Grid
from slides.tiling.focus import BLUR_MPP, WINDOW, blur
from slides.tiling.index import index_slide
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tests.conftest import stained_picture
from tests.tiling.test_tissue import REAL, real_slide


def tissue(sigma=0.0, gain=1.0):
    picture = stained_picture(400, 300)[100:220, 120:260].astype(float)
    picture = ndimage.gaussian_filter(picture, (sigma, sigma, 0)) if sigma else picture
    return (128 + gain * (picture - 128)).clip(0, 255).astype(np.uint8)


def test_it_rises_with_every_micron():
    found = [blur(tissue(sigma)) for sigma in (0, 0.7, 1.4, 2, 3, 5)]
    assert found == sorted(found)
    assert found[0] < 0.3
    assert found[-1] > 0.8


def test_contrast_is_no_focus():
    assert blur(tissue(1.4, gain=0.5)) == pytest.approx(blur(tissue(1.4)), abs=0.04)
    assert blur(tissue(gain=0.5)) < blur(tissue(2.0))


def test_one_direction_is_enough():
    smeared = ndimage.uniform_filter(tissue().astype(float), (1, WINDOW, 1)).astype(np.uint8)
    assert blur(smeared) == pytest.approx(blur(smeared.transpose(1, 0, 2)), abs=1e-6)
    assert blur(smeared) > blur(tissue()) + 0.2


@pytest.mark.parametrize("shape", [(1, 1, 3), (7, 3, 3), (50, 1, 3)])
def test_a_plain_picture_is_all_blur(shape):
    assert blur(np.full(shape, 200, np.uint8)) == 1


def test_it_is_its_definition():
    """The reference is the column's mean by brute force, then the share of differences left."""
    rgb = tissue()[:31, :17]
    grey = (rgb @ [0.299, 0.587, 0.114]).astype(np.float32)
    worst = 0
    for picture in (grey, grey.T):
        rows = np.arange(len(picture))
        window = [picture[np.clip(rows + k, 0, len(picture) - 1)] for k in range(-4, 5)]
        before, after = (abs(np.diff(p, axis=0)) for p in (picture, np.mean(window, 0)))
        worst = max(worst, 1 - np.maximum(before - after, 0).sum() / before.sum())
    assert blur(rgb) == pytest.approx(worst, abs=1e-5)


@pytest.mark.parametrize("name", REAL)
def test_the_threshold_to_begin_with_parts_sharp_from_blurred_tiles(shared_data, name):
    """H&E, IHC and a frozen section: 0.5 keeps all sharp tiles and none blurred by 3 microns."""
    slide = Slide(real_slide(shared_data, name), REAL[name])
    index = index_slide(slide, Grid(224, max(0.5, slide.mpp)), Tissue())
    size = min(index.size0, round(index.size0 * slide.mpp / BLUR_MPP))
    chosen = index.coords0[:: max(1, len(index) // 20)].tolist()
    tiles = [slide.region(*corner0, index.size0, size) for corner0 in chosen]
    assert max(map(blur, tiles)) < 0.5
    assert min(blur(defocused(tile, 3 / BLUR_MPP)) for tile in tiles) > 0.5


def test_it_holds_for_every_kind_of_tissue(shared_data):
    """Fat and mucin are smooth but sharp."""
    table = pd.read_csv(shared_data / "tiles" / "tiles.csv")
    for (_, kind), group in table.groupby(["case", "compartment"]):
        for row in group.iloc[::6].itertuples():
            with Image.open(shared_data / "tiles" / "images" / row.file) as image:
                size = round(image.width * row.mpp / BLUR_MPP)
                tile = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BOX))
            assert blur(tile) < 0.45, kind
            assert blur(defocused(tile, 3 / BLUR_MPP)) > 0.55, kind


def defocused(rgb, pixels):
    return ndimage.gaussian_filter(rgb.astype(float), (pixels, pixels, 0)).astype(np.uint8)
