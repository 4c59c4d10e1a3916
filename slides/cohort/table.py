"""The cohort table: slides, their patients, splits and labels.

    case_id, slide_id, slide_path, split    required; split is train, val or test
    mpp, stain, site                        optional
    every other column                      a label, unless the labels are named

A label is 1, 0 or unknown; other tasks have other values (`slides.cohort.targets`). A blank cell or
a word such as NA (`slides.cohort.spelling`) is *unknown*: it becomes nan, is masked in the loss and
the metrics, and is never counted as 0.
All faults of a table are reported in one `CohortError`, each with its row (as a spreadsheet numbers
them: the header is row 1) and its remedy, so that one round of corrections is enough.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slides.cohort.counts import Tally
from slides.cohort.leaks import cases_in_two_splits, repeated_values, same_pictures
from slides.cohort.spelling import is_missing, missing_words, read_number, value_reader
from slides.cohort.table_file import file_at, like, read_table, repeated_columns
from slides.cohort.targets import Cells, Columns, Labels, make_columns
from slides.errors import CohortError, SettingsError, all_faults, name_fault, some, some_rows
from slides.grid import MPP_RANGE
from slides.wsi.slide_file import slide_file

SPLITS = ("train", "val", "test")
FEW_LOST = 3  # missing slides that are listed one by one
REQUIRED = ("case_id", "slide_id", "slide_path", "split")
OPTIONAL = ("mpp", "stain", "site")
SPLIT_WORDS = {"training": "train", "validation": "val", "valid": "val", "testing": "test",
               **{name: name for name in SPLITS}}  # fmt: skip
LIKE = {  # required column -> other names of it, as `like` spells them
    "case_id": {"patientid", "patient", "case", "subject", "subjectid", "participant", "pid",
                "casesubmitterid", "bcrpatientbarcode", "patientbarcode", "caseno"},
    "slide_id": {"slide", "slidename", "imageid", "image", "wsi", "wsiid", "slideno"},
    "slide_path": {"path", "file", "filename", "filepath", "imagepath", "slidefile", "wsipath"},
    "split": {"set", "partition", "dataset", "subset", "cohort", "part"},
}  # fmt: skip


@dataclass(frozen=True)
class SlideRow:
    """One slide of the cohort."""

    case_id: str
    """The patient. Cases, not slides, are split and resampled."""
    slide_id: str
    """Unique; the stem of every file written for the slide."""
    path: Path
    """The slide's file, absolute."""
    split: str
    """`train`, `val` or `test`."""
    mpp: float | None
    """Microns per level-0 pixel from the table; None takes the slide's own."""
    stain: str
    """Free text, may be empty."""
    site: str
    """Free text, may be empty."""
    labels: tuple[float, ...]
    """1.0, 0.0 or nan (unknown), in the order of `Cohort.labels`; other tasks: their numbers."""
    parts: tuple[SlideRow, ...] = ()
    """The slides of a case (`slides.cohort.cases`), whose id is then the `slide_id`."""

    @property
    def slides(self) -> tuple[SlideRow, ...]:
        """The slides whose tiles make up the bag: this one, or its parts."""
        return self.parts or (self,)


