"""Coordinates of four other programs become the tiles they meant: same corners, size and order.

The files are written here word for word as those programs write them, including integers as floats,
missing attributes and empty slides. The slide encodes its coordinates, so a tile says where it is.
"""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest

from slides.chunks import read_tiles
from slides.errors import IndexFileError, IndexSettingsError, TooCoarseError
from slides.foreign import find_coordinates, read_coordinates
from slides.grid import Grid
from slides.index import index_path, write_index
from slides.reader import Slide
from slides.tissue import Tissue

CORNERS0 = np.array([[448, 0], [0, 448], [37, 41], [896, 600]])  # in no order of ours


@pytest.fixture
def slide(coordinate_slide):
    return Slide(coordinate_slide.path, mpp=0.25)


def trident(path, coords0=CORNERS0, **other):
    attrs = {
        "patch_size": 224, "patch_size_level0": 448.0, "level0_magnification": 40,
        "target_magnification": 20.0, "overlap": 0, "name": "coordinates", "savetodir": "out",
        "level0_width": 1531, "level0_height": 1193,
    } | other  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("coords", data=np.asarray(coords0, np.int64).reshape(-1, 2))
        data.attrs.update({key: value for key, value in attrs.items() if value is not None})
    return path


def clam(path, **other):
    attrs = {"patch_size": 224, "patch_level": 1, "downsample": (2.0, 2.0)} | other
    with h5py.File(path, "w") as file:
        data = file.create_dataset("coords", data=CORNERS0.astype(np.int32))
        data.attrs.update({key: value for key, value in attrs.items() if value is not None})
    return path


def atlas_patch(path):
    five = np.column_stack([CORNERS0, np.full((4, 2), 448), np.zeros(4, int)]).astype(np.int32)
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=five)
        file.attrs.update({
            "patch_size": 224, "patch_size_level0": 448, "level0_magnification": 40,
            "target_magnification": 20, "overlap": 0, "level0_width": 1531, "level0_height": 1193,
        })  # fmt: skip
    return path


def hs2p(path, **other):
    x, y = CORNERS0.T
    np.savez(path, tile_index=np.arange(4), x=x, y=y, tissue_fractions=[0.5, 1, 0.25, 0.75])
    tiling = {
        "requested_spacing_um": 0.5, "read_level": 0, "read_tile_size_px": 448,
        "read_spacing_um": 0.25, "tile_size_lv0": 448, "step_px_lv0": 448, "tolerance": 0.05,
        "is_within_tolerance": False,
    } | other  # fmt: skip
    path.with_suffix(".meta.json").write_text(json.dumps({"tiling": tiling}))
    return path


WRITERS = {
    "coordinates_patches.h5": trident,
    "clam.h5": clam,
    "atlas.h5": atlas_patch,
    "coordinates.coordinates.npz": hs2p,
}


class TestRead:
    @pytest.mark.parametrize("name", WRITERS)
    def test_the_tiles_they_meant(self, slide, coordinate_slide, tmp_path, name):
        index = read_coordinates(WRITERS[name](tmp_path / name), slide)
        np.testing.assert_array_equal(index.coords0, CORNERS0)
        assert (index.size0, index.grid, index.level) == (448, Grid(224, 0.5), 1)
        for tile_CSS, (x0, y0) in zip(read_tiles(slide, index), CORNERS0.tolist(), strict=True):
            tile = tile_CSS.permute(1, 2, 0).numpy()
            coordinate_slide.assert_shows(tile, x0, y0, 448, within0=3)

    def test_what_trident_leaves_out(self, slide, tmp_path):
        """Older files: integers, no overlap, no level-0 size: its own rule gives the size."""
        gone = dict.fromkeys(["patch_size_level0", "overlap", "level0_width", "level0_height"])
        index = read_coordinates(trident(tmp_path / "a.h5", target_magnification=20, **gone), slide)
        assert (index.size0, index.grid.overlap) == (448, 0)

    def test_a_nominal_size_is_kept_and_named_by_its_true_resolution(self, slide, tmp_path):
        index = read_coordinates(trident(tmp_path / "a.h5", patch_size_level0=440.0), slide)
        assert index.size0 == index.grid.size0(slide.mpp) == 440
        assert index.grid.mpp == pytest.approx(440 * 0.25 / 224)

    def test_an_empty_slide(self, slide, tmp_path):
        assert read_coordinates(trident(tmp_path / "a.h5", []), slide).coords0.shape == (0, 2)

    def test_clam_with_a_custom_downsample(self, slide, tmp_path):
        path = clam(tmp_path / "a.h5", patch_level=0, downsample=(1.0, 1.0), custom_downsample=2)
        assert read_coordinates(path, slide).size0 == 448
        path = clam(tmp_path / "a.h5", downsample=None)
        assert read_coordinates(path, slide).size0 == round(224 * slide.level_downsamples[1])

    def test_hs2p_within_its_tolerance_keeps_fractions(self, slide, tmp_path):
        near = {"is_within_tolerance": True, "read_tile_size_px": 224, "tile_size_lv0": 224}
        path = hs2p(tmp_path / "a.coordinates.npz", **near, step_px_lv0=112)
        index = read_coordinates(path, slide)
        assert (index.size0, index.grid.size, index.grid.overlap) == (224, 224, 112)
        assert index.tissue_fraction.tolist() == [0.5, 1, 0.25, 0.75]

    def test_our_own_files_too(self, slide, tmp_path):
        """They are TRIDENT's kind."""
        index = read_coordinates(trident(tmp_path / "a.h5"), slide)
        path = index_path(tmp_path, index.grid, "coordinates")
        write_index(path, replace(index, tissue_mm2=1.0), Tissue())
        again = read_coordinates(path, slide)
        np.testing.assert_array_equal(again.coords0, index.coords0)
        assert (again.size0, again.grid) == (index.size0, index.grid)


