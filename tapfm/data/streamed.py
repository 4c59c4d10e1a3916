"""Bags of slides in a row, read as they are asked for; their targets, and where their tiles lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np

from slides.cohort.cases import group_by_case
from slides.cohort.table import Cohort, SlideRow
from slides.errors import LISTED, CohortError, SlideError, all_faults, some
from slides.seeds import stable_seed
from slides.streaming.balance import balanced_order
from slides.streaming.bounded_tiles import host_budget, tiles_to_hold
from slides.streaming.order import Turn, epoch_order, paired_order
from slides.streaming.prefetch import Prefetcher
from slides.streaming.stream import Skipped, TileBag
from slides.tiling.checked import Checked
from slides.tiling.index_file import TileIndex
from tapfm.data.bag import Bag, Places
from tapfm.data.lookahead import Ahead, chunk_to_fill


class Streamed:
    """Bags in a row; while they are gone through, the next one's tiles are read ahead."""

    def __init__(self, bags: Sequence[Bag], prefetcher: Prefetcher):
        self.bags, self.prefetcher = bags, prefetcher

    def __len__(self) -> int:
        return len(self.bags)

    def __iter__(self) -> Iterator[Bag]:
        with self.prefetcher:
            yield from self.bags


def host_weights(trainer: Any) -> int:
    """Return bytes of host memory in which a run's optimizer changes numbers at each update."""
    return getattr(getattr(trainer, "lightning_module", None), "host_bytes", 0)


def tile_budget(gigabytes: float | None, trainer: Any) -> int:
    """Return bytes of host memory for this process's tiles or features.

    Args:
        gigabytes: `data.host_gb`.
        trainer: of the run, or None; its optimizer's host memory is not the tiles'.
    """
    processes = trainer.num_devices if trainer else 1  # of this machine
    return host_budget(gigabytes, host_weights(trainer), processes)


def apart(trainer: Any, workers: int) -> BaseContext | None:
    """Return how to start readers that share no memory with a run; None where they may.

    A forked reader shares all of it until either side writes: an offloaded optimizer rewrites its
    masters at each update, which then copies every page, and the memory is taken twice.
    """
    if not workers or not host_weights(trainer):
        return None
    context = get_context("forkserver")
    context.set_forkserver_preload(["slides.streaming.stream"])  # imported once for all readers
    return context


def targets(rows: Sequence[SlideRow], width: int) -> np.ndarray:
    """Return the bags' targets, (N, Y)."""
    return np.array([row.labels for row in rows], np.float32).reshape(len(rows), width)


def readable(every: Sequence[SlideRow], split: str, data: Any) -> list[SlideRow]:
    """Return the slides of a split that have tiles; note the others with the data module.

    A resumed run has those that it was begun with.

    Raises:
        SlideError: one has none, unless `on_error` is skip.
        CohortError: all have none.
    """
    rows, checked = [], checked_indexes(data)
    for row in every:
        try:
            if not (checked and checked.row(row.slide_id, row.path, row.mpp)):
                data.index(row)
            rows.append(row)
        except SlideError as fault:
            if data.on_error != "skip":
                raise
            why = None if data.known([row]) else data.tile_source.why_not(row)
            data.skipped.note({row.slide_id: why or str(fault)})
    if every and not rows:
        why = [data.skipped[row.slide_id] for row in every]
        raise CohortError(all_faults(f"split {split}, no slide of which can be read", why))
    rows = as_begun(rows, split, data.begun.get(split), data.skipped)
    data.had[split] = [row.slide_id for row in rows]
    return rows


def checked_indexes(data: Any) -> Checked | None:
    """Return the record of the indexes found right; None for a run on features."""
    source = data.tile_source
    return None if data.features else Checked(source.index_dir, source.grid, source.tissue)


def as_begun(
    rows: list[SlideRow], split: str, begun: Sequence[str] | None, skipped: Mapping[str, str]
) -> list[SlideRow]:
    """Return the slides that a resumed run was begun with; print those that it leaves out again.

    Args:
        rows: slides that can be read now.
        split: theirs.
        begun: ids of those it was begun with; None for a new run.
        skipped: why others cannot be read.

    Raises:
        CohortError: one of them cannot be read any more.
    """
    if begun is None:
        return rows
    there = {row.slide_id for row in rows}
    if lost := [name for name in begun if name not in there]:
        why = [skipped.get(name, f"{name}: not there") for name in lost[:LISTED]]
        where = f"split {split}: this run was begun with {len(lost)} slides that cannot be read now"
        raise CohortError(all_faults(f"{where}. Mend them, or start a new run", why))
    if late := [row.slide_id for row in rows if row.slide_id not in set(begun)]:
        print(f"split {split}: {some(late)}: left out when this run was begun, and so again")
    return [row for row in rows if row.slide_id in set(begun)]