@dataclass(frozen=True)
class Cohort:
    """A cohort table without faults."""

    labels: tuple[str, ...]
    """Names of the label columns."""
    rows: tuple[SlideRow, ...]
    """The slides, in the table's order."""
    classes: tuple[str, ...] = ()
    """Class names of a multi-class label, in order of their numbers."""
    columns: Columns = field(default=Labels(), compare=False)
    """How the label columns were read."""

    def split(self, name: str) -> tuple[SlideRow, ...]:
        """Return the slides of one split, in the table's order; may be empty."""
        if name not in SPLITS:
            raise SettingsError(f"split is {name!r}: give one of {', '.join(SPLITS)}")
        return tuple(row for row in self.rows if row.split == name)

    def tally(self, rows: Sequence[SlideRow]) -> Tally:
        """Return the counts of label values among some of its slides."""
        return self.columns.tally(self.labels, self.classes, rows)

    def without(self, slide_ids: Collection[str]) -> Cohort:
        """Return the cohort without the given slides."""
        absent = sorted(set(slide_ids) - {row.slide_id for row in self.rows})
        if absent:
            raise ValueError(f"not in the cohort, so they cannot be left out: {', '.join(absent)}")
        return replace(self, rows=tuple(r for r in self.rows if r.slide_id not in slide_ids))

    @property
    def sha256(self) -> str:
        """SHA-256 of the table's contents; the slides' folder does not count."""
        rows = [
            [r.case_id, r.slide_id, r.path.name, r.split, r.mpp, r.stain, r.site]
            + [None if math.isnan(value) else value for value in r.labels]
            for r in self.rows
        ]
        names = [self.labels, self.classes] if self.classes else self.labels
        text = json.dumps([names, rows], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def read_cohort(
    table: Path,
    labels: Sequence[str] | None = None,
    slides_dir: Path | None = None,
    both_classes: Collection[str] = SPLITS,
    task: str | Mapping[str, Any] = "multilabel",
    need_slides: bool = True,
    missing: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    values: Mapping[Any, Any] | None = None,
) -> Cohort:
    """Return the cohort of a table; a faulty table is refused.

    Args:
        table: the file: .csv, .tsv, .xlsx, .parquet.
        labels: the label columns, in this order; None takes every column except `REQUIRED` and
            `OPTIONAL`.
        slides_dir: folder that relative slide paths start from; None is the table's folder.
        both_classes: splits in which each label must have a known 0 and a known 1 (or the values
            that another task needs), unless the split is empty. Use () for prediction alone.
        need_slides: whether slide_path and the slides must be there.
        missing: the user's words for unknown, beside those of `slides.cohort.spelling.MISSING`.
        names: the user's names of columns -> those of tapfm.
        values: the user's words in label columns -> what they mean (`spelling.value_reader`).
        task: type of the label columns, a name or name and options: `slides.cohort.targets`.

    Raises:
        CohortError: the table is faulty; all faults are listed.
    """
    table = Path(table)
    header, records = read_table(table, names)
    meant = value_reader(values)
    columns = make_columns(task)
    free = [name for name in header if name and name not in REQUIRED + OPTIONAL]
    labels = columns.choose(labels, free)
    required = tuple(name for name in REQUIRED if need_slides or name != "slide_path")
    faults = _header_faults(header, labels, required)

    base = Path(slides_dir) if slides_dir is not None else table.parent
    faults += [] if records else ["there is no row below the header: add a row for each slide"]
    present = [name for name in labels if name in header]
    whole = dict(_whole(header, records, faults))
    lost: dict[int, str] = {}
    rows = {n: _row(n, each, base, faults, required, lost) for n, each in whole.items()}
    faults += _lost(lost)
    texts = {n: [meant(name, each[name]) for name in present] for n, each in whole.items()}
    faults += _leaks(rows)
    if len(present) == len(labels) or columns.apart:
        splits = {number: row.split for number, row in rows.items()}
        cells = Cells(present, texts, splits, missing_words(missing))
        faults += (values := columns.read(cells, both_classes)).faults
    if faults:
        raise CohortError(all_faults(table, faults))
    if need_slides:
        _warn_of_copies(table, rows.values())
    each = (replace(row, labels=values.rows[number]) for number, row in rows.items())
    return Cohort(tuple(labels), tuple(each), values.classes, columns)


def _whole(
    header: list[str], records: list[tuple[int, list[str]]], faults: list[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield rows as column -> text; add a fault for each that has too few or too many cells."""
    for number, cells in records:
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        else:
            faults.append(
                f"row {number}: it has {len(cells)} cells, the header {len(header)}: look for a "
                "missing or extra separator, and put quotes round a value that contains one"
            )


def _header_faults(
    header: list[str], labels: Sequence[str] | None, required: Sequence[str]
) -> list[str]:
    faults = []
    for name in required:
        if name not in header:
            there = f"there are: {', '.join(header)}"
            alike = [each for each in header if like(each) in LIKE[name]]
            faults.append(
                f"column {name!r} is missing: if it is {alike[0]!r}, write data.columns: "
                f"{{{alike[0]}: {name}}} ({there})"
                if alike
                else f"column {name!r} is missing: add it ({there})"
                + " or let `tapfm split` deal one" * (name == "split")
            )
    faults += repeated_columns(header)
    for name in labels or ():
        if name not in header:
            choice = [h for h in header if h not in REQUIRED + OPTIONAL]
            found = ", ".join(choice) or "none"
            faults.append(f"label {name!r} is no column: choose among the label columns ({found})")
        elif name in REQUIRED + OPTIONAL:
            faults.append(f"label {name!r} is a column with a meaning of its own: rename the label")
    for name in sorted({name for name in labels or () if list(labels).count(name) > 1}):
        faults.append(f"label {name!r} is named twice: name it once")
    return faults


def _row(number, record, base, faults, required, lost) -> SlideRow:
    """Return one row without its labels; add its faults to `faults`, a missing slide to `lost`."""
    for name in required:
        if record.get(name, "-") == "":
            faults.append(f"row {number}: {name} is blank: fill it in, or remove the row")
    slide_id, split = record.get("slide_id", ""), record.get("split", "")
    split = SPLIT_WORDS.get(split.lower(), split)
    if slide_id in (".", "..") or "/" in slide_id or "\\" in slide_id:
        faults.append(
            f"row {number}: slide_id {slide_id!r} is a path, and files are named after it: use the "
            "file's name without its folder"
        )
    for name in ("slide_id", "case_id"):
        if fault := name_fault(record.get(name, "")):
            faults.append(f"row {number}: {name} {fault}")
    if split and split not in SPLITS:
        faults.append(f"row {number}: split is {split!r}: write one of {', '.join(SPLITS)}")

    path = Path()
    if slide_path := record.get("slide_path"):
        try:
            path = slide_file(file_at(base, slide_path))
            found = path.resolve().exists()
        except (OSError, RuntimeError):  # too long a name, circular links, unknown home
            path, found = Path(slide_path), False
        if not found and "slide_path" in required:
            lost[number] = f"{slide_id or 'the slide'} is not at {path}"
            path = Path()

    text, mpp = record.get("mpp", ""), None
    if not is_missing(text):
        mpp = read_number(text)
        if mpp is None or not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
            faults.append(
                f"row {number}: mpp is {text!r}: give microns per pixel between {MPP_RANGE[0]:g} "
                f"and {MPP_RANGE[1]:g}, or leave it blank to take it from the slide"
            )

    return SlideRow(
        record.get("case_id", ""),
        slide_id,
        path,
        split,
        mpp,
        record.get("stain", ""),
        record.get("site", ""),
        (),
    )


def _lost(lost: Mapping[int, str]) -> list[str]:
    """Return a fault for each slide that is not there; one for all of them if they are many."""
    remedy = "correct slide_path or the folder that it is relative to (data.slides_dir), or remove"
    if len(lost) > FEW_LOST:
        first = next(iter(lost.values()))
        return [f"{len(lost)} slides are not there ({some_rows([*lost])}): {first}: {remedy} the "
                "rows; `tapfm check --fix` looks for files of these names"]  # fmt: skip
    return [f"row {number}: {where}: {remedy} the row" for number, where in lost.items()]


def _leaks(rows: dict[int, SlideRow]) -> list[str]:
    """Return a fault for each repeated slide_id or file, and for what is in two splits."""
    names = {number: row.slide_id for number, row in rows.items()}
    there = {number: row for number, row in rows.items() if row.path != Path()}
    files = {number: str(row.path.resolve()) for number, row in there.items()}
    dealt = {  # a misspelt split is reported as such
        number: (row.case_id, row.split)
        for number, row in rows.items()
        if row.case_id and row.split in SPLITS
    }
    faults = repeated_values("slide_id", names) + repeated_values("slide_path", files)
    return faults + cases_in_two_splits(dealt)


def _warn_of_copies(table: Path, rows: Collection[SlideRow]) -> None:
    """Warn of slides in two splits whose files have the same bytes."""
    for copies, splits in same_pictures({row: (row.path, row.split) for row in rows}):
        warnings.warn(
            f"{table}: {some([row.slide_id for row in copies])} are the same slide, byte for byte, "
            f"in {' and '.join(splits)}: figures are flattered. Keep one row.",
            stacklevel=3,
        )
