"""The label columns of a cohort table, by task: reads them, and reports their faults.

    Labels    any number of columns of 1, 0 or unknown; the default
    Classes   one column of class names
    Numbers   any number of columns of numbers
    Times     two columns: a time of 0 or more, and whether the event was observed (1, 0)

Each kind reads text into numbers, nan if unknown, and reports faults: unreadable cells by row, and
splits in which nothing could be learned. Only class names come from all values (see `tapfm.tasks`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from slides.cohort.counts import Tally, class_tally, label_tally, number_tally, time_tally
from slides.cohort.spelling import MISSING, is_missing, look_alike, read_number, word_fault
from slides.cohort.strata import Strata, class_strata, label_strata, number_strata, time_strata
from slides.errors import CohortError, some, some_rows

KNOWN = {"false": 0.0, "true": 1.0}  # beside numbers, in lower case
MEAN = "macro"  # name of the mean over classes or columns in every table of figures
MANY = 8  # unreadable cells of a column that are listed one by one


@dataclass(frozen=True)
class Cells:
    """The text of the label columns, by row."""

    names: Sequence[str]
    """Names of the columns."""
    texts: Mapping[int, Sequence[str]]
    """Row number -> one text per column."""
    splits: Mapping[int, str]
    """Row number -> split."""
    missing: Collection[str] = MISSING
    """Words for unknown, see `slides.cohort.spelling.missing_words`."""

    def known(self, column: int) -> dict[int, str]:
        """Return row number -> text of a column, without unknown cells; beside `+` a `-` is one."""
        each = {row: texts[column] for row, texts in self.texts.items()}
        sign = "-" if "+" in each.values() else None
        return {r: t for r, t in each.items() if t == sign or not is_missing(t, self.missing)}

    def of(self, split: str) -> list[int]:
        """Return the row numbers of a split."""
        return [row for row, each in self.splits.items() if each == split]


@dataclass(frozen=True)
class Values:
    """The numbers in the label columns, and the faults found there."""

    rows: Mapping[int, tuple[float, ...]]
    """Row number -> numbers, nan if unknown."""
    faults: list[str]
    classes: tuple[str, ...] = ()
    """Class names, if the numbers are class numbers."""


class Columns(Protocol):
    """Interface: how a task chooses and reads its label columns."""

    apart: ClassVar[bool]
    """Whether a column can be read if another one is missing."""
    binary: ClassVar[bool] = False
    """Whether every cell is 0, 1 or unknown."""
    strata: ClassVar[Callable[..., Strata]]
    """Labels of 0 and 1 by which cases are stratified, one of `slides.cohort.strata`."""
    tally: ClassVar[Callable[..., Tally]]
    """Counts of label values, one of `slides.cohort.counts`."""

    def choose(self, requested: Sequence[str] | None, free: Sequence[str]) -> Sequence[str]:
        """Return the names of the columns.

        Args:
            requested: the labels that the user names; None if none are named.
            free: the table's columns without another meaning.

        Raises:
            CohortError: the columns do not suit the task.
        """

    def read(self, cells: Cells, splits: Collection[str]) -> Values:
        """Return numbers and faults; values must vary in each of `splits` that has slides."""


@dataclass(frozen=True)
class EachColumn(Columns):
    """Any number of columns, each a target by itself."""

    cell: ClassVar[Callable[[str], float | None]]
    """Returns the number in a text; None if it is unreadable."""
    unreadable: ClassVar[tuple[str, str, str]]
    """Description of unreadable cells, remedy for one of them, remedy if most are."""
    lacking: ClassVar[Callable[[str, str, list[float]], list[str]]]
    """Returns the faults of a column's values in a split."""
    apart: ClassVar = True

    def choose(self, requested, free):
        """Return the requested columns, or all."""
        return free if requested is None else requested

    def read(self, cells, splits):
        """Return numbers and faults, see `Columns.read`."""
        numbers, bad = _numbers(cells, self.cell)
        faults = named_as_mean("label", cells.names)
        for name, wrong in bad.items():
            known = cells.known(cells.names.index(name)).values()
            words = word_fault(name, known) if self.binary else []
            faults += words or _unreadable(name, wrong, len(cells.texts), *self.unreadable)
        for split in splits:
            rows = cells.of(split)
            for column, name in enumerate(cells.names):
                if rows and name not in bad:
                    faults += self.lacking(name, split, [numbers[row][column] for row in rows])
        return Values(numbers, faults)


