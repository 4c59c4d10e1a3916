"""`tapfm labels`: makes a table of labels, or a cohort table, from published data.

    mutations (slides/labels/mutations.py) --> labels of cases
    manifest + folder (slides/labels/manifest.py) --> whole diagnostic slides
    both + a split (slides/cohort/splits.py) --> case_id, slide_id, slide_path, split, site, labels

All faults of the mutations, the manifest and the files are reported at once. A case that was not
profiled stays in the table with blank labels, is counted and named. Beside the table,
`<table>.labels.json` records the sources (sha256), rules and assumptions; neither file has a date
in it, so the same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from slides.cohort.split_files import csv_text
from slides.cohort.splits import FRACTIONS, balance, fixed_split, gather_cases
from slides.errors import DownloadError, LabelError
from slides.files import write_json, write_text
from slides.labels.manifest import check_files, pick_diagnostic, read_manifest
from slides.labels.mutations import Calls, Disagreement, disagreements, read_calls

NAMED = 12  # cases spelled out in one line


@dataclass(frozen=True)
class Downloads:
    """A GDC download, and how its slides become a cohort."""

    manifest: Path
    folder: Path
    base: Path
    """The folder that `slide_path` is relative to."""
    on_error: str = "stop"
    """`skip` leaves missing and damaged slides out of the table."""
    fractions: Sequence[float] = FRACTIONS
    """Shares of the cases in train, val and test."""
    preserve_sites: bool = False
    seed: int = 0


def parse_genes(genes: Sequence[str], rule: str) -> dict[str, str]:
    """Return gene -> rule from ["EGFR", "STK11:truncating"]; `rule` where none is given.

    Raises:
        LabelError: there is no gene, or one is named twice.
    """
    pairs = [gene.partition(":")[::2] for gene in genes]
    rules = {gene: own or rule for gene, own in pairs}
    if not rules or len(rules) < len(pairs):
        raise LabelError(
            f"genes {' '.join(genes) or '(none)'}: name each gene once: give --genes EGFR KRAS"
        )
    return rules


def run_labels(
    sources: Sequence[Path],
    rules: Mapping[str, str],
    profiled: Path | str | None = None,
    downloads: Downloads | None = None,
    out: Path | None = None,
    writer: str = "tapfm",
) -> int:
    """Read the sources, print a report, and write the table; return exit code 0.

    Args:
        sources: the first gives the labels; a second is compared with it.
        rules: gene -> rule, in the order of the table's columns.
        profiled: see `slides.labels.mutations.read_calls`.
        downloads: makes a cohort table, a row a slide; None a label table, a row a case.
        out: the table; None only reports.
        writer: program and version, for the record beside the table.

    Raises:
        LabelError: sources or downloads are faulty; all faults are listed.
    """
    faults: list[str] = []
    calls = _all_calls(sources, rules, profiled, faults)
    picked, left = _all_slides(downloads, faults) if downloads else ([], [])
    if faults:
        raise LabelError("\n".join(dict.fromkeys(faults)))
    first = calls[0]
    cases = dict.fromkeys(name.case_id for _, name, _ in picked) if downloads else first.cases
    _print_counts(calls, cases)
    unknown = [case for case in cases if all(math.isnan(first.value(case, g)) for g in rules)]
    if len(unknown) == len(cases):
        raise LabelError(f"{first.path}: it knows none of the {len(cases)} cases. Do the two belong"
                         f" to one study? Its cases: {_some(list(first.cases))}")  # fmt: skip
    if unknown:
        print(f"{len(unknown)} cases not profiled, labels blank: {_some(unknown)}")
    differ = [] if len(calls) < 2 else disagreements(*calls, cases)
    _print_disagreements(differ, len(cases))
    text, how = _cohort(first, picked, left, downloads) if downloads else (_labels(first), {})
    if out is None:
        print("nothing written: give --out")
        return 0
    record = {
        "writer": writer,
        "table": {"file": out.name, "sha256": _sha256(text.encode())},
        "sources": [_source(each, cases) for each in calls],
        "disagreements": [asdict(each) for each in differ],
        "profiled_list": _file(profiled) if profiled not in (None, "all") else profiled,
        **how,
    }
    write_text(out, text)
    write_json(out.with_name(out.name + ".labels.json"), record)
    print(f"{out}: {text.count(chr(10)) - 1} rows; {out.name}.labels.json says where from")
    return 0


def _print_counts(calls: Sequence[Calls], cases: Iterable[str]) -> None:
    for each in calls:
        print(f"{each.path}: {each.kind}; profiled: {each.profiled}")
        print(f"  {'gene':10}{'rule':15}{'positive':>9}{'negative':>9}{'unknown':>9}")
        for gene, rule in each.rules.items():
            counts = "".join(f"{n:9}" for n in each.count(gene, cases))
            print(f"  {gene:10}{rule:15}{counts}")
        print("".join(f"  {note}\n" for note in each.notes), end="")


def _print_disagreements(differ: Sequence[Disagreement], cases: int) -> None:
    if differ:
        print(f"where the two disagree, of {cases} cases:")
        print(f"  {'gene':10}{'both know':>10}{'differ':>8}{'1st only':>10}{'2nd only':>10}")
    for d in differ:
        total = d.only_first + d.only_second
        print(f"  {d.gene:10}{d.shared:10}{total:8}{d.only_first:10}{d.only_second:10}")


def _all_calls(sources, rules, profiled, faults) -> list[Calls]:
    calls = []
    for path in sources:
        try:
            calls.append(read_calls(path, rules, profiled))
        except LabelError as error:
            faults.append(str(error))
    if profiled and calls and all(each.kind == "cBioPortal matrix" for each in calls):
        faults.append(
            f"--profiled {profiled}: a matrix already states who was sequenced: leave it out"
        )
    return calls


def _all_slides(downloads: Downloads, faults: list[str]) -> tuple[list[tuple], list[dict]]:
    """Return (manifest row, name, path) of each intact diagnostic slide, and those left out."""
    try:
        listed = read_manifest(downloads.manifest)
        picked, left = pick_diagnostic(listed)
    except DownloadError as error:
        faults.append(str(error))
        return [], []
    kinds = "".join(f"; left out: {n} {kind}" for kind, n in left.items())
    print(f"{downloads.manifest}: {len(listed)} files, {len(picked)} diagnostic slides{kinds}")
    checked = check_files([file for file, _ in picked], downloads.folder)
    whole = [(file, name, checked.found[file.id]) for file, name in picked
             if file.id in checked.found]  # fmt: skip
    print(f"{downloads.folder}: {len(whole)} slides whole by size and md5, {checked.hashed} of the "
          f"files hashed now; {len(checked.faults)} missing or damaged")  # fmt: skip
    if downloads.on_error == "skip" and whole:
        print("".join(f"left out: {fault}\n" for fault in checked.faults), end="")
    else:
        faults += checked.faults
    others = (name.slide_id for file, name in picked if file.id not in checked.found)
    return whole, [
        {"slide": slide, "reason": fault}
        for slide, fault in zip(others, checked.faults, strict=True)
    ]


def _labels(calls: Calls) -> str:
    """Return the label table as text, a row a case."""
    rows = [[case, *_cells(calls, case)] for case in calls.cases]
    return csv_text([["case_id", *calls.rules], *rows])


def _cohort(
    calls: Calls, picked: list[tuple], left: list[dict], downloads: Downloads
) -> tuple[str, dict]:
    """Return the cohort table as text, a row a slide, and a record of how it was made."""
    names = [name for _, name, _ in picked]
    ids = [name.case_id for name in names]
    values = [[calls.value(case, gene) for gene in calls.rules] for case in ids]
    cases = gather_cases(ids, [n.site for n in names], tuple(calls.rules), np.array(values))
    how = {key: getattr(downloads, key) for key in ("fractions", "seed", "preserve_sites")}
    split = fixed_split(cases, **how)
    print(balance(cases, split))
    rows = [
        [name.case_id, name.slide_id, Path(os.path.relpath(path, downloads.base)).as_posix(),
         split[name.case_id], name.site, *_cells(calls, name.case_id)]
        for _, name, path in picked
    ]  # fmt: skip
    header = ["case_id", "slide_id", "slide_path", "split", "site", *calls.rules]
    made = {"manifest": _file(downloads.manifest), "split": how, "left_out": left}
    return csv_text([header, *rows]), made


def _cells(calls: Calls, case: str) -> list[str]:
    values = [calls.value(case, gene) for gene in calls.rules]
    return ["" if math.isnan(value) else str(int(value)) for value in values]


def _source(calls: Calls, cases) -> dict:
    counts = {
        gene: dict(zip(("positive", "negative", "unknown"), calls.count(gene, cases), strict=True))
        for gene in calls.rules
    }
    return {
        "file": calls.path.name,
        "kind": calls.kind,
        "sha256": calls.sha256,
        "rules": dict(calls.rules),
        "profiled": calls.profiled,
        "counts": counts,
        "notes": list(calls.notes),
    }


def _file(path: Path) -> dict:
    return {"file": Path(path).name, "sha256": _sha256(Path(path).read_bytes())}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)
