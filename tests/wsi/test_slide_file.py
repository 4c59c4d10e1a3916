"""One slide has one path and one name, whichever of its files or folders was given.

DICOM series and MIRAX folders, in a table and on the command line; two slides stay two.
"""

import csv
import warnings

import numpy as np
import pytest

from slides.cohort.table import read_cohort
from slides.errors import CohortError, NotASlideError, SettingsError
from slides.files import names_of, slide_stem
from slides.grid import Grid
from slides.streaming.loose_slides import rows_of_files
from slides.wsi.reader import Slide
from slides.wsi.slide_file import slide_file, slide_name
from tapfm.cli import main
from tests.dicom import write_series
from tests.zoo import PICTURE, Page, smaller, write_pages


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """The files of one slide, alone in a folder called S21-7."""
    return write_series(tmp_path_factory.mktemp("dicom") / "S21-7", PICTURE, refers=True)


@pytest.fixture
def mirax(tmp_path):
    """A slide as MIRAX lays it out: `case.mrxs` beside the folder `case`."""
    (tmp_path / "case").mkdir()
    for name in ("Slidedat.ini", "Index.dat", "Data0000.dat"):
        (tmp_path / "case" / name).write_bytes(b"x")
    (tmp_path / "case.mrxs").write_bytes(b"\xff\xd8\xff")
    return tmp_path / "case.mrxs"


class TestDicom:
    def test_every_file_and_the_folder_are_the_finest_level(self, series):
        assert {slide_file(path) for path in (*series, series[0].parent)} == {series[0]}
        assert slide_name(series[0]) == "S21-7"

    def test_levels_and_pixels(self, series):
        with Slide(slide_file(series[-1])) as slide:
            assert (slide.vendor, slide.mpp) == ("dicom", 0.5)
            assert (slide.width0, slide.height0) == PICTURE.shape[1::-1]
            np.testing.assert_array_equal(slide.read(333, 257, Grid(97, 0.5)),
                                          PICTURE[257:354, 333:430])  # fmt: skip
            half = smaller(PICTURE, 2)[100:164, 200:264].astype(int)
            assert np.abs(slide.read(400, 200, Grid(64, 1.0)) - half).mean() < 2.5

    def test_two_series_in_a_folder_are_two_slides(self, tmp_path):
        first = write_series(tmp_path, PICTURE)
        second = write_series(tmp_path, np.ascontiguousarray(PICTURE[:, ::-1]))
        assert [slide_file(path) for path in second] == [second[0]] * len(second)
        assert [row.slide_id for row in rows_of_files([*first, *second], None)] == ["0000", "0004"]
        assert slide_file(tmp_path) == tmp_path
        with pytest.raises(NotASlideError, match=r"a folder of 2 slides.*0000.dcm, 0004.dcm"):
            _ = Slide(tmp_path).width0

    def test_files_without_an_ending(self, tmp_path):
        files = write_series(tmp_path / "IM", PICTURE, levels=(1,), ending="")
        assert slide_file(files[-1]) == files[0]

    def test_a_series_that_refers_to_another_is_its_own(self, tmp_path):
        """Without that, files of one slide would be as many slides."""
        files = write_series(tmp_path, PICTURE, levels=(1, 2), refers=True)
        assert {slide_file(path) for path in files} == {files[0]}

    def test_other_dicom_files_are_no_slide(self, tmp_path, shared_data):
        path = tmp_path / "ct.dcm"
        path.write_bytes(bytes(128) + b"DICM" + bytes(500))
        assert slide_file(path) == path


class TestMirax:
    @pytest.mark.parametrize("given", ["case", "case/Slidedat.ini", "case/Data0000.dat"])
    def test_folder_and_files(self, given, mirax):
        assert slide_file(mirax.parent / given) == mirax
        assert slide_file(mirax) == mirax

    def test_both_at_once_are_one(self, mirax):
        assert [row.path for row in rows_of_files(sorted(mirax.parent.iterdir()), None)] == [mirax]

    def test_a_folder_without_its_file_says_so(self, mirax):
        mirax.unlink()
        with pytest.raises(NotASlideError, match="case is a folder without a slide"):
            _ = Slide(mirax.with_suffix("")).width0


class TestFolders:
    def test_of_one_slide_and_other_files(self, tmp_path):
        """The GDC downloads each slide into a folder of its own."""
        (tmp_path / "d4ff" / "logs").mkdir(parents=True)
        (tmp_path / "d4ff" / "annotations.txt").write_text("id")
        (tmp_path / "d4ff" / "._TCGA-1.tif").write_bytes(b"mac")
        path = write_pages(tmp_path / "d4ff" / "TCGA-1.tif", [Page(PICTURE)])
        assert [(row.slide_id, row.path) for row in rows_of_files([tmp_path / "d4ff"], None)] == [
            ("TCGA-1", path)
        ]

    def test_two_slides_of_one_name_are_still_refused(self, tmp_path):
        paths = [tmp_path / name / "a.tif" for name in ("1", "2")]
        for path in paths:
            path.parent.mkdir()
            path.write_bytes(b"")
        with pytest.raises(SettingsError, match="both have this name"):
            rows_of_files(paths, None)


class TestTables:
    def table(self, folder, paths):
        lines = [f"c{n},s{n},{path},train" for n, path in enumerate(paths)]
        (folder / "t.csv").write_text("\n".join(["case_id,slide_id,slide_path,split", *lines]))
        return folder / "t.csv"

    def test_a_folder_is_its_slide(self, tmp_path, series, mirax):
        paths = [series[0].parent, mirax.with_suffix("")]
        cohort = read_cohort(self.table(tmp_path, paths), labels=[])
        assert [row.path for row in cohort.rows] == [series[0], mirax]

    def test_two_files_of_a_slide_are_one_slide_twice(self, tmp_path, series):
        table = self.table(tmp_path, [series[1], series[0].parent])
        with pytest.raises(CohortError, match=r"slide_path .* appears 2 times"):
            read_cohort(table, labels=[])


def test_index_by_the_folder(series, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = ["index", str(series[0].parent), str(series[2]), "--out", str(tmp_path)]
        assert main([*given, "--tile-px", "64", "--workers", "0"]) == 0
    with open(next(tmp_path.rglob("ledger.csv")), newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["slide_id"], row["path"]) == ("S21-7", str(series[0]))
    assert int(row["tiles"]) > 20


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a/S21.7_A.ome.tiff", "S21.7_A"), ("b.OME.TIF", "b"), ("c.ome.svs", "c.ome"),
        ("TCGA-05-4244-01Z-00-DX1.D4FF.svs", "TCGA-05-4244-01Z-00-DX1.D4FF"), ("plain", "plain"),
    ],
)  # fmt: skip
def test_stems(path, stem):
    assert slide_stem(path) == stem
    assert stem in names_of("x", path)
