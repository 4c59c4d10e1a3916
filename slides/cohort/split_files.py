"""Split files of other tools, CLAM and Patho-Bench: read and written.

    CLAM         splits_0.csv       a column each for train, val, test: ragged lists of slide_id
                 splits_0_bool.csv  a row a slide; True in one of three columns
    Patho-Bench  <task>/k=all.tsv   case_id, slide_id, the label, fold_0, fold_1, ... with the
                 <task>/config.yaml part's name in each; and the meaning of the label's numbers

A split that is read becomes case -> part. A case in two parts of one split (a leak) and slides that
the cohort does not have are refused. Slides that the file does not name are left out.

Source: CLAM's `create_splits_seq.py` and the format of Patho-Bench's split files.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from slides.cohort.splits import Split
from slides.cohort.table import SPLITS
from slides.errors import SplitError, all_faults

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


def read_split(path: Path, case_of: Mapping[str, str], fold: int = 0) -> Split:
    """Return case -> part from a CLAM CSV of either form or a Patho-Bench `k=all.tsv`.

    Args:
        path: the file; its columns show which kind it is.
        case_of: slide name -> case_id of the cohort's slides; a slide may have several names (its
            id, its file's stem).
        fold: column fold_<n> of a Patho-Bench file; a CLAM file has one split.

    Raises:
        SplitError: no such file or format, unknown slides, or a case in two parts.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SplitError(f"{path}: no readable split ({error}). Correct its path.") from error
    lines = list(csv.reader(io.StringIO(text), delimiter="\t" if "\t" in text else ","))
    header = lines[0] if lines else []
    records = [dict(zip(header, line, strict=False)) for line in lines[1:] if any(line)]
    column = f"fold_{fold}"
    faults: list[str] = []
    if {"slide_id", column} <= set(header):
        cut = [n for n, row in enumerate(records, start=2) if len(row) < len(header)]
        if cut:
            raise SplitError(f"{path}: row {cut[0]} is cut off. Copy the file again.")
        parts = [(row["slide_id"], row[column], str(n)) for n, row in enumerate(records, start=2)]
    elif {"train", "test"} <= set(header):
        parts = list(_clam_parts(header, records, faults))
    else:
        raise SplitError(
            f"{path}: its columns are {', '.join(header)[:99]}. Give a CLAM split (train, val, "
            f"test) or a Patho-Bench k=all.tsv with slide_id and {column}."
        )
    split = _by_case(parts, case_of, faults)
    if faults:
        raise SplitError(all_faults(path, faults))
    return split


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
        elif slide not in case_of:
            unknown.append(slide)
        elif part:
            rows[case_of[slide]][part].append(slide)
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


def csv_text(rows: Iterable[Sequence], delimiter: str = ",") -> str:
    """Return rows as CSV text."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return text.getvalue()
