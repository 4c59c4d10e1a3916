"""Labels from published mutations: which case has which gene mutated.

    MAF                data_mutations.txt, a GDC MAF; plain or .gz; a row a mutation. For the GDC's
                       one file per case: `cat` them into one, headers included
    cBioPortal matrix  a row a sample, a column a gene; WT, NS (not sequenced) or protein changes,
                       MUTATED if it has no name; or 0 and 1. Also alterations_across_samples.tsv
    GigaPath table     a row a slide, a True or False for each gene

A case is 1 if any of its tumour samples has a mutation that the gene's rule (variants.py) counts,
0 if it was *profiled* and none has one, and unknown otherwise, never 0. It is unknown too if it has
a mutation of which the file does not say enough: no class, or a hotspot without a protein change.
Rows that say themselves that they are no somatic mutation (Mutation_Status, Validation_Status) and
rows without a sample are left out and counted. A matrix states who was profiled, and so may a MAF
(`#sequenced_samples:`). The others do not: without a list of profiled samples a case counts as
profiled only if the file proves it by a mutation of any gene (False in GigaPath's table may mean
"not in the MAF").

Price: the unpacked text in memory and one pass over it; 0.2 s for a matrix of 2 MB.
Condition: every gene was sequenced in every profiled sample (exomes; not a mix of gene panels).
None of these files has fusions.

Source: the GDC's MAF format, cBioPortal's file formats.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slides.cohort.spelling import is_missing
from slides.cohort.tcga_names import case_of, is_tumour
from slides.errors import LabelError, all_faults, some
from slides.labels.source_kinds import KINDS
from slides.labels.source_text import read_bytes, sequenced_samples, source_table, source_text
from slides.labels.variants import HOTSPOTS, RULES


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
    notes: tuple[str, ...] = ()
    """Lines on rows that were left out or could not be read."""

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
    data = read_bytes(path)
    header, rows = source_table(path, data)
    kind, read = next((k[::2] for k in KINDS if k[1] <= set(header)), (None, None))
    if read is None:
        raise LabelError(
            f"{path}: its columns are {some(header)}. Give a MAF (Hugo_Symbol, "
            "Variant_Classification, Tumor_Sample_Barcode), a cBioPortal matrix (SAMPLE_ID and a "
            "column a gene) or GigaPath's table (case_submitter_id, file_name and a column a gene)."
        )
    notes: list[str] = []
    cases, who, faults = read(header, rows, rules, notes)
    faults += [
        f"gene {gene}: the file lists no mutation of it in any sample: write the symbol that the "
        "file uses (STK11, not LKB1), or leave the gene out"
        for gene in rules
        if not faults and not any(gene in case.mutated for case in cases.values())
    ]
    if faults:
        raise LabelError(all_faults(path, faults))
    samples = sequenced_samples(source_text(path, data)) if kind == "MAF" else []
    who = _mark_profiled(path, kind, cases, rules, profiled, samples) or who
    if kind == "GigaPath table":
        rules = dict.fromkeys(rules, "as published")
    called = {case: found.calls(rules) for case, found in sorted(cases.items())}
    sha256 = hashlib.sha256(data).hexdigest()
    return Calls(path, kind, sha256, dict(rules), who, called, tuple(notes))


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


def _mark_profiled(path: Path, kind: str, cases: dict, rules, profiled, samples: list[str]) -> str:
    """Mark the cases that count as profiled, and return who does; "" if the file decides.

    `samples` are those that the file itself names as sequenced.
    """
    if kind == "cBioPortal matrix":
        return "as the file says: NS is not sequenced"
    if profiled == "all":
        for case in cases.values():
            case.profiled |= set(rules)
        return "everyone in the file, as asked"
    if profiled is None and samples:
        for case in {case_of(sample) for sample in samples if is_tumour(sample)}:
            cases[case].profiled |= set(rules)
        return f"the {len(samples)} samples that the file names as sequenced, and whoever has a row"
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
    lines = source_text(Path(path), read_bytes(Path(path))).splitlines()
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
    known = (sample for sample in samples if not is_missing(sample))
    return {case_of(sample) for sample in known if is_tumour(sample)}
