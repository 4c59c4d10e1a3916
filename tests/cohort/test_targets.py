"""Label columns of every task are read exactly, or refused with row and remedy."""

import math

import numpy as np
import pytest

from slides.cohort.table import read_cohort
from slides.cohort.targets import make_columns
from slides.errors import CohortError
from tapfm.stats.metrics import MACRO

SPLITS = ["train"] * 4 + ["val"] * 3 + ["test"] * 3
SURVIVAL = {"name": "survival", "time": "months", "event": "dead"}
TIMES = ["12.5", "3", "0", "40", "7", "9", "30", "1", "2", "50"]
DEAD = ["1", "0", "1:DECEASED", "0:LIVING", "1", "1", "0", "1", "0", "1"]


@pytest.fixture
def read(tmp_path):
    """Read a table of ten slides with these columns."""

    def read(task, labels=None, **columns):
        header = ["case_id", "slide_id", "slide_path", "split", *columns]
        lines = [",".join(header)]
        for n, split in enumerate(SPLITS):
            (tmp_path / f"s{n}.svs").touch()
            lines.append(",".join([f"c{n}", f"s{n}", f"s{n}.svs", split,
                                   *(values[n] for values in columns.values())]))  # fmt: skip
        (tmp_path / "cohort.csv").write_text("\n".join(lines) + "\n")
        return read_cohort(tmp_path / "cohort.csv", labels, task=task)

    return read


def faults(read, *arguments, **columns):
    with pytest.raises(CohortError) as caught:
        read(*arguments, **columns)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def column(cohort, k=0):
    return [row.labels[k] for row in cohort.rows]


