"""A cohort table is read exactly, or refused with all its faults at once.

Each fault names its row (the header is row 1) and the way out. Unknown labels are nan from the
table to the weights, and never 0.
"""

import math

import pytest

from slides.cohort.table import SPLITS, SlideRow, read_cohort
from slides.errors import CohortError, SettingsError

HEADER = ["case_id", "slide_id", "slide_path", "split", "mpp", "stain", "site", "EGFR", "KRAS"]


def sound_table():
    """Return seven slides: both classes of both labels in every split, a case with two slides."""
    rows = []
    for number, split in enumerate(["train", "train", "val", "val", "test", "test"]):
        egfr, kras = number % 2, 1 - number % 2
        rows.append(
            [
                f"c{number}",
                f"s{number}",
                f"s{number}.svs",
                split,
                "",
                "HE",
                "x",
                str(egfr),
                str(kras),
            ]
        )
    rows.append(["c0", "s6", "s6.svs", "train", "0.2527", "", "", "", "NA"])
    return rows


@pytest.fixture
def write(tmp_path):
    """Write a table beside its slides, and return its path."""

    def write(rows, header=HEADER, name="cohort.csv", encoding="utf-8"):
        separator = "\t" if name.endswith(".tsv") else ","
        lines = [separator.join(line) for line in [header, *rows]]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding=encoding)
        for number in range(7):
            (tmp_path / f"s{number}.svs").touch()
        return path

    return write


def faults(path, *arguments, **options):
    """Return the lines of the error after the first, which has their number."""
    with pytest.raises(CohortError) as caught:
        read_cohort(path, *arguments, **options)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{path}: {len(lines)} fault{'s' * (len(lines) != 1)}"
    return [line.strip() for line in lines]


def one_fault(path, *arguments, **options):
    lines = faults(path, *arguments, **options)
    assert len(lines) == 1, lines
    return lines[0]


def with_cell(row, column, value):
    """Return the sound table with one cell changed; `row` counts from 2, as the errors do."""
    rows = sound_table()
    rows[row - 2][HEADER.index(column)] = value
    return rows


def check_sound(cohort, folder):
    assert cohort.labels == ("EGFR", "KRAS")
    assert [row.slide_id for row in cohort.rows] == [f"s{number}" for number in range(7)]
    assert [len(cohort.split(name)) for name in SPLITS] == [3, 2, 2]
    assert cohort.rows[1] == SlideRow(
        "c1", "s1", folder / "s1.svs", "train", None, "HE", "x", (1.0, 0.0)
    )
    last = cohort.rows[6]
    assert (last.case_id, last.mpp, last.stain) == ("c0", 0.2527, "")
    assert all(math.isnan(label) for label in last.labels)


