"""Other programs' coordinates give their tiles exactly: corners, size and order.

The files are written here word for word as those programs write them, including integers as floats,
missing attributes and empty slides. The slide encodes its coordinates, so a tile says where it is.
"""

import hashlib
import json
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import yaml

from slides.errors import CoordinatesError, IndexSettingsError, NoTissueError, TooCoarseError
from slides.grid import Grid
from slides.streaming.chunks import read_tiles
from slides.streaming.tile_source import TileSource
from slides.tiling.index import index_cohort, index_path, read_index, write_index
from slides.tiling.job_folders import find_coordinates
from slides.tiling.other_tools import read_coordinates
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tapfm.cli import main
from tapfm.config import read_source
from tests.cohorts import write_cohort

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


def clam(path, coords0=CORNERS0, **other):
    attrs = {"patch_size": 224, "patch_level": 1, "downsample": (2.0, 2.0)} | other
    with h5py.File(path, "w") as file:
        data = file.create_dataset("coords", data=coords0.astype(np.int32))
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


def hs2p(path, coords0=CORNERS0, **other):
    """Write hs2p's files; for a slide without tiles it writes no arrays."""
    x, y = np.asarray(coords0, np.int64).reshape(-1, 2).T
    tiling = {
        "is_within_tolerance": False, "min_tissue_fraction": 0.01, "n_tiles": len(x),
        "overlap": 0.0, "read_level": 0, "read_spacing_um": 0.25, "read_tile_size_px": 448,
        "requested_spacing_um": 0.5, "requested_tile_size_px": 224, "step_px_lv0": 448,
        "tile_size_lv0": 448, "tolerance": 0.05,
    } | other  # fmt: skip
    slide = {"base_spacing_um": 0.25, "dimensions": [1531, 1193], "level_downsamples": [1.0, 2.0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"slide": slide, "tiling": tiling}))
    if len(x):
        number, fraction = np.arange(len(x), dtype=np.int32), np.float32([0.5, 1, 0.25, 0.75])
        arrays = {"tile_index": number, "x": x, "y": y, "tissue_fractions": fraction[: len(x)]}
        np.savez(str(path).replace(".meta.json", ".npz"), **arrays)
    return path


