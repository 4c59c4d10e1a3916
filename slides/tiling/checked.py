"""Which indexes were found right, by the size, times and place of their files.

    <index_dir>/20x_224px_0px_overlap/checked.json

To look again whether an index fits its slide, both files are opened and hashed: 3 ms a slide, a
minute for 20,000 of them. A slide and an index whose size, times of change and inode are those of
the last look need no other one; damage that changes none of these shows where tiles are read.

Not for masks and coordinates of other programs, which are files of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from slides.files import locked, write_text
from slides.grid import Grid
from slides.tiling.index_file import WRITER_VERSION, index_path
from slides.tiling.tissue import Tissue

FACTS = ("mpp", "mpp_source", "tissue_mm2", "tiles")  # of a row of the ledger


class Checked:
    """The record of one index folder and one choice of settings."""

    def __init__(self, index_dir: Path, grid: Grid, tissue: Tissue):
        self.index_dir, self.grid = index_dir, grid
        self.file = index_dir / grid.tag / "checked.json"
        self.off = tissue.masks is not None or tissue.coords is not None
        settings = json.dumps([asdict(grid), asdict(tissue), WRITER_VERSION], default=str)
        self.settings = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self.known = {} if self.off else self._read()

    def row(self, slide_id: str, path: Path, mpp: float | None) -> dict | None:
        """Return a slide's row of the ledger if nothing has changed since the last look."""
        known = self.known.get(slide_id)
        if not known or known["seen"] != self._seen(slide_id, path, mpp):
            return None
        facts = dict(zip(FACTS, known["facts"], strict=True))
        rest = {"seconds": 0.0, "status": "kept", "reason": ""}
        return {"slide_id": slide_id, "path": str(path), **facts, **rest}

    def note(self, rows: Iterable[tuple[dict, Path, float | None]]) -> None:
        """Add rows of the ledger, each with its slide and the table's mpp; failed ones are left."""
        found = {}
        for row, path, mpp in () if self.off else rows:
            seen = self._seen(row["slide_id"], path, mpp)
            if row["status"] != "failed" and seen:
                facts = [row[name] for name in FACTS]
                found[row["slide_id"]] = {"seen": seen, "facts": facts}
        if not {name: each for name, each in found.items() if self.known.get(name) != each}:
            return
        with locked(self.file):
            write_text(self.file, json.dumps({**self._read(), **found}))

    def _read(self) -> dict[str, dict]:
        try:
            found = json.loads(self.file.read_text())
            return {name: each for name, each in found.items() if {"seen", "facts"} <= each.keys()}
        except (OSError, ValueError, AttributeError):  # none yet, or damaged: looked at anew
            return {}

    def _seen(self, slide_id: str, path: Path, mpp: float | None) -> list:
        """Return what tells whether slide, index or settings have changed; [] if one is missing."""
        try:
            stats = [
                os.stat(each) for each in (path, index_path(self.index_dir, self.grid, slide_id))
            ]
        except OSError:
            return []
        if not os.access(path, os.R_OK):
            return []
        files = [[each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino] for each in stats]
        return [self.settings, str(path), mpp, *files]
