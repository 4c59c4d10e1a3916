"""Lets several processes write the same files at once: no row is lost, no file is torn.

python -m benchmarks.campaign.writers --tries 10
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from benchmarks.campaign.tries import arguments, draw, emptied, record
from slides.files import join_csv, rows_there
from slides.grid import Grid
from slides.tiling.index import _write_ledger, index_cohort
from slides.tiling.tissue import Tissue
from tests.conftest import stained_picture, write_pyramid

WRITERS, ROWS, HEADER = 4, 50, ("slide_id", "p")


def predictions(path: Path, writer: int) -> None:
    """Join rows one by one."""
    for number in range(ROWS):
        join_csv(path, HEADER, [(f"{writer}-{number}", number)])


def ledger(path: Path, writer: int) -> None:
    """Join rows of an index's ledger one by one."""
    for number in range(ROWS):
        _write_ledger(path, [{"slide_id": f"{writer}-{number}", "tiles": number}])


def indexes(path: Path, writer: int) -> None:
    """Index the same slides as the others."""
    rows = [
        SimpleNamespace(slide_id=each.stem, path=each, mpp=None)
        for each in sorted(path.parent.glob("s*.tif"))
    ]
    tissue = Tissue(min_area_um2=1000.0)
    index_cohort(rows, path.parent / "index", Grid(32, 0.5), tissue, progress=False)


def together(folder: Path, tries: int, seed: int) -> Counter:
    """Start writers at once; return how the tries ended."""
    ends, fork = Counter(), multiprocessing.get_context("fork")
    for number in range(tries):
        job = draw(seed, "writers", number).choice((predictions, ledger, indexes))
        path = emptied(folder) / "file.csv"
        for each in range(4 if job is indexes else 0):
            picture = stained_picture(311, 263, seed=each)
            write_pyramid(folder / f"s{each}.tif", picture, 0.5, levels=2)
        writers = [fork.Process(target=job, args=(path, each)) for each in range(WRITERS)]
        for each in writers:
            each.start()
        for each in writers:
            each.join()
        fine = not any(each.exitcode for each in writers)
        if job is predictions:
            fine &= len(rows_there(path, HEADER)) == WRITERS * ROWS
        elif job is ledger:
            fine &= len(path.read_text().splitlines()) == 1 + WRITERS * ROWS
        else:
            found = next((folder / "index").rglob("ledger.csv")).read_text().splitlines()
            files = list((folder / "index").rglob("*_patches.h5"))
            fine &= len(found) == 1 + 4 and len(files) == 4
        fine &= not list(folder.rglob("*.partial"))
        ends["kept" if fine else f"{job.__name__}: lost"] += 1
    return ends


def main() -> None:
    """Try and record."""
    flags = arguments(__doc__, 10)
    with tempfile.TemporaryDirectory() as folder:
        ends = together(Path(folder) / "writers", flags.tries, flags.seed)
    record("writers: 4 processes, predictions, ledger, index", ends, ends["kept"], flags.seed)


if __name__ == "__main__":
    main()
