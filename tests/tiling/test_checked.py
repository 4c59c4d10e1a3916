"""An index that nothing has touched is kept without a look; whatever is touched is looked at."""

import json
import os
from dataclasses import replace

import pytest

from slides.grid import Grid
from slides.tiling import index as indexing
from slides.tiling.index import index_cohort, index_path
from slides.tiling.tissue import Tissue
from tests.conftest import stained_picture, write_pyramid
from tests.tiling.test_index import row

GRID, TISSUE = Grid(32, 0.5), Tissue(min_area_um2=1000.0)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        picture = stained_picture(311, 263, seed=number)
        write_pyramid(tmp_path / f"s{number}.tif", picture, 0.5, levels=2)
    return tmp_path


@pytest.fixture
def looked(monkeypatch):
    """The slides whose index is looked at."""
    found, real = [], indexing._index_one
    monkeypatch.setattr(indexing, "_index_one", lambda job: found.append(job[0]) or real(job))
    return found


def ledger(folder, grid=GRID, tissue=TISSUE, mpps=(None, None, None)):
    rows = [row(folder / f"s{n}.tif", mpp) for n, mpp in enumerate(mpps)]
    return index_cohort(rows, folder / "index", grid, tissue, progress=False)


def test_what_is_unchanged_is_not_looked_at_and_has_the_same_row(folder, looked):
    first = ledger(folder)
    assert looked == ["s0", "s1", "s2"]
    again = ledger(folder)
    assert looked == ["s0", "s1", "s2"]
    for one, other in zip(first, again, strict=True):
        assert other == {**one, "status": "kept", "seconds": 0.0, "reason": ""}
    assert [each["status"] for each in ledger(folder, mpps=(0.4, None, None))] == [
        "rebuilt", "kept", "kept",
    ]  # fmt: skip
    assert looked == ["s0", "s1", "s2", "s0"]


def replaced(path):
    data = path.read_bytes()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    copy = path.with_suffix(".copy")
    copy.write_bytes(data)
    os.utime(copy, ns=times)
    copy.replace(path)


@pytest.mark.parametrize("which", ["slide", "index"])
@pytest.mark.parametrize("how", ["touched", "grown", "replaced", "gone"])
def test_whatever_is_touched_is_looked_at(folder, looked, which, how):
    ledger(folder)
    looked.clear()
    path = folder / "s1.tif" if which == "slide" else index_path(folder / "index", GRID, "s1")
    time = path.stat().st_mtime_ns
    if how == "touched":
        os.utime(path, ns=(time, time + 1))
    elif how == "grown":
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(time, time))
    elif how == "replaced":
        replaced(path)
    elif which == "index":
        path.unlink()
    else:
        return
    ledger(folder)
    assert looked == ["s1"]


def test_other_settings_and_a_damaged_record_are_looked_at(folder, looked):
    ledger(folder)
    looked.clear()
    ledger(folder, tissue=replace(TISSUE, min_fraction=0.6))
    assert len(looked) == 3
    record = folder / "index" / GRID.tag / "checked.json"
    looked.clear()
    ledger(folder, tissue=replace(TISSUE, min_fraction=0.6))
    assert not looked
    wrong = json.dumps({"s0": {"seen": 1, "facts": []}})
    for text in ("{", "[]", '{"s0": 1}', '{"s0": {}}', wrong):
        record.write_text(text)
        looked.clear()
        ledger(folder, tissue=replace(TISSUE, min_fraction=0.6))
        assert len(looked) == 3, text
