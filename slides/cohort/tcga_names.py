"""Parses names of TCGA, CPTAC and MSK: case, site, section and type of a slide or sample.

    TCGA-05-4244-01Z-00-DX1.d4ff32cd-38cf-40ea-8213-45c2b100ac01.svs
    |    |  |    | |    |   `- file UUID, in either case
    |    |  |    | |    `- DX diagnostic (FFPE); TS, BS, MS frozen top, bottom, middle
    |    |  |    | `- vial
    |    |  |    `- sample type: 01 to 09 tumour, 10 to 14 normal
    |    |  `- participant
    |    `- tissue source site (TSS), the hospital
    `----------- case: the first 12 characters

Barcodes may be in lower case, or have dots for dashes, as column names of R do.

A CPTAC name (C3L-00001-21) begins with its case and has no site. So does an MSK-IMPACT sample
(P-0000001-T01-IM6; GENIE-MSK before it in GENIE), whose T is a tumour and whose N is normal. Any
other name is its own case.

Source: the GDC's barcode pages; all 1,345 TCGA-LUAD file names of the GigaPath table parse.
    cBioPortal's studies of MSK-IMPACT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SLIDE = re.compile(
    r"(?P<barcode>(?P<case>TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4})-(?P<type>\d{2})[A-Z]-\d{2}-"
    r"(?P<section>(?:DX|TS|BS|MS)[A-Z0-9]*))\.[0-9A-Fa-f-]{36}\.svs"
)
SAMPLE = re.compile(
    r"(?P<case>TCGA[-.](?P<site>[A-Z0-9]{2})[-.][A-Z0-9]{4})(?:[-.](?P<type>\d{2}).*)?", re.I
)
CPTAC = re.compile(r"(C3[LN]-\d{5})(?:-.*)?", re.I)
MSK = re.compile(r"(?P<case>(?:GENIE-MSK-)?P-\d{7})(?:-(?P<type>[TN])\d{2}(?:-.*)?)?", re.I)
TUMOUR = range(1, 10)


@dataclass(frozen=True)
class SlideName:
    """The parts of a TCGA slide's file name."""

    slide_id: str
    """The barcode: the name up to the UUID."""
    case_id: str
    site: str
    """Tissue source site, two characters."""
    section: str
    """`DX1`, `TSA` and so on."""
    sample_type: int

    @property
    def diagnostic(self) -> bool:
        """Whether the slide is an FFPE section of a tumour."""
        return self.section.startswith("DX") and self.sample_type in TUMOUR


def parse_slide(name: str) -> SlideName | None:
    """Return the parts of a slide's file name; None if it is not TCGA's."""
    match = SLIDE.fullmatch(name)
    if not match:
        return None
    return SlideName(
        match["barcode"], match["case"], match["site"], match["section"], int(match["type"])
    )


def case_of(sample: str) -> str:
    """Return the case of a TCGA barcode of any length, or of a CPTAC or MSK sample; else the name.

    The case is in capitals, with dashes.
    """
    if match := SAMPLE.fullmatch(sample) or MSK.fullmatch(sample):
        return match["case"].upper().replace(".", "-")
    match = CPTAC.fullmatch(sample)
    return match[1].upper() if match else sample


def site_of(case_id: str) -> str:
    """Return the tissue source site of a TCGA case or barcode; "" for other names."""
    match = SAMPLE.fullmatch(case_id)
    return match["site"].upper() if match else ""


def is_tumour(sample: str) -> bool:
    """Return whether a sample is from a tumour; True for names other than TCGA's and MSK's."""
    if match := MSK.fullmatch(sample):
        return (match["type"] or "T").upper() == "T"
    match = SAMPLE.fullmatch(sample)
    return not (match and match["type"]) or int(match["type"]) in TUMOUR
