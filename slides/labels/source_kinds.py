"""Reads the rows of each kind of source: what they say of every case and gene.

    MAF                a row a mutation
    cBioPortal matrix  a row a sample, a column a gene
    GigaPath table     a row a slide, a column a gene

Each reader returns case -> `CaseGenes`, who counts as profiled in words, and faults.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from slides.cohort.spelling import is_missing
from slides.cohort.targets import zero_or_one
from slides.cohort.tcga_names import case_of, is_tumour
from slides.errors import LISTED, some_rows
from slides.labels.protein_change import protein_change
from slides.labels.variants import CLASSES, change_counts, class_word, row_counts

# GigaPath's gene columns; LKB1 never matches, since it is an alias of STK11
GIGAPATH_GENES = (
    "PTEN", "EGFR", "KRAS", "TP53", "ALK", "ROS1", "BRAF", "MET", "PIK3CA", "LKB1", "STK11", "RET",
    "FAT1", "LRP1B",
)  # fmt: skip
NOT_SOMATIC = {  # column of a MAF -> values, in lower case, of rows that are no somatic mutation
    "Mutation_Status": {"germline", "wildtype", "loh", "none", "redacted"},
    "Validation_Status": {"wildtype", "invalid", "redacted"},
}
CHANGES = ("HGVSp_Short", "HGVSp", "Protein_Change", "Amino_Acid_Change")  # columns of a MAF
NOT_SEQUENCED = frozenset({"ns", "np", "not profiled"})  # cells of a matrix, in lower case
WILD = frozenset({"wt", "wildtype", "wild type", "wild-type", "no alteration"})
NAMELESS = frozenset({"mutated", "mut", "mutant"})  # changes in a matrix without a name


class CaseGenes:
    """Genes seen in the rows of one case."""

    def __init__(self):
        self.mutated: set[str] = set()  # genes with any listed change
        self.counted: set[str] = set()  # genes with one that the rule counts
        self.unclear: set[str] = set()  # genes with one of which it is not known
        self.profiled: set[str] = set()  # genes known to have been sequenced

    def add(self, gene: str, counts: bool | None) -> None:
        """Add a change of a gene; None if it is not known whether the rule counts it."""
        self.mutated.add(gene)
        if counts is not False:
            (self.unclear if counts is None else self.counted).add(gene)

    def calls(self, rules: Mapping[str, str]) -> dict[str, bool]:
        """Return gene -> mutated; a gene of which it is not known is absent."""
        known = self.counted | (self.profiled - self.unclear)
        return {gene: gene in self.counted for gene in rules if gene in known}


def _sampled(rows, place: int, notes: list[str]):
    """Yield rows that name a tumour sample; note how many name none."""
    nameless = []
    for number, cells in rows:
        if is_missing(cells[place]):
            nameless.append(number)
        elif is_tumour(cells[place]):
            yield number, cells
    if nameless:
        notes.append(f"{len(nameless)} rows name no sample and are left out: {some_rows(nameless)}")


def _records(header, rows, column: str, cases, faults: list[str], notes: list[str]):
    """Yield each sample's row number, cells by column, and genes; add to `faults` and `notes`."""
    place = header.index(column)
    for number, cells in _sampled(rows, place, notes):
        if len(cells) != len(header):
            faults.append(f"row {number}: {len(cells)} cells, and the header has {len(header)}")
        else:
            record = dict(zip(header, cells, strict=True))
            yield number, record, cases[case_of(cells[place])]


