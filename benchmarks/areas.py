"""Compares the areas that two programs' tiles cover of a cohort's slides, and the painted truth.

Two lattices have no tile in common, so areas are compared, in cells of `CELL_UM` microns. A
program's tiles are read from its own files by `slides.tiling.other_tools`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from slides.demo.tissue_painter import TISSUE, TUMOUR
from slides.tiling.index_file import TileIndex
from slides.tiling.job_folders import find_coordinates
from slides.tiling.other_tools import read_coordinates
from slides.wsi.reader import Slide

CELL_UM = 4.0  # that of the demo cohort's truth


@dataclass(frozen=True)
class Areas:
    """Covered cells and tissue cells of each slide, (h, w) bool, in the table's order."""

    covered: list[np.ndarray]
    tissue: list[np.ndarray | None]
    """Painted tissue; None where unknown."""

    def shared(self, other: Areas) -> float:
        """Return the intersection over union of two covered areas, over all slides."""
        pairs = list(zip(self.covered, other.covered, strict=True))
        both, either = np.sum([((a & b).sum(), (a | b).sum()) for a, b in pairs], 0)
        return float(both / either)

    def against_truth(self) -> tuple[float, float]:
        """Return the shares of tissue that is covered, and of covered area that is tissue."""
        pairs = [(a, b) for a, b in zip(self.covered, self.tissue, strict=True) if b is not None]
        if not pairs:
            return float("nan"), float("nan")
        both, covered, tissue = np.sum([((a & b).sum(), a.sum(), b.sum()) for a, b in pairs], 0)
        return float(both / tissue), float(both / covered)


def read_areas(table: Path, folder: Path) -> Areas:
    """Return the covered area of every slide of a table, from the tiles in a folder."""
    found, known = [], []
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            mpp = float(row["mpp"]) if row.get("mpp") else None
            with Slide(table.parent / row["slide_path"], mpp, row["slide_id"]) as slide:
                index = read_coordinates(find_coordinates(folder, slide.name), slide)
            found.append(covered(index))
            truth = table.parent / "truth" / f"{slide.name}.png"
            known.append(np.isin(Image.open(truth), (TISSUE, TUMOUR)) if truth.exists() else None)
    return Areas(found, known)


def covered(index: TileIndex) -> np.ndarray:
    """Return the cells of a slide whose centre lies in a tile, (h, w) bool."""
    step0 = round(CELL_UM / index.slide_mpp)
    cells = np.zeros((-(-index.height0 // step0), -(-index.width0 // step0)), bool)
    first = -(-(index.coords0 - step0 // 2) // step0)  # whose middle is the corner or behind it
    after = -(-(index.coords0 + index.size0 - step0 // 2) // step0)
    for (left, top), (right, bottom) in zip(first.tolist(), after.tolist(), strict=True):
        cells[max(top, 0) : bottom, max(left, 0) : right] = True
    return cells
