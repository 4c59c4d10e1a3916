"""Chooses the tiles of a cohort's slides and keeps them on disk.

    <index_dir>/20x_224px_0px_overlap/patches/<slide_id>_patches.h5     the tiles (index_file.py)
    <index_dir>/20x_224px_0px_overlap/ledger.csv                        the result of every slide

A tile is chosen if enough of it is tissue, or if another program chose it (`Tissue.coords`).
A slide counts as indexed once its file is found complete and its best tile has been read, so
damage shows here and not hours into a run. A second run keeps valid indexes and rebuilds those made
with other settings, from another file or at another resolution; the ledger says which.
"""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from slides.errors import (
    CoordinatesError,
    IndexFileError,
    IndexSettingsError,
    SlideError,
    reading_faults,
    refuse,
    slide_fault,
)  # fmt: skip
from slides.files import WriteError, file_fingerprint, locked, write_whole
from slides.grid import Grid
from slides.tiling.checked import Checked
from slides.tiling.choose import choose_tiles, index_slide, to_index
from slides.tiling.index_file import TileIndex, index_path, read_index, write_index
from slides.tiling.job_folders import find_all, find_coordinates
from slides.tiling.other_tools import index_from_coordinates
from slides.tiling.tissue import Tissue, why_dark
from slides.wsi.reader import Slide

__all__ = [
    "TileIndex", "index_cohort", "index_path", "index_slide", "read_index", "write_index",
]  # fmt: skip

LEDGER = (
    "slide_id", "path", "mpp", "mpp_source", "tissue_mm2", "tiles", "seconds", "status", "reason",
)  # fmt: skip


@dataclass
class _Outcome:
    """One row of the ledger, and the error behind it if any."""

    row: dict
    error: SlideError | None
    note: str
    """Warning about a slide that was indexed all the same; empty if there is none."""


def index_cohort(
    rows: Iterable,
    index_dir: str | Path,
    grid: Grid,
    tissue: Tissue,
    workers: int = 0,
    on_error: str = "stop",
    progress: bool = True,
    pictures: Path | None = None,
) -> list[dict]:
    """Index every slide of a cohort, keeping the indexes that are already right.

    Args:
        rows: Slides: anything with `slide_id`, `path` and `mpp` (None takes the file's).
        index_dir: Folder of the indexes; see `index_path`.
        grid: The tile grid.
        tissue: The tissue settings.
        workers: Processes; 0 indexes in this one.
        on_error: "stop" raises the first slide's fault, "skip" records it in the ledger and goes
            on. A disk that cannot be written to always stops.
        progress: Show a progress bar.
        pictures: Folder for `<slide_id>.png`, the stages of each slide without a picture or with a
            new index; None draws nothing.

    Returns:
        The ledger, a dict a slide in the order given; `status` is indexed, kept, rebuilt or failed.

    Raises:
        CoordinatesError: with "stop", some slides have no coordinates; all are listed.
        SlideError: with "stop", the first slide's fault; the ledger is still written.
    """
    refuse(reading_faults(workers, on_error))
    rows = list(rows)
    ids = [row.slide_id for row in rows]
    if twice := sorted(name for name, times in Counter(ids).items() if times > 1):
        raise SlideError(
            f"{', '.join(twice)}: listed more than once, so one index would overwrite the other. "
            f"Give every slide its own slide_id."
        )
    jobs = [
        (row.slide_id, Path(row.path), row.mpp, Path(index_dir), grid, tissue, pictures)
        for row in rows
    ]
    if tissue.coords is not None and pictures:
        raise CoordinatesError("pictures show how tissue was found; tissue.coords skips that.")
    if tissue.coords is not None and on_error == "stop":
        find_all(tissue.coords, [job[:2] for job in jobs])  # all missing ones, before hours of work
    checked = Checked(Path(index_dir), grid, tissue)
    found = [] if pictures else [checked.row(*job[:3]) for job in jobs]
    done: dict[str, dict] = {row["slide_id"]: row for row in found if row}
    ledger = Path(index_dir) / grid.tag / "ledger.csv"
    try:
        _index_all([job for job in jobs if job[0] not in done], workers, on_error, progress, done)
    except SlideError:
        _write_ledger_if_possible(ledger, done)
        raise
    listed = [done[name] for name in ids]
    _write_ledger(ledger, listed)
    checked.note((done[job[0]], job[1], job[2]) for job in jobs)
    return listed


