"""The slides that a run leaves out: said as they happen, written at once, and limited.

A night's run should not end on one bad slide, nor go on when a disk is lost and most are bad.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from slides.cohort.table import SPLITS, SlideRow
from slides.errors import CohortError
from slides.files import write_text
from tapfm.distributed import rank

LIMIT = 0.1
"""The share of the training slides that may be left out; more than one must be."""


class SkippedSlides(dict):
    """The slides left out, slide_id -> reason.

    Args:
        rows: all slides of the cohort.
        limit: the share of the training slides that may be left out.
    """

    def __init__(self, rows: Iterable[SlideRow] = (), limit: float = LIMIT):
        super().__init__()
        self.rows, self.limit = tuple(rows), limit
        self.file: Path | None = None

    def note(self, found: Mapping[str, str], *, said: bool = False) -> None:
        """Add slides, or cases, and print and write those that are new; `said` prints none.

        Raises:
            CohortError: too many of the training slides are left out by now.
        """
        new = {name: reason for name, reason in found.items() if name not in self}
        self.update(new)
        if not new or rank():
            return
        for reason in () if said else new.values():
            tqdm.write(f"tapfm: left out: {reason}", file=sys.stderr)
        self.write()
        lost = sum(self.left_out(row) for row in self.rows if row.split == "train")
        every = sum(row.split == "train" for row in self.rows)
        if lost > max(1, self.limit * every):
            where = f"{self.file} has the reasons" if self.file else next(iter(new.values()))
            raise CohortError(
                f"{lost} of {every} training slides cannot be read, more than the share of "
                f"{self.limit:g} that data.max_skipped allows ({where}). Mend them, or give "
                f"--data.max_skipped {min(1.0, lost / every + 0.05):.2f} to train without them."
            )

    def left_out(self, row: SlideRow) -> bool:
        """Return whether a slide is left out, itself or with its case."""
        return row.slide_id in self or row.case_id in self

    def write_to(self, file: Path, *, keep: bool) -> None:
        """Write all slides left out, from now on as they happen; `keep` those of the file."""
        self.file = file
        if keep and file.exists():
            with suppress(ValueError, TypeError):  # cut short by a kill, in an older version
                self.update({**json.loads(file.read_text()), **self})
        self.write()

    def write(self) -> None:
        """Write them as JSON, if a file is named."""
        if self.file and not rank():
            write_text(self.file, json.dumps(self, indent=1))

    def summary(self) -> str:
        """Return how many of each split are left out: "2 of 80 train, 0 of 20 val"; "" if none."""
        every = Counter(row.split for row in self.rows)
        lost = Counter(row.split for row in self.rows if self.left_out(row))
        counts = [f"{lost[each]} of {every[each]} {each}" for each in SPLITS if every[each]]
        return ", ".join(counts) if lost else ""
