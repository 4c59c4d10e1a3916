"""Reads a protein change, however it is spelled, as cBioPortal does: G12D, E746_A750del, Q37*.

    p.G12D  p.(Gly12Asp)  NP_004976.2:p.Gly12Asp  g12d       G12D
    G12>D  L747_P753>S                                       G12D  L747_P753delinsS
    p.Leu210%3D  L210L                                       L210=
    Gln37Ter  Q37X  T125fsX9                                 Q37*  T125fs*9

Source: HGVS nomenclature for proteins; VEP, SnpEff, ANNOVAR and older HGVS for other spellings.
"""

from __future__ import annotations

import re

THREE = {
    "Ala": "A", "Arg": "R", "Asn": "N", "Asp": "D", "Cys": "C", "Gln": "Q", "Glu": "E", "Gly": "G",
    "His": "H", "Ile": "I", "Leu": "L", "Lys": "K", "Met": "M", "Phe": "F", "Pro": "P", "Ser": "S",
    "Thr": "T", "Trp": "W", "Tyr": "Y", "Val": "V", "Sec": "U", "Ter": "*", "Xaa": "X",
}  # fmt: skip
AT = r"[A-Z*]\d+(_[A-Z*]\d+)?"  # a residue, or the first and last of a range
READABLE = re.compile(
    r"[A-Z*]\d+[A-WYZ*=]|M1\?|" + AT + r"(_splice|dup[A-Z*]*|ins[A-Z*\d]+|del[A-Z]*"
    r"|del[A-Z]*ins[A-Z*\d]+|[A-Z]*fs(\*(\d+|\?)?)?|[A-Z*]?ext.*)"
)


def protein_change(text: str) -> str:
    """Return a change in one-letter notation, without the p.; "" if it names no protein change."""
    text = text.strip().replace("%3D", "=").replace("%3d", "=").rpartition(":")[2]
    text = re.sub(r"^p\.", "", text.strip("()[] "), flags=re.I).strip("()[] ")
    if re.match(r"[a-z]\.", text):
        return ""  # of the coding sequence (c.35G>A) or the genome
    if text.lower() == "promoter":
        return "Promoter"
    if re.fullmatch(r"[A-Za-z]{3}\d+(?!del|dup|ext)[A-Za-z]{3}", text):
        text = text.title()  # gly12asp
    text = re.sub("|".join(THREE), lambda match: THREE[match[0]], text)
    text = re.sub(r"^[a-z](?=\d)|(?<=\d)[a-z]$", lambda match: match[0].upper(), text)
    text = re.sub(r"X(?=\d*$)", "*", text) if re.search(r"fsX\d*$|^[A-WYZ]\d+X$", text) else text
    text = re.sub(r"^([A-Z]\d+)>([A-Z*])$", r"\1\2", text)
    text = re.sub(r"^([A-Z]\d+(?:_[A-Z]\d+)?)>([A-Z*]+)$", r"\1delins\2", text)
    text = re.sub(r"^([A-Z*])(\d+)\1$", r"\1\2=", text)
    text = re.sub(r"del\d+$", "del", text)
    return text if READABLE.fullmatch(text) else ""