class TestRefuse:
    def test_another_slide(self, slide, tmp_path):
        with pytest.raises(IndexSettingsError, match="slide of 999 x 1193 pixels, this one has"):
            read_coordinates(trident(tmp_path / "a.h5", level0_width=999), slide)
        far = trident(tmp_path / "a.h5", [[0, 0], [1531, 0], [0, -1]])
        with pytest.raises(IndexSettingsError, match=r"2 of the 3 tiles .* outside"):
            read_coordinates(far, slide)

    def test_what_the_reader_would_give_otherwise(self, slide, tmp_path):
        with pytest.raises(IndexSettingsError, match="230 level-0 pixels made into 224"):
            read_coordinates(trident(tmp_path / "a.h5", patch_size_level0=230), slide)
        with pytest.raises(TooCoarseError, match="enlarging"):
            read_coordinates(trident(tmp_path / "a.h5", patch_size_level0=112), slide)

    @pytest.mark.parametrize("share", [0, 0.3, 0.9])
    @pytest.mark.parametrize("name", WRITERS)
    def test_damaged(self, slide, tmp_path, name, share):
        path = WRITERS[name](tmp_path / name)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(IndexFileError, match=r"coordinates: .*damaged"):
            read_coordinates(path, slide)

    @pytest.mark.parametrize("lost", ["patch_size", "target_magnification"])
    def test_an_attribute_that_is_needed(self, slide, tmp_path, lost):
        path = trident(tmp_path / "a.h5", patch_size_level0=None, **{lost: None})
        with pytest.raises(
            IndexFileError, match=f"damaged.*{'patch_size' if lost == 'patch_size' else lost}"
        ):
            read_coordinates(path, slide)

    def test_none_there(self, slide, tmp_path):
        with pytest.raises(IndexFileError, match="no coordinates at"):
            read_coordinates(tmp_path / "a.h5", slide)


class TestJobDirectory:
    @pytest.mark.parametrize(
        "where",
        [
            "20x_224px_0px_overlap/patches/s.1_patches.h5",
            "patches/s.1_patches.h5",
            "patches/s.1.h5",
            "tiles/s.1.coordinates.npz",
            "s.1.h5",
        ],
    )
    def test_each_layout(self, tmp_path, where):
        path = tmp_path / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        (tmp_path / "s.10.h5").touch()
        assert find_coordinates(tmp_path, "s.1") == path

    def test_none_and_several_are_named(self, tmp_path):
        with pytest.raises(IndexFileError, match=r"s: no coordinates in .*s_patches.h5, s.h5"):
            find_coordinates(tmp_path, "s")
        for tag in ("10x_224px_0px_overlap", "20x_224px_0px_overlap"):
            trident(tmp_path / tag / "patches" / "s_patches.h5")
        with pytest.raises(IndexFileError, match=r"2 times: 10x.*20x.*Name one"):
            find_coordinates(tmp_path, "s")
        found = find_coordinates(tmp_path / "20x_224px_0px_overlap", "s")
        assert found.parent.parent.name.startswith("20x")
