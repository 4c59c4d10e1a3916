"""An index has the tiles with tissue, reads back complete or not at all, and is never partial.

The slide is drawn with tissue in known places. The full disk is real, by the kernel's limit on file
size in another process, and simulated by failing each call in turn.
"""

import csv
import errno
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from slides import files
from slides.errors import (
    IndexFileError,
    IndexSettingsError,
    MissingResolutionError,
    NotASlideError,
    NoTissueError,
    SettingsError,
    SlideError,
    TooCoarseError,
    UnreadableRegionError,
)
from slides.grid import Grid
from slides.tiling.choose import choose_tiles
from slides.tiling.index import (
    LEDGER,
    index_cohort,
    index_path,
    index_slide,
    read_index,
    write_index,
)
from slides.tiling.stage_picture import draw_stages
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tests.conftest import ROOT, stained_picture, write_pyramid

GRID = Grid(64, 0.5)


def row(path, mpp=None, slide_id=None):
    """Return a cohort row with the attributes that indexing reads."""
    return SimpleNamespace(slide_id=slide_id or Path(path).stem, path=Path(path), mpp=mpp)


@pytest.fixture
def made(small_slide, tmp_path):
    """Write one slide's index, and return the index and its path."""
    index = index_slide(Slide(small_slide("a.tif")), GRID, Tissue())
    path = index_path(tmp_path / "index", GRID, "a")
    write_index(path, index, Tissue())
    return index, path


def as_array(path):
    """Return a picture's colours."""
    return np.asarray(Image.open(path).convert("RGB"))


def leftovers(folder):
    return [p.name for p in Path(folder).rglob("*") if "partial" in p.name or p.suffix == ".tmp"]


class TestChoice:
    def test_takes_the_tiles_that_are_tissue(self, small_slide):
        """The tissue of `small_slide` is an oval: 0.3 by 0.35 of the sides about (0.45, 0.55)."""
        index = index_slide(Slide(small_slide("a.tif")), GRID, Tissue(min_fraction=0.5))
        corners = GRID.coords(1201, 907, 0.5)
        x, y = (corners + 32).T
        oval = ((x / 1201 - 0.45) / 0.3) ** 2 + ((y / 907 - 0.55) / 0.35) ** 2
        chosen = {tuple(c) for c in index.coords0}
        assert {tuple(c) for c in corners[oval < 0.75]} <= chosen
        assert not {tuple(c) for c in corners[oval > 1.35]} & chosen

    def test_keeps_the_order_of_the_lattice(self, made):
        order = np.lexsort(made[0].coords0.T)
        assert (order == np.arange(len(made[0]))).all()

    def test_the_threshold_moves_the_choice(self, small_slide):
        slide = Slide(small_slide("a.tif"))
        few = index_slide(slide, GRID, Tissue(min_fraction=0.9))
        many = index_slide(slide, GRID, Tissue(min_fraction=0.0))
        assert {tuple(c) for c in few.coords0} < {tuple(c) for c in many.coords0}
        assert few.tissue_fraction.min() >= 0.9
        assert many.tissue_fraction.min() > 0

    @pytest.mark.parametrize(("mpp", "size0"), [(0.2527, 443), (0.265, 423), (0.5021, 224)])
    def test_tiles_have_the_true_size(self, small_slide, mpp, size0):
        slide = Slide(small_slide("a.svs", mpp=mpp))
        index = index_slide(slide, Grid(224, 0.5), Tissue())
        assert index.size0 == size0
        assert index.slide_mpp == pytest.approx(mpp)
        assert (index.coords0 % size0 == 0).all()
        assert (index.coords0 + size0 <= (1201, 907)).all()
        assert index.level == slide.level_for(size0, 224)

    def test_counts_tissue_in_square_millimetres(self, small_slide):
        index = index_slide(Slide(small_slide("a.tif")), GRID, Tissue())
        oval = np.pi * (0.3 * 1201) * (0.35 * 907) * 0.5**2 / 1e6
        assert index.tissue_mm2 == pytest.approx(oval, rel=0.1)


