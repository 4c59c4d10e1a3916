"""Folders of labelled tiles and downloads as they are named and linked on people's disks."""

import hashlib

import pytest

from slides.cohort.labelled_tiles import read_tiles
from slides.labels.manifest import ManifestFile, check_files
from tests.cohort.test_labelled_tiles import touch
from tests.zoo import PART_FOLDERS


@pytest.mark.parametrize("names", PART_FOLDERS, ids="-".join)
def test_parts_in_other_words_are_parts_and_no_classes(tmp_path, names):
    for part in names:
        touch(tmp_path, *(f"{part}/{kind}/{part}{n}.png" for kind in "xy" for n in range(8)))
    found = read_tiles(tmp_path)
    assert found.classes == ("x", "y")
    first, last = names[0], names[-1]
    assert {row.path.parts[-3] for row in found.part("test")} == {last}
    trained = {row.path.parts[-3] for row in found.part("train")}
    assert trained == {first}
    if len(names) == 3:
        assert {row.path.parts[-3] for row in found.part("val")} == {names[1]}


def test_a_class_on_another_disk_is_a_class(tmp_path):
    touch(tmp_path, *(f"tiles/{kind}/{n}.png" for kind in "xy" for n in range(8)))
    touch(tmp_path, *(f"disk/z/{n}.png" for n in range(8)))
    plain = read_tiles(tmp_path / "tiles")
    (tmp_path / "tiles" / "z").symlink_to(tmp_path / "disk" / "z", target_is_directory=True)
    linked = read_tiles(tmp_path / "tiles")
    assert (plain.classes, linked.classes) == (("x", "y"), ("x", "y", "z"))
    assert len(linked.rows) == 24


def test_a_download_on_another_disk_is_found(tmp_path):
    file = tmp_path / "disk" / "batch" / "id0" / "a.svs"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"slide")
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    listed = [ManifestFile("id0", "a.svs", hashlib.md5(b"slide").hexdigest(), 5)]
    checked = check_files(listed, tmp_path / "slides", progress=False)
    assert not checked.faults
    assert checked.found["id0"] == tmp_path / "slides" / "link" / "batch" / "id0" / "a.svs"


def test_hidden_folders_and_files_are_no_class_and_no_tile(tmp_path):
    """Notebooks keep copies of what they opened, and macOS what it could not store."""
    touch(tmp_path, *(f"{kind}/{n}.png" for kind in "xy" for n in range(8)))
    touch(tmp_path, ".ipynb_checkpoints/0-checkpoint.png", "x/.ipynb_checkpoints/1.png",
          "x/._2.png", "x/.3.png")  # fmt: skip
    found = read_tiles(tmp_path)
    assert found.classes == ("x", "y")
    assert len(found.rows) == 16
