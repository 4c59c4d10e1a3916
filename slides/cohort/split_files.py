"""Split files of other tools, CLAM, Patho-Bench and STAMP: read and written.

    CLAM         splits_0.csv       a column each for train, val, test: ragged lists of slide_id
                 splits_0_bool.csv  a row a slide; True in one of three columns
    Patho-Bench  <task>/k=all.tsv   case_id, slide_id, the label, fold_0, fold_1, ... with the
                 <task>/config.yaml part's name in each; and the meaning of the label's numbers
    STAMP        splits.json        train_patients and test_patients of each fold: cases

A split that is read becomes case -> part. A case in two parts of one split (a leak) and slides that
the cohort does not have are refused. Slides that the file does not name are left out. A slide may
be named by its id, its file, with ending and folder or without, or by its features' file.

Source: CLAM's `create_splits_seq.py`, the format of Patho-Bench's split files, and STAMP 2.4's
    `crossval`, which takes the splits that it finds in its output folder.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from slides.cohort.spelling import is_missing, tidy
from slides.cohort.splits import Split
from slides.cohort.table import SPLITS
from slides.cohort.targets import zero_or_one
from slides.errors import SplitError, all_faults
from slides.files import decode_text

ENDING = re.compile(  # of slides, and of the features of one
    r"\.(svs|ndpi|mrxs|scn|bif|vms|vmu|svslide|czi|dcm|isyntax|qptiff|(ome\.)?tiff?|jpe?g|png|h5|pt)$",
    re.I,
)
TRUE = frozenset({"true", "1", "1.0"})
FALSE = frozenset({"false", "0", "0.0", ""})


def clam_text(case_of: Mapping[str, str], split: Split) -> str:
    """Return `splits_<k>.csv`: slide_ids in the columns train, val, test, padded with blanks.

    Args:
        case_of: slide_id -> case_id, in the order to write.
        split: the part of each case.
    """
    lists = {
        part: [slide for slide, case in case_of.items() if split.get(case) == part]
        for part in SPLITS
    }
    longest = max(map(len, lists.values()))
    padded = [slides + [""] * (longest - len(slides)) for slides in lists.values()]
    return csv_text(
        [["", *SPLITS], *([n, *row] for n, row in enumerate(zip(*padded, strict=True)))]
    )


def clam_bool_text(case_of: Mapping[str, str], split: Split) -> str:
    """Return `splits_<k>_bool.csv`: a row a slide, True in the column of its part."""
    rows = [
        [slide, *(split[case] == part for part in SPLITS)]
        for slide, case in case_of.items()
        if case in split
    ]
    return csv_text([["", *SPLITS], *rows])


def patho_bench_texts(
    case_of: Mapping[str, str],
    splits: Sequence[Split],
    label: str,
    values: Mapping[str, int | None],
) -> dict[str, str]:
    """Return the two files of a task, name -> text.

    Args:
        case_of: slide_id -> case_id.
        splits: one per column fold_<i>.
        label: the task's label column.
        values: slide_id -> 0, 1 or None (unknown: the slide is left out, as Patho-Bench drops it).
    """
    header = ["case_id", "slide_id", label, *(f"fold_{fold}" for fold in range(len(splits)))]
    rows = [
        [case, slide, values[slide], *(split.get(case, "") for split in splits)]
        for slide, case in case_of.items()
        if values[slide] is not None
    ]
    config = (
        f"task_col: {json.dumps(label)}\nsample_col: case_id\nextra_cols: []\n"
        'label_dict: {0: "0", 1: "1"}\nmetrics: [macro-ovr-auc, bacc]\n'
    )
    return {"k=all.tsv": csv_text([header, *rows], "\t"), "config.yaml": config}


def stamp_text(splits: Sequence[Split]) -> str:
    """Return STAMP's `splits.json`; STAMP draws its validation patients from those that train."""
    folds = [
        {
            "train_patients": [case for case, part in split.items() if part != "test"],
            "test_patients": [case for case, part in split.items() if part == "test"],
        }
        for split in splits
    ]
    return json.dumps({"splits": folds}, indent=4) + "\n"