def _maf(header, rows, rules, notes):
    """Return the cases of a MAF, a note on who counts as profiled, and faults; add to `notes`."""
    cases, odd, unread, denied, faults = defaultdict(CaseGenes), Counter(), Counter(), 0, []
    at = {name: place for place, name in enumerate(header)}
    places = [at[name] for name in CHANGES if name in at]
    if "hotspot" in rules.values() and not places:
        faults.append("column HGVSp_Short is missing, and the rule hotspot needs protein changes")
    for _, cells in _sampled(rows, at["Tumor_Sample_Barcode"], notes):
        case, gene = cases[case_of(cells[at["Tumor_Sample_Barcode"]])], cells[at["Hugo_Symbol"]]
        case.profiled |= rules.keys()
        if gene not in rules:
            continue
        if any(n in at and cells[at[n]].lower() in words for n, words in NOT_SOMATIC.items()):
            denied += 1
            continue
        kind = cells[at["Variant_Classification"]]
        change = next((found for at_ in places if (found := protein_change(cells[at_]))), "")
        counts = row_counts(gene, rules[gene], kind, change)
        case.add(gene, counts)
        if counts is None:
            known = class_word(kind) in CLASSES
            (unread if known else odd)[gene if known else kind] += 1
    if denied:
        notes.append(f"{denied} rows of these genes say that they are no somatic mutation")
    notes += [
        f"Variant_Classification {kind!r} ({n} rows of these genes) is not known: the label is "
        "unknown where no other row counts"
        for kind, n in odd.items()
    ]
    notes += [
        f"{gene}: {n} rows have no protein change that can be read: the label is unknown where no "
        "other row counts"
        for gene, n in unread.items()
    ]
    who = "only cases with a row in the file; a case without one is unknown, sequenced or not"
    return cases, who, faults


def _matrix(header, rows, rules, notes):
    """Return the cases of a cBioPortal matrix, an empty note, and faults; add to `notes`."""
    cases, faults, unread = defaultdict(CaseGenes), _missing_genes(header, rules), Counter()
    samples = _records(header, rows, "SAMPLE_ID", cases, faults, notes)
    for number, record, case in samples:
        for gene in rules.keys() & record.keys():
            cell = record[gene]
            if is_missing(cell) or cell.lower() in NOT_SEQUENCED:
                continue
            stated = 0.0 if cell.lower() in WILD else zero_or_one(cell)
            if stated == 0:
                case.profiled.add(gene)
                continue
            changes = ["MUTATED"] if stated else re.findall(r"[^\s,;|]+", cell)
            if not all(map(_is_change, changes)):
                faults.append(
                    f"row {number}: {gene} is {cell!r}: write protein changes (L858R T790M), "
                    "MUTATED or 1, WT or 0, or NS where it was not sequenced"
                )
            each = [change_counts(gene, rules[gene], change) for change in changes]
            counts = True if True in each else None if None in each else False
            case.add(gene, counts)
            unread[gene] += counts is None
            if counts is False:
                case.profiled.add(gene)
    notes += [
        f"{gene}: {n} cells do not tell whether the rule {rules[gene]} counts them: unknown"
        for gene, n in unread.items()
        if n
    ]
    return cases, "", _first(faults)


def _is_change(text: str) -> bool:
    """Return whether a word of a matrix is a change, read or not: letters, and a place."""
    lower = text.lower()
    placed = re.search(r"[a-z].*\d|\d.*[a-z]", lower)
    return lower in NAMELESS or bool(placed or protein_change(text))


def _gigapath(header, rows, rules, notes):
    """Return the cases of GigaPath's table, who counts as profiled, and faults; add to `notes`."""
    cases, faults = defaultdict(CaseGenes), _missing_genes(header, rules)
    finer = [gene for gene, rule in rules.items() if rule in ("truncating", "hotspot")]
    if finer:
        faults.append(f"the table has no protein changes, so no rule for {', '.join(finer)}")
    slides = _records(header, rows, "case_submitter_id", cases, faults, notes)
    for number, record, case in slides:
        for gene in rules.keys() & record.keys():
            if is_missing(record[gene]):
                continue
            stated = zero_or_one(record[gene])
            if stated is None:
                faults.append(f"row {number}: {gene} is {record[gene]!r}, not True or False")
            elif stated:
                case.add(gene, True)
        if any(zero_or_one(record.get(gene, "")) for gene in GIGAPATH_GENES):
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


KINDS = (
    ("MAF", {"Hugo_Symbol", "Variant_Classification", "Tumor_Sample_Barcode"}, _maf),
    ("cBioPortal matrix", {"SAMPLE_ID"}, _matrix),
    ("GigaPath table", {"case_submitter_id", "file_name"}, _gigapath),
)
"""Name, columns that show the kind, and reader, in the order in which they are tried."""
