"""Other programs' squares as the tiles that were asked for: same centres, asked extent, and said.

The slide encodes its coordinates (0.25 microns per pixel), so a tile says where it was read.
"""

from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from slides.errors import CoordinatesError
from slides.grid import Grid
from slides.streaming.chunks import read_tiles
from slides.tiling.index import index_cohort, index_path, read_index
from slides.tiling.other_tools import index_from_coordinates, read_coordinates
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tests.tiling.test_other_tools import CORNERS0, clam, trident

LATTICE0 = np.stack(np.meshgrid(np.arange(0, 1400, 448), np.arange(0, 1000, 448)), -1)
LATTICE0 = LATTICE0.reshape(-1, 2)[:4]
INSIDE0 = LATTICE0[:3]
FAR0 = np.array([[1400, 0], [0, 1100]])  # squares that reach over the slide's edges
LEVEL0 = {"patch_level": 0, "downsample": (1.0, 1.0)}


@pytest.fixture
def slide(coordinate_slide):
    return Slide(coordinate_slide.path, mpp=0.25)


def bare(path, coords0=LATTICE0):
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=coords0)
    return path


FITTED = {
    # the file, the tiles asked for, their side and shift in level-0 pixels, what is said
    "TRIDENT's 256 for a model of 224": (
        lambda path: trident(path, patch_size=256, patch_size_level0=512),
        Grid(224, 0.5), 448, 32, "the middle 448 of its squares of 512 level-0 pixels",
    ),
    "TRIDENT's 256 for a model of 252": (
        lambda path: trident(path, patch_size=256, patch_size_level0=512),
        Grid(252, 0.5), 504, 4, "the middle 504 of its squares of 512",
    ),
    "CLAM's 448 of level 0 as 224": (
        lambda path: clam(path, patch_size=448, **LEVEL0),
        Grid(224, 0.5), 448, 0, "its squares of 448 level-0 pixels are read as 224 px",
    ),
    "CLAM's 460 of level 0 as 224": (
        lambda path: clam(path, patch_size=460, **LEVEL0),
        Grid(224, 0.5), 460, 0, "its squares of 460 level-0 pixels are read as 224 px",
    ),
    "CLAM's 512 of level 0 for a model of 224": (
        lambda path: clam(path, patch_size=512, **LEVEL0),
        Grid(224, 0.5), 448, 32, "the middle 448 of its squares of 512",
    ),
    "unscaled tiles of nearly the scan's resolution": (
        lambda path: clam(path, patch_size=230, **LEVEL0),
        Grid(224, 0.25), 224, 3, "the middle 224 of its squares of 230",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FITTED)
def test_same_centres_asked_extent(name, slide, coordinate_slide, tmp_path):
    write, grid, size0, shift0, says = FITTED[name]
    index, note = index_from_coordinates(write(tmp_path / "a.h5"), slide, grid)
    assert (index.size0, index.grid.size) == (size0, grid.size)
    np.testing.assert_array_equal(index.coords0, CORNERS0 + shift0)
    assert note.startswith(says)
    within0 = 0 if size0 == grid.size else 5
    for tile_CSS, (x0, y0) in zip(read_tiles(slide, index), index.coords0.tolist(), strict=True):
        coordinate_slide.assert_shows(
            tile_CSS.permute(1, 2, 0).numpy(), x0, y0, size0, within0=within0
        )


@pytest.mark.parametrize(
    ("write", "grid"),
    [
        (lambda path: trident(path), Grid(256, 0.5)),  # larger than what was chosen
        (lambda path: trident(path), Grid(112, 0.5)),  # a quarter of it
        (lambda path: trident(path, patch_size=448), Grid(224, 0.375)),  # at another scale
        (lambda path: clam(path, patch_size=448, **LEVEL0), Grid(512, 0.5)),
        (lambda path: clam(path, patch_size=448, **LEVEL0), Grid(224, 0.25)),
    ],
)
def test_other_extents_are_refused(write, grid, slide, tmp_path):
    says = r"its tiles are 448 level-0 pixels .*--on-error skip"
    with pytest.raises(CoordinatesError, match=says):
        index_from_coordinates(write(tmp_path / "a.h5"), slide, grid)


class TestCornersAlone:
    def test_as_far_apart_as_the_tiles_asked_for(self, slide, tmp_path):
        path = bare(tmp_path / "a.h5", INSIDE0)
        index, note = index_from_coordinates(path, slide, Grid(224, 0.5))
        np.testing.assert_array_equal(index.coords0, INSIDE0)
        assert (index.size0, index.grid, note) == (448, Grid(224, 0.5), "")
        assert index.origin.startswith("corners without a size: ")

    @pytest.mark.parametrize("grid", [Grid(224, 0.25), Grid(224, 1.0), None])
    def test_else_their_size_is_missing(self, slide, tmp_path, grid):
        says = r"lacks the size of its tiles, an attribute patch_size .* 448 level-0 pixels apart"
        with pytest.raises(CoordinatesError, match=says):
            read_coordinates(bare(tmp_path / "a.h5"), slide, grid)


def test_the_ledger_says_so_and_the_index_is_kept(coordinate_slide, tmp_path, capsys):
    trident(tmp_path / "job" / "a_patches.h5", patch_size=256, patch_size_level0=512)
    rows = [SimpleNamespace(slide_id="a", path=coordinate_slide.path, mpp=0.25)]
    grid, tissue = Grid(224, 0.5), Tissue(coords=str(tmp_path / "job"))
    ledger = index_cohort(rows, tmp_path, grid, tissue, progress=False)[0]
    assert "the middle 448 of its squares of 512" in ledger["reason"]
    assert "tapfm: a: the middle 448" in capsys.readouterr().err
    index = read_index(index_path(tmp_path, grid, "a"), grid, tissue)
    np.testing.assert_array_equal(index.coords0, CORNERS0 + 32)
    assert index_cohort(rows, tmp_path, grid, tissue, progress=False)[0]["status"] == "kept"


class TestOfOverlappingContours:
    """CLAM lists a square once for each contour that it lies in."""

    def test_a_square_listed_twice_is_one_tile(self, slide, tmp_path):
        coords0 = np.concatenate([INSIDE0, INSIDE0[1:], INSIDE0[:1]])
        path = clam(tmp_path / "a.h5", coords0, patch_size=448, **LEVEL0)
        index, note = index_from_coordinates(path, slide, Grid(448, 0.25))
        np.testing.assert_array_equal(index.coords0, INSIDE0)
        assert note == "3 tiles are listed more than once and taken once"
        assert len(index.tissue_fraction) == len(INSIDE0)

    def test_no_word_where_each_is_listed_once(self, slide, tmp_path):
        path = clam(tmp_path / "a.h5", INSIDE0, patch_size=448, **LEVEL0)
        assert index_from_coordinates(path, slide, Grid(448, 0.25))[1] == ""


def test_tiles_over_the_edge_are_white_and_named(slide, tmp_path):
    coords0 = np.concatenate([INSIDE0, FAR0])
    path = clam(tmp_path / "a.h5", coords0, patch_size=448, **LEVEL0)
    index, note = index_from_coordinates(path, slide, Grid(448, 0.25))
    assert note == "2 tiles reach over the slide's edge: white there, black in other tools"
    assert (slide.read(1400, 0, index.grid)[:, 1531 - 1400 :] == 255).all()
