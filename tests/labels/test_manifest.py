"""A download is checked against its manifest: which files are slides, and which are intact.

One pass finds every missing or damaged file; a file is hashed once, and again only if it changed;
an interrupted check continues.
"""

import hashlib

import pytest

from slides.errors import DownloadError
from slides.labels.manifest import BLOCK, ManifestFile, check_files, pick_diagnostic, read_manifest

HEADER = "id\tfilename\tmd5\tsize\tstate\n"
UUID = "d4ff32cd-38cf-40ea-8213-45c2b100ac01"


def slide(number, kind="01Z-00-DX1"):
    return f"TCGA-05-{4000 + number}-{kind}.{UUID}.svs"


@pytest.fixture
def download(tmp_path):
    """Write three files in gdc-client's layout; the last is longer than one block."""
    files = []
    for number, data in enumerate([b"abc", b"de", b"f" * (BLOCK + 7)]):
        path = tmp_path / "slides" / f"id{number}" / slide(number)
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        files.append(
            ManifestFile(f"id{number}", path.name, hashlib.md5(data).hexdigest(), len(data))
        )
    return tmp_path / "slides", files


def check(download, files=None):
    return check_files(files or download[1], download[0], progress=False)


def place(download, number):
    folder, files = download
    return folder / files[number].id / files[number].name


def test_a_manifest_is_read(tmp_path):
    path = tmp_path / "manifest.txt"
    path.write_text(HEADER + f"i\t{slide(1)}\t{'A' * 32}\t17\treleased\n\n")
    assert read_manifest(path) == [ManifestFile("i", slide(1), "a" * 32, 17)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,filename,md5,size\n", "no column id, filename, md5, size in its first line"),
        ("", "no column id"),
        (HEADER, "it lists no file"),
        (HEADER + f"i\tn\t{'a' * 32}\n", "row 2: 3 cells of 5: it is cut short"),
        (HEADER + f"i\tn\t{'a' * 31}\t1\ts\n", "row 2: n has md5 'a{31}' and size '1'"),
        (HEADER + f"i\tn\t{'a' * 32}\t1.5\ts\n", "size '1.5', not 32 hex"),
        (HEADER + f"i\t../n\t{'a' * 32}\t1\ts\n", "not plain names"),
        (HEADER + f"i\tn\t{'a' * 32}\t1\ts\n" * 2, r"2 times\n  name n is listed 2 times"),
    ],
)
def test_a_manifest_that_is_none(tmp_path, text, message):
    path = tmp_path / "manifest.txt"
    path.write_text(text)
    with pytest.raises(DownloadError, match=message):
        read_manifest(path)


def test_diagnostic_slides_are_picked_and_the_rest_counted():
    names = [
        slide(1), slide(1, "01A-01-TS1"), slide(2, "01A-01-BSA"), slide(3, "11A-00-DX1"),
        "x.maf.gz", slide(4, "06A-00-DX2"), "C3L-00001-21.svs",
    ]  # fmt: skip
    files = [ManifestFile(str(n), name, "", 1) for n, name in enumerate(names)]
    picked, left = pick_diagnostic(files)
    assert [name.slide_id for _, name in picked] == [
        "TCGA-05-4001-01Z-00-DX1", "TCGA-05-4004-06A-00-DX2", "C3L-00001-21",
    ]  # fmt: skip
    assert picked[2][1].case_id == "C3L-00001"
    assert left == {
        "TS, sample type 01": 1, "BS, sample type 01": 1, "DX, sample type 11": 1,
        "no slide (.gz)": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["patient7.svs", slide(1)], "patient7.svs: no TCGA or CPTAC name"),
        ([slide(1, "01A-01-TS1")], "no diagnostic slide .* only 1 TS, sample type 01"),
        ([slide(1), slide(1).replace("d4", "e4")], "4001-01Z-00-DX1: 2 files have this barcode"),
    ],
)
def test_slides_that_cannot_be_picked(names, message):
    with pytest.raises(DownloadError, match=message):
        pick_diagnostic([ManifestFile(str(n), name, "", 1) for n, name in enumerate(names)])


def test_whole_files_are_found_where_gdc_client_puts_them_or_anywhere_below(download):
    folder, files = download
    place(download, 1).rename(folder / files[1].name)
    checked = check(download)
    assert checked.faults == []
    assert checked.found["id0"] == folder / "id0" / files[0].name
    assert checked.found["id1"] == folder / files[1].name
    assert checked.hashed == 3


def test_every_fault_is_found_and_named(download):
    folder, files = download
    place(download, 0).write_bytes(b"abX")
    place(download, 1).rename(folder / "id1" / (files[1].name + ".partial"))
    place(download, 2).write_bytes(b"f")
    checked = check(download)
    assert checked.found == {}
    damaged, missing, short = checked.faults
    assert damaged.startswith(f"{place(download, 0)}: damaged: md5 ")
    assert f"the manifest says {files[0].md5}: delete it and run `gdc-client" in damaged
    assert missing.startswith(f"{files[1].name}: missing, not at ")
    assert ".partial has 2 of its bytes" in missing
    assert f"1 bytes, the manifest says {BLOCK + 7}" in short
    assert checked.hashed == 1, "the size alone tells"


def test_a_file_is_hashed_again_only_if_it_changed(download):
    assert check(download).hashed == 3
    again = check(download)
    assert (again.hashed, len(again.found)) == (0, 3)
    place(download, 0).write_bytes(b"abX")  # as long as before
    changed = check(download)
    assert (changed.hashed, list(changed.found)) == (1, ["id1", "id2"])
    assert check(download).faults == changed.faults, "and a bad one is remembered as bad"
    place(download, 0).write_bytes(b"abc")
    assert check(download).faults == []


def test_a_check_that_was_stopped_goes_on(download):
    folder, files = download
    assert check(download, files[:2]).hashed == 2
    record = folder / "verified.tsv"
    record.write_text(record.read_text()[:-5])  # killed in the middle of a line
    checked = check(download)
    assert (checked.hashed, checked.faults) == (2, [])
    assert check(download).hashed == 0


def test_where_nothing_may_be_written_files_are_hashed_every_time(download):
    folder, _ = download
    (folder / "verified.tsv").mkdir()  # what cannot be opened to append, for root too
    for _ in range(2):
        checked = check(download)
        assert (checked.hashed, checked.faults) == (3, [])


def test_the_record_believes_the_manifest_of_today(download):
    files = download[1]
    check(download)
    other = ManifestFile("id0", files[0].name, "0" * 32, 3)
    assert "damaged" in check(download, [other]).faults[0]