@dataclass(frozen=True)
class Classes(Columns):
    """One column of class names, numbered in `order`, or numbers by size and names by letter."""

    order: Sequence[str] = ()
    apart: ClassVar = False
    strata: ClassVar = staticmethod(class_strata)
    tally: ClassVar = staticmethod(class_tally)

    def choose(self, requested, free):
        """Return the requested column, or the only one there is."""
        names = list(free if requested is None else requested)
        if len(names) != 1:
            raise CohortError(
                f"this task takes one column of class names, not {len(names)} "
                f"({some(names) or 'none'}): name it with data.labels: [COLUMN]"
            )
        return names

    def read(self, cells, splits):
        """Return numbers, faults and class names, see `Columns.read`."""
        known, (name,) = cells.known(0), cells.names
        classes = [str(each) for each in self.order] or sorted(set(known.values()), key=_order)
        place = {text: float(at) for at, text in enumerate(classes)}
        rows = {row: (place.get(known.get(row), math.nan),) for row in cells.texts}
        others = sorted(set(known.values()) - set(classes))
        lacks = f"data.task.order lacks {some(others)}: list every class, low to high"
        faults = [lacks] * bool(others) + named_as_mean(f"column {name!r}: class", classes)
        if len(classes) < 2:
            faults.append(
                f"column {name!r} has {len(classes)} classes ({some(classes) or 'none'}): a task "
                "needs two or more"
            )
        faults += [f"column {name!r}: {alike}" for alike in look_alike(classes)]
        for split in splits:
            members = cells.of(split)
            present = {known[row] for row in members if row in known}
            lacking = [text for text in classes if text not in present]
            if members and lacking and len(classes) > 1:
                faults.append(
                    f"column {name!r} in split {split}: no slide of class {some(lacking)}, and "
                    "every class is needed in every split: move cases between splits, merge "
                    "classes, or leave those slides' cells blank"
                )
        return Values(rows, faults, tuple(classes))


@dataclass(frozen=True)
class Times(Columns):
    """Survival: a time, and whether it ended with the event (1) or was censored (0)."""

    time: str
    event: str
    apart: ClassVar = False
    strata: ClassVar = staticmethod(time_strata)
    tally: ClassVar = staticmethod(time_tally)

    def choose(self, requested, free):
        """Return the two columns, time and event."""
        if requested is not None:
            raise CohortError(
                "this task takes its columns from data.task (time and event): leave data.labels out"
            )
        return (self.time, self.event)

    def read(self, cells, splits):
        """Return (time, event, row number) and faults; the row number identifies the slide."""
        times, events = {}, {}
        faults = []
        for row, text in cells.known(0).items():
            times[row] = read_number(text)
            if times[row] is None or times[row] < 0:
                faults.append(
                    f"row {row}: {self.time} is {text!r}: write a time of 0 or more, or leave it "
                    "blank if it is unknown"
                )
        for row, text in cells.known(1).items():
            events[row] = zero_or_one(text.split(":")[0])  # cBioPortal's form is 1:DECEASED
            if events[row] is None:
                faults.append(
                    f"row {row}: {self.event} is {text!r}: write 1 if the event was observed, 0 if "
                    "the case was censored, or leave it blank if it is unknown"
                )
        rows = {}
        for row in cells.texts:
            pair = times.get(row), events.get(row)
            known = None not in pair
            rows[row] = (*(pair if known else (math.nan, math.nan)), float(row))
        for split in splits if not faults else ():
            members = [rows[row] for row in cells.of(split)]
            observed = [time for time, event, _ in members if event == 1]
            if members and not any(time > min(observed) for time, _, _ in members if observed):
                faults.append(
                    f"split {split} has {len(observed)} events and no case followed for longer "
                    "than the first of them: nothing can be compared. Move cases between splits"
                )
        return Values(rows, faults)


def named_as_mean(what: str, names: Collection[str]) -> list[str]:
    """Return a fault if a name equals `MEAN`, the mean's name in every table of figures."""
    return [f"{what} {MEAN!r} has the name of the mean over all: rename it"] * (MEAN in names)


def _numbers(cells: Cells, read) -> tuple[dict[int, tuple[float, ...]], dict[str, list]]:
    """Return row -> numbers, and column -> the (row, text) that `read` cannot read."""
    rows, bad = {}, defaultdict(list)
    for row, texts in cells.texts.items():
        values = []
        for name, text in zip(cells.names, texts, strict=True):
            value = math.nan if is_missing(text, cells.missing) else read(text)
            if value is None:
                bad[name].append((row, text))
            values.append(math.nan if value is None else value)
        rows[row] = tuple(values)
    return rows, bad


