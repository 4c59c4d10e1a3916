"""Rules that decide which mutations make a gene count as mutated.

    nonsynonymous   the protein changes; TERT's promoter counts; synonymous changes do not
    truncating      nonsense, frame shift, splice site, nonstop: for tumour suppressors
    hotspot         the changes of `HOTSPOTS`
    listed          whatever the source lists, silent changes too

A MAF gives the variant's class, a cBioPortal matrix only the protein change. The two agree except
for changes that spare the protein (`T125=`, splice region), which a matrix lists as mutations.

Source: the variant set of maftools and vcf2maf.
"""

from __future__ import annotations

import re

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
HOTSPOTS = {  # protein changes, without the p.
    "BRAF": r"V600.+",
    "EGFR": r"L858R|[A-Z]7(29|[345]\d|6[01])(_[A-Z]\d+)?del(ins)?[A-Z]*",  # exon 19: 729 to 761
    "KRAS": r"(G1[23]|Q61)[A-Z]",
    "NRAS": r"(G1[23]|Q61)[A-Z]",
    "TERT": r"Promoter|C228T|C250T",
}


def row_counts(gene: str, rule: str, kind: str, change: str) -> bool:
    """Return whether a rule counts a row of a MAF."""
    if rule == "listed":
        return True
    if gene == "TERT" and kind == "5'Flank":
        return rule != "truncating"
    if rule == "truncating":
        return kind in TRUNCATING
    hot = rule != "hotspot" or bool(re.fullmatch(HOTSPOTS[gene], change))
    return hot and kind in NONSYNONYMOUS


def change_counts(gene: str, rule: str, change: str) -> bool:
    """Return whether a rule counts a protein change; `T125=` spares the protein."""
    if rule == "listed":
        return True
    if rule == "truncating":
        return "*" in change or "fs" in change or change.endswith("_splice")
    hot = rule != "hotspot" or bool(re.fullmatch(HOTSPOTS[gene], change))
    return hot and not change.endswith("=")
