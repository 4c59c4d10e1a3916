"""Counts say what the table says, for every task, and never take an unknown value for 0."""

import pytest

from slides.cohort.cases import unlabelled
from slides.cohort.counts import count_table
from slides.cohort.table import read_cohort

HEAD = "case_id,slide_id,slide_path,split"
ROWS = [("a", "train"), ("a", "train"), ("b", "train"), ("c", "val"), ("d", "val"), ("e", "test")]


def cohort(folder, columns, cells, **how):
    lines = [f"{HEAD},{columns}"]
    for number, ((case, split), values) in enumerate(zip(ROWS, cells, strict=True)):
        lines.append(f"{case},s{number},s{number}.svs,{split},{values}")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return read_cohort(folder / "t.csv", need_slides=False, both_classes=(), **how)


@pytest.mark.parametrize(
    ("columns", "cells", "task", "counted"),
    [
        ("A,B", ["1,", "1,", "0,", "NA,1", "0,0", "1,1"], "multilabel",
         [["A 1", "2", "0", "1"], ["A 0", "1", "1", "0"], ["A unknown", "0", "1", "0"],
          ["B 1", "0", "1", "1"], ["B 0", "0", "1", "0"], ["B unknown", "3", "0", "0"]]),
        ("kind", ["X", "X", "Y", "Y", "", "X"], "multiclass",
         [["kind X", "2", "0", "1"], ["kind Y", "1", "1", "0"], ["kind unknown", "0", "1", "0"]]),
        ("tmb", ["1.5", "2", "", "3", "4", "5"], "regression",
         [["tmb known", "2", "2", "1"], ["tmb unknown", "1", "0", "0"]]),
        ("t,e", ["1,1", "1,1", "5,0", "3,0", "3,", "2,1"],
         {"name": "survival", "time": "t", "event": "e"},
         [["e 1 (event)", "2", "0", "1"], ["e 0 (censored)", "1", "1", "0"],
          ["e unknown", "0", "1", "0"]]),
    ],
)  # fmt: skip
def test_every_task_counts_its_values_by_split(columns, cells, task, counted, tmp_path):
    table = count_table(cohort(tmp_path, columns, cells, task=task))
    assert table[:3] == [["", "train", "val", "test"], ["cases", "2", "2", "1"],
                         ["slides", "3", "2", "1"]]  # fmt: skip
    assert table[3:] == counted


def test_a_split_without_slides_has_no_column_and_no_unknown_no_row(tmp_path):
    found = cohort(tmp_path, "A", ["1", "1", "0", "1", "0", "0"]).without(["s5"])
    assert count_table(found)[0] == ["", "train", "val"]
    assert [row[0] for row in count_table(found)] == ["", "cases", "slides", "A 1", "A 0"]


def test_a_bag_is_without_a_label_if_all_its_slides_are(tmp_path):
    rows = cohort(tmp_path, "A,B", ["1,", ",", ",", ",", ",", ","]).split("train")
    assert unlabelled(rows, ["A", "B"], "slide") == {"s1", "s2"}
    assert unlabelled(rows, ["A", "B"], "case") == {"s2"}, "s0 lends s1 of the same case its label"
    assert unlabelled(rows, [], "slide") == frozenset()
    task = {"name": "survival", "time": "t", "event": "e"}
    rows = cohort(tmp_path, "t,e", ["5,1", ",", "", ",", ",", ","][:2] + [",1", ",", ",", ","],
                  task=task).split("train")  # fmt: skip
    assert unlabelled(rows, ["t", "e"], "slide") == {"s1", "s2"}, "the row's number is no label"
