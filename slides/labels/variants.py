"""Rules that decide which mutations make a gene count as mutated.

    nonsynonymous   the protein changes; TERT's promoter counts; synonymous changes do not
    truncating      nonsense, frame shift, splice site, nonstop: for tumour suppressors
    hotspot         the changes of `HOTSPOTS`
    listed          whatever the source lists, silent changes too

Whether a rule counts a mutation may be unknown: a class that is not in the lists, a hotspot without
a protein change. Then the label is unknown too, unless another mutation of the case counts.

A MAF gives the variant's class, a cBioPortal matrix only the protein change. The two agree except
for changes that spare the protein (`T125=`, splice region), which a matrix lists as mutations.

Source: the variant set of maftools and vcf2maf.
"""

from __future__ import annotations

import re

from slides.labels.protein_change import protein_change

RULES = ("nonsynonymous", "truncating", "hotspot", "listed")
TRUNCATING = frozenset(
    {"Nonsense_Mutation", "Frame_Shift_Del", "Frame_Shift_Ins", "Splice_Site", "Nonstop_Mutation"}
)
NONSYNONYMOUS = TRUNCATING | {
    "In_Frame_Del", "In_Frame_Ins", "Missense_Mutation", "Translation_Start_Site",
    "Start_Codon_Del", "Start_Codon_Ins", "Start_Codon_SNP", "Stop_Codon_Del", "Stop_Codon_Ins",
}  # fmt: skip
SILENT = frozenset(
    {
        "Silent", "Splice_Region", "Intron", "IGR", "RNA", "lincRNA", "3'UTR", "5'UTR", "3'Flank",
        "5'Flank", "Targeted_Region", "De_novo_Start_InFrame", "De_novo_Start_OutOfFrame", "Fusion",
    }
)  # fmt: skip
CLASSES = {kind.lower(): kind for kind in NONSYNONYMOUS | SILENT}
HOTSPOTS = {  # protein changes, as `protein_change` spells them
    "BRAF": r"V600.+",
    "EGFR": r"L858R|[A-Z]7(29|[345]\d|6[01])(_[A-Z]\d+)?del(ins)?[A-Z]*",  # exon 19: 729 to 761
    "KRAS": r"(G1[23]|Q61)[A-Z]",
    "NRAS": r"(G1[23]|Q61)[A-Z]",
    "TERT": r"Promoter|C228T|C250T",
}


def class_word(kind: str) -> str:
    """Return a Variant_Classification as `CLASSES` spells it: `Missense Mutation` too."""
    return kind.lower().replace(" ", "_")


def row_counts(gene: str, rule: str, kind: str, change: str) -> bool | None:
    """Return whether a rule counts a row of a MAF; None if the row does not tell."""
    if rule == "listed":
        return True
    kind = CLASSES.get(class_word(kind), "")
    if gene == "TERT" and kind == "5'Flank":
        return rule != "truncating"
    if not kind:
        return None
    counted = TRUNCATING if rule == "truncating" else NONSYNONYMOUS
    return kind in counted and (rule != "hotspot" or _is_hotspot(gene, change))


def change_counts(gene: str, rule: str, change: str) -> bool | None:
    """Return whether a rule counts a change of a matrix; None if the change does not tell.

    `T125=` spares the protein. A change without a name (MUTATED) changes it.
    """
    if rule == "listed":
        return True
    named = protein_change(change)
    if named.endswith("="):
        return False
    if rule == "truncating":
        found = named or change
        cut = "*" in found or "fs" in found or found.endswith("_splice")
        return True if cut else False if named else None
    return rule != "hotspot" or _is_hotspot(gene, change)


def _is_hotspot(gene: str, change: str) -> bool | None:
    """Return whether a protein change is one of `HOTSPOTS`; None if it cannot be read."""
    named = protein_change(change)
    if re.fullmatch(HOTSPOTS[gene], named):
        return True
    any_residue = change.upper().endswith("X") and re.fullmatch(HOTSPOTS[gene], named[:-1] + "A")
    return None if any_residue or not named else False
