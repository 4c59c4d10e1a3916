"""Feature files of four programs give the same features and places, and every fault has a name."""

import h5py
import numpy as np
import pytest
import torch

from slides.errors import FeatureFileError
from tapfm.data.feature_files import read_scales, read_slide
from tests import feature_folders as write

TILES, DIM = 7, 5
Z = np.random.default_rng(0).standard_normal((TILES, DIM)).astype(np.float32)


def read(folder, slide_id="s.1", mpp=0.5):
    return read_slide(folder, slide_id, lambda: mpp)


class Contract:
    """What every reader keeps."""

    writer: str
    coords = True
    half = False

    def write(self, folder, z_TD=Z):
        raise NotImplementedError

    def test_features_rows_and_writer(self, tmp_path):
        path = self.write(tmp_path)
        found = read(tmp_path)
        assert (found.slide_id, found.path, found.writer) == ("s.1", path, self.writer)
        expected = Z.astype(np.float16) if self.half else Z
        assert found.z_TD.numpy().dtype == expected.dtype
        np.testing.assert_array_equal(found.z_TD.numpy(), expected)
        assert len(found) == TILES

    def test_places_are_level_0_pixels(self, tmp_path):
        self.write(tmp_path)
        found = read(tmp_path)
        if not self.coords:
            assert found.coords0 is None
            return
        assert found.coords0.dtype == np.int64
        np.testing.assert_array_equal(found.coords0, write.lattice(TILES))
        assert (found.size0, found.step0) == (write.STEP0, write.STEP0)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_number_that_is_not_finite(self, tmp_path, value):
        spoilt = Z.copy()
        spoilt[3, 2] = value
        path = self.write(tmp_path, spoilt)
        with pytest.raises(FeatureFileError, match=rf"s.1: 1 of the 35 numbers in {path} are nan"):
            read(tmp_path)

    def test_no_tile(self, tmp_path):
        self.write(tmp_path, Z[:0])
        with pytest.raises(FeatureFileError, match=r"s.1: .* holds no tile. Loosen"):
            read(tmp_path)

    def test_a_file_cut_short_is_damaged(self, tmp_path):
        path = self.write(tmp_path)
        path.write_bytes(path.read_bytes()[:301])
        with pytest.raises(FeatureFileError, match=r"s.1: .* is (damaged|no plain tensor)"):
            read(tmp_path)

    def test_more_coordinates_than_tiles(self, tmp_path):
        path = self.write(tmp_path)
        if not self.coords:
            return
        with h5py.File(path, "r+") as file:
            attrs, coords = dict(file["coords"].attrs), file["coords"][:]
            del file["coords"]
            file["coords"] = np.concatenate([coords, coords])
            file["coords"].attrs.update(attrs)
        with pytest.raises(FeatureFileError, match=r"s.1: .* holds 14 coordinates for 7 tiles"):
            read(tmp_path)


class TestTrident(Contract):
    writer = "TRIDENT"

    def write(self, folder, z_TD=Z):
        return write.write_trident(folder, "s.1", z_TD)

    def test_overlap_shortens_the_step_and_older_files_say_no_size(self, tmp_path):
        path = write.write_trident(tmp_path, "s.1", Z, overlap=14)
        assert (read(tmp_path).size0, read(tmp_path).step0) == (112, 84)
        with h5py.File(path, "r+") as file:
            del file["coords"].attrs["patch_size_level0"]
        assert read(tmp_path).size0 == 112


class TestTridentBatch(TestTrident):
    def write(self, folder, z_TD=Z):
        return write.write_trident_batch(folder, "s.1", z_TD)


class TestOurs(Contract):
    writer = "tapfm"

    def write(self, folder, z_TD=Z):
        return write.write_ours(folder, "s.1", z_TD)

    def test_scores(self, tmp_path):
        path = self.write(tmp_path)
        score_T = read(tmp_path).score_T
        np.testing.assert_array_equal(score_T, np.linspace(-1, 1, TILES, dtype=np.float32))
        with h5py.File(path, "r+") as file:
            file["scores"][0] = np.nan
        with pytest.raises(FeatureFileError, match=r"scores in .* nan"):
            read(tmp_path)
        write.write_ours(tmp_path, "s.1", Z, scores=False)
        assert read(tmp_path).score_T is None


class TestAtlasPatch(Contract):
    writer = "AtlasPatch"

    def write(self, folder, z_TD=Z):
        return write.write_atlaspatch(folder, "s.1", z_TD)

    def test_the_encoder_is_named_and_several_are_refused(self, tmp_path):
        path = self.write(tmp_path)
        assert read(tmp_path).encoder == "lunit_vit_small_patch8_dino"
        with h5py.File(path, "r+") as file:
            file["features/uni_v1"] = Z
        with pytest.raises(FeatureFileError, match=r"several encoders' features: lunit_vit.*, uni"):
            read(tmp_path)


