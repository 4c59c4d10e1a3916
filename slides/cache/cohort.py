"""The tile caches of a cohort: made ahead of a run, in several processes, within a budget.

Slides are taken in the table's order until the budget is spent; the rest are read from their files.
What other cohorts left in the folder makes room, the longest unused first, never one in use.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from slides.cache.disk_room import make_room
from slides.cache.tiles import build_cache, cache_path
from slides.errors import IndexFileError, SlideError
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
    """Cache every slide of a cohort that has been indexed; caches that are right are kept.

    Args:
        rows: slides: anything with `slide_id`, `path` and `mpp`.
        index_dir: where their indexes lie.
        cache_dir: where the caches go.
        grid: as the slides were indexed.
        tissue: as the slides were indexed.
        workers: processes; 0 reads in this one.
        on_error: `stop` raises the first slide's fault, `skip` goes on. A cache that cannot be
            written always stops: the next slide would find the same disk.
        progress: show a bar.
        budget: bytes that all caches in `cache_dir` may take; caches of other slides go to make
            room, and slides of this cohort that do not fit, in its order, are not cached. None is
            no limit.

    Returns:
        The slides that failed, each with its reason.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be stop or skip, got {on_error!r}")
    from tqdm import tqdm

    jobs = [(row.slide_id, row.path, row.mpp, index_dir, cache_dir, grid, tissue) for row in rows]
    if budget is not None:
        jobs = _that_fit(jobs, budget)
    failed = {}
    with contextlib.ExitStack() as stack:
        outcomes = map(_cache_one, jobs)
        if workers:
            context = multiprocessing.get_context("spawn")  # open slides must not be forked
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))
            stack.callback(pool.shutdown, cancel_futures=True)  # after a fault, begin no more
            outcomes = pool.map(_cache_one, jobs)
        bar = tqdm(outcomes, "cache", len(jobs), unit="slide", disable=not progress)
        for (slide_id, *_), (fault, is_disk) in zip(jobs, bar, strict=True):
            if fault and (on_error == "stop" or is_disk):
                raise fault
            if fault:
                failed[slide_id] = str(fault)
    return failed


def _that_fit(jobs: list[tuple], budget: int) -> list[tuple]:
    """The first slides of a cohort that fit in the budget; other cohorts' caches make room."""
    fit, own, wanted = [], [], 0
    for job in jobs:
        slide_id, _, _, index_dir, cache_dir, grid, tissue = job
        try:
            index = read_index(index_path(index_dir, grid, slide_id), grid, tissue)
        except SlideError:
            fit.append(job)  # it is met, and said, when its turn comes
            continue
        size = len(index) * grid.size**2 * 3  # what it takes if nothing can be squeezed
        if wanted + size <= budget:
            fit.append(job)
            own.append(cache_path(cache_dir, index))
            wanted += size
    if fit:
        make_room(cache_dir, budget - wanted, own)
    return fit


def _cache_one(job: tuple) -> tuple[SlideError | None, bool]:
    """The slide's fault if any, and whether the cache's own disk is to blame."""
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
