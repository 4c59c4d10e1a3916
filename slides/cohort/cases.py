"""Merges the slides of each case (patient) into one row, so that a bag is a case.

The bag of a case has the tiles of all its slides. Its label is the one its slides share: known
labels must agree, unknown ones are ignored.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from slides.cohort.table import SlideRow
from slides.errors import CohortError, all_faults


def group_by_case(rows: Sequence[SlideRow], names: Sequence[str]) -> list[SlideRow]:
    """Return one row per case, in order of first appearance; its `parts` are its slides.

    Args:
        rows: slides.
        names: the label columns' names, for messages.

    Raises:
        CohortError: slides of one case have different labels.
    """
    cases = defaultdict(list)
    for row in rows:
        cases[row.case_id].append(row)
    merged, faults = [], []
    for case, parts in cases.items():
        labels = []
        for place, each in enumerate(zip(*(part.labels for part in parts), strict=True)):
            known = [value for value in each if not math.isnan(value)]
            # after the columns comes the row's own number: the case takes its first slide's
            if place < len(names) and len(set(known)) > 1:
                slides = ", ".join(part.slide_id for part in parts)
                faults.append(
                    f"case {case}: its slides {slides} differ in {names[place]}: give them one "
                    "value, or leave cells blank, or set data.bags: slide"
                )
            labels.append(known[0] if known else math.nan)
        first = parts[0]
        merged.append(replace(first, slide_id=case, labels=tuple(labels), parts=tuple(parts)))
    if faults:
        raise CohortError(all_faults("data.bags: case", faults))
    return merged


def unlabelled(rows: Sequence[SlideRow], names: Sequence[str], bags: str) -> frozenset[str]:
    """Return the slides that teach nothing: no label of them, or of their case, is known.

    Args:
        rows: training slides.
        names: the label columns; without any, no slide is returned.
        bags: what shares labels, a `slide` or a `case`.
    """
    if not names:
        return frozenset()
    each = group_by_case(rows, names) if bags == "case" else rows
    blank = (row for row in each if all(map(math.isnan, row.labels[: len(names)])))
    return frozenset(slide.slide_id for row in blank for slide in row.slides)
