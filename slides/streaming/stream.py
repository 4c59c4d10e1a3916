"""Slides for training: bags of tiles, read ahead by worker processes.

Training uses one slide a step. `SlideSampler` (order.py) decides which slide comes next,
`BagDataset` reads and augments its tiles, `SlideLoader` does so ahead of time. Augmentation, order
and choice of tiles depend only on (seed, epoch, slide), so the number of workers and a restart
change nothing. Of a slide too large for memory the first tiles are kept and the rest is read again
(`SlideTiles`, bounded_tiles.py). All of these can be imported from here.

Price: at most workers * prefetch + 1 bags in memory, decoded into shared memory; `hold` bounds
each.

Shapes: T tiles of a slide, S side of a tile, K labels.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from slides.cohort.table import SlideRow
from slides.errors import NoTissueError, SlideError, reading_faults, refuse
from slides.seeds import stable_seed
from slides.streaming.augment import AugmentedSlide, draw_augmentation, strength_faults
from slides.streaming.bounded_tiles import JoinedTiles, SlideTiles, joined
from slides.streaming.chunks import SlideSource, WorkerDiedError, close, named_fault, read_tiles
from slides.streaming.order import (
    SAMPLINGS,
    SlideSampler,
    Turn,
    budget_faults,
    epoch_order,
    sample_tiles,
    spread_tiles,
)
from slides.streaming.prefetch import stream_chunks

if TYPE_CHECKING:
    from slides.tiling.index import TileIndex

__all__ = [
    "Augment",
    "BagDataset",
    "Skipped",
    "SlideLoader",
    "SlideSampler",
    "SlideSource",
    "SlideTiles",
    "TileBag",
    "Turn",
    "WorkerDiedError",
    "epoch_order",
    "read_tiles",
    "sample_tiles",
    "slide_generator",
    "spread_tiles",
    "stream_chunks",
]

SHM = "/dev/shm"  # where processes share memory: 64 MB in most containers
WORKER_DIED = "DataLoader worker (pid"  # how torch begins to say so


@dataclass  # not frozen: Lightning's precision plugins rebuild a batch field by field
class TileBag:
    """The tiles of one slide or case, as the data loader gives them."""

    slide_id: str
    case_id: str
    tiles: Tensor | SlideTiles | JoinedTiles
    """uint8 (T, 3, S, S), augmented if the dataset augments; each type has `split(size)`."""
    coords0: np.ndarray
    """int64 (T, 2), level-0 corners of these tiles, each in its own slide."""
    labels: Tensor
    """float32 (K,), nan where unknown."""
    turn: Turn
    counts: tuple[int, ...] = ()
    """Tiles of each of its slides, in order."""
    steps0: tuple[int, ...] = ()
    """Level-0 pixels from a tile of each slide's lattice to the next."""

    def on_fault(self, handler: Callable[[SlideError], None]) -> None:
        """Set the handler of faults in tiles that are read later (`SlideTiles`)."""
        for part in self.tiles.parts if isinstance(self.tiles, JoinedTiles) else [self.tiles]:
            if isinstance(part, SlideTiles):
                part.on_fault = handler

    @property
    def unshared(self) -> int:
        """Bytes of tiles that are not in shared memory yet."""
        parts = self.tiles.parts if isinstance(self.tiles, JoinedTiles) else [self.tiles]
        parts = [part.in_memory if isinstance(part, SlideTiles) else part for part in parts]
        return sum(part.nbytes for part in parts if part is not None and not part.is_shared())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TileBag:
        """Move the labels only: tiles go to the device chunk by chunk, never the whole slide."""
        return replace(self, labels=self.labels.to(device, non_blocking=non_blocking))


@dataclass
class Skipped:
    """A slide that could not be read, left out because `on_error` is skip."""

    slide_id: str
    reason: str
    turn: Turn

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Skipped:
        """Return self; there is nothing to move."""
        return self


@dataclass(frozen=True)
class Augment:
    """Settings of training augmentation, see `slides.streaming.augment`."""

    flips: bool = True
    """Mirror half of the tiles."""
    rotations: bool = True
    """Turn by a multiple of 90 degrees."""
    colour: float = 0.0
    """Slide-shared change of stain, contrast and brightness; 0.1 is up to a tenth."""
    stain: float = 0.0
    """Slide-shared change of haematoxylin and eosin alone; 0.1 is up to a tenth of each."""
    scale: float = 0.0
    """Slide-shared change of scale; 0.1 is a factor of up to 1.1, or down to 1 / 1.1."""

    def __post_init__(self):
        refuse(strength_faults(self.colour, self.stain, self.scale), "data")


