"""Thirty sloppy tables, one kind of fault each: read as they are, mended, or refused in one line.

Each is the sound table with one thing changed. What is mended reads to the same cohort; what cannot
be known is one line that names it and says what to do.
"""

import csv
import io
import re

import pandas as pd
import pytest

from slides.cohort.mending import mend
from slides.cohort.table import read_cohort
from slides.errors import CohortError
from slides.files import write_csv

HEAD = ["case_id", "slide_id", "slide_path", "split", "mpp", "EGFR"]
SOUND = [
    ["p1", "s1", "s1.svs", "train", "0.25", "1"],
    ["p2", "s2", "s2.svs", "train", "0.25", "0"],
    ["p3", "s3", "s3.svs", "val", "0.25", "1"],
    ["p4", "s4", "s4.svs", "val", "", "0"],
    ["p5", "s5", "s5.svs", "test", "", "1"],
    ["p6", "s6", "s6.svs", "test", "", "0"],
]


def text(head=HEAD, rows=SOUND, separator=",", above=""):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, lineterminator="\n")
    writer.writerows([head, *rows])
    return above + out.getvalue()


def column(name, change, head=None):
    """Return the sound table with each cell of a column changed, and the column renamed."""
    at = HEAD.index(name)
    rows = [[*row[:at], change(row[at]), *row[at + 1 :]] for row in SOUND]
    return text([*HEAD[:at], head or name, *HEAD[at + 1 :]], rows)


def word(one, zero):
    return column("EGFR", {"1": one, "0": zero}.get)


def without(name):
    at = HEAD.index(name)
    return text(*([row[:at] + row[at + 1 :] for row in part] if part is SOUND else
                  part[:at] + part[at + 1 :] for part in (HEAD, SOUND)))  # fmt: skip


def excel(folder, name, frames, **how):
    path = folder / name
    with pd.ExcelWriter(path.with_suffix(".xlsx")) as book:
        for sheet, frame in frames.items():
            frame.to_excel(book, sheet_name=sheet, index=False, **how)
    return path.with_suffix(".xlsx").rename(path)


def frame(rows=SOUND):
    made = pd.DataFrame(rows, columns=HEAD)
    return made.assign(mpp=pd.to_numeric(made["mpp"]), EGFR=made["EGFR"] == "1")


@pytest.fixture
def folder(tmp_path):
    """Six slides, the third in a folder of its own."""
    for number in range(1, 7):
        place = tmp_path / "deep" / "er" if number == 3 else tmp_path
        place.mkdir(parents=True, exist_ok=True)
        (place / f"s{number}.svs").write_text(f"slide {number}")
    (tmp_path / "s3.svs").write_text("slide 3")
    (tmp_path / "deep" / "er" / "s3.svs").rename(tmp_path / "deep" / "er" / "s9.svs")
    return tmp_path


def key(cohort):
    """Return what must be the same however the table was written."""
    return [(r.case_id, r.slide_id, r.path.name, r.split, r.mpp, r.labels) for r in cohort.rows]


@pytest.fixture
def sound(folder):
    (folder / "sound.csv").write_text(text())
    return key(read_cohort(folder / "sound.csv"))