@pytest.mark.parametrize("name", ["cohort.csv", "cohort.tsv", "COHORT.CSV"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_sound_table(write, tmp_path, name, encoding):
    check_sound(read_cohort(write(sound_table(), name=name, encoding=encoding)), tmp_path)


@pytest.mark.parametrize("separator", [";", "\t", ",", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
def test_a_table_as_a_spreadsheet_saves_it(write, tmp_path, separator, encoding):
    """Separators, encodings, blank columns, a decimal comma, words for 0 and 1."""
    path = write([])
    rows = [[*row, "", ""] for row in sound_table()]
    rows[6][4] = "0,2527" if separator != "," else '"0,2527"'
    for row in rows:
        row[7:9] = [{"0": "FALSE", "1": "TRUE"}.get(cell, cell) for cell in row[7:9]]
        row[6] = "K\u00f6ln" if row[6] else ""
    lines = [separator.join(line) for line in [[*HEADER, "", ""], *rows]]
    said = f"sep={separator}\r\n" if separator == "|" else ""
    path.write_bytes((said + "\r\n".join(lines) + "\r\n").encode(encoding))
    cohort = read_cohort(path)
    assert [row.labels[0] for row in cohort.rows[:6]] == [0, 1, 0, 1, 0, 1]
    assert (cohort.rows[6].mpp, cohort.rows[0].site) == (0.2527, "K\u00f6ln")


def test_columns_without_a_name_that_have_cells_are_numbered(write):
    rows = [[*row, "x", "", "y"] for row in sound_table()]
    line = one_fault(write(rows, [*HEADER, "", "", ""]))
    assert line == "columns 10, 11 have cells and no name: name or remove them"


def test_what_nobody_sees_in_a_cell_does_not_count(write):
    """No-break and zero-width spaces, and the two forms of an umlaut, are one case."""
    rows = sound_table()
    rows[0][0], rows[6][0] = "M\u00fcller\u00a03", "\u200bMu\u0308ller 3"
    cohort = read_cohort(write(rows, [*HEADER[:-1], "KRAS\u00a0"]))
    assert cohort.rows[0].case_id == cohort.rows[6].case_id == "M\u00fcller 3"
    assert cohort.labels == ("EGFR", "KRAS")


def test_ids_that_pandas_made_floats_are_integers(write):
    rows = sound_table()
    for number, row in enumerate(rows):
        row[0], row[1] = f"{number % 6}.0", f"{100 + number}.0"
    cohort = read_cohort(write(rows))
    assert [row.slide_id for row in cohort.rows] == [str(100 + n) for n in range(7)]
    assert cohort.rows[6].case_id == "0"
    rows[3][1] = "0.10"  # then it is no column of integers
    assert read_cohort(write(rows)).rows[0].slide_id == "100.0"


def test_a_path_of_windows_is_found(write, tmp_path):
    path = write(with_cell(3, "slide_path", "deep\\s1.svs"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "s1.svs").rename(tmp_path / "deep" / "s1.svs")
    assert read_cohort(path).rows[1].path == tmp_path / "deep" / "s1.svs"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7", "007"), ("103", "103.0"), ("P_12", "p-12"), ("tcga-05-4244", "TCGA-05-4244"),
        ("TCGA-05-4244", "TCGA-05-4244-01A"), ("P-0000001-T01-IM6", "P-0000001"),
    ],
)  # fmt: skip
def test_one_case_under_two_spellings_is_in_two_splits(write, one, other):
    rows = sound_table()
    rows[0][0] = rows[6][0] = one
    rows[2][0] = other
    line = one_fault(write(rows))
    assert line == (
        f"{one!r}, {other!r} look like one case, and it is in train (rows 2, 8) and val (row 4): "
        "put all slides of a case in one split, and spell it one way"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [("7", "70"), ("1-1", "11"), ("1.05", "1.5"), ("TCGA-05-4244", "TCGA-05-4245")],
)
def test_two_cases_of_like_names_are_two(write, one, other):
    rows = sound_table()
    rows[0][0] = rows[6][0] = one
    rows[2][0] = other
    assert len(read_cohort(write(rows)).rows) == 7


def test_a_copy_of_a_slide_in_another_split_is_warned_of(write, tmp_path, recwarn):
    path = write(sound_table())
    for number, data in enumerate([b"one", b"two", b"one", b"six"]):
        (tmp_path / f"s{number}.svs").write_bytes(data)
    read_cohort(path)
    (told,) = [str(each.message) for each in recwarn]
    assert "s0, s2 are the same slide, byte for byte, in train and val" in told
    (tmp_path / "s2.svs").write_bytes(b"two")
    (tmp_path / "s0.svs").write_bytes(b"two")
    recwarn.clear()
    read_cohort(write(with_cell(4, "split", "train"), name="other.csv"), both_classes=())
    assert not recwarn, "copies within a split leak nothing"


def test_a_sound_parquet_table_as_pandas_types_it(write, tmp_path):
    """Labels are floats with gaps, mpp is float, text has None."""
    pandas = pytest.importorskip("pandas")
    write(sound_table())
    frame = pandas.read_csv(tmp_path / "cohort.csv")
    assert frame["EGFR"].dtype == float
    frame.to_parquet(tmp_path / "cohort.parquet")
    check_sound(read_cohort(tmp_path / "cohort.parquet"), tmp_path)


@pytest.mark.parametrize("column", ["slide_id", "split"])
def test_a_parquet_table_whose_index_is_a_column(write, tmp_path, column):
    """pandas keeps what `set_index` took out of the columns apart."""
    pandas = pytest.importorskip("pandas")
    write(sound_table())
    frame = pandas.read_csv(tmp_path / "cohort.csv").set_index(column)
    frame.to_parquet(tmp_path / "cohort.parquet")
    check_sound(read_cohort(tmp_path / "cohort.parquet"), tmp_path)


def test_the_row_numbers_of_pandas_are_no_label(write, tmp_path):
    numbered = [[str(number), *row] for number, row in enumerate(sound_table())]
    check_sound(read_cohort(write(numbered, header=["Unnamed: 0", *HEADER])), tmp_path)


def test_parquet_booleans_are_labels_and_ids_stay_text(write, tmp_path):
    pandas = pytest.importorskip("pandas")
    write([])
    frame = pandas.DataFrame(
        {
            "case_id": ["007", "008"],
            "slide_id": ["0.10", "1"],
            "slide_path": ["s0.svs", "s1.svs"],
            "split": "train",
            "EGFR": [True, False],
            "paid": ["True", "False"],  # text, and no label
        }
    )
    frame.to_parquet(tmp_path / "b.parquet")
    rows = read_cohort(tmp_path / "b.parquet", ["EGFR"]).rows
    assert [(row.case_id, row.slide_id, row.labels) for row in rows] == [
        ("007", "0.10", (1.0,)),
        ("008", "1", (0.0,)),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "", "NA", "na", "N/A", "nan", "NaN", " NA ", "unknown", "null", "Not Reported", "'--", "?",
        "[Not Available]", "#N/A", "-", ".", "missing", "<NA>", "not_evaluated", "[Discrepancy]",
    ],
)  # fmt: skip
def test_unknown_is_nan_and_never_0(write, text):
    rows = sound_table()
    rows.append(["c9", "s9", "s0x.svs", "train", "", "", "", text, "1"])
    path = write(rows)
    (path.parent / "s0x.svs").touch()
    row = read_cohort(path).rows[-1]
    assert math.isnan(row.labels[0])
    assert row.labels[1] == 1.0


def test_a_users_own_words_are_unknown(write):
    path = write(with_cell(8, "EGFR", "(Indeterminate)"))
    assert math.isnan(read_cohort(path, missing=["indeterminate"]).rows[6].labels[0])
    assert "label 'EGFR' is '(Indeterminate)'" in one_fault(path)


@pytest.mark.parametrize("text", ["0", "0.0", "1", "1.0", "1.00", "FALSE", "true", "True"])
def test_known_labels(write, text):
    value = float(text) if text[0].isdigit() else float(text.lower() == "true")
    assert read_cohort(write(with_cell(8, "EGFR", text))).rows[6].labels[0] == value


def test_labels_can_be_chosen_and_come_in_that_order(write):
    path = write(sound_table())
    cohort = read_cohort(path, ["KRAS"])
    assert cohort.labels == ("KRAS",)
    assert cohort.rows[0].labels == (1.0,)
    assert read_cohort(path, ["KRAS", "EGFR"]).rows[0].labels == (1.0, 0.0)
    assert read_cohort(path, []).rows[0].labels == ()


def test_slides_lie_where_they_are_said_to(write, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    for number in range(7):
        (other / f"s{number}.svs").touch()
    rows = with_cell(2, "slide_path", str(tmp_path / "s0.svs"))
    cohort = read_cohort(write(rows), slides_dir=other)
    assert cohort.rows[0].path == tmp_path / "s0.svs"  # an absolute path stays
    assert cohort.rows[1].path == other / "s1.svs"


def test_blank_lines_do_not_shift_the_row_numbers(write):
    rows = with_cell(4, "mpp", "40x")
    rows.insert(1, [""] * len(HEADER))
    assert one_fault(write(rows)).startswith("row 5: mpp is '40x'")


# Faults, one at a time: what each says


CELLS = [
    (3, "EGFR", "2", "row 3: label 'EGFR' is '2': write 1, 0, or leave it blank"),
    (3, "KRAS", "mut", "row 3: label 'KRAS' is 'mut': write 1, 0"),
    (3, "EGFR", "-1", "row 3: label 'EGFR' is '-1'"),
    (3, "EGFR", "0.5", "row 3: label 'EGFR' is '0.5'"),
    (8, "split", "tune", "row 8: split is 'tune': write one of train, val, test"),
    (8, "split", "", "row 8: split is blank: fill it in"),
    (4, "case_id", "", "row 4: case_id is blank"),
    (4, "slide_id", "", "row 4: slide_id is blank"),
    (4, "slide_path", "", "row 4: slide_path is blank"),
    (4, "slide_id", "a/b", "row 4: slide_id 'a/b' is a path"),
    (4, "slide_id", "..", "row 4: slide_id '..' is a path"),
    (4, "slide_id", "s0", "rows 2, 4: slide_id s0 appears 2 times: keep one row"),
    (4, "slide_path", "gone.svs", "row 4: s2 is not at "),
    (4, "mpp", "352.8", "row 4: mpp is '352.8': give microns per pixel between 0.05 and 20"),
    (4, "mpp", "0", "row 4: mpp is '0'"),
    (4, "mpp", "40x", "row 4: mpp is '40x'"),
    (4, "mpp", "inf", "row 4: mpp is 'inf'"),
    (4, "case_id", "c0", "case c0 is in train (rows 2, 8) and val (row 4): put all slides of a"),
    (2, "KRAS", "NA", "label 'KRAS' in split train: 0 slides are 1, 1 are 0, 2 unknown: no 1, and"),
    (5, "EGFR", "0", "label 'EGFR' in split val: 0 slides are 1, 2 are 0, 0 unknown: no 1, and"),
    (7, "KRAS", "1", "label 'KRAS' in split test: 2 slides are 1, 0 are 0, 0 unknown: no 0, and"),
]


@pytest.mark.parametrize(("row", "column", "value", "text"), CELLS)
def test_a_fault_names_its_row_what_was_found_and_the_way_out(write, row, column, value, text):
    # A split that loses a class to the fault says so too; that is not what is looked at here.
    line = one_fault(write(with_cell(row, column, value)), both_classes=both(text))
    assert line.startswith(text)
    assert ": " in line.removeprefix(text[:10])


def both(text):
    return SPLITS if text.startswith("label") else ()


@pytest.mark.parametrize("name", ["~nobody-here/s.svs", "s" * 300 + ".svs", "ring.svs"])
def test_a_path_that_cannot_be_followed_is_a_missing_slide(write, tmp_path, name):
    (tmp_path / "ring.svs").symlink_to("ring.svs")
    with pytest.raises(CohortError, match=r"row 2: s\S* is not at .*correct slide_path"):
        read_cohort(write(with_cell(2, "slide_path", name)))


def test_one_file_under_two_names_is_a_duplicate(write, tmp_path):
    rows = with_cell(4, "slide_path", "../" + tmp_path.name + "/s0.svs")
    line = one_fault(write(rows))
    assert line == f"rows 2, 4: slide_path {tmp_path / 's0.svs'} appears 2 times: keep one row"


@pytest.mark.parametrize("column", ["case_id", "slide_id", "slide_path", "split"])
def test_a_missing_column(write, column):
    at = HEADER.index(column)
    rows = [row[:at] + row[at + 1 :] for row in sound_table()]
    line = one_fault(write(rows, HEADER[:at] + HEADER[at + 1 :]))
    assert line.startswith(f"column '{column}' is missing: add it (there are: ")


@pytest.mark.parametrize("column", ["mpp", "stain", "site"])
def test_optional_columns_may_be_absent(write, column):
    at = HEADER.index(column)
    rows = [row[:at] + row[at + 1 :] for row in sound_table()]
    cohort = read_cohort(write(rows, HEADER[:at] + HEADER[at + 1 :]))
    assert getattr(cohort.rows[6], column) == (None if column == "mpp" else "")
    assert cohort.labels == ("EGFR", "KRAS")


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["ALK"], "label 'ALK' is no column: choose among the label columns (EGFR, KRAS)"),
        (["EGFR", "EGFR"], "label 'EGFR' is named twice"),
    ],
)
def test_labels_that_are_not_there(write, labels, text):
    assert one_fault(write(sound_table()), labels).startswith(text)


