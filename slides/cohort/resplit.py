"""`tapfm split`: splits a cohort table again, at random or as another tool's files say.

Every column but `split` is kept. One split goes to a table, several go to a folder: a table each
(`cohort_0.csv`, for `data.table`) and, if requested, the files of CLAM, Patho-Bench and STAMP.
Slide paths relative to the table's folder become relative to the new table's; with `slides_dir`
they stay.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slides.cohort.leaks import cases_spelled_twice, repeated_values
from slides.cohort.spelling import missing_words, value_reader
from slides.cohort.split_files import (
    clam_bool_text,
    clam_text,
    csv_text,
    label_conflicts,
    patho_bench_texts,
    read_records,
    read_split,
    slide_names,
    stamp_text,
)
from slides.cohort.splits import (
    FRACTIONS,
    Cases,
    Split,
    balance,
    fixed_split,
    gather_cases,
    kfold,
    monte_carlo,
)
from slides.cohort.strata import stratify
from slides.cohort.table import OPTIONAL, REQUIRED
from slides.cohort.table_file import file_at, read_table, repeated_columns
from slides.cohort.targets import (
    Cells,
    Classes,
    Columns,
    Labels,
    make_columns,
    named_columns,
    zero_or_one,
)
from slides.cohort.tcga_names import site_of
from slides.errors import SplitError, all_faults, refuse
from slides.files import plain_name, write_text


def run_split(
    table: Path,
    out: Path,
    labels: Sequence[str] | None = None,
    folds: int | None = None,
    repeats: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    preserve_sites: bool = False,
    source: Path | None = None,
    fold: int = 0,
    formats: Sequence[str] = ("table",),
    task: str | Mapping[str, Any] = "multilabel",
    slides_dir: str | None = None,
    **spelling: Any,
) -> int:
    """Split the cases or read a split, print its balance, and write it; return exit code 0.

    Args:
        table: a cohort table; its `split` column, if any, is ignored.
        out: a .csv or .tsv for one split, else a folder.
        labels: columns to stratify over; None is all. For survival by name: time and event.
        folds: number of folds of a cross-validation.
        repeats: number of Monte-Carlo splits with these fractions.
        fractions: shares of train, val and test.
        seed: seed of the random split.
        preserve_sites: keep the cases of a site together; TCGA barcodes name their site.
        source: a CLAM, Patho-Bench or STAMP file to read the split from.
        fold: the fold of a Patho-Bench or STAMP file.
        formats: any of table, clam, clam-bool, patho-bench, stamp.
        task: the type of the labels: a name, or a name and options (`slides.cohort.targets`).
        slides_dir: folder of relative slide paths, which are then kept; None is the table's.
        spelling: `missing`, `names` and `values` of `slides.cohort.table.read_cohort`; the new
            tables keep the user's names and words.

    Raises:
        SplitError: the table is faulty (all faults are listed), or no such split can be made.
    """
    words = missing_words(spelling.get("missing") or ())
    columns, labels = _columns(task, labels)
    several = folds is not None or (repeats or 1) > 1 or list(formats) != ["table"]
    binary = "patho-bench" not in formats or columns.binary
    _check_options(out, [folds, repeats, source], several, "" if binary else task)
    written, records, labels, cases = _read(table, labels, columns, words, spelling)
    case_of = {row["slide_id"]: row["case_id"] for row in records}
    by_name = labels if isinstance(columns, Labels | Classes) else ()
    _say_mixed(table, label_conflicts(records, case_of, by_name, words), "patho-bench" in formats)
    if source is not None:
        names = slide_names((r["slide_id"], r.get("slide_path", ""), r["case_id"]) for r in records)
        splits = [read_split(source, names, fold)]
        _compare_with_source(source, records, names, by_name, words)
    else:
        splits = _deal(cases, folds, repeats, fractions, seed, preserve_sites)
    _print_balance(cases, splits)
    base = None if slides_dir else table.parent
    tables = _Tables(written, spelling.get("names") or {}, base, table.stem)
    for path, text in _files(tables, out, records, labels, case_of, splits, formats).items():
        write_text(path, text)
    print(f"{out}: written")
    return 0


def _deal(cases: Cases, folds, repeats, fractions, *how) -> list[Split]:
    if folds is not None:
        return kfold(cases, folds, *how)
    if repeats is not None:
        return monte_carlo(cases, repeats, fractions, *how)
    return [fixed_split(cases, fractions, *how)]


def _say_mixed(table: Path, mixed: Mapping[tuple[str, str], list[str]], by_case: bool) -> None:
    """Print which cases have slides of several values; refuse them if labels are by case."""
    faults = [
        f"case {case}: its slides are {' and '.join(values)} in {label}"
        for (case, label), values in mixed.items()
    ]
    if by_case:
        remedy = ": Patho-Bench takes a label a case: give its slides one value, or blank cells"
        refuse([fault + remedy for fault in faults], table, SplitError)
    print("".join(f"warning: {fault}\n" for fault in faults), end="")


def _compare_with_source(
    source: Path, records: list[dict], names: Mapping[str, str], labels: Sequence[str], words
) -> None:
    """Print where another tool's file has other labels than the table, which are kept."""
    header, theirs = read_records(source)
    shared = [label for label in labels if label in header]
    mixed = label_conflicts(theirs, names, shared, words)
    for (case, label), values in label_conflicts([*records, *theirs], names, shared, words).items():
        found = mixed.get((case, label))
        says = f"{' and '.join(found)} in its rows" if found else "another value than the table"
        print(f"warning: {source}: case {case} has {says} of {label} ({', '.join(values)}): the "
              "table's is kept")  # fmt: skip