class TestFile:
    def test_comes_back_as_it_went(self, made):
        index, path = made
        again = read_index(path, GRID, Tissue())
        for name, value in vars(index).items():
            np.testing.assert_array_equal(getattr(again, name), value, name)
        assert again.coords0.dtype == np.int64
        assert len(again) == len(index)

    def test_lies_where_trident_looks_and_speaks_its_words(self, made):
        index, path = made
        assert path.parts[-3:] == ("20x_64px_0px_overlap", "patches", "a_patches.h5")
        with h5py.File(path) as file:
            assert not dict(file.attrs)
            assert file["coords"].dtype == np.int64
            attrs = dict(file["coords"].attrs)
        assert attrs["patch_size"] == 64
        assert attrs["overlap"] == 0
        assert attrs["name"] == "a"
        assert (attrs["level0_width"], attrs["level0_height"]) == (1201, 907)
        assert attrs["patch_size_level0"] == index.size0
        assert attrs["target_magnification"] == 20
        assert attrs["savetodir"] == str(path.parent.parent)
        assert attrs["mpp_level0"] == pytest.approx(0.5)
        assert attrs["target_mpp"] == 0.5
        for ours in ("read_level", "writer", "writer_version", "mask_sha256", "spec_sha256"):
            assert ours in attrs

    @pytest.mark.parametrize("slide_mpp", [0.1, 0.2527, 0.265, 0.2499, 0.333, 0.4, 0.5021, 0.49])
    @pytest.mark.parametrize("size", [224, 256, 518, 97])
    @pytest.mark.parametrize("mpp", [0.5, 0.55])
    def test_trident_reads_the_same_square(self, made, tmp_path, slide_mpp, size, mpp):
        """TRIDENT's formula is patch_size * level0_magnification // target_magnification."""
        grid = Grid(size, mpp)
        index = replace(made[0], grid=grid, size0=grid.size0(slide_mpp), slide_mpp=slide_mpp)
        write_index(tmp_path / "t.h5", index, Tissue())
        with h5py.File(tmp_path / "t.h5") as file:
            attrs = dict(file["coords"].attrs)
        theirs = (
            attrs["patch_size"] * attrs["level0_magnification"] // attrs["target_magnification"]
        )
        assert theirs == index.size0

    def test_an_index_without_tiles_has_two_columns(self, made, tmp_path):
        none = replace(
            made[0], coords0=np.empty((0, 2), np.int64), tissue_fraction=np.empty(0, np.float32)
        )
        write_index(tmp_path / "none.h5", none, Tissue())
        assert read_index(tmp_path / "none.h5", GRID, Tissue()).coords0.shape == (0, 2)

    @pytest.mark.parametrize(
        ("grid", "tissue", "says"),
        [
            (Grid(64, 0.6), Tissue(), "grid.mpp was 0.5, asked for 0.6"),
            (Grid(65, 0.5), Tissue(), "grid.size was 64, asked for 65"),
            (Grid(64, 0.5, 3), Tissue(), "grid.overlap was 0, asked for 3"),
            (GRID, Tissue(min_fraction=0.1), "tissue.min_fraction was 0.25, asked for 0.1"),
            (GRID, Tissue(pen=False), "tissue.pen was True, asked for False"),
        ],
    )
    def test_other_settings_are_refused_and_named(self, made, grid, tissue, says):
        with pytest.raises(IndexSettingsError) as caught:
            read_index(made[1], grid, tissue)
        assert says in str(caught.value)
        assert "tapfm index" in str(caught.value)

    def test_none_there(self, tmp_path):
        with pytest.raises(IndexFileError, match="no index at"):
            read_index(tmp_path / "a_patches.h5", GRID, Tissue())


