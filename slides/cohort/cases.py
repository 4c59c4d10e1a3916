"""A patient's slides as one: what is known of a case, and the slides it is made of.

Where a bag is a case, its tiles are those of all its slides, and its label is the case's: what its
slides say, which must agree; a slide of which it is unknown says nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from slides.cohort.table import SlideRow
from slides.errors import CohortError, all_faults


def group_by_case(rows: Sequence[SlideRow], names: Sequence[str]) -> list[SlideRow]:
    """A row a case, in order of first appearance; its `parts` are its slides.

    Args:
        rows: slides.
        names: of the label columns, for messages.

    Raises:
        CohortError: slides of one case have different labels.
    """
    cases = defaultdict(list)
    for row in rows:
        cases[row.case_id].append(row)
    gathered, faults = [], []
    for case, parts in cases.items():
        labels = []
        for place, each in enumerate(zip(*(part.labels for part in parts), strict=True)):
            known = [value for value in each if not math.isnan(value)]
            # what follows the columns is a row's own number: the case takes its first slide's
            if place < len(names) and len(set(known)) > 1:
                slides = ", ".join(part.slide_id for part in parts)
                faults.append(
                    f"case {case}: its slides {slides} differ in {names[place]}: give them one "
                    "value, or leave cells blank, or take data.bags: slide"
                )
            labels.append(known[0] if known else math.nan)
        first = parts[0]
        gathered.append(replace(first, slide_id=case, labels=tuple(labels), parts=tuple(parts)))
    if faults:
        raise CohortError(all_faults("data.bags: case", faults))
    return gathered
