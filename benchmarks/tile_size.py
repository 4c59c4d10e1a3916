"""Level-0 pixels that a tile should have and is given, by several rules: arithmetic, no slide.

    python -m benchmarks.tile_size

A tile of 224 px at 0.5 microns per pixel, on scans of odd resolutions. Beside ours two published
rules: by nominal magnification (TRIDENT, CLAM, AtlasPatch: 0.30 to 0.60 mpp is "20x", finer is
"40x"), and a refusal of every scan coarser than what is asked for (LazySlide 0.13).
"""

from __future__ import annotations

import sys

from benchmarks.record import rewrite
from slides.errors import TooCoarseError
from slides.grid import Grid
from tapfm.reports.plain_table import markdown

SCANS = (0.23, 0.2485, 0.25, 0.2527, 0.265, 0.33, 0.46, 0.499, 0.5021, 0.55)  # mpp
COARSE = 0.30  # from here on a scan is "20x"
GRID = Grid(size=224, mpp=0.5)


def main() -> int:
    """Rewrite the table."""
    lines = [["scan, mpp", "should be, px", "tapfm", "by nominal magnification",
              "coarser is refused"]]  # fmt: skip
    for mpp in SCANS:
        true = GRID.size * GRID.mpp / mpp
        nominal = GRID.size if mpp >= COARSE else 2 * GRID.size
        cells = f"{mpp:g}", f"{true:.1f}", ours(mpp, true), off(nominal, true)
        lines.append([*cells, "refused" if mpp > GRID.mpp else "taken"])
    rewrite("tile_size", markdown(lines))
    return 0


def ours(mpp: float, true: float) -> str:
    """Return the level-0 pixels that tapfm reads."""
    try:
        found = off(GRID.size0(mpp), true)
    except TooCoarseError:
        return "refused: enlarging invents detail"
    return found + (f", unscaled: said to be {mpp:g}" if GRID.unscaled(mpp) else "")


def off(found: int, true: float) -> str:
    """Return a side, and its distance from the nearest whole pixel to the exact size."""
    pixels = found - round(true)
    return f"{found} ({pixels:+d} px, {pixels / true:+.1%})" if pixels else f"{found} (0 px)"


if __name__ == "__main__":
    sys.exit(main())