def _unreadable(name: str, wrong: list, rows: int, what: str, remedy: str, choice: str):
    """Return one fault per cell, or one per column if most of its cells are unreadable."""
    if len(wrong) > MANY and 2 * len(wrong) > rows:
        values = list(dict.fromkeys(repr(text) for _, text in wrong))
        return [
            f"column {name!r}: {len(wrong)} of {rows} rows are {what} (they say {some(values)}; "
            f"{some_rows([row for row, _ in wrong])}): if it is no label, {choice}"
        ]
    return [f"row {row}: label {name!r} is {text!r}: {remedy}" for row, text in wrong]


def _one_class(name: str, split: str, values: list[float]) -> list[str]:
    positives, negatives = values.count(1.0), values.count(0.0)
    if positives and negatives:
        return []
    lacking = " or ".join(word for word, n in (("1", positives), ("0", negatives)) if not n)
    return [
        f"label {name!r} in split {split}: {positives} slides are 1, {negatives} are 0, "
        f"{len(values) - positives - negatives} unknown: no {lacking}, and the split "
        "needs both: move cases between splits, or leave the label out"
    ]


def _one_value(name: str, split: str, values: list[float]) -> list[str]:
    if len(known := {value for value in values if not math.isnan(value)}) > 1:
        return []
    found = f"always {known.pop():g}" if known else "never known"
    return [
        f"target {name!r} in split {split} is {found}: it must vary there. Move cases between "
        "splits, or leave the target out"
    ]


def zero_or_one(text: str) -> float | None:
    """Return the 0.0 or 1.0 in a text, or of False and True; None if it is something else."""
    value = KNOWN.get(text.lower(), read_number(text))
    return value if value in (0.0, 1.0) else None


def _order(text: str) -> tuple[int, float, str]:
    """Return the sort key that puts numbers by size before names by letter."""
    value = read_number(text)
    return (1, 0.0, text) if value is None else (0, value, text)


@dataclass(frozen=True)
class Labels(EachColumn):
    """Columns of 1, 0 or unknown; True and False will do."""

    cell: ClassVar = staticmethod(zero_or_one)
    unreadable: ClassVar = (
        "neither 0, 1 nor unknown",
        "write 1, 0, or leave it blank if it is unknown",
        "name the labels you want; if it is one, write 1, 0 or leave the cell blank",
    )
    lacking: ClassVar = staticmethod(_one_class)
    binary: ClassVar = True
    strata: ClassVar = staticmethod(label_strata)
    tally: ClassVar = staticmethod(label_tally)


@dataclass(frozen=True)
class Numbers(EachColumn):
    """Columns of finite numbers or unknown."""

    cell: ClassVar = staticmethod(read_number)
    unreadable: ClassVar = (
        "not numbers",
        "write a number with a decimal point, or leave it blank if it is unknown",
        "name the targets you want with data.labels",
    )
    lacking: ClassVar = staticmethod(_one_value)
    strata: ClassVar = staticmethod(number_strata)
    tally: ClassVar = staticmethod(number_tally)


COLUMNS: dict[str, type[Columns]] = {
    "multilabel": Labels,
    "multiclass": Classes,
    "ordinal": Classes,
    "regression": Numbers,
    "expression": Numbers,
    "survival": Times,
}
"""Task -> how its columns are read. The task's options name a kind's fields without default."""


def named_columns(task: str) -> list[str]:
    """Return the options of a task that each name a column: time and event of survival.

    Raises:
        CohortError: no such task.
    """
    if task not in tuple(COLUMNS):
        raise CohortError(f"data.task {task!r} is none of {', '.join(COLUMNS)}")
    return [field.name for field in fields(COLUMNS[task]) if field.default is NO_DEFAULT]


def make_columns(task: str | Mapping[str, Any]) -> Columns:
    """Return the reader of a task's columns; options that name no column are ignored.

    Raises:
        CohortError: no such task, or one without its columns.
    """
    options = task if isinstance(task, Mapping) else {"name": task}
    name = options.get("name")
    wanted = named_columns(name)
    if not all(isinstance(options.get(key), str) for key in wanted):
        each = ", ".join(f"{key}: COLUMN" for key in wanted)
        raise CohortError(f"data.task {name} needs its columns: {{name: {name}, {each}}}")
    own = {field.name for field in fields(COLUMNS[name])}
    return COLUMNS[name](**{key: options[key] for key in options if key in own})
