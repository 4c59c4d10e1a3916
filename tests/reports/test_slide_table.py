"""The table of slides counts what the config calls labels, and takes nothing else for one."""

import pytest

from slides.grid import Grid
from tapfm.reports.slide_table import by_split, slide_table


@pytest.fixture
def cohort(tmp_path):
    """A table with a column of 0 and 1 that is no label, and its ledger of tiles."""
    (tmp_path / "t.csv").write_text(
        "Case ID,slide_id,slide_path,split,smoker,kind,EGFR,os,dead\n"
        "p1,s1,s1.svs,train,1,A,mut,5,1\n"
        "p1,s2,s2.svs,train,0,B,,6,0\n"
        "p2,s3,s3.svs,val,1,A,wt,,\n"
    )
    folder = tmp_path / "index" / Grid().tag
    folder.mkdir(parents=True)
    lines = "".join(f"s{n},,0.5,tiff,1,{10 * n},1,indexed,\n" for n in (1, 2, 3))
    (folder / "ledger.csv").write_text(
        f"slide_id,path,mpp,mpp_source,tissue_mm2,tiles,seconds,status,reason\n{lines}"
    )
    return {"table": str(tmp_path / "t.csv"), "index_dir": str(tmp_path / "index")}


COUNTED = [
    ({"labels": ["EGFR"], "values": {"mut": 1, "wt": 0}}, ["EGFR 1", "EGFR 0", "EGFR unknown"],
     [["train", 2, 1, 30, 1, 0, 1], ["val", 1, 1, 30, 0, 1, 0]]),
    ({"labels": ["kind"], "task": "multiclass"}, ["kind A", "kind B", "kind unknown"],
     [["train", 2, 1, 30, 1, 1, 0], ["val", 1, 1, 30, 1, 0, 0]]),
    ({"task": {"name": "survival", "time": "os", "event": "dead"}},
     ["dead 1 (event)", "dead 0 (censored)", "dead unknown"],
     [["train", 2, 1, 30, 1, 1, 0], ["val", 1, 1, 30, 0, 0, 1]]),
    ({"labels": ["os"], "task": "regression"}, ["os known", "os unknown"],
     [["train", 2, 1, 30, 2, 0], ["val", 1, 1, 30, 0, 1]]),
    ({"labels": ["gone"]}, [], [["train", 2, 1, 30], ["val", 1, 1, 30]]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "names", "rows"), COUNTED)
def test_only_the_labels_of_the_run_are_counted(cohort, tmp_path, settings, names, rows):
    data = cohort | settings
    slides = slide_table(tmp_path / "saved.csv", data)
    header, counted = by_split(slides, data)
    assert header == ["split", "slides", "cases", "tiles", *names]
    assert counted == rows
