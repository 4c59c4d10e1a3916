"""Tissue absorbs with colour; glass, borders, shadows and pen do not; fractions are exact.

The references are brute force: Otsu by trying every threshold, a tile's fraction by counting
sub-pixels. Pictures are drawn at 8 microns per pixel, where a millimetre is 125 pixels.
"""

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slides.errors import NoTissueError, TilingError
from slides.tiling.tissue import (
    SIGNAL_CAP,
    SIGNAL_RANGE,
    Tissue,
    pen_mask,
    stained,
    threshold,
    tile_fraction,
    tissue_mask,
    why_empty,
)
from slides.wsi.reader import Slide

GLASS = (243, 242, 244)
STAINS = {
    "H&E": ((214, 150, 195), (110, 70, 150)),
    "faint H&E": ((236, 222, 234), (215, 195, 222)),
    "pale blue IHC": ((205, 210, 224), (170, 180, 212)),
    "DAB": ((200, 175, 150), (90, 55, 30)),
    "grey stroma": ((212, 208, 211), (185, 176, 186)),
    "pale mucosa": ((232, 206, 236), (214, 186, 224)),
    "frozen, dark": ((150, 45, 95), (70, 30, 80)),
}
H, W = 211, 307
Y, X = np.mgrid[0:H, 0:W]
OVAL = ((X - 130) / 70) ** 2 + ((Y - 110) / 55) ** 2 < 1