class TestClam(Contract):
    writer = "CLAM"

    def write(self, folder, z_TD=Z):
        return write.write_clam(folder, "s.1", z_TD)

    def test_the_step_is_the_commonest_distance(self, tmp_path):
        """A second contour's lattice begins 10 pixels off the first's."""
        path = self.write(tmp_path)
        with h5py.File(path, "r+") as file:
            file["coords"][6] = file["coords"][5] + np.array([10, 0])
        assert read(tmp_path).step0 == write.STEP0


class TestClamPt(Contract):
    writer, coords = "CLAM", False

    def write(self, folder, z_TD=Z):
        return write.write_clam_pt(folder, "s.1", z_TD)

    def test_code_is_not_run(self, tmp_path):
        class Code:
            def __reduce__(self):
                return (pytest.fail, ("code was run",))

        path = self.write(tmp_path)
        torch.save(Code(), path)
        with pytest.raises(FeatureFileError, match=r"s.1: .* holds code or objects, which are not"):
            read(tmp_path)
        torch.save({"features": torch.zeros(2, 3)}, path)
        with pytest.raises(FeatureFileError, match="it holds a dict, not a tensor"):
            read(tmp_path)

    def test_a_file_with_coordinates_comes_first(self, tmp_path):
        self.write(tmp_path)
        write.write_clam(tmp_path, "s.1", Z)
        assert read(tmp_path).coords0 is not None


class TestStamp(Contract):
    writer, half = "STAMP", True

    def write(self, folder, z_TD=Z):
        return write.write_stamp(folder, "s.1", z_TD)

    def test_without_the_slides_resolution_the_tiles_own_stands_for_it(self, tmp_path):
        self.write(tmp_path)
        found = read(tmp_path, mpp=None)  # 56 microns in 224 pixels: 0.25
        np.testing.assert_array_equal(found.coords0, 2 * write.lattice(TILES))
        assert found.step0 == 224

    def test_the_side_of_a_tile_by_its_older_name(self, tmp_path):
        with h5py.File(self.write(tmp_path), "r+") as file:
            file.attrs["tile_size"] = file.attrs["tile_size_um"]
            del file.attrs["tile_size_um"]
        np.testing.assert_array_equal(read(tmp_path).coords0, write.lattice(TILES))

    def test_coordinates_in_no_unit_are_not_known(self, tmp_path):
        with h5py.File(self.write(tmp_path), "r+") as file:
            del file.attrs["unit"]
        assert read(tmp_path).coords0 is None

    def test_float16_that_overflowed_is_told_apart(self, tmp_path):
        with np.errstate(over="ignore"):
            self.write(tmp_path, Z * 1e6)
        with pytest.raises(FeatureFileError, match=r"float16 ends at 65504: store float32"):
            read(tmp_path)


def test_a_missing_file_and_one_of_another_shape(tmp_path):
    with pytest.raises(FeatureFileError, match=r"s.1: there is no s.1.h5 or .pt in .*Extract"):
        read(tmp_path)
    write.write_trident(tmp_path, "s.1", Z[:, :, None, None])
    with pytest.raises(FeatureFileError, match=r"holds \(7, 5, 1, 1\) of float32, and floats of"):
        read(tmp_path)
    with h5py.File(tmp_path / "s.1.h5", "w") as file:
        file.create_group("features/uni")
    with pytest.raises(FeatureFileError, match="is a group of several encoders"):
        read(tmp_path)


def test_folders_of_several_magnifications_are_one_set_of_tiles(tmp_path):
    fine, coarse = tmp_path / "fine", tmp_path / "coarse"
    write.write_trident(fine, "s.1", Z)
    write.write_trident(coarse, "s.1", Z[:2] + 1, patch_size_level0=224.0)
    found = read_scales([fine, coarse], "s.1", lambda: 0.5)
    np.testing.assert_array_equal(found.z_TD, np.concatenate([Z, Z[:2] + 1]))
    np.testing.assert_array_equal(
        found.coords0, np.concatenate([write.lattice(TILES), write.lattice(2)])
    )
    assert found.step0_T.tolist() == TILES * [112] + 2 * [224]
    assert read_scales([fine], "s.1", lambda: 0.5).step0_T.tolist() == TILES * [112]


def test_magnifications_without_coordinates_or_of_another_encoder_are_named(tmp_path):
    fine, bare, other = tmp_path / "fine", tmp_path / "bare", tmp_path / "other"
    write.write_trident(fine, "s.1", Z)
    write.write_clam_pt(bare, "s.1", Z)
    write.write_trident(other, "s.1", Z[:, :3])
    with pytest.raises(FeatureFileError, match=r"s\.1: .*bare.* has no coordinates, by which"):
        read_scales([fine, bare], "s.1", lambda: 0.5)
    with pytest.raises(
        FeatureFileError, match=r"other.* has 3 features a tile, and .*fine.* has 5"
    ):
        read_scales([fine, other], "s.1", lambda: 0.5)
