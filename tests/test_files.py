"""A file is complete or does not exist."""

import pytest

from slides.errors import IndexFileError, NoTissueError
from slides.files import DAMAGE, damage_as, replacing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as partial:
        partial.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", DAMAGE)
def test_whatever_a_reader_raises_is_damage_and_says_what(kind):
    says = pytest.raises(IndexFileError, match=rf"^a\.h5: {kind.__name__}: no bytes")
    with says, damage_as(lambda why: IndexFileError(f"a.h5: {why}")):
        raise kind("no bytes")


def test_a_fault_that_is_known_and_a_bug_stay_what_they_are():
    for known in (NoTissueError("b: none"), ZeroDivisionError("by zero")):
        with pytest.raises(type(known)), damage_as(IndexFileError):
            raise known