class TestDamage:
    @pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
    def test_a_cut_file_is_never_read(self, made, share):
        data = made[1].read_bytes()
        made[1].write_bytes(data[: int(len(data) * share)])
        with pytest.raises(IndexFileError, match=r"damaged.*Delete"):
            read_index(made[1], GRID, Tissue())

    @pytest.mark.parametrize("dataset", ["coords", "tissue_fraction", "pen_fraction", "blur"])
    def test_a_changed_number_is_noticed(self, made, dataset):
        with h5py.File(made[1], "r+") as file:
            values = file[dataset][:]
            values.flat[3] = 7
            file[dataset][:] = values
        with pytest.raises(IndexFileError, match="checksum"):
            read_index(made[1], GRID, Tissue())

    @pytest.mark.parametrize("lost", ["slide_fingerprint", "tiles_sha256"])
    def test_an_index_that_lacks_an_attribute_is_damaged(self, made, lost):
        with h5py.File(made[1], "r+") as file:
            del file["coords"].attrs[lost]
        with pytest.raises(IndexFileError, match="damaged"):
            read_index(made[1], GRID, Tissue())

    @pytest.mark.parametrize("lost", ["tissue_fraction", "coords"])
    def test_a_foreign_file_is_no_index(self, made, lost):
        with h5py.File(made[1], "r+") as file:
            del file[lost]
        with pytest.raises(IndexFileError, match="damaged"):
            read_index(made[1], GRID, Tissue())


class TestFullDisk:
    @pytest.mark.parametrize("call", ["write", "fsync", "replace", "mkdir"])
    def test_whichever_call_fails_nothing_half_written_is_left(
        self, made, tmp_path, monkeypatch, call
    ):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        class FullFile:
            def __init__(self, path, *_):
                Path(path).write_bytes(b"half")  # what the disk still took

            def __enter__(self):
                return self

            def __exit__(self, *_):
                return False

            write = full

        old = made[1].read_bytes()
        targets = {
            "write": (files, "open", FullFile),
            "fsync": (os, "fsync", full),
            "replace": (os, "replace", full),
            "mkdir": (Path, "mkdir", full),
        }
        monkeypatch.setattr(*targets[call], raising=False)
        for path in (made[1], tmp_path / "new" / "b_patches.h5"):
            with pytest.raises(IndexFileError) as caught:
                write_index(path, made[0], Tissue())
            for text in ("No space left on device", str(path), "Nothing half-written", "Free some"):
                assert text in str(caught.value)
        monkeypatch.undo()
        assert made[1].read_bytes() == old, "the index that was there is still there"
        assert not (tmp_path / "new" / "b_patches.h5").exists()
        assert not leftovers(tmp_path)

    def test_the_kernel_refuses_the_bytes(self, small_slide, tmp_path):
        """A real limit on file size in a real run: the run exits with the error, then resumes."""
        paths = [str(small_slide(f"{name}.tif", seed=n)) for n, name in enumerate("abc")]
        code = textwrap.dedent("""
            import resource, sys
            from pathlib import Path
            from types import SimpleNamespace
            from slides.errors import IndexFileError
            from slides.grid import Grid
            from slides.tiling.index import index_cohort
            from slides.tiling.tissue import Tissue
            out, *paths = sys.argv[1:]
            rows = [SimpleNamespace(slide_id=Path(p).stem, path=p, mpp=None) for p in paths]
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            try:
                index_cohort(rows, out, Grid(64, 0.5), Tissue(), on_error="skip", progress=False)
            except IndexFileError as error:
                print("stopped:", error)
        """)
        out = tmp_path / "index"
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        ran = subprocess.run(
            [sys.executable, "-c", code, str(out), *paths],
            capture_output=True, text=True, env=env, check=True,
        )  # fmt: skip
        assert re.match("stopped: a: .*File too large", ran.stdout), ran.stderr
        assert not list(out.rglob("*.h5"))
        assert not leftovers(out)
        ledger = index_cohort([row(p) for p in paths], out, GRID, Tissue(), progress=False)
        assert [r["status"] for r in ledger] == ["indexed"] * 3