def test_a_column_that_has_a_meaning_is_no_label(write):
    assert any(
        "'mpp' is a column with a meaning" in x for x in faults(write(sound_table()), ["mpp"])
    )


def test_a_ragged_row(write):
    rows = sound_table()
    rows[6] = rows[6][:-1]
    assert one_fault(write(rows)).startswith("row 8: it has 8 cells, the header 9")


def test_a_column_twice(write):
    header = [*HEADER[:-1], "EGFR"]
    assert any(
        x.startswith("column 'EGFR' appears 2 times") for x in faults(write(sound_table(), header))
    )


def test_a_column_that_is_no_label_is_one_line_and_not_one_a_row(write):
    rows = [[*row, str(50 + n)] for n, row in enumerate(sound_table() + sound_table()[:3])]
    lines = faults(write(rows, [*HEADER, "age"]))
    ages = [line for line in lines if "age" in line]
    assert len(ages) == 1
    assert "10 of 10 rows are neither 0, 1 nor unknown (they say '50', '51'" in ages[0]
    assert "name the labels you want" in ages[0]


def test_a_label_written_otherwise_is_one_line_a_row(write):
    """Seven rows are few enough to be listed one by one."""
    rows = [[*row[:-1], "mut"] for row in sound_table()]
    lines = faults(write(rows))
    assert [line.split(":")[0] for line in lines] == [f"row {n}" for n in range(2, 9)]