class BagDataset(Dataset):
    """Maps a turn to the slide's `TileBag`; a plain number i is slide i in epoch 0.

    Training gives a budget and an `Augment`; validation and test give neither, and so get all
    tiles, in index order, as they are on the slide.
    """

    def __init__(
        self,
        rows: Sequence[SlideRow],
        open_slide: Callable[[SlideRow], tuple[SlideSource, TileIndex]],
        budget: int | None = None,
        seed: int = 0,
        augment: Augment | None = None,
        on_error: str = "stop",
        sampling: str = "uniform",
        hold: int | None = None,
        workers: int = 0,
    ):
        """Store the settings; no slide is opened yet.

        Args:
            rows: the slides of a split.
            open_slide: returns a slide's pixels and index; called in the worker at each turn. The
                pixels are closed after use if they have a `close`. Must pickle for `spawn`.
            budget: tiles per slide and epoch, drawn again each epoch; None is all.
            seed: seed of the choice of tiles and of augmentation.
            augment: None leaves tiles as they are.
            on_error: `stop` raises a slide's fault, `skip` returns a `Skipped` instead. Faults of
                the program itself always stop.
            sampling: how tiles are drawn, one of `order.SAMPLINGS`.
            hold: tiles of a slide to keep in memory, the rest is read when requested; None keeps
                all.
            workers: processes that read the rest.
        """
        faults = reading_faults(workers, on_error) + budget_faults(budget)
        if sampling not in SAMPLINGS:
            faults.append(f"data.sampling is {sampling!r}: give {' or '.join(SAMPLINGS)}")
        refuse(faults, "data")  # now, not in a worker
        self.rows, self.open_slide = tuple(rows), open_slide
        self.budget, self.seed, self.augment, self.on_error = budget, seed, augment, on_error
        self.sampling, self.hold, self.workers = sampling, hold, workers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, turn: Turn | int) -> TileBag | Skipped:
        if not isinstance(turn, Turn):
            if not 0 <= turn < len(self.rows):
                raise IndexError(turn)
            turn = Turn(0, turn, turn)
        row = self.rows[turn.slide]
        try:
            return self._read(row, turn)
        except Exception as error:
            fault = named_fault(error, row.slide_id)
            if self.on_error == "skip" and isinstance(fault, SlideError):
                return Skipped(row.slide_id, str(fault), turn)
            raise fault from error

    def _read(self, row: SlideRow, turn: Turn) -> TileBag:
        """Return the bag of a slide, or of a case: its slides one after the other."""
        parts = []
        for slide in row.slides:
            try:
                parts.append(self._tiles(slide, turn))
            except Exception as error:
                raise named_fault(error, slide.slide_id) from error
        tiles, coords0, steps0 = zip(*parts, strict=True)
        counts = tuple(len(each) for each in coords0)
        coords0, labels_K = np.concatenate(coords0), torch.tensor(row.labels, dtype=torch.float32)
        return TileBag(
            row.slide_id, row.case_id, joined(tiles), coords0, labels_K, turn, counts, steps0
        )

    def _tiles(self, row: SlideRow, turn: Turn) -> tuple[Tensor | SlideTiles, np.ndarray, int]:
        """Return the tiles of a slide that an epoch uses, their corners, the lattice's step."""
        source, index = self.open_slide(row)
        try:
            if not len(index.coords0):
                raise NoTissueError(
                    f"{row.slide_id}: its index has no tile. Lower the tissue thresholds and "
                    "index it again, or leave it out."
                )
            chosen = index.part(self.drawn(index, row.slide_id, turn))
            if self.augment is not None:
                generator = slide_generator(self.seed, turn.epoch, turn.drawn_as(row.slide_id))
                change = draw_augmentation(len(chosen), generator, **vars(self.augment))
                source = AugmentedSlide(source, chosen.coords0, change)
            kept = len(chosen.coords0[: self.hold]) * 3 * chosen.grid.size**2
            shared = get_worker_info() is not None and fits_in_shm(kept)
            tiles = read_tiles(source, chosen, slice(self.hold), shared=shared)
        finally:
            close(source)  # a cohort's worth of open files and decoder caches would add up
        if len(tiles) < len(chosen):
            tiles = SlideTiles.of(source, chosen, self.workers, in_memory=tiles)
        return tiles, chosen.coords0, index.step0

    def drawn(self, index: TileIndex, slide_id: str, turn: Turn) -> np.ndarray:
        """Return which rows of a slide's tiles a turn takes."""
        place = self.budget, self.seed, turn.epoch, turn.drawn_as(slide_id)
        if self.sampling == "spatial":
            return spread_tiles(index.coords0 // index.size0, *place)
        return sample_tiles(len(index), *place)


class _FaultsAsItems(Dataset):
    """Wraps a dataset so that a slide's fault is returned as an item, not raised."""

    def __init__(self, bags: BagDataset):
        self.bags, self.rows = bags, bags.rows

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, turn: Turn | int) -> TileBag | Skipped | SlideError | bytes:
        try:
            bag = self.bags[turn]
        except SlideError as fault:
            return fault
        if get_worker_info() and isinstance(bag, TileBag) and not fits_in_shm(bag.unshared):
            return pickle.dumps(bag, protocol=5)  # through the pipe: slower, and always possible
        return bag


