"""One bad file ends no job: it is that slide's fault, in one line, soon and at little memory."""

import os
import re
import resource
import subprocess
import sys

import h5py
import numpy as np
import pytest

from slides.cohort.table import read_cohort
from slides.errors import CohortError, NotASlideError, SlideError, name_fault
from slides.files import replacing
from slides.grid import Grid
from slides.hdf5 import HEAP, OBJECT, REFERENCE, open_h5
from slides.streaming.chunks import named_fault
from slides.tiling.index import index_cohort, index_path, read_index
from slides.tiling.other_tools import read_coordinates
from slides.tiling.tissue import Tissue
from slides.wsi import reader
from slides.wsi.reader import Slide
from tapfm.data.feature_files import read_slide
from tests.conftest import ROOT, stained_picture, write_pyramid
from tests.tiling.test_index import row

GRID, TISSUE = Grid(32, 0.5), Tissue(min_area_um2=1000.0)


@pytest.fixture
def sound(tmp_path):
    return write_pyramid(tmp_path / "sound.tif", stained_picture(311, 263), 0.5, levels=2)


def test_files_that_cannot_be_read_end_no_job(tmp_path, sound):
    """A pipe, a device, a file whose reading fails (root may open any), a folder, nothing."""
    os.mkfifo(tmp_path / "pipe.svs")
    (tmp_path / "folder.svs").mkdir()
    paths = ["pipe.svs", "folder.svs", "gone.svs", "/dev/zero", "/proc/self/mem"]
    rows = [row(tmp_path / path, 0.5) for path in paths] + [row(sound)]
    ledger = index_cohort(rows, tmp_path / "index", GRID, TISSUE, on_error="skip", progress=False)
    assert [each["status"] for each in ledger] == ["failed"] * 5 + ["indexed"]
    for each, path in zip(ledger, paths, strict=False):
        assert path.rpartition("/")[2].partition(".")[0] in each["reason"]
        assert "\n" not in each["reason"]


def test_an_index_is_not_kept_for_a_slide_that_cannot_be_read(tmp_path, sound, monkeypatch):
    def ledger():
        return index_cohort([row(sound)], tmp_path, GRID, TISSUE, on_error="skip", progress=False)

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    assert [ledger()[0]["status"], ledger()[0]["status"]] == ["indexed", "kept"]
    os.utime(sound)
    monkeypatch.setattr("slides.tiling.index.file_fingerprint", closed)
    (found,) = ledger()
    assert found["status"] == "failed"
    assert "cannot be read ([Errno 13] Permission denied" in found["reason"]


def test_no_memory_for_a_slide_is_its_fault(tmp_path, sound, monkeypatch):
    def bomb(self, *_):
        raise MemoryError("Unable to allocate 1.39 TiB")

    monkeypatch.setattr(Slide, "thumbnail", bomb)
    (found,) = index_cohort([row(sound)], tmp_path, GRID, TISSUE, on_error="skip", progress=False)
    assert "sound: " in found["reason"]
    assert "needs more memory than there is (Unable to allocate 1.39 TiB)" in found["reason"]
    assert isinstance(named_fault(MemoryError("2 TiB"), "s1"), SlideError)


def test_a_thumbnail_and_a_lattice_that_no_slide_has_are_refused(sound, monkeypatch):
    monkeypatch.setattr(reader, "MAX_THUMBNAIL", 1000)
    with Slide(sound) as slide, pytest.raises(NotASlideError, match="thumbnail would have 311 x"):
        slide.thumbnail(0.5)
    with pytest.raises(NotASlideError, match=r"big: 9586980 x 9586980 tiles, .* Correct its mpp"):
        Grid(224, 0.5).coords(2**31, 2**31, 0.5, "big")
    assert len(Grid(224, 0.5).coords(300_000, 200_000, 0.25)) > 298_000


@pytest.fixture
def bomb(tmp_path):
    """Two hundred million rows in a file of a few kB."""
    path = tmp_path / "sound_patches.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("coords", (200_000_000, 2), "i8", chunks=(4096, 2))
        data.attrs.update(patch_size=32, patch_size_level0=32, spec_sha256="x")
        file.create_dataset("features", (200_000_000, 8), "f4", chunks=(4096, 8))
    assert path.stat().st_size < 20_000
    os.link(path, tmp_path / "sound.h5")
    return path


def test_two_hundred_million_rows_are_refused_before_they_are_read(bomb, sound):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Slide(sound) as slide:
        for read in (
            lambda: read_coordinates(bomb, slide, GRID),
            lambda: read_index(bomb, GRID, TISSUE),
            lambda: read_slide(bomb.parent, "sound", lambda: 0.5),
        ):
            with pytest.raises(SlideError, match=r"200000000 rows, .* no slide has so many"):
                read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a\0b", "a control character (U+0000)"), ("a\nb", "a control character (U+000A)"),
        ("\x1b[2Ja", "a control character (U+001B)"), ("a\u202egpj", "an invisible character"),
        ("a\u2028b", "a line break"), ("=1+1", "begins like a formula"), ("@a", "a formula"),
        ("é" * 121, "242 bytes, and files are named after it"),
    ],
)  # fmt: skip
def test_names_that_no_file_or_terminal_should_see(name, says, tmp_path):
    assert says in name_fault(name)
    table = tmp_path / "cohort.tsv"
    lines = ["case_id\tslide_id\tslide_path\tsplit\tx", f'c0\t"{name}"\ts.svs\ttrain\t1']
    table.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")
    with pytest.raises(CohortError) as caught:
        read_cohort(table, both_classes=())
    shown = str(caught.value)
    assert not set(shown) & set("\0\x1b\u202e\u2028")