def test_classes_are_numbered_by_name(read):
    cohort = read("multiclass", kind=list("babcabcabc"))
    assert cohort.classes == ("a", "b", "c")
    assert column(cohort) == [1, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    other = read("multiclass", kind=list("babdabdabd"))
    assert other.sha256 != cohort.sha256, "the names are part of the fingerprint"


def test_grades_are_numbered_by_size(read):
    assert read("multiclass", kind=["10", "2"] * 5).classes == ("2", "10")


def test_an_unknown_class_is_nan(read):
    cohort = read("multiclass", kind=["", "NA", *"abababab"])
    assert np.isnan(column(cohort)[:2]).all()
    assert cohort.classes == ("a", "b")


@pytest.mark.parametrize(
    "classes",
    [
        ("HER2+", "HER2-"), ("HR+/HER2-", "HR+/HER2+", "HR-/HER2+"), ("+", "-"), ("3+4", "4+3"),
        ("MSI", "MSS"), ("1-2", "12"), ("<5", ">5"), ("pT1", "pT1a"),
    ],
)  # fmt: skip
def test_classes_that_differ_in_a_sign_are_classes_of_their_own(read, classes):
    three = (classes * 3)[:3]
    assert set(read("multiclass", kind=[*three, three[0], *three, *three]).classes) == set(classes)


@pytest.mark.parametrize(
    ("one", "other"),
    [("IIa", "IIA"), ("non-small cell", "Non_small cell"), ("grade 1", "Grade1"), ("1", "1.0")],
)
def test_classes_that_look_alike_are_refused(read, one, other):
    first, second = sorted((one, other))
    faults_ = faults(read, "multiclass", kind=[one, other] * 5)
    assert faults_ == [
        f"column 'kind': {first!r} and {second!r} look like one class: spell it one way"
    ]


def test_words_for_unknown_are_no_class(read):
    kinds = ["Not Reported", "a", "[Not Available]", "b", "-", "a", "b", "#N/A", "a", "b"]
    assert read("multiclass", kind=kinds).classes == ("a", "b")


def test_a_decimal_comma_is_read_where_it_parts_no_thousands(read):
    values = ["0,5", "1,5", "2,25", "1", "2", "3", "4", "5", "6", "7"]
    quoted = [f'"{value}"' for value in values]
    assert column(read("regression", tmb=quoted))[:3] == [0.5, 1.5, 2.25]
    (fault,) = faults(read, "regression", tmb=['"1,234"', *quoted[1:]])
    assert fault.startswith("row 2: label 'tmb' is '1,234': write a number with a decimal point")


def test_classes_that_cannot_be_learned(read):
    lines = faults(read, "multiclass", kind=list("abababaabc"))
    assert [line.split(",")[0] for line in lines] == [
        "column 'kind' in split train: no slide of class c",
        "column 'kind' in split val: no slide of class c",
    ]
    lines = faults(read, "multiclass", kind=["LUAD", "luad"] * 5)
    assert lines == ["column 'kind': 'LUAD' and 'luad' look like one class: spell it one way"]
    (fault,) = faults(read, "multiclass", kind=["a"] * 10)
    assert fault.startswith("column 'kind' has 1 classes (a)")


def test_nothing_has_the_name_of_the_mean_over_all(read):
    """CAMELYON17's stages are negative, itc, micro and macro: figures of the last would be lost."""
    stages = ["negative", "itc", "micro", MACRO]
    message = f"column 'stage': class '{MACRO}' has the name of the mean over all: rename it"
    assert faults(read, "multiclass", stage=[*stages, *stages[1:], *stages[1:]])[0] == message
    for task in ("multilabel", "regression"):
        message = [f"label '{MACRO}' has the name of the mean over all: rename it"]
        assert faults(read, task, **{MACRO: list("0101010101")}) == message
    dead = {"name": "survival", "time": MACRO, "event": "dead"}
    assert read(dead, **{MACRO: TIMES, "dead": DEAD}).labels == (MACRO, "dead")


def test_a_multiclass_task_has_one_column(read):
    with pytest.raises(CohortError, match=r"one column of class names, not 2 \(kind, site2\)"):
        read("multiclass", kind=list("ababababab"), site2=list("ababababab"))
    assert read("multiclass", ["kind"], kind=list("ababababab"), x=list("1" * 10)).labels == (
        "kind",
    )


def test_numbers(read):
    cohort = read("regression", score=["1", "2.5", "", "-1e3", *"456789"])
    assert column(cohort)[:2] == [1, 2.5]
    assert math.isnan(column(cohort)[2])
    assert column(cohort)[3] == -1000
    (fault,) = faults(read, "regression", score=["1", "high", "inf", *"4567890"])[:1]
    assert fault.startswith("row 3: label 'score' is 'high': write a number")
    (fault,) = faults(read, "regression", score=["7"] * 4 + list("456789"))
    assert fault.startswith("target 'score' in split train is always 7: it must vary there")
    (fault,) = faults(read, "regression", score=[*"1234", "", "", "", *"789"])
    assert "in split val is never known" in fault


def test_times(read):
    cohort = read(SURVIVAL, months=TIMES, dead=DEAD)
    assert cohort.labels == ("months", "dead")
    assert column(cohort, 0)[:4] == [12.5, 3, 0, 40]
    assert column(cohort, 1)[:4] == [1, 0, 1, 0]
    assert len(set(column(cohort, 2))) == 10, "each row has a number of its own"


def test_a_time_without_an_event_is_unknown(read):
    dead = DEAD.copy()
    dead[0] = ""
    months = TIMES.copy()
    months[1] = "NA"
    cohort = read(SURVIVAL, months=months, dead=dead)
    assert np.isnan(column(cohort, 0)[:2]).all()
    assert np.isnan(column(cohort, 1)[:2]).all()


def test_times_that_cannot_be(read):
    lines = faults(read, SURVIVAL, months=["-1", "x", *TIMES[2:]], dead=["2", *DEAD[1:]])
    assert lines[0].startswith("row 2: months is '-1': write a time of 0 or more")
    assert lines[1].startswith("row 3: months is 'x'")
    assert lines[2].startswith("row 2: dead is '2': write 1 if the event was observed")
    (fault,) = faults(read, SURVIVAL, months=TIMES, dead=[*DEAD[:4], "0", "0", "0", *DEAD[7:]])
    assert fault.startswith("split val has 0 events")
    (fault,) = faults(read, SURVIVAL, months=TIMES)
    assert fault.startswith("label 'dead' is no column")
    with pytest.raises(CohortError, match=r"leave data\.labels out"):
        read(SURVIVAL, ["months"], months=TIMES, dead=DEAD)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("ranking", "'ranking' is none of multilabel, multiclass, ordinal, regression, "),
        ("survival", "survival needs its columns"),
        ({"name": "survival", "time": "t"}, "survival needs its columns"),
    ],
)
def test_tasks_that_are_none(task, message):
    with pytest.raises(CohortError, match=message):
        make_columns(task)
