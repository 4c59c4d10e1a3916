"""Builds the tile caches of a cohort in several processes, within a disk budget.

Slides are cached in the table's order until the budget is spent; the rest are read from their
files. Other cohorts' caches in the folder are removed for them, least recently used first, but
never one in use.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from slides.cache.disk_room import make_room
from slides.cache.tiles import build_cache, cache_path
from slides.errors import IndexFileError, SlideError, reading_faults, refuse
from slides.grid import Grid
from slides.tiling.index import index_path, read_index
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide


def cache_cohort(
    rows: Iterable,
    index_dir: Path,
    cache_dir: Path,
    grid: Grid,
    tissue: Tissue,
    workers: int = 0,
    on_error: str = "stop",
    progress: bool = True,
    budget: int | None = None,
) -> dict[str, str]:
    """Cache every indexed slide of a cohort, keeping valid caches.

    Args:
        rows: slides: anything with `slide_id`, `path` and `mpp`.
        index_dir: folder of their indexes.
        cache_dir: folder of the caches.
        grid: the grid of the indexes.
        tissue: the tissue settings of the indexes.
        workers: processes; 0 reads in this one.
        on_error: `stop` raises the first slide's fault, `skip` goes on. A cache that cannot be
            written always stops, since the disk is the same for all slides.
        progress: show a progress bar.
        budget: bytes that all caches in `cache_dir` may take. Other slides' caches are removed to
            make room; slides of this cohort that do not fit are not cached. None is no limit.

    Returns:
        The slides that failed, slide_id -> reason.
    """
    refuse(reading_faults(workers, on_error))
    from slides.progress import progress_bar

    jobs = [(row.slide_id, row.path, row.mpp, index_dir, cache_dir, grid, tissue) for row in rows]
    if budget is not None:
        jobs = _jobs_within(jobs, budget)
    failed = {}
    with contextlib.ExitStack() as stack:
        outcomes = map(_cache_one, jobs)
        if workers:
            context = multiprocessing.get_context("spawn")  # open slides must not be forked
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))
            stack.callback(pool.shutdown, cancel_futures=True)  # after a fault, begin no more
            outcomes = pool.map(_cache_one, jobs)
        bar = progress_bar(outcomes, "cache", len(jobs), unit="slide", disable=not progress)
        for (slide_id, *_), (fault, is_disk) in zip(jobs, bar, strict=True):
            if fault and (on_error == "stop" or is_disk):
                raise fault
            if fault:
                failed[slide_id] = str(fault)
                bar.write(f"tapfm: left out: {fault}", file=sys.stderr)
    return failed


def _jobs_within(jobs: list[tuple], budget: int) -> list[tuple]:
    """Return the jobs whose caches fit in the budget, and make room for them."""
    fit, own, wanted = [], [], 0
    for job in jobs:
        slide_id, _, _, index_dir, cache_dir, grid, tissue = job
        try:
            index = read_index(index_path(index_dir, grid, slide_id), grid, tissue)
        except SlideError:
            fit.append(job)  # the fault is reported when the slide is cached
            continue
        size = len(index) * grid.size**2 * 3  # upper limit: without any compression
        if wanted + size <= budget:
            fit.append(job)
            own.append(cache_path(cache_dir, index))
            wanted += size
    if fit:
        make_room(cache_dir, budget - wanted, own)
    return fit


def _cache_one(job: tuple) -> tuple[SlideError | None, bool]:
    """Return the slide's fault if any, and whether writing the cache caused it."""
    slide_id, path, mpp, index_dir, cache_dir, grid, tissue = job
    writing = False
    try:
        index = read_index(index_path(index_dir, grid, slide_id), grid, tissue)
        with Slide(path, mpp=mpp, name=slide_id) as slide:
            writing = True
            build_cache(slide, index, cache_dir)
    except SlideError as fault:
        return fault, writing and isinstance(fault, IndexFileError)
    return None, False