READ = {
    "semicolons": (text(separator=";"), {}),
    "tabs in a .csv": (text(separator="\t"), {}),
    "bars": (text(separator="|"), {}),
    "Excel's sep line": (text(separator=";", above="sep=;\n"), {}),
    "decimal commas": (text(separator=";").replace("0.25", "0,25"), {}),
    "a byte order mark": ("\ufeff" + text(), {}),
    "UTF-16": (text().encode("utf-16"), {}),
    "Windows-1252": (text().replace("p1", "Müller").encode("cp1252"), {}),
    "blank columns and rows": (text().replace("\n", ",,\n") + ",,,,,,,\n", {}),
    "spaces round cells": (text().replace(",", " , "), {}),
    "header in capitals": (text([name.upper().replace("_", " ") for name in HEAD[:4]] + HEAD[4:]),
                           {}),
    "ids as decimals": (column("case_id", lambda case: f"{case[1:]}.0"), {}),
    "splits by other words": (column("split", {"train": "Training", "val": "validation",
                                               "test": "TEST"}.get), {}),
    "TRUE and FALSE": (word("TRUE", "FALSE"), {}),
    "backslashes": (column("slide_path", lambda name: f".\\{name}"), {}),
    "own names of columns": (column("case_id", str, "Patient No."),
                             {"names": {"Patient No.": "case_id"}}),
    "own words": (word("mut", "wt"), {"values": {"mut": 1, "WT": 0}}),
    "yes and no, as YAML has them": (word("Yes", "no"), {"values": {True: 1, False: 0}}),
    "words of one column": (word("hit", "miss"), {"values": {"EGFR": {"hit": 1, "miss": 0}}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_what_can_mean_one_thing_alone_is_read(folder, sound, kind):
    content, how = READ[kind]
    path = folder / "t.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = key(read_cohort(path, **how))
    if kind in ("ids as decimals", "Windows-1252"):
        assert found[0][0] == {"ids as decimals": "1", "Windows-1252": "Müller"}[kind]
        found, sound = [row[1:] for row in found], [row[1:] for row in sound]
    assert found == sound


@pytest.mark.parametrize("name", ["t.xlsx", "t.csv", "t.txt"])
def test_a_workbook_is_read_whatever_it_is_called(folder, sound, name):
    assert key(read_cohort(excel(folder, name, {"Sheet1": frame()}))) == sound


def test_of_several_sheets_the_one_with_a_split_is_read(folder, sound):
    notes = pd.DataFrame({"notes": ["read me"]})
    path = excel(folder, "t.xlsx", {"Notes": notes, "Cohort": frame()})
    assert key(read_cohort(path)) == sound
    path = excel(folder, "two.xlsx", {"A": frame(), "B": frame()})
    with pytest.raises(CohortError, match=r"2 sheets have cells \(A, B\) and 2 a column `split`"):
        read_cohort(path)


MENDED = {
    "Patient ID": (column("case_id", str, "Patient ID"), "column 'Patient ID': now case_id"),
    "mutated and wild type": (word("Mutated", "wild type"), "column EGFR: 'Mutated' is now 1"),
    "plus and minus": (word("+", "-"), "column EGFR: '+' is now 1, '-' is now 0"),
    "other ending": (column("slide_path", lambda name: name.replace("svs", "tif")),
                     "slide_path, ending of 6 slides: s1.tif is s1.svs"),
    "no ending": (column("slide_path", lambda name: name[:2]), "slide_path, ending of 6 slides"),
    "another machine's folders": (column("slide_path", lambda name: f"D:\\scans\\{name}"),
                                  "slide_path, folder of 6 slides: D:\\scans\\s1.svs is s1.svs"),
    "missing folder": (column("slide_path", lambda n: f"elsewhere/{n}"), "slide_path, folder of 6"),
    "no slide_id": (without("slide_id"), "column slide_id: made from the names of the files"),
    "no slide_path": (without("slide_path"), "column slide_path: made from slide_id"),
    "units": (column("mpp", lambda mpp: f"{mpp} µm/px" if mpp else ""), "column mpp: '0.25 µm/px'"),
    "a row twice": (text(rows=[*SOUND, SOUND[2]]), "1 rows that repeat another: left out"),
    "a title": (text(above="Cohort of 2023\nseen by AB\n"), "2 rows above the header: left out"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MENDED)
def test_what_has_one_likely_meaning_is_mended_and_told(folder, sound, kind):
    content, told = MENDED[kind]
    (folder / "t.csv").write_text(content)
    with pytest.raises(CohortError) as refused:
        read_cohort(folder / "t.csv")
    assert str(refused.value)
    made = mend(folder / "t.csv")
    assert any(line.startswith(told) for line in made.done), made.done
    write_csv(folder / "new.csv", made.header, made.rows)
    assert key(read_cohort(folder / "new.csv")) == sound
    assert mend(folder / "new.csv").done == [], "once is enough"


REFUSED = {
    "no split": (without("split"), r"column 'split' is missing: .*tapfm split"),
    "no patient": (without("case_id"), "column 'case_id' is missing: add it"),
    "cells merged over rows": (column("case_id", lambda case: case if case != "p2" else ""),
                               "row 3: case_id is blank: fill it in"),
    "a row of sums": (text(rows=[*SOUND, ["", "", "", "", "", "3"]]), "row 8: .* is blank"),
    "magnification": (column("mpp", lambda _: "40x"), "row 2: mpp is '40x': give microns"),
    "three words": (word("high", "maybe"), "row 3: label 'EGFR' is 'maybe'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_known_is_said_and_nothing_is_guessed(folder, kind):
    content, line = REFUSED[kind]
    (folder / "t.csv").write_text(content)
    made = mend(folder / "t.csv")
    write_csv(folder / "new.csv", made.header, made.rows)
    for table in ("t.csv", "new.csv"):
        with pytest.raises(CohortError) as refused:
            read_cohort(folder / table)
        assert re.search(line, str(refused.value)), refused.value


def test_a_name_that_no_column_has_is_one_line(folder):
    (folder / "t.csv").write_text(text())
    with pytest.raises(CohortError, match=r"data\.columns: there is no column 'Pat'\. There are: "):
        read_cohort(folder / "t.csv", names={"Pat": "case_id"})


def test_likely_columns_and_words_are_named_with_what_to_write(folder):
    (folder / "t.csv").write_text(column("case_id", str, "Patient ID"))
    with pytest.raises(CohortError, match=r"write data\.columns: \{Patient ID: case_id\}"):
        read_cohort(folder / "t.csv")
    (folder / "t.csv").write_text(word("mut", "wt"))
    with pytest.raises(CohortError, match=r"write data\.values: \{'mut': 1, 'wt': 0\}") as refused:
        read_cohort(folder / "t.csv")
    assert len(str(refused.value).splitlines()) == 2