def picture(stain="H&E", where=OVAL, glass=GLASS, seed=0):
    """Return cells of 5 x 5 px in two shades of a stain on noisy glass; (211, 307, 3) uint8."""
    rng = np.random.default_rng(seed)
    cells = np.kron(rng.random((H // 5 + 1, W // 5 + 1)) < 0.4, np.ones((5, 5)))[:H, :W] > 0
    rgb = np.full((H, W, 3), glass, float)
    light, dark = STAINS[stain]
    rgb[where & ~cells], rgb[where & cells] = light, dark
    return np.clip(rgb + rng.normal(0, 1.5, rgb.shape), 0, 255).astype(np.uint8)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


class TestMask:
    @pytest.mark.parametrize("stain", STAINS)
    def test_finds_the_tissue_and_nothing_else(self, stain):
        assert overlap(tissue_mask(picture(stain), Tissue()), OVAL) > 0.93

    @pytest.mark.parametrize("glass", [(255, 255, 255), (228, 228, 228), (248, 245, 236)])
    @pytest.mark.parametrize("stain", ["H&E", "frozen, dark", "DAB"])
    def test_whatever_the_glass(self, stain, glass):
        assert overlap(tissue_mask(picture(stain, glass=glass), Tissue()), OVAL) > 0.93

    @pytest.mark.parametrize("stain", STAINS)
    def test_a_slide_that_is_all_tissue_stays_whole(self, stain):
        """Otsu alone would keep only the darker half."""
        everywhere = np.ones((H, W), bool)
        if stain in ("faint H&E", "pale mucosa", "pale blue IHC", "grey stroma"):
            everywhere[:, -20:] = False  # a stain this weak can only be told beside some glass
        assert tissue_mask(picture(stain, everywhere), Tissue())[everywhere].mean() > 0.97

    def test_pale_tissue_is_not_taken_for_the_white_of_the_glass(self):
        """There is no glass, and more than the brightest twentieth is pale purple mucosa."""
        everywhere = np.ones((H, W), bool)
        rgb = picture(where=everywhere)
        rgb[:, 180:] = picture("pale mucosa", everywhere)[:, 180:]
        assert tissue_mask(rgb, Tissue())[:, 180:].mean() > 0.97

    def test_glass_cut_off_by_the_slide_s_edge_is_no_hole(self):
        """Tissue and edges enclose a corner of 17 px; elsewhere it would be filled."""
        corner = (Y > H - 18) & (X > W - 18)
        mask = tissue_mask(picture(where=~corner), Tissue())
        assert mask[corner].mean() < 0.3
        hole = (abs(Y - 100) < 9) & (abs(X - 100) < 9)
        assert tissue_mask(picture(where=~hole), Tissue())[hole].all()

    def test_black_that_touches_tissue_is_no_tissue(self):
        rgb = picture()
        rgb[100:120, :130] = 15
        mask = tissue_mask(rgb, Tissue(pen=False))
        assert mask[104:116, :120].mean() < 0.05

    @pytest.mark.parametrize("seed", range(3))
    def test_glass_alone_is_empty(self, seed):
        """Otsu alone would keep half of the noise."""
        assert not tissue_mask(picture(where=np.zeros((H, W), bool), seed=seed), Tissue()).any()

    @pytest.mark.parametrize("grey", [0, 20, 60, 120, 180])
    def test_borders_and_shadows_of_any_grey_are_out(self, grey):
        rgb = picture()
        rgb[:, :25] = rgb[-18:] = grey
        mask = tissue_mask(rgb, Tissue())
        assert not mask[:, :25].any()
        assert not mask[-18:].any()
        assert overlap(mask, OVAL) > 0.9

    def test_fat_counts_as_tissue_large_holes_do_not(self):
        """Membranes 6 px (48 microns) apart are closed; a hole 0.5 mm wide stays open."""
        net = OVAL & ((X % 7 == 0) | (Y % 7 == 0))
        filled = tissue_mask(picture(where=net), Tissue())
        assert filled[OVAL].mean() > 0.9
        hole = (X - 130) ** 2 + (Y - 110) ** 2 < 31**2
        mask = tissue_mask(picture(where=OVAL & ~hole), Tissue())
        assert mask[hole].mean() < 0.2

    def test_specks_go_and_the_setting_moves_the_limit(self):
        """The area of a square of 12 px is 9,216 square microns."""
        speck = (abs(X - 270) < 6) & (abs(Y - 30) < 6)
        rgb = picture(where=OVAL | speck)
        assert not tissue_mask(rgb, Tissue(min_area_um2=20_000))[speck].any()
        assert tissue_mask(rgb, Tissue(min_area_um2=5_000))[speck].mean() > 0.5

    def test_sizes_are_microns_not_pixels(self):
        """At 2 microns per pixel everything in the same picture is too small to keep."""
        rgb = picture(where=(abs(X - 130) < 20) & (abs(Y - 100) < 20))
        assert tissue_mask(rgb, Tissue(min_area_um2=20_000), mpp=8).any()
        assert not tissue_mask(rgb, Tissue(min_area_um2=20_000), mpp=2).any()

    def test_the_picture_is_left_as_it_was(self):
        rgb = picture()
        before = rgb.copy()
        tissue_mask(rgb, Tissue())
        np.testing.assert_array_equal(rgb, before)


class TestPen:
    INKS: ClassVar = {
        "green": (40, 150, 80),
        "light green": (60, 170, 60),
        "blue": (30, 60, 170),
        "light blue": (20, 110, 180),
        "red": (190, 30, 50),
        "black": (20, 20, 25),
    }

    @pytest.mark.parametrize("ink", INKS)
    @pytest.mark.parametrize("stain", ["H&E", "pale blue IHC", "DAB"])
    def test_strokes_go_and_tissue_stays(self, ink, stain):
        stroke = abs(Y - 12 - X // 20) < 7
        rgb = picture(stain, seed=1)
        rgb[stroke] = rgb[stroke] * (np.array(self.INKS[ink]) / 255)
        mask = tissue_mask(rgb, Tissue())
        assert mask[stroke].mean() < 0.02
        assert overlap(mask, OVAL) > 0.85

    @pytest.mark.parametrize("ink", ["green", "blue", "red"])
    def test_without_the_rule_strokes_would_be_tissue(self, ink):
        """Partner test: ink is coloured, so only the pen rule removes it."""
        stroke = abs(Y - 20) < 7
        rgb = picture()
        rgb[stroke] = rgb[stroke] * (np.array(self.INKS[ink]) / 255)
        assert tissue_mask(rgb, Tissue(pen=False))[stroke].mean() > 0.9

    @pytest.mark.parametrize("stain", STAINS)
    def test_no_stain_is_ink(self, stain):
        assert pen_mask(picture(stain)).mean() < 0.001

    def test_a_spot_of_blood_is_no_pen(self):
        spot = (abs(X - 130) < 7) & (abs(Y - 110) < 7)
        rgb = picture()
        rgb[spot] = self.INKS["red"]
        assert tissue_mask(rgb, Tissue())[spot].all()

    def test_where_all_is_ink_it_is_the_stain(self):
        rgb = np.full((H, W, 3), 250, np.uint8)
        rgb[OVAL] = self.INKS["green"]
        assert overlap(tissue_mask(rgb, Tissue()), OVAL) > 0.9


class TestThreshold:
    @staticmethod
    def otsu_by_search(signal):
        capped = np.minimum(signal, SIGNAL_CAP)
        best, at = -1.0, 0.0
        for t in np.linspace(0, SIGNAL_CAP, 257)[1:-1]:
            low, high = capped[capped < t], capped[capped >= t]
            if len(low) and len(high):
                between = len(low) * len(high) * (low.mean() - high.mean()) ** 2
                if between > best:
                    best, at = between, t
        return at

    @pytest.mark.parametrize("high", [0.08, 0.1, 0.11])
    def test_is_otsu_where_otsu_is_believable(self, high):
        rng = np.random.default_rng(0)
        signal = np.abs(np.concatenate([rng.normal(0.02, 0.01, 4001), rng.normal(high, 0.01, 997)]))
        found = self.otsu_by_search(signal)
        assert SIGNAL_RANGE[0] < found < SIGNAL_RANGE[1], "the case must test Otsu, not the clamp"
        assert threshold(signal) == pytest.approx(found, abs=2 * SIGNAL_CAP / 256)

    def test_is_clamped_elsewhere(self):
        rng = np.random.default_rng(0)
        assert threshold(np.abs(rng.normal(0, 0.005, 5003))) == SIGNAL_RANGE[0]
        assert threshold(rng.normal(0.3, 0.05, 5003)) == SIGNAL_RANGE[1]
        assert threshold(np.zeros(11)) == SIGNAL_RANGE[0]


class TestTileFraction:
    @staticmethod
    def by_counting(mask, x0, y0, size0, downsample, n=64):
        points = (np.arange(n) + 0.5) / n * size0
        j = np.floor((x0 + points) / downsample).astype(int)
        i = np.floor((y0 + points) / downsample).astype(int)
        inside = np.outer((i >= 0) & (i < mask.shape[0]), (j >= 0) & (j < mask.shape[1]))
        i, j = np.clip(i, 0, mask.shape[0] - 1), np.clip(j, 0, mask.shape[1] - 1)
        return (mask[np.ix_(i, j)] & inside).mean()

    @settings(max_examples=60)
    @given(
        st.integers(0, 2**32 - 1),
        st.integers(-60, 400),
        st.integers(-60, 300),
        st.integers(1, 211),
        st.floats(1, 37),
    )
    def test_is_the_counted_share(self, seed, x0, y0, size0, downsample):
        mask = np.random.default_rng(seed).random((13, 29)) < 0.5
        fraction = tile_fraction(mask, np.array([[x0, y0]]), size0, downsample)
        counted = self.by_counting(mask, x0, y0, size0, downsample)
        assert fraction[0] == pytest.approx(counted, abs=0.07)

    def test_whole_pixels_are_exact(self):
        mask = np.zeros((5, 7), bool)
        mask[2, 3] = mask[4, 6] = True
        coords0 = np.array([[0, 0], [12, 8], [24, 16], [10, 8]])
        np.testing.assert_allclose(
            tile_fraction(mask, coords0, 4, 4.0), [0, 1, 1, 0.5], rtol=0, atol=1e-12
        )

    def test_no_tiles(self):
        assert tile_fraction(np.ones((3, 5), bool), np.empty((0, 2), int), 4, 2.0).shape == (0,)


class TestSettings:
    @pytest.mark.parametrize(
        "wrong", [{"mpp": 0}, {"min_fraction": 1.5}, {"min_area_um2": -1.0}, {"mpp": 400}]
    )
    def test_impossible_ones_are_refused(self, wrong):
        with pytest.raises(TilingError, match=next(iter(wrong))):
            Tissue(**wrong)


@pytest.mark.parametrize(
    ("rgb", "tissue", "says"),
    [
        (picture(where=np.zeros((H, W), bool)), Tissue(), "no pixel is stained"),
        (picture(where=(X < 9) & (Y < 9)), Tissue(), "tissue.min_area_um2 asks for 10000"),
    ],
)
def test_an_empty_mask_says_which_threshold_did_it(rgb, tissue, says):
    assert not tissue_mask(rgb, tissue).any()
    assert says in why_empty(rgb, tissue, 8.0)
    assert issubclass(NoTissueError, ValueError)


REAL = {  # whole slides, by what to say of their resolution
    "BS9_HE2_20x.tif": None,
    "EROS_20x.tif": None,
    "PDACtc3_20x.tif": None,
    "BS25_SYN_10x.tif": None,
    "LNMET_CK.tif": 0.5,
    "CMU-1-Small-Region.svs": None,
    "tcga-cr-7395-01a-01-ts1.svs": 0.5,
}


def real_slide(shared_data, name):
    """Return the path of one of `REAL`."""
    (path,) = (shared_data / "slides").glob(f"*/{name}")
    return path


class TestRealSlides:
    @pytest.mark.parametrize(
        ("name", "mpp", "low", "high"),
        [
            ("BS9_HE2_20x.tif", None, 0.22, 0.29),
            ("EROS_20x.tif", None, 0.38, 0.45),
            ("PDACtc3_20x.tif", None, 0.07, 0.11),
            ("BS25_SYN_10x.tif", None, 0.12, 0.18),
            ("LNMET_CK.tif", 0.5, 0.16, 0.22),
            ("CMU-1-Small-Region.svs", None, 0.39, 0.45),
            ("tcga-cr-7395-01a-01-ts1.svs", 0.5, 0.63, 0.69),
        ],
    )
    def test_slides_have_the_tissue_one_sees(self, shared_data, name, mpp, low, high):
        """Tissue shares were confirmed by eye on the outlined thumbnails, H&E and IHC."""
        slide = Slide(real_slide(shared_data, name), mpp)
        rgb, downsample = slide.thumbnail(8.0)
        mask = tissue_mask(rgb, Tissue(), downsample * slide.mpp)
        assert low < mask.mean() < high
        assert not (stained(rgb, 8.0) & pen_mask(rgb)).any()

    @pytest.mark.parametrize("name", REAL)
    def test_ink_over_real_tissue_goes_and_the_rest_stays(self, shared_data, name):
        """A stroke 0.3 mm wide absorbs like dye: by a factor for each channel."""
        slide = Slide(real_slide(shared_data, name), REAL[name])
        rgb, downsample = slide.thumbnail(8.0)
        mpp = downsample * slide.mpp
        before = tissue_mask(rgb, Tissue(), mpp)
        y, x = np.mgrid[: rgb.shape[0], : rgb.shape[1]]
        stroke = abs(y - 0.25 * rgb.shape[0] - x / 9) < 150 / mpp
        away = abs(y - 0.25 * rgb.shape[0] - x / 9) > 250 / mpp
        assert (stroke & before).sum() * mpp**2 > 100_000
        for ink in TestPen.INKS.values():
            marked = rgb.copy()
            marked[stroke] = rgb[stroke] * (np.array(ink) / 255)
            mask = tissue_mask(marked, Tissue(), mpp)
            assert not mask[stroke].any()
            assert overlap(mask & away, before & away) > 0.95

    def test_needle_slides_are_all_tissue(self, shared_data):
        for name in ("train_000", "train_034", "val_003"):
            rgb, _ = Slide(shared_data / "needle" / "slides" / f"{name}.tif").thumbnail(8.0)
            assert tissue_mask(rgb, Tissue()).mean() > 0.98
