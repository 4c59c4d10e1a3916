"""Labels from published mutations: which case has which gene mutated.

    MAF                data_mutations.txt, a GDC MAF; plain or .gz; a row a mutation. For the GDC's
                       one file per case: `cat` them into one, headers included
    cBioPortal matrix  a row a sample, a column a gene; WT, NS (not sequenced) or protein changes,
                       MUTATED if it has no name
    GigaPath table     a row a slide, a True or False for each gene

A case is 1 if any of its tumour samples has a mutation that the gene's rule (variants.py) counts,
0 if it was *profiled* and none has one, and unknown otherwise, never 0. A matrix states who was
profiled. The others do not: without a list of profiled samples a case counts as profiled only if
the file proves it by a mutation of any gene (False in GigaPath's table may mean "not in the MAF").

Price: the unpacked text in memory and one pass over it; 0.2 s for a matrix of 2 MB.
Condition: every gene was sequenced in every profiled sample (exomes; not a mix of gene panels).
None of these files has fusions.

Source: the GDC's MAF format, cBioPortal's file formats.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from slides.cohort.targets import UNKNOWN
from slides.cohort.tcga_names import case_of, is_tumour
from slides.errors import LISTED, LabelError, all_faults, some
from slides.labels.variants import HOTSPOTS, NONSYNONYMOUS, RULES, SILENT, change_counts, row_counts

# GigaPath's gene columns; LKB1 never matches, since it is an alias of STK11
GIGAPATH_GENES = (
    "PTEN", "EGFR", "KRAS", "TP53", "ALK", "ROS1", "BRAF", "MET", "PIK3CA", "LKB1", "STK11", "RET",
    "FAT1", "LRP1B",
)  # fmt: skip
NOT_SOMATIC = frozenset({"germline", "wildtype", "loh"})
NOT_SEQUENCED = UNKNOWN | {"ns", "np"}  # cells of a matrix, in lower case
NAMELESS = frozenset({"mutated", "promoter"})  # changes in a matrix without a position
TABLE = {"True": True, "False": False}  # cells of GigaPath's table
CELL = 1 << 24  # characters of a cell: the allele of a long deletion exceeds csv's default limit


@dataclass(frozen=True)
class Calls:
    """The mutation calls of one source, by case."""

    path: Path
    kind: str
    """`MAF`, `cBioPortal matrix` or `GigaPath table`."""
    sha256: str
    """SHA-256 of the file, packed or not."""
    rules: Mapping[str, str]
    """Gene -> rule; "as published" if the source decided."""
    profiled: str
    """Which cases count as profiled, in words."""
    cases: Mapping[str, Mapping[str, bool]]
    """Case -> gene -> mutated; an absent gene is unknown."""

    def value(self, case: str, gene: str) -> float:
        """Return 1.0, 0.0 or nan (unknown); nan for a case that the source does not know."""
        return float(self.cases.get(case, {}).get(gene, math.nan))

    def count(self, gene: str, cases: Iterable[str] | None = None) -> tuple[int, int, int]:
        """Return the number of positive, negative and unknown cases."""
        values = [self.value(case, gene) for case in (self.cases if cases is None else cases)]
        return values.count(1.0), values.count(0.0), sum(map(math.isnan, values))


@dataclass(frozen=True)
class Disagreement:
    """Differences of two sources on one gene, over the cases that both know."""

    gene: str
    shared: int
    only_first: int
    """Mutated in the first source, not in the second."""
    only_second: int


def disagreements(first: Calls, second: Calls, cases: Iterable[str]) -> list[Disagreement]:
    """Return where two sources differ among the given cases, a row a gene."""
    cases, rows = list(cases), []
    for gene in first.rules:
        pairs = Counter((first.value(case, gene), second.value(case, gene)) for case in cases)
        known = {pair: n for pair, n in pairs.items() if not any(map(math.isnan, pair))}
        only = known.get((1.0, 0.0), 0), known.get((0.0, 1.0), 0)
        rows.append(Disagreement(gene, sum(known.values()), *only))
    return rows


def read_calls(path: Path, rules: Mapping[str, str], profiled: Path | str | None = None) -> Calls:
    """Read a source of any of the three kinds; its header shows which it is.

    Args:
        path: the file, plain or gzip.
        rules: gene -> one of `RULES`.
        profiled: path of a list of samples (`read_profiled`); "all" counts all cases of the file as
            profiled, None only those for whom the file proves it. Ignored for a matrix.

    Raises:
        LabelError: the file is faulty for these genes; all faults are listed.
    """
    path = Path(path)
    _check_rules(path, rules)
    data = _read_bytes(path)
    header, rows = _table(path, data)
    kinds = (
        ("MAF", {"Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode"}, _maf),
        ("cBioPortal matrix", {"SAMPLE_ID"}, _matrix),
        ("GigaPath table", {"case_submitter_id", "file_name"}, _gigapath),
    )
    kind, read = next((k[::2] for k in kinds if k[1] <= set(header)), (None, None))
    if read is None:
        raise LabelError(
            f"{path}: its columns are {some(header)}. Give a MAF (Hugo_Symbol, "
            "Variant_Classification, Tumor_Sample_Barcode), a cBioPortal matrix (SAMPLE_ID and a "
            "column a gene) or GigaPath's table (case_submitter_id, file_name and a column a gene)."
        )
    cases, who, faults = read(header, rows, rules)
    faults += [
        f"gene {gene}: the file lists no mutation of it in any sample: write the symbol that the "
        "file uses (STK11, not LKB1), or leave the gene out"
        for gene in rules
        if not faults and not any(gene in case.mutated for case in cases.values())
    ]
    if faults:
        raise LabelError(all_faults(path, faults))
    who = _mark_profiled(path, kind, cases, rules, profiled) or who
    if kind == "GigaPath table":
        rules = dict.fromkeys(rules, "as published")
    return Calls(path, kind, hashlib.sha256(data).hexdigest(), dict(rules), who,
                 {case: found.calls(rules) for case, found in sorted(cases.items())})  # fmt: skip


def _check_rules(path: Path, rules: Mapping[str, str]) -> None:
    """Raise LabelError if a rule does not exist, or has no hotspots for its gene."""
    faults = [
        f"gene {gene}: rule {rule!r} is none of {', '.join(RULES)}"
        for gene, rule in rules.items()
        if rule not in RULES
    ] + [
        f"gene {gene}: there is no hotspot list for it (there is for {', '.join(HOTSPOTS)}): take "
        "nonsynonymous or truncating, or add its row to HOTSPOTS"
        for gene, rule in rules.items()
        if rule == "hotspot" and gene not in HOTSPOTS
    ]
    if faults:
        raise LabelError(all_faults(path, faults))


def _mark_profiled(path: Path, kind: str, cases: dict, rules, profiled) -> str:
    """Mark the cases that count as profiled, and return who does; "" if the file decides."""
    if kind == "cBioPortal matrix":
        return "as the file says: NS is not sequenced"
    if profiled == "all":
        for case in cases.values():
            case.profiled |= set(rules)
        return "everyone in the file, as asked"
    if profiled is None:
        return ""
    names = read_profiled(profiled)
    if not names & cases.keys():
        raise LabelError(
            f"{profiled}: none of its {len(names)} cases is in {path} (it has "
            f"{some(sorted(names))}; there, {some(sorted(cases))}). Give the list of the same "
            "study, or leave it out."
        )
    # A sequenced case without a row in a MAF has no mutation; GigaPath's table has a row for all.
    for case in names if kind == "MAF" else names & cases.keys():
        cases[case].profiled |= set(rules)
    return f"{len(names)} cases of {Path(profiled).name}, and whoever has a mutation"


def read_profiled(path: Path) -> set[str]:
    """Return the cases in cBioPortal's `cases_sequenced.txt`, or in a text with a sample a line.

    Raises:
        LabelError: the file is missing, or not such a list.
    """
    lines = _text(Path(path), _read_bytes(Path(path))).splitlines()
    ids = [line.partition(":")[2].split() for line in lines if line.startswith("case_list_ids:")]
    if ids:
        samples = ids[0]
    else:
        samples = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    odd = [sample for sample in samples if re.search(r"[\s,;:]", sample)]
    if odd or not samples:
        raise LabelError(
            f"{path}: {f'a line reads {odd[0]!r}' if odd else 'it names no sample'}. Give "
            "cBioPortal's case_lists/cases_sequenced.txt, or a text with a sample or case a line."
        )
    return {case_of(sample) for sample in samples if is_tumour(sample)}


class _Case:
    """Genes seen in the rows of one case."""

    def __init__(self):
        self.mutated: set[str] = set()  # genes with any listed change
        self.counted: set[str] = set()  # genes with one that the rule counts
        self.profiled: set[str] = set()  # genes known to have been sequenced

    def calls(self, rules: Mapping[str, str]) -> dict[str, bool]:
        known = self.counted | self.profiled
        return {gene: gene in self.counted for gene in rules if gene in known}


def _maf(header, rows, rules):
    """Return the cases of a MAF, a note on who counts as profiled, and faults."""
    cases, odd, faults = defaultdict(_Case), Counter(), []
    at = {name: place for place, name in enumerate(header)}
    if "hotspot" in rules.values() and "HGVSp_Short" not in at:
        faults.append("column HGVSp_Short is missing, and the rule hotspot needs protein changes")
    for number, cells in rows:
        if len(cells) < len(header):
            faults.append(f"row {number}: {len(cells)} cells of {len(header)}: the file is cut")
            continue
        sample, gene = cells[at["Tumor_Sample_Barcode"]], cells[at["Hugo_Symbol"]]
        if not is_tumour(sample):
            continue
        case = cases[case_of(sample)]
        case.profiled |= rules.keys()
        status = cells[at["Mutation_Status"]].lower() if "Mutation_Status" in at else ""
        if gene not in rules or status in NOT_SOMATIC:
            continue
        kind = cells[at["Variant_Classification"]]
        if kind not in NONSYNONYMOUS | SILENT:
            odd[kind] += 1
        case.mutated.add(gene)
        change = cells[at["HGVSp_Short"]] if "HGVSp_Short" in at else ""
        if row_counts(gene, rules[gene], kind, change.removeprefix("p.")):
            case.counted.add(gene)
    faults += [
        f"Variant_Classification {kind!r} ({n} rows of these genes) is not known: write one of "
        f"{', '.join(sorted(NONSYNONYMOUS | SILENT))}, or remove the rows"
        for kind, n in odd.items()
    ]
    who = "only cases with a row in the file; a case without one is unknown, sequenced or not"
    return cases, who, _first(faults)


def _matrix(header, rows, rules):
    """Return the cases of a cBioPortal matrix, an empty note, and faults."""
    cases, faults = defaultdict(_Case), _missing_genes(header, rules)
    for number, cells in rows:
        if len(cells) != len(header):
            faults.append(f"row {number}: {len(cells)} cells of {len(header)}: the file is cut")
            continue
        record = dict(zip(header, cells, strict=True))
        if not is_tumour(record["SAMPLE_ID"]):
            continue
        case = cases[case_of(record["SAMPLE_ID"])]
        for gene in rules.keys() & record.keys():
            cell = record[gene]
            if cell.lower() in NOT_SEQUENCED:
                continue
            if cell.lower() == "wt":
                case.profiled.add(gene)
                continue
            changes = [change for change in re.split(r"[\s,;]+", cell) if change]
            if any(c.lower() not in NAMELESS and not re.search(r"\d", c) for c in changes):
                faults.append(
                    f"row {number}: {gene} is {cell!r}: write protein changes (L858R T790M), "
                    "MUTATED, WT, or NS where it was not sequenced"
                )
            case.mutated.add(gene)
            if any(change_counts(gene, rules[gene], change) for change in changes):
                case.counted.add(gene)
            elif "mutated" not in cell.lower():  # a nameless change may be one that counts
                case.profiled.add(gene)
    return cases, "", _first(faults)


def _gigapath(header, rows, rules):
    """Return the cases of GigaPath's table, a note on who counts as profiled, and faults."""
    cases, faults = defaultdict(_Case), _missing_genes(header, rules)
    finer = [gene for gene, rule in rules.items() if rule in ("truncating", "hotspot")]
    if finer:
        faults.append(f"the table has no protein changes, so no rule for {', '.join(finer)}")
    place = header.index("case_submitter_id")
    for number, cells in rows:
        if len(cells) != len(header):
            faults.append(f"row {number}: {len(cells)} cells of {len(header)}: the file is cut")
            continue
        record = dict(zip(header, cells, strict=True))
        case = cases[cells[place]]
        for gene in rules.keys() & record.keys():
            if record[gene] not in TABLE:
                faults.append(f"row {number}: {gene} is {record[gene]!r}, not True or False")
            elif TABLE[record[gene]]:
                case.mutated.add(gene)
                case.counted.add(gene)
        if any(record.get(gene) == "True" for gene in GIGAPATH_GENES):
            case.profiled |= rules.keys()
    who = "only cases with a mutation of any of its genes; False may mean not sequenced"
    return cases, who, _first(faults)