def test_a_table_without_rows(write):
    assert one_fault(write([])).startswith("there is no row below the header")


def test_all_faults_come_at_once(write):
    """The table has one fault of each kind; no fault hides another."""
    rows = sound_table()
    rows[0][7] = "yes"
    rows[1][3] = "dev"
    rows[2][2] = "gone.svs"
    rows[3][4] = "352.8"
    rows[4][1] = "s5"
    rows[5][0] = "c3"
    rows[6] = rows[6][:3]
    lines = faults(write(rows), ["EGFR", "KRAS", "ALK"])
    for text in [
        "label 'ALK' is no column",
        "row 8: it has 3 cells",
        "row 3: split is 'dev'",
        "row 4: s2 is not at",
        "row 5: mpp is '352.8'",
        "row 2: label 'EGFR' is 'yes'",
        "rows 6, 7: slide_id s5 appears 2 times",
        "case c3 is in val (row 5) and test (row 7)",
        "label 'KRAS' in split train",
    ]:
        assert sum(line.startswith(text) for line in lines) == 1, (text, lines)
    assert len(lines) == 9


def test_a_split_that_needs_no_classes(write):
    rows = with_cell(5, "EGFR", "0")
    path = write(rows)
    assert len(read_cohort(path, both_classes=("train", "test")).rows) == 7
    assert one_fault(path, both_classes=("val",)).startswith("label 'EGFR' in split val")