def _index_all(jobs: list, workers: int, on_error: str, progress: bool, done: dict) -> None:
    """Index each slide and add its row of the ledger to `done`; raise a fault that stops."""
    from slides.progress import progress_bar

    tiles = 0
    with progress_bar(total=len(jobs), desc="index", unit="slide", disable=not progress) as bar:
        for outcome in _outcomes(jobs, workers):
            done[outcome.row["slide_id"]] = outcome.row
            tiles += outcome.row["tiles"]
            bar.set_postfix(tiles=tiles, refresh=False)
            bar.update()
            if outcome.note and not outcome.error:
                bar.write(f"tapfm: {outcome.row['slide_id']}: {outcome.note}", file=sys.stderr)
            if outcome.error and (on_error == "stop" or isinstance(outcome.error, IndexFileError)):
                raise outcome.error
            if outcome.error:
                bar.write(f"tapfm: left out: {outcome.error}", file=sys.stderr)


def _outcomes(jobs: Sequence[tuple], workers: int) -> Iterable[_Outcome]:
    """Yield outcomes as they finish; start no further job once the caller stops iterating."""
    if workers == 0:
        yield from map(_index_one, jobs)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")  # an OpenSlide handle must not be forked
    pool = ProcessPoolExecutor(min(workers, max(1, len(jobs))), mp_context=context)
    try:
        futures = {pool.submit(_index_one, job): job[0] for job in jobs}
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        lost = [name for future, name in futures.items() if not future.done() or future.exception()]
        raise SlideError(
            f"{', '.join(lost[: workers + 1])}: a process died while indexing one of these slides, "
            f"perhaps out of memory. Use fewer workers, or workers: 0 to find out which it is."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _index_one(job: tuple) -> _Outcome:
    slide_id, path, mpp, index_dir, grid, tissue, pictures = job
    began = time.perf_counter()
    out = index_path(index_dir, grid, slide_id)
    error, index, status, reason, note = None, None, "indexed", "", ""
    try:
        index, reason = _reusable(out, path, mpp, grid, tissue)
        picture = pictures and Path(pictures) / f"{slide_id}.png"
        if index is not None and (picture is None or picture.exists()):
            status = "kept"
        else:
            status = "kept" if index else "rebuilt" if reason else "indexed"
            with Slide(path, mpp, slide_id) as slide:
                if other := slide.contradiction:
                    note = f"the table's mpp of {mpp:g} is taken, the file states {other}"
                if tissue.coords is not None:
                    index, how = _from_coordinates(tissue.coords, slide, grid, out)
                    note = "; ".join(filter(None, (note, how)))
                    write_index(out, index, tissue)
                else:
                    choice = choose_tiles(slide, grid, tissue)
                    dark = "" if tissue.masks else why_dark(choice.thumbnail)
                    note = "; ".join(filter(None, (note, dark)))
                    if picture:
                        from slides.tiling.stage_picture import draw_stages  # loads matplotlib

                        draw_stages(choice, slide, picture)
                    if index is None:
                        index = to_index(choice, slide, grid, tissue)
                        if lost := choice.lost.sum():
                            why = "tiles of tissue left out: the file lists tiles without bytes"
                            reason = f"{reason} {lost} {why} there".strip()
                        write_index(out, index, tissue)
            reason = "; ".join(filter(None, (reason, note)))
    except WriteError:  # the pictures' folder
        raise
    except (SlideError, OSError, MemoryError, OverflowError) as fault:
        index, error, status = None, slide_fault(fault, slide_id, path), "failed"
        reason = f"{type(error).__name__}: {error}"
    return _Outcome(
        {
            "slide_id": slide_id,
            "path": str(path),
            "mpp": index.slide_mpp if index else mpp,
            "mpp_source": index.mpp_source if index else "",
            "tissue_mm2": round(index.tissue_mm2, 3) if index else 0.0,
            "tiles": len(index) if index else 0,
            "seconds": round(time.perf_counter() - began, 3),
            "status": status,
            "reason": reason,
        },
        error,
        note,
    )


def _from_coordinates(folder: str, slide: Slide, grid: Grid, out: Path) -> tuple[TileIndex, str]:
    """Return the tiles that another program chose, and what was changed to fit the request.

    Its own file is never overwritten.
    """
    path = find_coordinates(folder, slide.name, slide.path)
    if path.resolve() == out.resolve():
        raise CoordinatesError(
            f"{slide.name}: its index would overwrite its coordinates, {path}. Give another folder "
            f"for the index."
        )
    return index_from_coordinates(path, slide, grid)


def _reusable(
    out: Path, slide_path: Path, mpp: float | None, grid: Grid, tissue: Tissue
) -> tuple[TileIndex | None, str]:
    """Return the index on disk if it is still valid, else why it must be rebuilt."""
    if not out.exists():
        return None, ""
    try:
        index = read_index(out, grid, tissue, slide_path)
    except (IndexSettingsError, IndexFileError) as fault:
        return None, f"rebuilt: {fault}"
    if not slide_path.is_file():
        return None, "rebuilt: the slide is missing"
    if why := why_outdated(index, slide_path, mpp):
        return None, f"rebuilt: {why}"
    return index, ""


def why_outdated(index: TileIndex, slide_path: Path, mpp: float | None) -> str:
    """Return why an index does not fit the slide as it is now, or "" if it does.

    Args:
        index: the index as read from disk.
        slide_path: the slide; a missing file is not compared, its tiles may be cached.
        mpp: microns per pixel in the cohort's table, or None.
    """
    had = f"it was made with {index.slide_mpp:g}"
    if mpp is not None and (index.mpp_source != "table" or index.slide_mpp != mpp):
        return f"the table now gives mpp {mpp:g}, {had}"
    if mpp is None and index.mpp_source == "table":
        return f"the table no longer gives an mpp, {had}"
    try:
        if slide_path.is_file() and file_fingerprint(slide_path) != index.fingerprint:
            return "the slide's file has changed"
    except OSError as error:
        raise slide_fault(error, index.slide_id, slide_path) from error
    return ""


def ledger_reason(index_dir: Path, grid: Grid, slide_id: str) -> str | None:
    """Return why indexing left a slide out, as the ledger says; None if it does not."""
    try:
        with open(Path(index_dir) / grid.tag / "ledger.csv", newline="", encoding="utf-8") as file:
            found = {row.get("slide_id"): row for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    return found.get(slide_id, {}).get("reason") or None


def _write_ledger(path: Path, rows: list[dict]) -> None:
    """Write the ledger as CSV; rows of slides outside this run stay, also those of other runs."""
    named = {row["slide_id"] for row in rows}
    try:
        with locked(path):
            try:
                with open(path, newline="", encoding="utf-8") as file:
                    older = [
                        row for row in csv.DictReader(file) if row.get("slide_id") not in named
                    ]
            except (OSError, UnicodeDecodeError, csv.Error):
                older = []
            text = io.StringIO()
            writer = csv.DictWriter(text, LEDGER, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(older + rows)
            write_whole(path, text.getvalue().encode(), path.name)
    except OSError as error:
        raise IndexFileError(
            f"{path}: cannot be locked ({error}). Give another index folder."
        ) from error


def _write_ledger_if_possible(path: Path, done: dict[str, dict]) -> None:
    """Write the ledger while another error is raised, which must not be hidden."""
    with contextlib.suppress(IndexFileError):
        _write_ledger(path, list(done.values()))