WRITERS = {
    "coordinates_patches.h5": trident,
    "clam.h5": clam,
    "atlas.h5": atlas_patch,
    "coordinates.coordinates.meta.json": hs2p,
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
        """Older files lack overlap and level-0 size: TRIDENT's formula gives it."""
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
        path = hs2p(tmp_path / "a.coordinates.meta.json", **near, step_px_lv0=112)
        index = read_coordinates(path, slide)
        assert (index.size0, index.grid.size, index.grid.overlap) == (224, 224, 112)
        assert index.tissue_fraction.tolist() == [0.5, 1, 0.25, 0.75]
        other = read_coordinates(tmp_path / "a.coordinates.npz", slide)  # its other half
        np.testing.assert_array_equal(other.coords0, index.coords0)
        assert other.mask_sha256 == index.mask_sha256

    def test_an_empty_slide_of_hs2p_has_no_arrays(self, slide, tmp_path):
        path = hs2p(tmp_path / "a.coordinates.meta.json", [])
        assert find_coordinates(tmp_path, "a") == path
        assert read_coordinates(path, slide).coords0.shape == (0, 2)

    def test_our_own_files_too(self, slide, tmp_path):
        """Our files have TRIDENT's format."""
        index = read_coordinates(trident(tmp_path / "a.h5"), slide)
        path = index_path(tmp_path, index.grid, "coordinates")
        write_index(path, replace(index, tissue_mm2=1.0), Tissue())
        again = read_coordinates(path, slide)
        np.testing.assert_array_equal(again.coords0, index.coords0)
        assert (again.size0, again.grid) == (index.size0, index.grid)


class TestRefuse:
    def test_another_slide(self, slide, tmp_path):
        with pytest.raises(CoordinatesError, match="slide of 999 x 1193 pixels, this one has"):
            read_coordinates(trident(tmp_path / "a.h5", level0_width=999), slide)
        theirs = hs2p(tmp_path / "a.coordinates.meta.json")
        theirs.write_text(theirs.read_text().replace("1531", "999"))
        with pytest.raises(CoordinatesError, match=r"by hs2p .* 999 x 1193 pixels, this one has"):
            read_coordinates(theirs, slide)
        far = trident(tmp_path / "a.h5", [[0, 0], [1531, 0], [0, -1]])
        with pytest.raises(CoordinatesError, match=r"2 of the 3 tiles .* outside"):
            read_coordinates(far, slide)

    def test_what_the_reader_would_give_otherwise(self, slide, tmp_path):
        with pytest.raises(CoordinatesError, match="230 level-0 pixels made into 224"):
            read_coordinates(trident(tmp_path / "a.h5", patch_size_level0=230), slide)
        with pytest.raises(TooCoarseError, match="enlarging"):
            read_coordinates(trident(tmp_path / "a.h5", patch_size_level0=112), slide)

    @pytest.mark.parametrize("share", [0, 0.3, 0.9])
    @pytest.mark.parametrize("name", WRITERS)
    def test_damaged(self, slide, tmp_path, name, share):
        path = WRITERS[name](tmp_path / name)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(CoordinatesError, match=r"coordinates: .*damaged"):
            read_coordinates(path, slide)

    def test_halves_of_hs2p_that_do_not_belong_together(self, slide, tmp_path):
        path = hs2p(tmp_path / "a.coordinates.meta.json", n_tiles=5)
        with pytest.raises(CoordinatesError, match=r"damaged.*4 tiles where a\.coord.* says 5"):
            read_coordinates(path, slide)
        (tmp_path / "a.coordinates.npz").write_bytes(b"PK")
        with pytest.raises(CoordinatesError, match="damaged"):
            read_coordinates(path, slide)
        (tmp_path / "a.coordinates.npz").unlink()
        with pytest.raises(CoordinatesError, match="damaged"):
            read_coordinates(path, slide)

    @pytest.mark.parametrize("lost", ["patch_size", "target_magnification"])
    def test_an_attribute_that_is_needed(self, slide, tmp_path, lost):
        path = trident(tmp_path / "a.h5", patch_size_level0=None, **{lost: None})
        with pytest.raises(
            CoordinatesError, match=f"damaged.*{'patch_size' if lost == 'patch_size' else lost}"
        ):
            read_coordinates(path, slide)

    def test_none_there(self, slide, tmp_path):
        with pytest.raises(CoordinatesError, match="no coordinates at"):
            read_coordinates(tmp_path / "a.h5", slide)


class TestIndex:
    """`index_cohort` with `Tissue(coords=...)` stores their tiles, or gives a reason."""

    GRID = Grid(224, 0.5)

    @pytest.fixture
    def job(self, tmp_path, coordinate_slide):
        """Return a folder of coordinates, and three slides of one file."""
        for name in "abc":
            trident(tmp_path / "job" / "20x_224px_0px_overlap" / "patches" / f"{name}_patches.h5")
        rows = [SimpleNamespace(slide_id=n, path=coordinate_slide.path, mpp=0.25) for n in "abc"]
        return SimpleNamespace(
            folder=tmp_path / "job", rows=rows, tissue=Tissue(coords=str(tmp_path / "job"))
        )

    def index(self, job, tmp_path, grid=GRID, **options):
        return index_cohort(
            job.rows, tmp_path / "ours", grid, job.tissue, progress=False, **options
        )

    def put(self, job, name, **other):
        return trident(
            job.folder / "20x_224px_0px_overlap" / "patches" / f"{name}_patches.h5", **other
        )

    @pytest.mark.parametrize("workers", [0, 2])
    def test_their_tiles_with_where_they_come_from(self, job, tmp_path, workers):
        ledger = self.index(job, tmp_path, workers=workers)
        assert [row["status"] for row in ledger] == ["indexed"] * 3
        assert [row["tiles"] for row in ledger] == [4] * 3
        index = read_index(index_path(tmp_path / "ours", self.GRID, "b"), self.GRID, job.tissue)
        np.testing.assert_array_equal(index.coords0, CORNERS0)
        assert index.origin.startswith(f"TRIDENT: {job.folder}")
        assert index.origin.endswith("b_patches.h5")
        with h5py.File(index_path(tmp_path / "ours", self.GRID, "b")) as file:
            assert file["coords"].attrs["origin"] == index.origin
            sha256 = json.loads(file["coords"].attrs["settings"])["coords"]["sha256"]
        theirs = find_coordinates(job.folder, "b").read_bytes()
        assert sha256 == hashlib.sha256(theirs).hexdigest()
        assert [row["status"] for row in self.index(job, tmp_path)] == ["kept"] * 3

    def test_a_nominal_size_within_the_tolerance_is_read_to_the_pixel(self, job, tmp_path):
        """TRIDENT's 448 px on a scan of 0.2527 would be 443 here: its pixels are used."""
        for name in "abc":
            self.put(job, name, patch_size_level0=456.0)
        self.index(job, tmp_path)
        index = read_index(index_path(tmp_path / "ours", self.GRID, "a"), self.GRID, job.tissue)
        assert (index.size0, index.grid.size0(0.25), index.grid.size) == (456, 456, 224)
        assert index.grid.mpp == 456 * 0.25 / 224

    @pytest.mark.parametrize(
        ("grid", "other", "says"),
        [
            (Grid(224, 0.5), {"patch_size_level0": 472.0}, r"0\.5268 microns .* 5% off"),
            (Grid(224, 0.5), {"patch_size_level0": 424.0}, r"0\.4732 microns .* 5% off"),
            (Grid(224, 1.0), {}, "0.5 microns per tile pixel where 1 were requested"),
            (Grid(256, 0.5), {}, "224 px where 256 px were requested"),
        ],
    )
    def test_other_tiles_than_asked_for_are_refused_with_both_sizes(
        self, job, tmp_path, grid, other, says
    ):
        self.put(job, "b", **other)
        with pytest.raises(
            CoordinatesError, match=rf"[ab]: .*level-0 pixels made into 224.*{says}"
        ):
            self.index(job, tmp_path, grid)

    def test_every_slide_without_coordinates_is_named_before_any_work(self, job, tmp_path):
        for name in "ac":
            find_coordinates(job.folder, name).unlink()
        with pytest.raises(CoordinatesError) as caught:
            self.index(job, tmp_path)
        assert "2 faults" in str(caught.value)
        assert all(f"\n  {name}: no coordinates in" in str(caught.value) for name in "ac")
        assert not (tmp_path / "ours").exists()
        ledger = self.index(job, tmp_path, on_error="skip")
        assert [row["status"] for row in ledger] == ["failed", "indexed", "failed"]
        assert "no coordinates" in ledger[2]["reason"]

    def test_changed_coordinates_are_taken_anew_and_never_used_stale(self, job, tmp_path):
        self.index(job, tmp_path)
        self.put(job, "a", coords0=CORNERS0[:2])
        path = index_path(tmp_path / "ours", self.GRID, "a")
        with pytest.raises(IndexSettingsError, match=r"coords\.sha256 was"):
            read_index(path, self.GRID, job.tissue)
        ledger = self.index(job, tmp_path)
        assert [row["status"] for row in ledger] == ["rebuilt", "kept", "kept"]
        assert len(read_index(path, self.GRID, job.tissue)) == 2
        with pytest.raises(IndexSettingsError, match="other settings"):
            read_index(path, self.GRID, Tissue())

    def test_tiles_chosen_by_us_are_not_taken_for_theirs(self, job, tmp_path, slide):
        path = find_coordinates(job.folder, "a")
        ours = replace(read_coordinates(path, slide), slide_id="a", tissue_mm2=1.0)
        write_index(index_path(tmp_path / "ours", self.GRID, "a"), ours, Tissue())
        assert self.index(job, tmp_path)[0]["status"] == "rebuilt"

    def test_their_file_is_never_written_over(self, job):
        before = find_coordinates(job.folder, "a").read_bytes()
        with pytest.raises(CoordinatesError, match="a: its index would take the place of"):
            index_cohort(job.rows, job.folder, self.GRID, job.tissue, progress=False)
        assert find_coordinates(job.folder, "a").read_bytes() == before

    @pytest.mark.parametrize("coords", [False, True])
    def test_nor_by_tiles_that_are_not_theirs(self, job, tmp_path, coords):
        """The tiles are our own choice, or those of another job."""
        path = trident(index_path(tmp_path / "ours", self.GRID, "a"), coords0=CORNERS0[:2])
        before, tissue = path.read_bytes(), job.tissue if coords else Tissue()
        with pytest.raises(CoordinatesError, match=r"a: its index .*another program.*--out.*--coo"):
            index_cohort(job.rows, tmp_path / "ours", self.GRID, tissue, progress=False)
        assert path.read_bytes() == before

    def test_no_tiles_at_all(self, job, tmp_path):
        self.put(job, "c", coords0=[])
        with pytest.raises(NoTissueError, match="c: no tile in"):
            self.index(job, tmp_path)

    def test_settings_that_would_do_nothing_are_refused_by_name(self):
        with pytest.raises(CoordinatesError, match=r"tissue\.masks, .* would do nothing|masks"):
            Tissue(coords="job", min_fraction=0.5, masks="masks")
        assert Tissue(coords="job", min_fraction=0.25).coords == "job"

    def test_the_command_takes_them_and_training_reads_them(self, tmp_path, capsys):
        config = write_cohort(tmp_path)
        for number in range(14):
            corners = [[32 * number, 64], [96, 128], [128, 128]]
            trident(
                tmp_path / "job" / "patches" / f"s{number}_patches.h5", corners,
                patch_size=32, patch_size_level0=32, level0_magnification=20,
                level0_width=311, level0_height=263,
            )  # fmt: skip
        for number in (10, 11, 12, 13):
            find_coordinates(tmp_path / "job", f"s{number}").unlink()
        command = ["index", "--config", str(config), "--coords", str(tmp_path / "job")]
        assert main(command) == 2
        output = capsys.readouterr().err
        assert all(f"s{number}: no coordinates" in output for number in (10, 11, 12, 13))
        assert main([*command, "--on-error", "skip"]) == 0
        assert "10 slides, 30 tiles" in capsys.readouterr().out
        settings = yaml.safe_load(config.read_text())
        settings["data"]["tiles"]["tissue"] = {"coords": str(tmp_path / "job")}
        config.write_text(yaml.safe_dump(settings))
        source = read_source([config])
        tile_source = TileSource(source.index_dir, None, source.tiles.grid, source.tiles.tissue)
        slide, index = tile_source(source.rows[3])
        assert read_tiles(slide, index).shape == (3, 3, 32, 32)
        assert index.coords0.tolist()[0] == [96, 64]


class TestJobDirectory:
    @pytest.mark.parametrize(
        "where",
        [
            "20x_224px_0px_overlap/patches/s.1_patches.h5",
            "patches/s.1_patches.h5",
            "patches/s.1.h5",
            "tiles/s.1.coordinates.meta.json",
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
        with pytest.raises(CoordinatesError, match=r"s: no coordinates in .*s_patches.h5, s.h5"):
            find_coordinates(tmp_path, "s")
        for tag in ("10x_224px_0px_overlap", "20x_224px_0px_overlap"):
            trident(tmp_path / tag / "patches" / "s_patches.h5")
        with pytest.raises(CoordinatesError, match=r"2 times: 10x.*20x.*Give one"):
            find_coordinates(tmp_path, "s")
        found = find_coordinates(tmp_path / "20x_224px_0px_overlap", "s")
        assert found.parent.parent.name.startswith("20x")


class TestHs2p:
    """If hs2p is installed (`pip install "hs2p[openslide]"`), its real files are read."""

    @pytest.fixture
    def run(self, tmp_path):
        hs2p = pytest.importorskip("hs2p")

        def run(path, mpp, size, name="s", **other):
            tiling = {"requested_spacing_um": mpp, "requested_tile_size_px": size}
            result = hs2p.tile_slide(
                hs2p.SlideSpec(sample_id=name, image_path=path),
                tiling=hs2p.TilingConfig(
                    **tiling, **{"tolerance": 0.05, "overlap": 0.0, "backend": "openslide"} | other
                ),
                segmentation=hs2p.SegmentationConfig(method="hsv", downsample=4),
            )
            hs2p.save_tiling_result(result, output_dir=tmp_path / "theirs")
            return find_coordinates(tmp_path / "theirs", name), result

        return run

    @pytest.mark.parametrize(
        ("mpp", "size", "other", "size0"),
        [
            (0.5, 224, {}, 448),
            (0.5, 112, {"overlap": 0.25}, 224),
            (0.26, 224, {}, 224),  # within its tolerance of the scan
            (0.51, 224, {}, 448),  # of a level
            (0.7, 100, {}, 280),  # of none: it reads 140 of a level that has twice the scan's
        ],
    )
    def test_its_tiles_as_it_reads_them(self, run, small_slide, mpp, size, other, size0):
        made = small_slide(mpp=0.25, width=2203, height=1531)
        path, theirs = run(made, mpp, size, **other)
        slide = Slide(made, name="s")
        index = read_coordinates(path, slide)
        np.testing.assert_array_equal(index.coords0, np.stack([theirs.x, theirs.y], -1))
        assert len(index) == theirs.num_tiles > 8
        assert (index.size0, index.grid.size) == (size0, size) == (theirs.tile_size_lv0, size)
        assert index.grid.step0(0.25) == theirs.step_px_lv0
        np.testing.assert_array_equal(index.tissue_fraction, theirs.tissue_fractions)
        assert read_tiles(slide, index, slice(2)).shape == (2, 3, size, size)

    def test_a_slide_of_glass(self, run, small_slide):
        glass = small_slide(mpp=0.25, tissue=False)
        path, theirs = run(glass, 0.5, 224)
        assert theirs.num_tiles == len(read_coordinates(path, Slide(glass))) == 0

    def test_what_is_written_above_is_what_it_writes(self, run, small_slide, tmp_path):
        real, _ = run(small_slide(mpp=0.25), 0.5, 224)
        made = hs2p(tmp_path / "made" / "s.coordinates.meta.json")
        says, ours = json.loads(real.read_text()), json.loads(made.read_text())
        assert set(ours["slide"]) == set(says["slide"])
        assert set(ours["tiling"]) == set(says["tiling"])
        arrays, mine = (np.load(each.with_name("s.coordinates.npz")) for each in (real, made))
        assert {k: v.dtype for k, v in arrays.items()} == {k: v.dtype for k, v in mine.items()}
