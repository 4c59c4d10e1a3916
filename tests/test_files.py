"""A file is complete or does not exist."""

import gzip
import multiprocessing
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from slides.errors import IndexFileError, NoTissueError
from slides.files import (
    DAMAGE,
    damage_as,
    decode_text,
    files_below,
    join_csv,
    replacing,
    rows_there,
    write_text,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as partial:
        partial.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_permissions_of_the_umask_whoever_writes_it(tmp_path, umask, mode):
    """safetensors makes its files 0600, so a colleague could not read a shared model."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a.safetensors") as partial:
            save_file({"a": np.zeros(2)}, partial)
        write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    for name in ("a.safetensors", "a.txt"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode


def extend(path, writer, rows):
    """Write one row after the other, as one of several processes."""
    for number in range(rows):
        join_csv(path, ("slide_id", "p"), [(f"{writer}-{number}", number)])


def test_rows_of_many_writers_at_once_are_all_kept(tmp_path):
    path, spawn = tmp_path / "deep" / "predictions.csv", multiprocessing.get_context("fork")
    writers = [spawn.Process(target=extend, args=(path, n, 40)) for n in range(4)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
        assert each.exitcode == 0
    rows = rows_there(path, ("slide_id", "p"))
    assert sorted(name for name, _ in rows) == sorted(
        f"{w}-{n}" for w in range(4) for n in range(40)
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_text_is_read_in_the_encodings_of_spreadsheets(encoding, pack):
    assert decode_text(pack("Köln;0,5\n".encode(encoding))) == "Köln;0,5\n"


@pytest.mark.parametrize("kind", DAMAGE)
def test_whatever_a_reader_raises_is_damage_and_says_what(kind):
    says = pytest.raises(IndexFileError, match=rf"^a\.h5: {kind.__name__}: no bytes")
    with says, damage_as(lambda why: IndexFileError(f"a.h5: {why}")):
        raise kind("no bytes")


def test_a_fault_that_is_known_and_a_bug_stay_what_they_are():
    for known in (NoTissueError("b: none"), ZeroDivisionError("by zero")):
        with pytest.raises(type(known)), damage_as(IndexFileError):
            raise known


class TestFilesBelow:
    @pytest.fixture
    def tree(self, tmp_path):
        """A folder with files, and a link to another disk and one to itself."""
        for name in ("here/b/2.png", "here/1.png", "disk/deep/3.png", "here/._1.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "here" / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
        (tmp_path / "here" / "b" / "round").symlink_to(tmp_path / "here", target_is_directory=True)
        (tmp_path / "here" / "lost").symlink_to(tmp_path / "nowhere")
        return tmp_path / "here"

    def test_linked_folders_are_entered_and_circles_are_not(self, tree):
        found = [path.relative_to(tree).as_posix() for path in files_below(tree)]
        assert found == ["1.png", "b/2.png", "link/deep/3.png"]

    def test_nothing_below_nothing(self, tmp_path):
        assert files_below(tmp_path / "none") == []
        assert files_below(tmp_path) == []