class TestCohort:
    @pytest.fixture
    def rows(self, small_slide):
        return [row(small_slide(f"{name}.svs", seed=n)) for n, name in enumerate("abc")]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_row_a_slide_in_the_order_given(self, rows, tmp_path, workers):
        ledger = index_cohort(rows, tmp_path, GRID, Tissue(), workers, progress=False)
        assert [r["slide_id"] for r in ledger] == ["a", "b", "c"]
        assert all(list(r) == list(LEDGER) and r["status"] == "indexed" for r in ledger)
        for r in ledger:
            index = read_index(index_path(tmp_path, GRID, r["slide_id"]), GRID, Tissue())
            assert r["tiles"] == len(index) > 0
            assert r["mpp_source"] == "openslide.mpp-x"
        with open(tmp_path / GRID.tag / "ledger.csv", newline="") as file:
            on_disk = list(csv.DictReader(file))
        assert [r["tiles"] for r in on_disk] == [str(r["tiles"]) for r in ledger]

    def test_processes_choose_the_same_tiles(self, rows, tmp_path):
        for workers in (0, 2):
            index_cohort(rows, tmp_path / str(workers), GRID, Tissue(), workers, progress=False)
        for r in rows:
            alone, pool = (
                read_index(index_path(tmp_path / w, GRID, r.slide_id), GRID, Tissue()) for w in "02"
            )
            np.testing.assert_array_equal(alone.coords0, pool.coords0)

    def test_a_second_run_keeps_what_is_right(self, rows, tmp_path):
        index_cohort(rows[:2], tmp_path, GRID, Tissue(), progress=False)
        before = index_path(tmp_path, GRID, "a").stat().st_mtime_ns
        ledger = index_cohort(rows, tmp_path, GRID, Tissue(), progress=False)
        assert [r["status"] for r in ledger] == ["kept", "kept", "indexed"]
        assert index_path(tmp_path, GRID, "a").stat().st_mtime_ns == before

    def test_what_is_not_right_is_rebuilt_and_said(self, rows, tmp_path, small_slide):
        index_cohort(rows, tmp_path, GRID, Tissue(), progress=False)
        ledger = index_cohort(rows, tmp_path, GRID, Tissue(min_fraction=0.5), progress=False)
        assert {r["status"] for r in ledger} == {"rebuilt"}
        assert "min_fraction was 0.25, asked for 0.5" in ledger[0]["reason"]

        rows[0].mpp = 0.4
        small_slide("b.svs", seed=77)
        index_path(tmp_path, GRID, "c").write_bytes(b"half an index")
        ledger = index_cohort(rows, tmp_path, GRID, Tissue(min_fraction=0.5), progress=False)
        assert "now gives mpp 0.4" in ledger[0]["reason"]
        assert "file has changed" in ledger[1]["reason"]
        assert "damaged" in ledger[2]["reason"]
        assert {r["status"] for r in ledger} == {"rebuilt"}
        rows[0].mpp = None
        ledger = index_cohort(rows, tmp_path, GRID, Tissue(min_fraction=0.5), progress=False)
        assert [r["status"] for r in ledger] == ["rebuilt", "kept", "kept"]
        assert ledger[0]["mpp"] == pytest.approx(0.5)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_skip_goes_on_and_lists_the_fault(self, rows, tmp_path, small_slide, workers):
        bad = [
            row(tmp_path / "gone.svs"),
            row(small_slide("glass.svs", tissue=False)),
            row(small_slide("lost.tif", mpp=None)),
            row(small_slide("coarse.svs", mpp=1.0)),
            row(small_slide("tiny.svs", width=61, height=803)),
        ]
        given = [bad[0], rows[0], *bad[1:], rows[1]]
        ledger = index_cohort(given, tmp_path, GRID, Tissue(), workers, "skip", progress=False)
        assert [r["status"] for r in ledger] == ["failed", "indexed", *["failed"] * 4, "indexed"]
        reasons = [r["reason"] for r in ledger if r["status"] == "failed"]
        kinds = [NotASlideError, NoTissueError, MissingResolutionError, TooCoarseError]
        kinds.append(NoTissueError)
        for slide, reason, kind in zip(bad, reasons, kinds, strict=True):
            assert reason.startswith(f"{kind.__name__}: {slide.slide_id}: ")
            assert "leave this slide out" in reason

    @pytest.mark.parametrize("workers", [0, 2])
    def test_stop_raises_the_fault_and_keeps_the_ledger(self, rows, tmp_path, workers):
        given = [rows[0], row(tmp_path / "gone.svs"), rows[1]]
        with pytest.raises(NotASlideError, match=r"gone: there is no file"):
            index_cohort(given, tmp_path, GRID, Tissue(), workers, progress=False)
        with open(tmp_path / GRID.tag / "ledger.csv", newline="") as file:
            assert "failed" in [r["status"] for r in csv.DictReader(file)]

    def test_the_ledger_remembers_slides_of_other_runs(self, rows, tmp_path):
        index_cohort(rows[:2], tmp_path, GRID, Tissue(), progress=False)
        index_cohort(rows[1:], tmp_path, GRID, Tissue(), progress=False)
        with open(tmp_path / GRID.tag / "ledger.csv", newline="") as file:
            assert [r["slide_id"] for r in csv.DictReader(file)] == ["a", "b", "c"]

    def test_two_slides_of_one_name_are_refused(self, rows, tmp_path):
        with pytest.raises(SlideError, match="a: listed more than once"):
            index_cohort([rows[0], rows[0]], tmp_path, GRID, Tissue(), progress=False)

    def test_on_error_is_one_of_two_words(self, rows, tmp_path):
        with pytest.raises(SettingsError, match=r"data\.on_error is 'ignore': give stop or skip"):
            index_cohort(rows, tmp_path, GRID, Tissue(), on_error="ignore")


