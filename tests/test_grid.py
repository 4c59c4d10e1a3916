"""Tiles are sized by microns per pixel, lie on one lattice of the slide, and are never enlarged.

`reference_corners` is the lattice in plain loops; everything else is a property of any grid or a
size worked out by hand.
"""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slides.errors import CohortError, SlideError, TilingError, TooCoarseError
from slides.grid import Grid

GRIDS = st.builds(
    lambda size, mpp, share: Grid(size, mpp, int(size * share)),
    size=st.integers(1, 521),
    mpp=st.floats(0.1, 4),
    share=st.floats(0, 0.99),
)
SIDES = st.integers(1, 4001)
FINER = st.floats(0.1, 1.05)  # the scan's mpp as a share of the tile's


def reference_corners(width0, height0, size0, step0):
    return [
        (x0, y0)
        for y0 in range(0, height0, step0)
        for x0 in range(0, width0, step0)
        if x0 + size0 <= width0 and y0 + size0 <= height0
    ]


class TestSize:
    @pytest.mark.parametrize(
        ("slide_mpp", "size0"),
        [(0.2527, 443), (0.265, 423), (0.25, 448), (0.5, 224), (0.5021, 224), (0.1, 1120)],
    )
    def test_by_hand_at_half_a_micron(self, slide_mpp, size0):
        assert Grid(224, 0.5).size0(slide_mpp) == size0

    def test_nominal_magnification_would_read_another_square(self):
        """Partner test: 0.2527 and 0.265 are both "40x", where 448 px would be read."""
        assert Grid().size0(0.2527) != 448
        assert Grid().size0(0.265) != 448

    @pytest.mark.parametrize("slide_mpp", [0.477, 0.499, 0.5, 0.5021, 0.526])
    def test_within_five_percent_of_the_scan_is_unscaled(self, slide_mpp):
        assert Grid(224, 0.5).size0(slide_mpp) == 224

    def test_just_beyond_five_percent_is_scaled(self):
        assert Grid(224, 0.5).size0(0.47) == round(224 * 0.5 / 0.47) == 238

    @given(GRIDS, FINER)
    def test_never_enlarged(self, grid, share):
        assert grid.size0(grid.mpp * share) >= grid.size

    @given(GRIDS, st.floats(1.06, 9))
    def test_a_coarser_scan_is_refused(self, grid, times):
        with pytest.raises(TooCoarseError):
            grid.size0(grid.mpp * times)

    def test_error_names_the_slide_the_fault_and_the_way_out(self):
        with pytest.raises(TooCoarseError) as caught:
            Grid(224, 0.25).size0(0.5, "b.svs")
        for text in ["b.svs", "0.25 microns per pixel", "scan has 0.5", "Ask for 0.5 or coarser"]:
            assert text in str(caught.value)


class TestCorners:
    @given(GRIDS, SIDES, SIDES, FINER)
    def test_are_those_of_the_reference(self, grid, width0, height0, share):
        slide_mpp = grid.mpp * share
        size0, step0 = grid.size0(slide_mpp), grid.step0(slide_mpp)
        if (width0 // step0 + 1) * (height0 // step0 + 1) > 20_000:
            width0, height0 = 20 * step0, 23 * step0
        coords0 = grid.coords(width0, height0, slide_mpp)
        assert coords0.dtype == np.int64
        assert coords0.shape[1:] == (2,)
        assert [tuple(c) for c in coords0] == reference_corners(width0, height0, size0, step0)

    def test_known_slide(self):
        """By hand: a 224 px tile at 0.5 is 448 px on 1000 x 700 px at 0.25: 2 x 1 tiles."""
        np.testing.assert_array_equal(Grid(224, 0.5).coords(1000, 700, 0.25), [[0, 0], [448, 0]])

    def test_rows_come_first_to_last_and_x_runs_within_them(self):
        coords0 = Grid(10, 0.5).coords(31, 21, 0.5)
        np.testing.assert_array_equal(coords0[:4], [[0, 0], [10, 0], [20, 0], [0, 10]])

    def test_overlap_shortens_the_step(self):
        coords0 = Grid(224, 0.5, overlap=24).coords(1000, 224, 0.5)
        np.testing.assert_array_equal(coords0[:, 0], [0, 200, 400, 600])

    def test_without_overlap_tiles_touch_whatever_the_rounding(self):
        for slide_mpp in (0.2527, 0.265, 0.3331, 0.5021):
            assert Grid().step0(slide_mpp) == Grid().size0(slide_mpp)

    def test_origin_shifts_the_lattice_not_the_slide(self):
        coords0 = Grid(10, 0.5).coords(31, 21, 0.5, origin0=(3, 7))
        np.testing.assert_array_equal(coords0, [[3, 7], [13, 7]])

    def test_a_slide_below_one_tile_has_none(self):
        assert Grid().coords(223, 5000, 0.5).shape == (0, 2)


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"mpp": 0}, {"mpp": 352.8}, {"overlap": 224}, {"overlap": -1}]
)
def test_impossible_grids_are_refused_with_the_value(wrong):
    with pytest.raises(
        TilingError, match=f"{next(iter(wrong))} must be.*got {next(iter(wrong.values()))}"
    ):
        Grid(**wrong)


@pytest.mark.parametrize(
    ("grid", "tag"),
    [
        (Grid(), "20x_224px_0px_overlap"),
        (Grid(256, 4.0, 16), "2.5x_256px_16px_overlap"),
        (Grid(518, 0.25), "40x_518px_0px_overlap"),
    ],
)
def test_tag_is_spelt_as_trident_spells_it(grid, tag):
    assert grid.tag == tag


@pytest.mark.parametrize("error", [*SlideError.__subclasses__(), SlideError, CohortError])
def test_errors_survive_a_worker_process(error):
    """PyTorch rebuilds a worker's exception from its message."""
    assert str(error("b.svs: no pixel size")) == "b.svs: no pixel size"


def test_importing_the_grid_pulls_in_nothing_slow():
    code = "import sys, slides.grid, slides.errors; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"'torch'", "'pandas'", "'openslide'", "'scipy'", "'h5py'"} & set(
        loaded.stdout.strip(" []\n").split(", ")
    )
