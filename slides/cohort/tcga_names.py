"""Parses TCGA names: the case, site, section and sample type of a slide or sample.

    TCGA-05-4244-01Z-00-DX1.d4ff32cd-38cf-40ea-8213-45c2b100ac01.svs
    |    |  |    | |    |   `- file UUID, in either case
    |    |  |    | |    `- DX diagnostic (FFPE); TS, BS, MS frozen top, bottom, middle
    |    |  |    | `- vial
    |    |  |    `- sample type: 01 to 09 tumour, 10 to 14 normal
    |    |  `- participant
    |    `- tissue source site (TSS), the hospital
    `----------- case: the first 12 characters

A CPTAC name (C3L-00001-21) begins with its case and has no site. Any other name is its own case.

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
    """Return the case of a barcode of any length or of a CPTAC sample; else the name itself."""
    if match := SAMPLE.fullmatch(sample):
        return match["case"]
    match = CPTAC.fullmatch(sample)
    return match[1] if match else sample


def site_of(case_id: str) -> str:
    """Return the tissue source site of a TCGA case or barcode; "" for other names."""
    match = SAMPLE.fullmatch(case_id)
    return match["site"] if match else ""


def is_tumour(sample: str) -> bool:
    """Return whether a sample is from a tumour; True for names other than TCGA's."""
    match = SAMPLE.fullmatch(sample)
    return not (match and match["type"]) or int(match["type"]) in TUMOUR
