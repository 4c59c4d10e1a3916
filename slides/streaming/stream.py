"""Slides for training: bags of tiles, read ahead by worker processes.

Training takes one slide a step. `SlideSampler` (in order.py) says which slide comes next,
`BagDataset` reads and augments its tiles, `SlideLoader` does so ahead of time. Augmenting is a
function of (seed, epoch, slide), as order and choice of tiles are, so the number of workers and a
restart change nothing. A slide too large to be held whole is read again beyond what is held
(`SlideTiles`, held.py). All of it can be imported from here.

Price: at most workers * prefetch + 1 bags in memory, decoded straight into shared memory; `hold`
bounds each.

Shapes: T tiles of a slide, S side of a tile, K labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from slides.cohort.table import SlideRow
from slides.errors import NoTissueError, SlideError
from slides.seeds import stable_seed
from slides.streaming.augment import AugmentedSlide, draw_change
from slides.streaming.bounded_tiles import JoinedTiles, SlideTiles, joined
from slides.streaming.chunks import SlideSource, WorkerDiedError, close, named_fault, read_tiles
from slides.streaming.order import (
    SAMPLINGS,
    SlideSampler,
    Turn,
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


@dataclass  # not frozen: Lightning's precision plugins rebuild a batch field by field
class TileBag:
    """The tiles of one slide as training, validation and the baselines see them."""

    slide_id: str
    case_id: str
    tiles: Tensor | SlideTiles | JoinedTiles
    """uint8 (T, 3, S, S), augmented if the dataset augments; all kinds `split` into chunks."""
    coords0: np.ndarray
    """int64 (T, 2), level-0 corners of these tiles, each in its own slide."""
    labels: Tensor
    """float32 (K,), nan where unknown."""
    turn: Turn
    counts: tuple[int, ...] = ()
    """Tiles of each of its slides, in order."""
    steps0: tuple[int, ...] = ()
    """Level-0 pixels from a tile of each slide's lattice to the next."""

    def on_fault(self, told: Callable[[SlideError], None]) -> None:
        """Who is told of a fault in tiles that are read as they are asked for: `SlideTiles`."""
        for part in self.tiles.parts if isinstance(self.tiles, JoinedTiles) else [self.tiles]:
            if isinstance(part, SlideTiles):
                part.on_fault = told

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TileBag:
        """Only the labels move: tiles go to the device chunk by chunk, never the whole slide."""
        return replace(self, labels=self.labels.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TileBag:
        """Page-locked tiles, so that their copies to a GPU can overlap with work."""
        return replace(self, tiles=self.tiles.pin_memory())


@dataclass
class Skipped:
    """A slide that could not be read and was left out because `on_error` is skip."""

    slide_id: str
    reason: str
    turn: Turn

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Skipped:
        """Nothing to move."""
        return self


@dataclass(frozen=True)
class Augment:
    """How training tiles are changed; see `slides.streaming.augment`."""

    flips: bool = True
    """Mirror half of the tiles."""
    rotations: bool = True
    """Turn by a multiple of 90 degrees."""
    colour: float = 0.0
    """Slide-shared change of stain, contrast and brightness; 0.1 is up to a tenth."""
    stain: float = 0.0
    """Slide-shared change of haematoxylin and eosin alone; 0.1 is up to a tenth of each."""


class BagDataset(Dataset):
    """Maps a turn to the slide's `TileBag`. A plain number i is the i-th slide, in epoch 0.

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
        """Nothing is opened yet.

        Args:
            rows: the slides of a split.
            open_slide: gives a slide's pixels and tiles; called in the worker, each turn anew, and
                what it gives is closed after use if it has a `close`. Must pickle for `spawn`.
            budget: tiles per slide and epoch, drawn anew each epoch; None is all.
            seed: of the tiles drawn and of augmentation.
            augment: None leaves tiles as they are.
            on_error: `stop` raises a slide's fault, `skip` gives a `Skipped` in its place. Only
                faults of slides can be skipped; a fault of the program always stops.
            sampling: how tiles are drawn, one of `order.SAMPLINGS`.
            hold: tiles of a slide that are held in memory, the rest is read as it is asked for;
                None holds all.
            workers: processes for that rest.
        """
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be stop or skip, got {on_error!r}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
        sample_tiles(1, budget, seed, 0, "")  # a bad budget is refused now, not in a worker
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
        """The bag of a slide, or of a case: its slides one after the other."""
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
        """Return the tiles of a slide that an epoch takes, their corners, the lattice's step."""
        source, index = self.open_slide(row)
        try:
            if not len(index.coords0):
                raise NoTissueError(
                    f"{row.slide_id}: its index has no tile. Loosen the tissue thresholds and "
                    "index it again, or leave it out."
                )
            drawn_as = f"{row.slide_id}#{turn.visit}" if turn.visit else row.slide_id
            chosen = index.part(self._rows(index, drawn_as, turn.epoch))
            if self.augment is not None:
                generator = slide_generator(self.seed, turn.epoch, drawn_as)
                change = draw_change(len(chosen), generator, **vars(self.augment))
                source = AugmentedSlide(source, chosen.coords0, change)
            elsewhere = get_worker_info() is not None
            tiles = read_tiles(source, chosen, slice(self.hold), shared=elsewhere)
        finally:
            close(source)  # a cohort's worth of open files and decoder caches would add up
        if len(tiles) < len(chosen):
            tiles = SlideTiles.of(source, chosen, self.workers, in_memory=tiles)
        return tiles, chosen.coords0, index.step0

    def _rows(self, index: TileIndex, drawn_as: str, epoch: int) -> np.ndarray:
        place = self.budget, self.seed, epoch, drawn_as
        if self.sampling == "spatial":
            return spread_tiles(index.coords0 // index.size0, *place)
        return sample_tiles(len(index), *place)


class _FaultsAsItems(Dataset):
    """A slide's fault travels as an item: raised in a worker it would come back as a traceback."""

    def __init__(self, bags: BagDataset):
        self.bags, self.rows = bags, bags.rows

    def __len__(self) -> int:
        return len(self.bags)

    def __getitem__(self, turn: Turn | int) -> TileBag | Skipped | SlideError:
        try:
            return self.bags[turn]
        except SlideError as fault:
            return fault


class SlideLoader(DataLoader):
    """A DataLoader of bags: no batch dimension, own random numbers, faults that can be read.

    It counts as resumable for Lightning (`state_dict`), and starts its workers at the first bag
    asked for, not at `iter`: Lightning calls `iter` before it says which epoch it is.
    """

    def __init__(
        self,
        dataset: BagDataset,
        sampler: SlideSampler | None = None,
        workers: int = 0,
        prefetch: int = 2,
        **kwargs,
    ):
        """Take `dataset` in the sampler's order, or slide by slide.

        Args:
            dataset: the bags.
            sampler: None for validation, test and the baselines: all slides, in the table's order.
            workers: reading processes; 0 reads in this one.
            prefetch: bags each worker reads ahead.
            kwargs: further arguments of `DataLoader`.
        """
        super().__init__(
            _FaultsAsItems(dataset),
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            # DataLoader draws a number at each iter: not from the generator that training uses,
            # or a resumed run would see other random numbers than an unbroken one.
            generator=torch.Generator(),
            **kwargs,
        )

    def __iter__(self) -> Iterator[TileBag | Skipped]:
        bags = None
        try:
            turns = list(self.sampler)  # as the iterator below will take them
            for number in range(len(turns)):
                bags = super().__iter__() if bags is None else bags
                bag = self._next(bags, turns[number:])
                if isinstance(bag, SlideError):
                    raise bag
                yield bag
                del bag  # the caller may be done with it: do not hold it while awaiting the next
        finally:
            # Left to the garbage collector, an iterator that is held by a traceback loses its
            # queues before it can tell the workers to stop, and waits 5 s for each of them.
            if self.num_workers and bags is not None and not self.persistent_workers:
                bags._shutdown_workers()

    def _next(self, bags: Iterator, turns: list) -> TileBag | Skipped | SlideError:
        try:
            return next(bags)
        except RuntimeError as error:
            if not re.search(r"DataLoader worker \(pid", str(error)):
                raise
            ahead = turns[: self.num_workers * (self.prefetch_factor or 1)]
            rows = [self.dataset.rows[getattr(turn, "slide", turn)] for turn in ahead]
            raise WorkerDiedError.of([row.slide_id for row in rows], str(error)) from error

    def state_dict(self) -> dict[str, int]:
        """The sampler's."""
        return self.sampler.state_dict() if isinstance(self.sampler, SlideSampler) else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The sampler's."""
        if isinstance(self.sampler, SlideSampler) and state:
            self.sampler.load_state_dict(state)


def slide_generator(seed: int, epoch: int, slide_id: str) -> torch.Generator:
    """The random numbers that augment one slide in one epoch."""
    generator = torch.Generator()
    return generator.manual_seed(stable_seed("augment", int(seed), int(epoch), slide_id) % 2**63)