def slide_names(slides: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """Return name -> case of slides given as (slide_id, path or "", case_id).

    A slide is named by its id and by its file, unless a file of another case has the same name.
    """
    files, ids = defaultdict(set), {}
    for slide, path, case in slides:
        ids[slide] = case
        for name in {_file_name(path), _without_ending(_file_name(path))} - {""}:
            files[name].add(case)
    return {name: min(cases) for name, cases in files.items() if len(cases) == 1} | ids


def find_slide(name: str, names: Mapping[str, str]) -> str | None:
    r"""Return the name in `names` that a split's name of a slide stands for; None if there is none.

    `103.0` is 103, and `slides\s3.tif` is s3.
    """
    file = _file_name(name)
    whole = name.removesuffix(".0") if re.fullmatch(r"\d+\.0", name) else name
    tried = (name, file, _without_ending(file), whole)
    return next((each for each in tried if each in names), None)


def read_records(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header of another tool's split file, and its rows by column; none of STAMP's.

    Raises:
        SplitError: it cannot be read.
    """
    text = _text(path)
    if text.lstrip().startswith("{"):
        return [], []
    first = text.partition("\n")[0]
    separator = "\t" if "\t" in text else max(",;", key=first.count)
    lines = [
        [tidy(cell) for cell in line] for line in csv.reader(text.splitlines(), delimiter=separator)
    ]
    header = lines[0] if lines else []
    return header, [dict(zip(header, line, strict=False)) for line in lines[1:] if any(line)]


def label_conflicts(
    records: Iterable[Mapping[str, str]],
    case_of: Mapping[str, str],
    labels: Iterable[str],
    missing: Collection[str],
) -> dict[tuple[str, str], list[str]]:
    """Return (case, label) -> its values, in order, where rows of a case have several.

    Args:
        records: rows with slide_id and label columns; blank and unknown cells do not count.
        case_of: slide name -> case_id; rows of other slides do not count.
        labels: the columns to compare.
        missing: words for unknown (`slides.cohort.spelling.missing_words`).
    """
    found = defaultdict(dict)
    for row in records:
        slide = find_slide(row.get("slide_id", ""), case_of)
        for label in labels if slide is not None else ():
            text = row.get(label, "")
            if not is_missing(text, missing):
                value = zero_or_one(text)
                found[case_of[slide], label][text if value is None else f"{value:g}"] = None
    return {key: list(values) for key, values in found.items() if len(values) > 1}


def read_split(path: Path, case_of: Mapping[str, str], fold: int = 0) -> Split:
    """Return case -> part from a CLAM CSV of either form, Patho-Bench's or STAMP's file.

    Args:
        path: the file; its columns show which kind it is.
        case_of: slide name -> case_id of the cohort's slides, see `slide_names`.
        fold: fold of a Patho-Bench or STAMP file; a CLAM file has one split.

    Raises:
        SplitError: no such file or format, unknown slides, or a case in two parts.
    """
    header, records = read_records(path)
    column = f"fold_{fold}"
    faults: list[str] = []
    if not header and (text := _text(path)).strip():
        parts = _stamp_parts(path, text, fold)
        case_of = {case: case for case in case_of.values()}
    elif {"slide_id", column} <= set(header):
        cut = [n for n, row in enumerate(records, start=2) if len(row) < len(header)]
        if cut:
            raise SplitError(f"{path}: row {cut[0]} is cut off. Copy the file again.")
        parts = [(row["slide_id"], row[column], str(n)) for n, row in enumerate(records, start=2)]
    elif {"train", "test"} <= set(header):
        parts = list(_clam_parts(header, records, faults))
    else:
        raise SplitError(
            f"{path}: its columns are {', '.join(header)[:99]}. Give a CLAM split (train, val, "
            f"test), a Patho-Bench k=all.tsv with slide_id and {column}, or STAMP's splits.json."
        )
    split = _by_case(parts, case_of, faults)
    if faults:
        raise SplitError(all_faults(path, faults))
    return split


def _text(path: Path) -> str:
    try:
        return decode_text(Path(path).read_bytes())
    except OSError as error:
        raise SplitError(f"{path}: no readable split ({error}). Correct its path.") from error
    except ValueError as error:
        raise SplitError(f"{path}: no readable split: {error}") from error


def _stamp_parts(path: Path, text: str, fold: int) -> list[tuple[str, str, str]]:
    """Return (case, part, place) of one fold of STAMP's file."""
    try:
        folds = json.loads(text)["splits"]
        if not 0 <= fold < len(folds):
            raise SplitError(f"{path}: it has {len(folds)} folds, from 0: fold {fold} is not one.")
        return [
            (str(case), part, f"{part}_patients")
            for part in ("train", "test")
            for case in folds[fold][f"{part}_patients"]
        ]
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, SplitError):
            raise
        raise SplitError(
            f"{path}: no splits of STAMP ({type(error).__name__}: {error}). Give its splits.json."
        ) from error


def _clam_parts(header, records, faults) -> Iterable[tuple[str, str, str]]:
    """Yield (slide, part, row) of a CLAM file; its values show which form it has."""
    values = {row.get(part, "").lower() for row in records for part in SPLITS}
    for number, row in enumerate(records, start=2):
        if values <= TRUE | FALSE:
            marked = [part for part in SPLITS if row.get(part, "").lower() in TRUE]
            if len(marked) > 1:
                faults.append(f"row {number}: {row[header[0]]} is in {' and '.join(marked)}")
            yield from ((row[header[0]], part, str(number)) for part in marked[:1])
        else:
            for part in SPLITS:
                if slide := row.get(part, ""):
                    yield slide, part, str(number)


def _by_case(parts, case_of: Mapping[str, str], faults: list[str]) -> Split:
    """Return case -> part; add a fault for each unknown slide, unknown part or leak."""
    rows = defaultdict(lambda: defaultdict(list))
    unknown = []
    for slide, part, number in parts:
        if part not in (*SPLITS, ""):
            faults.append(f"row {number}: {slide} is in {part!r}: write train, val or test")
        elif (name := find_slide(slide, case_of)) is None:
            unknown.append(slide)
        elif part:
            rows[case_of[name]][part].append(slide)
    if unknown:
        faults.append(
            f"{len(unknown)} slides are not in the cohort: {', '.join(unknown[:5])}"
            f"{' ...' * (len(unknown) > 5)}: add them to its table, or remove them here"
        )
    for case, where in rows.items():
        if len(where) > 1:
            faults.append(
                f"case {case} is in "
                + " and ".join(f"{part} ({', '.join(slides)})" for part, slides in where.items())
                + ": put all its slides in one part"
            )
    return {case: next(iter(where)) for case, where in rows.items()}


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _without_ending(name: str) -> str:
    return ENDING.sub("", name)


def csv_text(rows: Iterable[Sequence], delimiter: str = ",") -> str:
    """Return rows as CSV text."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return text.getvalue()