class TestFigures:
    """Pen and blur of each tile are stored beside its tissue."""

    @pytest.fixture
    def half_blurred(self, tmp_path):
        """Return a slide that is out of focus by 3 microns right of x0 = 600."""
        picture = stained_picture(1201, 907)
        soft = ndimage.gaussian_filter(picture.astype(float), (6, 6, 0)).astype(np.uint8)
        picture[:, 600:] = soft[:, 600:]
        return Slide(write_pyramid(tmp_path / "half.tif", picture, 0.5))

    def test_blur_is_measured_when_asked_for(self, half_blurred):
        assert np.isnan(index_slide(half_blurred, GRID, Tissue()).blur).all()
        index = index_slide(half_blurred, GRID, Tissue(max_blur=1, min_fraction=0.9))
        x0 = index.coords0[:, 0]
        assert index.blur[x0 < 530].max() < 0.5 < index.blur[x0 > 600].min()

    def test_blurred_tiles_are_left_out(self, half_blurred):
        every = index_slide(half_blurred, GRID, Tissue(max_blur=1))
        sharp = index_slide(half_blurred, GRID, Tissue(max_blur=0.5))
        np.testing.assert_array_equal(sharp.coords0, every.coords0[every.blur <= 0.5])
        assert 0 < len(sharp) < len(every)
        with pytest.raises(NoTissueError, match=r"half: all \d+ tiles .* the sharpest has 0\.\d\d"):
            index_slide(half_blurred, GRID, Tissue(max_blur=0.01))

    def test_pen_is_counted(self, tmp_path):
        picture = stained_picture(1201, 907)
        picture[:, 448:640] = (40, 150, 80)
        slide = Slide(write_pyramid(tmp_path / "pen.tif", picture, 0.5))
        index = index_slide(slide, GRID, Tissue(min_fraction=0.0))
        x0 = index.coords0[:, 0]
        assert index.pen_fraction[x0 == 320].min() > 0.3  # the halo
        assert index.pen_fraction[abs(x0 - 512) > 260].max() == 0
        assert index_slide(slide, GRID, Tissue(pen=False)).pen_fraction.max() == 0


class TestPictures:
    def test_every_slide_has_one_also_the_one_without_a_tile(self, small_slide, tmp_path):
        rows = [row(small_slide("a.svs")), row(small_slide("glass.svs", tissue=False))]
        folder = tmp_path / "pictures"
        options = {"on_error": "skip", "progress": False, "pictures": folder}
        for _ in range(2):  # what is kept is drawn where its picture is missing
            ledger = index_cohort(rows, tmp_path, GRID, Tissue(), **options)
            assert {path.name for path in folder.iterdir()} == {"a.png", "glass.png"}
            assert as_array(folder / "a.png").std() > 20
            (folder / "a.png").unlink()
        assert [r["status"] for r in ledger] == ["kept", "failed"]

    def test_two_dollars_in_a_name_are_no_formula(self, small_slide, tmp_path):
        slide = Slide(small_slide("a.svs"), name="a$x_$b")
        draw_stages(choose_tiles(slide, GRID, Tissue()), slide, tmp_path / "a.png")
        assert (tmp_path / "a.png").exists()

    def test_blur_has_a_panel_of_its_own(self, small_slide, tmp_path):
        widths = []
        for max_blur in (None, 1):
            tissue, slide = Tissue(max_blur=max_blur), Slide(small_slide("a.svs"))
            draw_stages(choose_tiles(slide, GRID, tissue), slide, tmp_path / "a.png")
            widths.append(as_array(tmp_path / "a.png").shape[1])
        assert widths[1] > 1.2 * widths[0]