def fits_in_shm(size: int) -> bool:
    """Return whether so many bytes of each of a loader's workers, and one more, fit in /dev/shm."""
    processes = get_worker_info().num_workers + 1
    try:
        return size == 0 or shutil.disk_usage(SHM).free > processes * size
    except OSError:  # a system without it
        return True


class SlideLoader(DataLoader):
    """A DataLoader of bags: no batch dimension, own random numbers, readable errors.

    Lightning can resume it (`state_dict`). Its workers start at the first bag, not at `iter`:
    Lightning calls `iter` before it sets the epoch.
    """

    def __init__(
        self,
        dataset: BagDataset,
        sampler: SlideSampler | None = None,
        workers: int = 0,
        prefetch: int = 2,
        context: BaseContext | None = None,
        **kwargs,
    ):
        """Load `dataset` in the sampler's order; None is the table's, for validation and test.

        Args:
            dataset: the bags.
            sampler: the order of slides.
            workers: reading processes; 0 reads in this one.
            prefetch: bags that each worker reads ahead.
            context: how its workers are started; None is the system's way.
            kwargs: further arguments of `DataLoader`.
        """
        super().__init__(
            _FaultsAsItems(dataset),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            multiprocessing_context=context,
            # DataLoader draws a number at each iter. Its own generator keeps that from changing
            # training's random numbers, which a resumed run must repeat.
            generator=torch.Generator(),
            **kwargs,
        )

    def __iter__(self) -> Iterator[TileBag | Skipped]:
        bags = None
        try:
            turns = list(self.sampler)  # the same as in the iterator below
            for number in range(len(turns)):
                bags = super().__iter__() if bags is None else bags
                bag = self._next(bags, turns[number:])
                if isinstance(bag, SlideError):
                    raise bag
                yield bag
                del bag  # frees it while the next one is awaited
        finally:
            # Left to the garbage collector, an iterator in a traceback loses its queues before it
            # can tell the workers to stop, and waits 5 s for each of them.
            if self.num_workers and bags is not None and not self.persistent_workers:
                try:
                    bags._shutdown_workers()
                except RuntimeError as error:  # torch's signal, which may come as late as this
                    if WORKER_DIED not in str(error):
                        raise

    def _next(self, bags: Iterator, turns: list) -> TileBag | Skipped | SlideError:
        try:
            bag = next(bags)
            return pickle.loads(bag) if isinstance(bag, bytes) else bag
        except (RuntimeError, ConnectionError) as error:  # of a pipe, where it died as it sent
            if isinstance(error, RuntimeError) and WORKER_DIED not in str(error):
                raise
            ahead = turns[: self.num_workers * (self.prefetch_factor or 1)]
            rows = [self.dataset.rows[getattr(turn, "slide", turn)] for turn in ahead]
            raise WorkerDiedError.of([row.slide_id for row in rows], str(error)) from error

    def state_dict(self) -> dict[str, int]:
        """Return the sampler's state."""
        return self.sampler.state_dict() if isinstance(self.sampler, SlideSampler) else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Load the sampler's state."""
        if isinstance(self.sampler, SlideSampler) and state:
            self.sampler.load_state_dict(state)


def slide_generator(seed: int, epoch: int, slide_id: str) -> torch.Generator:
    """Return the random generator that augments one slide in one epoch."""
    generator = torch.Generator()
    return generator.manual_seed(stable_seed("augment", int(seed), int(epoch), slide_id) % 2**63)
