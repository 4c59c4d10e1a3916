"""Says what adapting gained where it was measured, by training patients: end of a cohort's plan.

Source: benchmarks/results/tissue.json, traits planted into real tissue; a test holds the figures
    equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapfm.reports.plain_table import span
from tapfm.stats.bootstrap import Interval

DRAWS = 2000


@dataclass(frozen=True)
class Gain:
    """AUROC over the frozen encoder with the same head, of a cohort of so many training slides."""

    learns: str
    """Names what was trained: LoRA, or all weights."""
    patients: int
    slides: str
    cleared: Interval
    """On cleared nuclei."""
    enlarged: Interval
    """On enlarged nuclei."""


MEASURED = (
    Gain("LoRA on six blocks", 8, "64 or 68",
         Interval(0.167, 0.116, 0.216, DRAWS), Interval(0.056, 0.022, 0.106, DRAWS)),
    Gain("all weights", 8, "64 or 68",
         Interval(0.213, 0.152, 0.266, DRAWS), Interval(0.049, 0.012, 0.105, DRAWS)),
    Gain("LoRA on six blocks", 17, "152",
         Interval(0.151, 0.096, 0.194, DRAWS), Interval(0.054, 0.013, 0.102, DRAWS)),
    Gain("all weights", 17, "152",
         Interval(0.256, 0.198, 0.286, DRAWS), Interval(0.123, 0.025, 0.213, DRAWS)),
)  # fmt: skip


def advice(patients: int) -> str:
    """Return what to expect of a cohort with so many training patients."""
    lines = [
        f"\n{patients} training patients. A ViT-S/14 that was not made for tissue, adapted to",
        "small changes planted into real nuclei, three seeds, gained in AUROC:",
    ]
    for point in MEASURED:
        cleared, enlarged = (span(each, sign="+") for each in (point.cleared, point.enlarged))
        lines.append(
            f"  {point.learns} with {point.patients} patients of {point.slides} slides: "
            f"{cleared} on cleared nuclei, {enlarged} on enlarged ones"
        )
    lines.append(
        "The frozen encoder is saved where validation shows no gain: docs/when_to_adapt.md"
    )
    return "\n".join(lines)