class TestUnusableSlides:
    def test_glass(self, small_slide):
        with pytest.raises(NoTissueError, match=r"a: no tissue found: no pixel is stained.*Lower"):
            index_slide(Slide(small_slide("a.svs", tissue=False)), GRID, Tissue())

    def test_too_little_in_every_tile(self, small_slide):
        slide = Slide(small_slide("a.svs"))
        with pytest.raises(NoTissueError, match=r"none of its \d+ tiles.*100%.*the best has \d"):
            index_slide(slide, Grid(800, 0.5), Tissue(min_fraction=1.0))

    def test_smaller_than_a_tile(self, small_slide):
        with pytest.raises(NoTissueError, match="1201 x 907 pixels, less than one tile"):
            index_slide(Slide(small_slide("a.svs")), Grid(908, 0.5), Tissue())

    def test_a_slide_that_lost_its_last_level(self, small_slide):
        """It opens and all of level 0 decodes: only its directories show the loss."""
        path = small_slide("a.tif")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.9)])
        assert len(Slide(path).level_downsamples) == 2
        with pytest.raises(NotASlideError, match=r"a: .*truncated"):
            index_slide(Slide(path), GRID, Tissue())

    def test_pixels_damaged_only_at_full_size(self, small_slide):
        """The thumbnail is intact, so only reading a tile shows the damage."""
        path = small_slide("a.tif")
        raw = bytearray(path.read_bytes())
        raw[2000:150_000] = bytes(148_000)
        path.write_bytes(raw)
        with pytest.raises(UnreadableRegionError, match="level 0"):
            index_slide(Slide(path), Grid(64, 0.5), Tissue())


class TestRealSlides:
    MPP: ClassVar = {
        "LNMET_CK.tif": 0.5,
        "tcga-cr-7395-01a-01-ts1.svs": 0.5,
        "boxes.tiff": 0.5,
        "small_HE_levels.tiff": 0.5,
    }
    TILES: ClassVar = {
        "BS9_HE2_20x.tif": 345,
        "EROS_20x.tif": 497,
        "LNMET_CK.tif": 301,
        "PDACtc3_20x.tif": 273,
        "CMU-1-Small-Region.svs": 63,
        "boxes.tiff": 1,
        "small_HE_levels.tiff": 1,
        "tcga-cr-7395-01a-01-ts1.svs": 214,
    }
    FAULTS: ClassVar = {
        "BS25_SYN_10x.tif": "TooCoarseError: ",  # 1.05 microns per pixel; see the test below
        "boxes.png": "MissingResolutionError: ",
        "boxes_0.dcm": "NoTissueError: .*16 x 16 pixels, less than one tile",
        "boxes_1.dcm": "NoTissueError: .*16 x 16 pixels, less than one tile",
        "small.svs": "NoTissueError: .*16 x 16 pixels, less than one tile",
        "broken.svs": "NotASlideError: .*no format",
        "kidney-48-5.tif": "MissingResolutionError: ",
        "smalltif.tif": "NotASlideError: .*kind I;16",
        "unopenable.tiff": "NotASlideError: .*compression 52479",
        "unreadable.svs": "UnreadableRegionError: .*Bogus marker length",
    }

    def test_every_file_is_indexed_or_says_why_not(self, shared_data, tmp_path):
        """Two folders of every format at 20x; tile counts within a fifth of the expected ones."""
        files = sorted((shared_data / "slides").glob("*/*"))
        rows = [row(p, self.MPP.get(p.name), p.name) for p in files]
        ledger = index_cohort(rows, tmp_path, Grid(), Tissue(), 0, "skip", progress=False)
        assert {r["slide_id"] for r in ledger} >= self.TILES.keys() | self.FAULTS.keys()
        for r in ledger:
            name = r["slide_id"]
            if name in self.TILES:
                assert r["status"] == "indexed", r["reason"]
                assert r["tiles"] == pytest.approx(self.TILES[name], rel=0.2), name
            elif name in self.FAULTS:
                assert r["status"] == "failed"
                assert re.match(self.FAULTS[name], r["reason"]), r["reason"]

    def test_the_10x_ihc_slide_at_its_own_resolution(self, shared_data):
        slide = Slide(shared_data / "slides" / "atlas" / "BS25_SYN_10x.tif")
        index = index_slide(slide, Grid(224, 1.0), Tissue())
        assert index.size0 == round(224 * 1.0 / slide.mpp) or index.size0 == 224
        assert 200 < len(index) < 300

    @pytest.mark.parametrize("name", ["boxes_0.dcm", "boxes_1.dcm", "small.svs"])
    def test_the_smallest_slides_with_the_smallest_tiles(self, shared_data, name):
        slide = Slide(shared_data / "slides" / "fixtures" / name)
        index = index_slide(slide, Grid(8, 0.5), Tissue(min_area_um2=0, min_fraction=0.01))
        assert 1 <= len(index) <= 4

    def test_needle_slides_give_all_their_tiles(self, shared_data, tmp_path):
        """Each of 90 slides has forty tiles of real tissue and nothing else: all are found."""
        paths = sorted((shared_data / "needle" / "slides").glob("*.tif"))
        ledger = index_cohort(map(row, paths), tmp_path, Grid(), Tissue(), 0, progress=False)
        assert {r["tiles"] for r in ledger} == {40}


