"""Blur grows with the blur, whatever the contrast, and stays between 0 and 1."""

import numpy as np
import pytest
from conftest import stained_picture
from scipy import ndimage

from slides.focus import WINDOW, blur
from slides.grid import Grid
from slides.index import index_slide
from slides.reader import Slide
from slides.tissue import Tissue


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
    """Mean of the column's window by brute force, then the share of differences that is left."""
    rgb = tissue()[:31, :17]
    grey = (rgb @ [0.299, 0.587, 0.114]).astype(np.float32)
    worst = 0
    for picture in (grey, grey.T):
        rows = np.arange(len(picture))
        window = [picture[np.clip(rows + k, 0, len(picture) - 1)] for k in range(-4, 5)]
        before, after = (abs(np.diff(p, axis=0)) for p in (picture, np.mean(window, 0)))
        worst = max(worst, 1 - np.maximum(before - after, 0).sum() / before.sum())
    assert blur(rgb) == pytest.approx(worst, abs=1e-5)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "tcga-cr-7395-01a-01-ts1.svs"])
def test_real_tissue_is_sharper_than_the_threshold_to_begin_with(shared_data, name):
    slide = Slide(shared_data / "slides" / "fixtures" / name, 0.5)
    index = index_slide(slide, Grid(), Tissue(max_blur=1.0))
    assert (index.blur < 0.5).mean() > 0.98