def test_a_split_may_be_absent(write):
    """A table without test slides can train; only splits that exist need both classes."""
    rows = [row for row in sound_table() if row[3] != "test"]
    assert read_cohort(write(rows)).split("test") == ()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", b"", "no header"),
        ("a.csv", b"\xff\xd8\x81\0\x90", "no text of a known encoding. Save it as UTF-8"),
        ("a.csv", b"PK\3\4....", "a spreadsheet .* Save it as text"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("a.xlsx", b"PK", r"a spreadsheet that cannot be read .* Save it as text"),
        ("a.xls", b"\xd0\xcf", r"tables end in \.csv, .*, this one in \.xls\. Save it as one"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
    ],
)
def test_files_that_are_no_table(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CohortError, match=text) as caught:
        read_cohort(tmp_path / name)
    assert name in str(caught.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(CohortError, match=r"gone\.csv: there is no such file"):
        read_cohort(tmp_path / "gone.csv")


# What is done with a sound cohort


def test_without_leaves_the_rest_in_place(write):
    cohort = read_cohort(write(sound_table())).without(["s2", "s4"])
    assert [row.slide_id for row in cohort.rows] == ["s0", "s1", "s3", "s5", "s6"]
    with pytest.raises(ValueError, match="s99"):
        cohort.without(["s99"])


def test_a_misspelt_split_is_no_empty_split(write):
    with pytest.raises(SettingsError, match="give one of train, val, test"):
        read_cohort(write(sound_table())).split("valid")


def test_the_hash_is_of_the_table_not_of_the_disk(write, tmp_path):
    first = read_cohort(write(sound_table())).sha256
    other = tmp_path / "moved"
    other.mkdir()
    for number in range(7):
        (other / f"s{number}.svs").touch()
    assert read_cohort(write(sound_table()), slides_dir=other).sha256 == first
    changed = set()
    for row, column, value in [
        (8, "EGFR", "0"),
        (8, "EGFR", "1"),
        (8, "mpp", ""),
        (2, "stain", "x"),
    ]:
        changed.add(read_cohort(write(with_cell(row, column, value))).sha256)
    assert len(changed | {first}) == 5
    assert read_cohort(write(sound_table()), ["KRAS", "EGFR"]).sha256 != first