class TestLostTiles:
    """Tiles listed without bytes are read as white: tissue there is left out and counted."""

    def without(self, path, level, number):
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            counts = tiff.pages[level].tags["TileByteCounts"]
            values = list(counts.value)
            counts.overwrite([*values[:number], 0, *values[number + 1 :]])

    def index(self, path, tmp_path):
        row = SimpleNamespace(slide_id="a", path=path, mpp=0.5)
        (ledger,) = index_cohort([row], tmp_path / "index", GRID, Tissue(), progress=False)
        return ledger, read_index(index_path(tmp_path / "index", GRID, "a"), GRID, Tissue())

    @pytest.mark.filterwarnings("ignore:.*read through OpenSlide")
    @pytest.mark.parametrize("name", ["a.svs", "a.tif"])
    def test_over_tissue_they_are_left_out_and_counted(self, small_slide, tmp_path, name):
        whole, path = small_slide("whole" + name[1:]), small_slide(name)
        side = 240 if name == "a.svs" else 256
        column, row = 2, 1  # in the midst of the oval
        self.without(path, 0, row * -(-1201 // side) + column)
        ledger, index = self.index(path, tmp_path)
        with Slide(whole, mpp=0.5) as sound, Slide(path, mpp=0.5, direct=False) as damaged:
            before = index_slide(sound, GRID, Tissue())
            for x0, y0 in index.coords0.tolist():
                expected = sound.read(x0, y0, GRID)
                np.testing.assert_array_equal(damaged.read(x0, y0, GRID), expected)
        corner = np.array([column, row]) * side
        touched = ((before.coords0 < corner + side) & (before.coords0 + 64 > corner)).all(1)
        assert touched.sum() > 9
        if name == "a.tif":  # its thumbnail is whole, so the choice is the same but for these
            np.testing.assert_array_equal(index.coords0, before.coords0[~touched])
            reason = f"{touched.sum()} tiles of tissue left out: the file lists tiles without"
            assert ledger["reason"].startswith(reason)
        else:
            assert not {*map(tuple, before.coords0[touched])} & {*map(tuple, index.coords0)}
            assert "tiles of tissue left out" in ledger["reason"]

    @pytest.mark.filterwarnings("ignore:.*read through OpenSlide")
    def test_glass_that_a_generic_tiff_leaves_out_is_glass(self, small_slide, tmp_path):
        path = small_slide("a.tif")
        before = self.index(path, tmp_path)[1]
        self.without(path, 0, 0)
        ledger, index = self.index(path, tmp_path / "c")
        assert ledger["reason"] == ""
        np.testing.assert_array_equal(index.coords0, before.coords0)