def test_the_longest_name_is_written_whole(tmp_path, sound):
    for name in ("x" * 240, "é" * 120, "TCGA-05-4244-01Z-00-DX1.d4ff32cd"):
        assert name_fault(name) == ""
        index_cohort([row(sound, slide_id=name)], tmp_path, GRID, TISSUE, progress=False)
        assert index_path(tmp_path, GRID, name).is_file()
    with replacing(tmp_path / ("y" * 251 + ".csv")) as partial:
        partial.write_text("x")
    assert (tmp_path / ("y" * 251 + ".csv")).read_text() == "x"
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def texts(tmp_path):
    """A file whose texts lie in a heap, and where that begins."""
    with h5py.File(tmp_path / "texts.h5", "w") as file:
        file.attrs.update({"first": "one", "second": "two", "third": "three"})
    start = (tmp_path / "texts.h5").read_bytes().index(HEAP)
    return tmp_path / "texts.h5", start + len(HEAP) + 8


def test_a_heap_of_texts_without_sizes_is_refused(texts):
    """The library itself would stay in it for ever (h5py 3.16, HDF5 2.0.0), so it is not asked."""
    path, first = texts
    with open_h5(path) as file:
        assert dict(file.attrs) == {"first": "one", "second": "two", "third": "three"}
    sound = path.read_bytes()
    second = first + OBJECT.size + 8
    assert OBJECT.unpack_from(sound, second)[::3] == (2, 3)
    path.write_bytes(sound[:second] + bytes(OBJECT.size) + sound[second + OBJECT.size :])
    with pytest.raises(OSError, match=r"texts are damaged at byte 40 of a heap"):
        open_h5(path)


def test_a_text_that_is_longer_than_its_file_is_refused(texts):
    """The library would allocate 4 GB, and then look. What only looks like a length is none."""
    path, first = texts
    sound = path.read_bytes()
    heap = first - len(HEAP) - 8
    at = sound.index(REFERENCE.pack(3, heap, 2))
    long = bytearray(sound)
    long[at : at + 4] = (4_000_000_000).to_bytes(4, "little")
    path.write_bytes(long)
    with pytest.raises(OSError, match=r"names a text of 4000000000 bytes"):
        open_h5(path)
    path.write_bytes(sound)
    corners = np.array([[1_000_000, heap], [0, 500]], np.int32)  # of tiles, in four bytes each
    with h5py.File(path, "r+") as file:
        file["coords"] = corners
    with open_h5(path) as file:
        assert file.attrs["second"] == "two"
        assert np.array_equal(file["coords"][:], corners)


def test_a_disk_that_is_full_ends_in_one_error_and_no_file(tmp_path):
    """Straight onto it, the library leaves an object that crashes the process (h5py 3.16)."""
    code = f"""if True:
        import gc, resource, sys
        import numpy as np
        from pathlib import Path
        from slides.files import WriteError
        from slides.hdf5 import writing_h5
        path, limit = Path({str(tmp_path / "new.h5")!r}), int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            with writing_h5(path) as file:
                file["features"] = np.ones((185, 128), np.float32)
        except WriteError as error:
            print(error)
        del file
        gc.collect()
        print(sorted(each.name for each in path.parent.iterdir()))"""
    for limit, said in ((20_000, ["new.h5: cannot be written (File too large)", "[]"]),
                        (200_000, ["['new.h5']"])):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code, str(limit)], capture_output=True,
                              text=True, check=True)  # fmt: skip
        lines = done.stdout.splitlines()
        assert len(lines) == len(said)
        assert all(text in line for text, line in zip(said, lines, strict=True)), lines


def test_no_other_file_writes_hdf5_to_a_disk():
    at = [path for top in ("slides", "tapfm") for path in (ROOT / top).rglob("*.py")
          if re.search(r'h5py\.File\([^)]*"(w|a|x|r\+)"', path.read_text())]  # fmt: skip
    assert {path.name for path in at} == {"hdf5.py", "index_file.py"}, "both to memory"


def test_an_index_of_which_a_sector_is_lost_is_named(tmp_path, sound):
    index_cohort([row(sound)], tmp_path / "index", GRID, TISSUE, progress=False)
    path = index_path(tmp_path / "index", GRID, "sound")
    data = bytearray(path.read_bytes())
    start = data.index(HEAP) + 16
    data[start : start + 64] = bytes(64)
    path.write_bytes(data)
    with pytest.raises(SlideError, match="damaged"):
        read_index(path, GRID, TISSUE)


def test_coordinates_without_x_and_y_are_refused(tmp_path, sound):
    with h5py.File(tmp_path / "sound.h5", "w") as file:
        file["coords"] = np.empty((37, 0), np.int64)
        file["coords"].attrs["patch_size"] = 32
    with Slide(sound) as slide, pytest.raises(SlideError, match=r"\(37, 0\), and no x and y"):
        read_coordinates(tmp_path / "sound.h5", slide, GRID)