def _check_options(out: Path, sources: list, several: bool, not_binary: Any) -> None:
    faults = []
    if len([source for source in sources if source is not None]) > 1:
        faults.append("give one of --folds, --repeats and --from, not several")
    if not_binary:
        faults.append(f"--format patho-bench takes labels of 0 and 1: leave it out of {not_binary}")
    if out.suffix in (".csv", ".tsv") and several:
        faults.append(f"--out {out} is one file, and several are to be written: give a folder")
    refuse(faults, "tapfm split", SplitError)


def _print_balance(cases: Cases, splits: Sequence[Split]) -> None:
    for number, split in enumerate(splits):
        left = len(cases) - len(split)
        print(f"split {number}" + f"; {left} cases are in no part and left out" * (left > 0))
        print(balance(cases, split))


def _read(
    table: Path,
    labels: Sequence[str] | None,
    columns: Columns,
    words: Collection[str],
    spelling: Mapping[str, Any],
) -> tuple[list[dict], list[dict], Sequence[str], Cases]:
    """Return the rows as written and with the labels that are meant, label columns, and cases."""
    header, lines = read_table(table, spelling.get("names"))
    meant = value_reader(spelling.get("values"))
    labels = columns.choose(labels, [n for n in header if n and n not in REQUIRED + OPTIONAL])
    missing = [name for name in ("case_id", "slide_id", *labels) if name not in header]
    faults = [f"column {name!r} is missing (there are: {', '.join(header)})" for name in missing]
    faults += repeated_columns(header)
    records, texts = {}, {}
    for number, cells in lines:
        row = dict(zip(header, cells, strict=False))
        if len(cells) != len(header):
            faults.append(f"row {number}: {len(cells)} cells, the header has {len(header)}")
        elif not missing:
            if not row["case_id"] or not row["slide_id"]:
                faults.append(f"row {number}: case_id or slide_id is blank: fill it in")
            records[number], texts[number] = row, [meant(label, row[label]) for label in labels]
    if not missing:
        values = columns.read(Cells(labels, texts, {}, words), ())
        faults += values.faults
        faults += repeated_values("slide_id", {n: row["slide_id"] for n, row in records.items()})
        faults += cases_spelled_twice({n: row["case_id"] for n, row in records.items()})
    if faults or not records:
        raise SplitError(all_faults(table, faults or ["no row below the header"]))
    rows = list(records.values())
    spelled = [
        {**row, **dict(zip(labels, texts[number], strict=True))} for number, row in records.items()
    ]
    ids = [row["case_id"] for row in rows]
    sites = [row.get("site") or site_of(row["case_id"]) for row in rows]
    values_NY = np.array([values.rows[number] for number in records], float)
    strata = stratify(columns, labels, values.classes, ids, values_NY.reshape(len(ids), -1))
    values_NL = np.array(list(strata.values()), float).reshape(-1, len(ids)).T
    return rows, spelled, labels, gather_cases(ids, sites, list(strata), values_NL)


def _columns(
    task: str | Mapping[str, Any], labels: Sequence[str] | None
) -> tuple[Columns, Sequence[str] | None]:
    """Return the reader of the label columns, and the requested names."""
    wanted = named_columns(task) if isinstance(task, str) else []
    if not wanted:
        return make_columns(task), labels
    if len(labels or ()) != len(wanted):
        raise SplitError(
            f"--task {task} needs its columns: --labels {' '.join(map(str.upper, wanted))}"
        )
    return make_columns({"name": task, **dict(zip(wanted, labels, strict=True))}), None


@dataclass(frozen=True)
class _Tables:
    """Writes a split as a table in the words of the old one."""

    records: list[dict[str, str]]
    names: Mapping[str, str]
    """The user's names of columns -> those of the records."""
    base: Path | None
    """Folder of relative slide paths, which are rewritten; None keeps them."""
    stem: str

    def text(self, path: Path, split: Split) -> str:
        """Return the table of a split as text, for a file."""
        header = list(self.records[0]) + ["split"] * ("split" not in self.records[0])
        rows = []
        for record in self.records:
            if part := split.get(record["case_id"]):
                row = {**record, "split": part}
                slide, base = row.get("slide_path"), self.base
                relative = base and slide and not Path(slide).is_absolute()
                if relative and file_at(base, slide).exists():
                    found = os.path.relpath(file_at(base, slide), path.parent.absolute())
                    row["slide_path"] = Path(found).as_posix()
                rows.append([row[name] for name in header])
        own = {ours: theirs for theirs, ours in self.names.items()}
        header = [own.get(name, name) for name in header]
        return csv_text([header, *rows], "\t" if path.suffix == ".tsv" else ",")


def _files(
    tables: _Tables, out: Path, records, labels, case_of, splits: list[Split], formats
) -> dict[Path, str]:
    """Return what to write, path -> text."""
    if out.suffix in (".csv", ".tsv"):
        return {out: tables.text(out, splits[0])}
    files: dict[Path, str] = {}
    for number, split in enumerate(splits):
        if "table" in formats:
            path = out / f"{tables.stem}_{number}.csv"
            files[path] = tables.text(path, split)
        if "clam" in formats:
            files[out / f"splits_{number}.csv"] = clam_text(case_of, split)
        if "clam-bool" in formats:
            files[out / f"splits_{number}_bool.csv"] = clam_bool_text(case_of, split)
    if "stamp" in formats:
        files[out / "splits.json"] = stamp_text(splits)
    if "patho-bench" in formats:
        for label in labels:
            known = {row["slide_id"]: zero_or_one(row[label]) for row in records}
            values = {slide: None if v is None else int(v) for slide, v in known.items()}
            task = patho_bench_texts(case_of, splits, label, values)
            folder = plain_name(label)
            while any(path.parent == out / folder for path in files):
                folder += "_"  # of labels that differ in a sign
            files |= {out / folder / name: text for name, text in task.items()}
    return files