def _first(faults: list[str]) -> list[str]:
    rest = [f"and {len(faults) - LISTED} more"] if len(faults) > LISTED else []
    return faults[:LISTED] + rest


def _missing_genes(header: list[str], rules: Mapping[str, str]) -> list[str]:
    return [
        f"gene {gene}: there is no such column: write the symbol that the file uses"
        for gene in rules
        if gene not in header
    ]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabelError(f"{path}: {error.strerror}. Give the path of the file.") from error


def _text(path: Path, data: bytes) -> str:
    try:
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise LabelError(f"{path}: a broken gzip ({error}). Download it again.") from error
    except UnicodeDecodeError as error:
        raise LabelError(f"{path}: not UTF-8 text ({error}). Give the table, unpacked.") from error


def _table(path: Path, data: bytes) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Return header and numbered rows below any # lines; tab-separated if the header has a tab."""
    csv.field_size_limit(CELL)
    lines = io.StringIO(_text(path, data), newline="")
    number, first = 1, lines.readline()
    while first.startswith("#"):
        number, first = number + 1, lines.readline()
    if not first.strip():
        raise LabelError(f"{path}: it is empty. Download it again.")
    # In a MAF quotes are plain characters; in a CSV they enclose commas.
    style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if "\t" in first else {}
    header = [name.strip() for name in next(csv.reader([first], **style))]
    rows = (
        (n, [cell.strip() for cell in cells])
        for n, cells in enumerate(csv.reader(lines, **style), start=number + 1)
        if any(cells) and cells[0][:1] != "#" and cells[: len(header)] != header
    )
    return header, rows
