"""Slides to bags: the only file of tapfm that a training run and `slides` share.

Training draws tiles anew each epoch and augments them; validation, test and prediction take every
tile, as it is on the slide, streamed in chunks.

Shapes: T tiles of a slide, C tiles of a chunk, S side of a tile, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from slides.cache import CachedSlide
from slides.chunks import SlideSource
from slides.cohort import SlideRow, positive_weights, read_cohort
from slides.errors import CohortError, IndexFileError, SlideError
from slides.grid import Grid
from slides.held import SlideTiles, host_budget, tiles_to_hold
from slides.index import TileIndex, index_path, read_index
from slides.order import SlideSampler, Turn, stable_seed
from slides.reader import Slide
from slides.stain import StainedSlide, refuse_other_stains
from slides.stream import Augment, BagDataset, Skipped, SlideLoader
from slides.tissue import Tissue
from tapfm.bag import Bag, SkippedBag
from tapfm.config import ConfigError, Source, TileSettings, index_and_cache

PREFETCH = 2  # training slides that each worker reads ahead


@dataclass(frozen=True)
class Opener:
    """A row of the cohort to an open slide and its tiles; picklable, for worker processes."""

    index_dir: Path
    cache_dir: Path | None
    grid: Grid
    tissue: Tissue
    stain: str | None = None
    """How stains are normalised, see `slides.stain`; None leaves them."""
    cache_gb: float | None = None
    """With a limit, slides without a cache are read from their files."""

    def index(self, row: SlideRow) -> TileIndex:
        """The slide's tiles, from the index on disk.

        Raises:
            SlideError: there is none, or it was made with other settings.
        """
        path = index_path(self.index_dir, self.grid, row.slide_id)
        return read_index(path, self.grid, self.tissue)

    def __call__(self, row: SlideRow) -> tuple[SlideSource, TileIndex]:
        """Pixels, from the cache where there is one, normalised if asked for, and tiles."""
        index = self.index(row)
        source = Slide(row.path, mpp=row.mpp, name=row.slide_id)  # opened when it is read
        if self.cache_dir is not None:
            try:
                source = CachedSlide(self.cache_dir, index, row.path)
            except IndexFileError:
                if self.cache_gb is None:
                    raise
        return (StainedSlide(source, index, self.stain) if self.stain else source), index


class SlideData(L.LightningDataModule):
    """A cohort as Lightning asks for it.

    Args:
        table: the cohort's CSV, TSV or Parquet file.
        slides_dir: folder that slide paths are relative to; None is the table's.
        labels: label columns to train on; None is all of them.
        index_dir: where `tapfm index` wrote the tiles.
        cache_dir: where decoded tiles are kept; None reads the slides each time.
        cache_gb: what `cache_dir` may take, of this cohort and others; slides that do not fit are
            read each time. None is no limit.
        tiles: size, resolution and tissue.
        tiles_per_slide: tiles drawn from a slide each epoch, without replacement; None is all.
        colour: strength of the slide-shared colour jitter of training tiles; 0 is none.
        stain: bring the stains of every slide to a common reference, in training and ever after;
            None leaves them as they are.
        stain_jitter: strength of the slide-shared change of haematoxylin and eosin in training.
        sampling: `uniform` draws tiles wherever they are, `spatial` spreads them over the slide.
        host_gb: memory for tiles of training slides that are held or read ahead; of a slide that
            does not fit, the rest is read again in each pass, and a fault in it stops the run.
            None is half of the machine's.
        workers: reading processes.
        on_error: `stop` at a slide that cannot be read, or `skip` it, count it and list it.
        seed: of order, tiles and augmentation.
    """

    def __init__(
        self,
        table: str,
        slides_dir: str | None = None,
        labels: list[str] | None = None,
        index_dir: str = "data/index",
        cache_dir: str | None = None,
        cache_gb: float | None = None,
        tiles: TileSettings = TileSettings(),  # noqa: B008 (frozen)
        tiles_per_slide: int | None = None,
        colour: float = 0.0,
        stain: Literal["macenko", "reinhard"] | None = None,
        stain_jitter: float = 0.0,
        sampling: Literal["uniform", "spatial"] = "uniform",
        host_gb: float | None = None,
        workers: int = 2,
        on_error: Literal["stop", "skip"] = "stop",
        seed: int = 0,
    ):
        super().__init__()
        self.cohort = read_cohort(Path(table), labels, Path(slides_dir) if slides_dir else None)
        self.tiles, self.tiles_per_slide = tiles, tiles_per_slide
        cache = Path(cache_dir) if cache_dir else None
        for option, given in (("data.stain", stain), ("data.stain_jitter", stain_jitter)):
            if given:
                refuse_other_stains(self.cohort.rows, option)
        self.opener = Opener(Path(index_dir), cache, tiles.grid, tiles.tissue, stain, cache_gb)
        self.workers, self.on_error, self.seed = workers, on_error, seed
        if host_gb is not None and host_gb < 0:
            raise ConfigError(f"data.host_gb is {host_gb:g}: give 0 or more, or leave it out.")
        self.sampling, self.host_gb = sampling, host_gb
        self.augment = Augment(colour=colour, stain=stain_jitter)
        self.skipped: dict[str, str] = {}
        self.sampler: SlideSampler | None = None

    @property
    def source(self) -> Source:
        """What `tapfm index` would be asked to prepare."""
        opener = self.opener
        return Source(
            self.cohort.rows,
            opener.index_dir,
            opener.cache_dir,
            self.tiles,
            self.on_error,
            self.workers,
            opener.stain,
            opener.cache_gb,
        )

    @property
    def label_names(self) -> list[str]:
        """Names of the labels."""
        return list(self.cohort.labels)

    @property
    def pos_weight(self) -> list[float]:
        """Negatives over positives of each label, in the training split."""
        return positive_weights(self.cohort.split("train"))

    def prepare_data(self) -> None:
        """Index and cache what is not there yet: one process does, the others wait for it."""
        _, failed = index_and_cache(self.source)
        self.skipped.update(failed)

    def rows(self, split: str) -> list[SlideRow]:
        """The slides of a split that have tiles; those without are skipped or raise, as asked."""
        rows = []
        for row in self.cohort.split(split):
            try:
                self.opener.index(row)
                rows.append(row)
            except SlideError as fault:
                if self.on_error != "skip":
                    raise
                self.skipped[row.slide_id] = str(fault)
        return rows

    def train_dataloader(self) -> SlideLoader:
        """Slides in a new order each epoch, their tiles in memory."""
        rows = self.rows("train")
        if not rows:
            raise ValueError("the train split has no slide that can be read; see the ledger")
        self.sampler = SlideSampler(len(rows), self.seed, *self.place)
        bags = BagDataset(
            rows,
            self.opener,
            budget=self.tiles_per_slide,
            seed=self.seed,
            augment=self.augment,
            on_error=self.on_error,
            sampling=self.sampling,
            hold=self.hold(rows),
            workers=self.streaming_workers,
        )
        pin = torch.cuda.is_available()
        return SlideLoader(bags, self.sampler, self.workers, PREFETCH, pin_memory=pin)

    def hold(self, rows: list[SlideRow]) -> int:
        """Tiles of a training slide that are held in memory; says so where that is not all."""
        slides = self.workers * PREFETCH + 2  # read ahead, in training, and about to be let go
        processes = self.trainer.num_devices if self.trainer else 1  # of this machine
        budget = host_budget(self.host_gb) // processes
        hold = tiles_to_hold(budget, self.tiles.tile_px, slides)
        most = max(len(self.opener.index(row)) for row in rows)
        if hold < min(most, self.tiles_per_slide or most):
            print(
                f"data.host_gb: {budget / 1e9:.1f} GB hold {hold} tiles of each of {slides} slides "
                f"(of data.workers {self.workers}); the largest has {most}, and what is beyond is "
                "read again in each pass."
            )
        return hold

    @property
    def streaming_workers(self) -> int:
        """Processes for slides that are read as they are used."""
        return 0 if self.opener.cache_dir else self.workers  # it is quicker than one is to start

    @property
    def place(self) -> tuple[int, int]:
        """This process among those that train together: its number, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def val_dataloader(self) -> DataLoader:
        """Slides of the val split, all tiles, streamed; each process takes its share.

        Raises:
            CohortError: a process would have none, and the others would wait for it.
        """
        rank, world = self.place
        rows = self.rows("val")
        if world > 1 and len(rows) < world:
            raise CohortError(
                f"the val split has {len(rows)} slides for {world} processes: each needs one at "
                "least. Train with fewer devices."
            )
        return self.streamed(rows[rank::world])

    def test_dataloader(self) -> DataLoader:
        """Slides of the test split, all tiles, streamed."""
        return self.streamed(self.rows("test"))

    def streamed(self, rows: list[SlideRow]) -> DataLoader:
        """Slides in the table's order, all tiles, read as the model asks for them."""
        bags = [self.bag(row) for row in rows]
        return DataLoader(bags, batch_size=None, collate_fn=_as_it_is)

    def bag(self, row: SlideRow) -> Bag:
        """One slide, all tiles, not yet read."""
        labels_K = torch.tensor(row.labels, dtype=torch.float32)
        count = len(self.opener.index(row).coords0)
        tiles = SlideTiles(
            partial(self.opener, row), self.streaming_workers, on_fault=partial(self.skip, row)
        )
        return Bag(row.slide_id, row.case_id, tiles, count, labels_K, seed=0)

    def skip(self, row: SlideRow, fault: SlideError) -> None:
        """List a slide that broke while it was read, where such slides are to be left out.

        Raises:
            SkippedBag: it is left out.
        """
        if self.on_error == "skip":
            self.skipped[row.slide_id] = str(fault)
            raise SkippedBag(row.slide_id) from fault

    def transfer_batch_to_device(self, batch, device, dataloader_idx: int):
        """Tiles stay in host memory; the engine moves a chunk at a time."""
        return batch

    def on_before_batch_transfer(self, batch, dataloader_idx: int) -> Bag | None:
        """What the loaders give, as the trainer takes it; skipped slides are noted, and None."""
        if isinstance(batch, Bag):
            return batch
        if isinstance(batch, Skipped):
            if self.place[1] > 1:
                raise SlideError(
                    f"{batch.reason} Several processes train together and cannot leave out a slide "
                    "that one of them finds broken: take it out of the table."
                )
            self.skipped[batch.slide_id] = batch.reason
            return None
        seed = stable_seed("chunks", self.seed, batch.turn.epoch, batch.slide_id) % 2**63
        return Bag(
            batch.slide_id,
            batch.case_id,
            batch.tiles,
            len(batch.coords0),
            batch.labels,
            seed,
            batch.turn,
        )

    def trained(self, turn: Turn) -> None:
        """A slide's step is done: resuming begins after it."""
        self.sampler.trained(turn)


def _as_it_is(item):
    return item
