"""Resolutions that contradict each other and files that may not be read, through `tapfm index`."""

import csv
import errno
import os

import numpy as np
import pytest
from PIL import Image

from slides.tiling.index import index_path, read_index
from slides.tiling.tissue import Tissue
from slides.wsi import tiff_tags
from tapfm.cli import main
from tests.tiling.test_index import GRID
from tests.zoo import PICTURE, Page, smaller, write_pages

PX = ["--tile-px", "64", "--mpp", "0.5", "--workers", "0"]


def ledger(out):
    with open(out / GRID.tag / "ledger.csv", newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


class TestSlideMpp:
    def test_is_for_slides_that_state_none(self, tmp_path, capsys):
        states = write_pages(tmp_path / "states.tif", [Page(PICTURE)], 0.25)
        silent = write_pages(tmp_path / "silent.tif", [Page(PICTURE)], None)
        given = ["index", str(states), str(silent), "--slide-mpp", "0.5", "--out", str(tmp_path)]
        assert main([*given, *PX]) == 0
        rows = ledger(tmp_path)
        assert float(rows["states"]["mpp"]) == pytest.approx(0.25)
        assert (float(rows["silent"]["mpp"]), rows["silent"]["mpp_source"]) == (0.5, "table")
        said = capsys.readouterr().err
        assert "states: --slide-mpp is for slides that do not state theirs; its file states" in said
        assert "silent:" not in said
        path = index_path(tmp_path, GRID, "states")
        assert read_index(path, GRID, Tissue()).size0 == 128

    def test_the_same_value_needs_no_word(self, tmp_path, capsys):
        states = write_pages(tmp_path / "states.tif", [Page(PICTURE)], 0.503)
        given = ["index", str(states), "--slide-mpp", "0.5", "--out", str(tmp_path)]
        assert main([*given, *PX]) == 0
        assert float(ledger(tmp_path)["states"]["mpp"]) == pytest.approx(0.503, abs=1e-4)
        assert "slide-mpp" not in capsys.readouterr().err

    def test_beats_an_objective_power(self, small_slide, tmp_path):
        path = small_slide("a.svs", mpp=None, power=40)
        given = ["index", str(path), "--slide-mpp", "0.22", "--out", str(tmp_path)]
        assert main([*given, *PX]) == 0
        assert float(ledger(tmp_path)["a"]["mpp"]) == 0.22

    def test_a_table_that_contradicts_a_slide_is_taken_and_named(self, tmp_path, capsys):
        write_pages(tmp_path / "a.tif", [Page(PICTURE)], 0.25)
        table = "case_id,slide_id,slide_path,split,mpp\na,a,a.tif,train,0.5\n"
        (tmp_path / "cohort.csv").write_text(table)
        (tmp_path / "c.yaml").write_text(
            f"data: {{table: {tmp_path}/cohort.csv, index_dir: {tmp_path}, labels: [], workers: 0,"
            " tiles: {tile_px: 64}}"
        )
        assert main(["index", "--config", str(tmp_path / "c.yaml")]) == 0
        row = ledger(tmp_path)["a"]
        assert (float(row["mpp"]), row["mpp_source"]) == (0.5, "table")
        note = "the table's mpp of 0.5 is taken, the file states 0.25 (openslide.mpp-x)"
        assert row["reason"] == note
        assert f"tapfm: a: {note}" in capsys.readouterr().err


class TestPermission:
    def index_both(self, tmp_path):
        return main(
            ["index", str(tmp_path / "locked.tif"), str(tmp_path / "free.tif"), *PX]
            + ["--out", str(tmp_path / "out")]
        )

    @pytest.fixture
    def both(self, tmp_path):
        for name in ("locked", "free"):
            write_pages(tmp_path / f"{name}.tif", [Page(PICTURE)])
        return tmp_path

    def test_a_slide_that_may_not_be_read_stops_no_other(self, both, monkeypatch, capsys):
        def closed(path, *mode):
            if "locked" in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return open(path, *mode)

        monkeypatch.setattr(tiff_tags, "open", closed, raising=False)
        assert self.index_both(both) == 2
        rows = ledger(both / "out")
        assert (rows["locked"]["status"], rows["free"]["status"]) == ("failed", "indexed")
        assert "cannot be read: Permission denied. Ask its owner" in rows["locked"]["reason"]
        assert "locked: " in capsys.readouterr().err

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
    def test_by_the_file_systems_own_word(self, both):
        (both / "locked.tif").chmod(0)
        assert self.index_both(both) == 2
        assert "Permission denied" in ledger(both / "out")["locked"]["reason"]


class TestDarkSlides:
    """Tissue is sought where stains absorb light: in fluorescence, that is the glass."""

    def notes(self, picture, tmp_path, *more):
        write_pages(tmp_path / "a.tif", [Page(picture), Page(smaller(picture, 4))])
        main(["index", str(tmp_path / "a.tif"), "--out", str(tmp_path / "out"), *PX, *more])
        return ledger(tmp_path / "out")["a"]["reason"]

    def test_fluorescence_is_named(self, tmp_path, capsys):
        assert "as in fluorescence" in self.notes(255 - PICTURE, tmp_path)
        assert "most of it is dark" in capsys.readouterr().err

    def test_a_mask_of_the_users_needs_no_word(self, tmp_path):
        (tmp_path / "masks").mkdir()
        Image.fromarray(np.full((120, 143), 255, np.uint8)).save(tmp_path / "masks" / "a.png")
        found = self.notes(255 - PICTURE, tmp_path, "--masks", str(tmp_path / "masks"))
        assert "fluorescence" not in found

    @pytest.mark.parametrize("what", ["plain", "black border", "all tissue"])
    def test_brightfield_is_not(self, what, tmp_path):
        picture = {
            "plain": PICTURE,
            "black border": np.pad(PICTURE, ((0, 0), (2000, 0), (0, 0))),
            "all tissue": PICTURE[500:900, 400:800],
        }[what]
        assert self.notes(np.ascontiguousarray(picture), tmp_path) == ""
