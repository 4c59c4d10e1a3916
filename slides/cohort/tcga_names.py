"""TCGA names: whose slide or sample it is, what it shows, where it came from.

    TCGA-05-4244-01Z-00-DX1.d4ff32cd-38cf-40ea-8213-45c2b100ac01.svs
    |    |  |    | |    |   `- file UUID, in either case
    |    |  |    | |    `- DX diagnostic (FFPE); TS, BS, MS frozen top, bottom, middle
    |    |  |    | `- vial
    |    |  |    `- sample type: 01 to 09 tumour, 10 to 14 normal
    |    |  `- participant
    |    `- tissue source site (TSS), the hospital
    `----------- case: the first 12 characters

A CPTAC name (C3L-00001-21) has its case in front and no site. Any other name is its own case.

Source: the GDC's barcode pages; all 1,345 TCGA-LUAD file names of the GigaPath table parse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SLIDE = re.compile(
    r"(?P<barcode>(?P<case>TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4})-(?P<type>\d{2})[A-Z]-\d{2}-"
    r"(?P<section>(?:DX|TS|BS|MS)[A-Z0-9]*))\.[0-9A-Fa-f-]{36}\.svs"
)
SAMPLE = re.compile(r"(?P<case>TCGA-(?P<site>[A-Z0-9]{2})-[A-Z0-9]{4})(?:-(?P<type>\d{2}).*)?")
CPTAC = re.compile(r"(C3[LN]-\d{5})(?:-.*)?")
TUMOUR = range(1, 10)


@dataclass(frozen=True)
class SlideName:
    """What the file name of a TCGA slide says."""

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
        """Whether it is an FFPE section of a tumour."""
        return self.section.startswith("DX") and self.sample_type in TUMOUR


def parse_slide(name: str) -> SlideName | None:
    """What a file name says; None where it is no TCGA slide's."""
    match = SLIDE.fullmatch(name)
    if not match:
        return None
    return SlideName(
        match["barcode"], match["case"], match["site"], match["section"], int(match["type"])
    )


def case_of(sample: str) -> str:
    """The case of a barcode of any length, or of a CPTAC sample; else the name itself."""
    if match := SAMPLE.fullmatch(sample):
        return match["case"]
    match = CPTAC.fullmatch(sample)
    return match[1] if match else sample


def site_of(case_id: str) -> str:
    """Tissue source site of a TCGA case or barcode; "" for others."""
    match = SAMPLE.fullmatch(case_id)
    return match["site"] if match else ""


def is_tumour(sample: str) -> bool:
    """Whether a sample is a tumour's, as far as its name tells: only TCGA's names do."""
    match = SAMPLE.fullmatch(sample)
    return not (match and match["type"]) or int(match["type"]) in TUMOUR