def tiles_held(rows: Sequence[SlideRow], room: int, ahead: int, data: Any) -> int:
    """Return how many tiles of a slide are kept in memory; print a note if not all.

    Args:
        rows: bags.
        room: bytes.
        ahead: bags that each worker reads ahead.
        data: the data module, for `workers`, `tiles`, `tile_source` and `tiles_per_slide`.
    """
    bags = data.workers * ahead + 2  # read ahead, in training, and about to be let go
    if chunk := chunk_to_fill(data.trainer):
        bags, room = bags + 1, max(0, room - 3 * data.tiles.tile_px**2 * chunk)
    slides = bags * max(len(row.slides) for row in rows)
    hold = tiles_to_hold(room, data.tiles.tile_px, slides)
    checked, most = checked_indexes(data), 0
    for slide in (slide for row in rows for slide in row.slides):
        known = checked and checked.row(slide.slide_id, slide.path, slide.mpp)
        most = max(most, known["tiles"] if known else len(data.tile_source.index(slide)))
    if hold < min(most, data.tiles_per_slide or most):
        print(
            f"data.host_gb: {room / 1e9:.1f} GB hold {hold} tiles of each of {slides} slides (of "
            f"data.workers {data.workers}); the largest has {most}, and what is beyond is read "
            "again in each pass."
        )
    return hold


def check_pool(cohort: Cohort, bags: str, pool: str) -> None:
    """Refuse `data.bags` and `data.pool` that do not go together or do not suit the cohort.

    Raises:
        CohortError: slides of a case disagree, or both are given.
    """
    if bags == "case" and pool != "union":
        raise CohortError(
            f"data.pool {pool} is of slides, and data.bags: case has one bag a case already. "
            "Leave one of them out."
        )
    if bags == "case" or pool != "union":
        group_by_case(cohort.rows, cohort.labels)


def training_order(rows: Sequence[SlideRow], data: Any) -> Callable[[int], np.ndarray] | None:
    """Return a function from an epoch to the order of its bags; None is the shuffled one.

    Args:
        rows: bags.
        data: the data module.
    """
    if data.balanced:
        families = data.task.strata(targets(rows, data.task.width))
        return balanced_order(rows, families, data.seed)
    return paired_bags(rows, data) if data.paired else None


def paired_bags(rows: Sequence[SlideRow], data: Any) -> Callable[[int], np.ndarray]:
    """Return a function from an epoch to an order that pairs bags by the tiles they give.

    Args:
        rows: bags.
        data: the data module, for `index`, `tiles_per_slide`, `seed` and `place`.
    """
    most = data.tiles_per_slide or math.inf
    sizes = [sum(min(len(data.index(slide)), most) for slide in row.slides) for row in rows]
    world, seed = data.place[1], data.seed

    def order(epoch: int) -> np.ndarray:
        plain = epoch_order(len(rows), seed, epoch)
        return paired_order(plain, np.array(sizes), world, seed, epoch)

    return order


def check_val(rows: list[SlideRow], world: int) -> list[SlideRow]:
    """Return the slides of the val split, if so many processes can choose weights by them.

    Raises:
        CohortError: there is none, or a process would have none, and the others wait for it.
    """
    if not rows:
        raise CohortError(
            "the val split has no slide, and the best weights are chosen there. Give the table "
            "one: `tapfm split` deals it."
        )
    if len(rows) < world:
        raise CohortError(
            f"the val split has {len(rows)} slides for {world} processes: each needs one at "
            "least. Train with fewer devices."
        )
    return rows


def bag_of(batch: TileBag, seed: int, mpp: float) -> Bag:
    """Return a training slide as the trainer takes it, given the run's seed and resolution."""
    coords0 = np.split(batch.coords0, np.cumsum(batch.counts)[:-1])
    places = Places.of(coords0, batch.steps0, mpp)
    own = chunk_seed(seed, batch.turn, batch.slide_id)
    name = batch.slide_id, batch.case_id
    return Bag(*name, batch.tiles, places, batch.labels, own, batch.turn)


def chunk_seed(seed: int, turn: Turn, slide_id: str) -> int:
    """Return the seed of a training bag, a function of run seed, epoch, slide and visit."""
    return stable_seed("chunks", seed, turn.epoch, turn.drawn_as(slide_id)) % 2**63


def places_of(indices: Sequence[TileIndex]) -> Places:
    """Return where the tiles of the slides of a bag lie, slide after slide."""
    coords0, steps0 = [each.coords0 for each in indices], [each.step0 for each in indices]
    return Places.of(coords0, steps0, indices[0].grid.mpp)


def as_bag(item: Ahead | Bag | Skipped | TileBag, data: Any) -> Bag | None:
    """Return a loader's item as a `Bag`; note a skipped slide with the data module, return None.

    Raises:
        SlideError: it is skipped where several processes train.
    """
    if isinstance(item, Ahead):
        bag = as_bag(item.item, data)
        return bag and replace(bag, behind=tuple(as_bag(each, data) for each in item.behind))
    if isinstance(item, Bag):
        return item
    several = data.place[1] > 1
    if isinstance(item, Skipped):
        if several:
            raise SlideError(
                f"{item.reason} Several processes train together and cannot leave out a slide "
                "that one of them finds broken: take it out of the table."
            )
        data.skipped.note({item.slide_id: item.reason})
        return None
    if not several:  # others would wait for a slide that this one leaves out
        item.on_fault(partial(data.skip, item.slide_id))
    return bag_of(item, data.seed, data.tiles.mpp)
