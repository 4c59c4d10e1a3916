"""Slides to bags: the only file of tapfm that a training run and `slides` share.

Training draws tiles anew each epoch and augments them; validation, test and prediction take every
tile, as it is on the slide, streamed in chunks.

Shapes: T tiles of a slide, C tiles of a chunk, S side of a tile, K labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from slides.cohort.cases import group_by_case, unlabelled
from slides.cohort.table import SlideRow, read_cohort
from slides.errors import SlideError, refuse
from slides.streaming.bounded_tiles import joined
from slides.streaming.order import SlideSampler, Turn, repeated
from slides.streaming.prefetch import Prefetcher
from slides.streaming.settings import Source, TileSettings, index_and_cache
from slides.streaming.stain import refuse_other_stains
from slides.streaming.stream import Augment, BagDataset, SlideLoader
from slides.streaming.tile_source import TileSource
from slides.tiling.index_file import TileIndex
from tapfm.data.bag import Bag, SkippedBag
from tapfm.data.feature_files import SlideFeatures
from tapfm.data.feature_source import FeatureBags, FeatureSource, KnownBags, open_features
from tapfm.data.lookahead import LookaheadLoader, chunk_to_fill
from tapfm.data.skipped import LIMIT, SkippedSlides
from tapfm.data.streamed import (
    Streamed,
    apart,
    as_bag,
    check_pool,
    check_val,
    places_of,
    readable,
    targets,
    tile_budget,
    tiles_held,
    training_order,
)
from tapfm.settings import below
from tapfm.tasks import TASKS, Task, learn_task, task_config

PREFETCH = 2  # training slides that each worker reads ahead
TaskName = Literal[tuple(TASKS)]


class SlideData(L.LightningDataModule):
    """A cohort as Lightning asks for it.

    Args:
        table: the cohort's CSV, TSV or Parquet file.
        slides_dir: folder that slide paths are relative to; None is the table's.
        features_dir: folder of tile features (tapfm, TRIDENT, CLAM, STAMP) in place of slides
            and encoder, or one a magnification with commas between; None reads slides.
        labels: label columns to train on; None is all of them.
        columns: the table's names of columns -> those of tapfm, `{Patient ID: case_id}`.
        values: words in label columns -> what they mean, `{mut: 1, wt: 0}`, or so by column.
        missing: words for unknown in them, beside NA, [Not Available] and the like.
        task: what they hold and what is predicted of them, by name, or by name and options:
            multilabel, multiclass, regression, or `{name: survival, time: COLUMN, event: COLUMN}`
            with `bins` and `loss` (hazard or cox).
        sampler: `shuffled`, every bag once an epoch; `paired`, likewise, bags of like size in the
            processes of a run at a time; or `balanced`, drawn by label, site and case
            with equal chances (`slides.streaming.balance`), and the loss does not weigh classes
            then; that of frozen rows and warm start does, for they see every bag as often.
        bags: what a step, a loss and a prediction are of: a `slide`, or a `case`, the tiles of all
            slides of a patient in one bag.
        pool: what `tapfm test` takes for a case where bags are slides: `mean` or `max` of its
            slides' logits; `union` leaves bags as they are.
        index_dir: where `tapfm index` wrote the tiles.
        cache_dir: where decoded tiles are kept; None reads the slides each time.
        cache_gb: what `cache_dir` may take, of this cohort and others; slides that do not fit are
            read each time. None is no limit.
        tiles: size, resolution and tissue.
        tiles_per_slide: tiles drawn from a slide each epoch, without replacement; None is all.
        turns: mirror training tiles and turn them by quarters; which way is up is then not known.
        colour: strength of the slide-shared colour jitter of training tiles; 0 is none.
        stain: bring the stains of every slide to a common reference, in training and ever after;
            None leaves them as they are.
        stain_jitter: strength of the slide-shared change of haematoxylin and eosin in training.
        scale_jitter: strength of the slide-shared change of scale in training.
        sampling: `uniform` draws tiles wherever they are, `spatial` spreads them over the slide.
        views: how often a slide comes in a row, drawn anew each time (`regularisers.consistency`).
        host_gb: memory for tiles of training slides that are held or read ahead; of a slide that
            does not fit, the rest is read again in each pass. None is half of the machine's.
        workers: reading processes.
        on_error: `stop` at a slide that cannot be read, or `skip` it, count it and list it. What
            comes up in the second pass over a slide (see `host_gb`), or with several processes,
            stops the run all the same.
        max_skipped: the share of training slides that may be skipped; one may be in any case.
        seed: of order, tiles and augmentation.
    """

    def __init__(
        self,
        table: str,
        slides_dir: str | None = None,
        features_dir: str | None = None,
        labels: list[str] | None = None,
        columns: dict[str, str] | None = None,
        values: dict[Any, Any] | None = None,
        missing: list[str] | None = None,
        task: TaskName | dict[str, Any] = "multilabel",
        bags: Literal["slide", "case"] = "slide",
        pool: Literal["union", "mean", "max"] = "union",
        sampler: Literal["shuffled", "paired", "balanced"] = "shuffled",
        index_dir: str = "data/index",
        cache_dir: str | None = None,
        cache_gb: float | None = None,
        tiles: TileSettings = TileSettings(),  # noqa: B008 (frozen)
        tiles_per_slide: int | None = None,
        turns: bool = True,
        colour: float = 0.0,
        stain: Literal["macenko", "reinhard"] | None = None,
        stain_jitter: float = 0.0,
        scale_jitter: float = 0.0,
        sampling: Literal["uniform", "spatial"] = "uniform",
        views: int = 1,
        host_gb: float | None = None,
        workers: int = 2,
        on_error: Literal["stop", "skip"] = "stop",
        max_skipped: float = LIMIT,
        seed: int = 0,
    ):
        super().__init__()
        how = {"task": task, "need_slides": not features_dir, "missing": missing or (),
               "names": columns, "values": values}  # fmt: skip
        self.cohort = read_cohort(Path(table), labels, slides_dir and Path(slides_dir), **how)
        self.asked, self.bags, self.pool, self.balanced = task, bags, pool, sampler == "balanced"
        check_pool(self.cohort, bags, pool)
        self.tiles, self.tiles_per_slide, self.paired = tiles, tiles_per_slide, sampler == "paired"
        for option, given in (("data.stain", stain), ("data.stain_jitter", stain_jitter)):
            if given:
                refuse_other_stains(self.cohort.rows, option)
        where = Path(index_dir), Path(cache_dir) if cache_dir else None
        self.tile_source = TileSource(*where, tiles.grid, tiles.tissue, stain, cache_gb)
        self.workers, self.on_error, self.seed = workers, on_error, seed
        refuse(below({"host_gb": host_gb}, {"host_gb": 0}, "data"))
        self.sampling, self.host_gb, self.views = sampling, host_gb, views
        self.augment = Augment(turns, turns, colour, stain_jitter, scale_jitter)
        self.skipped = SkippedSlides(self.cohort.rows, max_skipped)
        self.had, self.begun = {}, {}  # split -> its slides, and those before a resume
        self.features: FeatureSource | None = None
        if features_dir:
            pixels = {"colour": colour, "stain": stain, "stain_jitter": stain_jitter}
            pixels |= {"scale_jitter": scale_jitter, "cache_dir": cache_dir, "cache_gb": cache_gb}
            self.augment = Augment(flips=False, rotations=False)
            self.features = open_features(features_dir, pixels, self)
            self.skipped.note(self.features.faults)
        self.sampler: SlideSampler | None = None

    @property
    def source(self) -> Source:
        """Return slides and settings for `tapfm index`."""
        how = self.tile_source
        where = self.used, how.index_dir, how.cache_dir
        return Source(*where, self.tiles, self.on_error, self.workers, how.stain, how.cache_gb)

    @cached_property
    def used(self) -> list[SlideRow]:
        """The slides, less those of training without a known label, which teach nothing."""
        lost = unlabelled(self.cohort.split("train"), self.cohort.labels, self.bags)
        return [row for row in self.cohort.rows if row.slide_id not in lost]

    @cached_property
    def weighted_task(self) -> Task:
        """Return the task, with statistics of the training split."""
        cohort = self.cohort
        target_NY = targets(self.gathered(cohort.split("train")), len(cohort.rows[0].labels))
        return learn_task(self.asked, cohort.labels, cohort.classes, target_NY)

    @property
    def task(self) -> Task:
        """Return the run's task, its loss unweighted if slides are drawn balanced."""
        return self.weighted_task.unweighted() if self.balanced else self.weighted_task

    @property
    def label_names(self) -> list[str]:
        """Names of the logits."""
        return list(self.task.labels)

    @property
    def task_spec(self) -> dict[str, Any]:
        """The task as a model's config has it."""
        return task_config(self.task)

    @property
    def features_spec(self) -> dict[str, Any] | None:
        """What a model on features must know of them; None on slides."""
        return self.features and self.features.spec

    def known(self, rows: Sequence[SlideRow]) -> FeatureSource | None:
        """Return the features of these slides, if their split is encoded already."""
        there = self.features and all(row.split in self.features.splits for row in rows)
        return self.features if there else None

    def index(self, row: SlideRow) -> TileIndex | SlideFeatures:
        """Return where a slide's tiles lie: `coords0`, `size0` and their number.

        Raises:
            SlideError: the slide has no index, or its features are at fault.
        """
        return (self.known([row]) or self.tile_source).index(row)

    def setup(self, stage: str) -> None:
        """Keep this process's share of the features, now that the processes are counted."""
        if self.features:
            self.features.trim(self.budget)

    def prepare_data(self) -> None:
        """Index and cache what is not there yet: one process does, the others wait for it."""
        if self.features:
            return
        _, failed = index_and_cache(self.source)
        self.skipped.note(failed, said=True)

    def gathered(self, rows: Sequence[SlideRow]) -> list[SlideRow]:
        """Return a row a bag: slides, or cases."""
        return group_by_case(rows, self.cohort.labels) if self.bags == "case" else list(rows)

    def rows(self, split: str) -> list[SlideRow]:
        """The bags of a split; slides without tiles are skipped or raise, as asked.

        Raises:
            CohortError: all of them are skipped.
        """
        return self.gathered(readable([r for r in self.used if r.split == split], split, self))

    def state_dict(self) -> dict[str, dict[str, list[str]]]:
        """Return the slides that each split had."""
        return {"slides": self.had}

    def load_state_dict(self, state_dict: dict[str, dict[str, list[str]]]) -> None:
        """Go on with the same slides."""
        self.begun = state_dict["slides"]

    @cached_property
    def training_rows(self) -> list[SlideRow]:
        """The bags of training."""
        return self.rows("train")

    def train_dataloader(self) -> SlideLoader:
        """Slides in a new order each epoch, their tiles in memory."""
        rows = self.training_rows
        order = training_order(rows, self)
        n, order = repeated(len(rows), order, self.seed, self.views, self.place[1])
        self.sampler = SlideSampler(n, self.seed, *self.place, order)
        bags, workers = self.training_bags(rows), 0 if self.known(rows) else self.workers
        how = workers, PREFETCH, apart(self.trainer, workers)
        return LookaheadLoader(bags, self.sampler, *how, room=chunk_to_fill(self.trainer))

    def training_bags(self, rows: list[SlideRow], plain: int = 0) -> BagDataset:
        """Return a dataset of training bags: tiles drawn, augmented, in memory.

        `plain`: not augmented, and with the tiles of so many bags in one.
        """
        few, augment = self.tiles_per_slide, self.augment
        if plain:
            few, augment = few and plain * few, None
        drawn = {"budget": few, "seed": self.seed, "sampling": self.sampling}
        if features := self.known(rows):
            return FeatureBags(rows, features, **drawn)
        hold = tiles_held(rows, self.room, PREFETCH, self)
        how = {"augment": augment, "on_error": self.on_error, "hold": hold}
        return BagDataset(rows, self.tile_source, **drawn, **how, workers=self.streaming_workers)

    def seen_in_training(self, epochs: int, *, plain: bool = False) -> Iterator[Bag]:
        """Yield this process's share of the training bags of the first epochs.

        `plain`: one bag a slide, with as many tiles, as they are on the slide.
        """
        rows, (rank, world) = self.training_rows, self.place
        times = range(1 if plain else epochs)
        turns = [Turn(epoch, slide, slide) for epoch in times for slide in range(len(rows))]
        workers, bags = 0 if self.known(rows) else self.workers, epochs if plain else 0
        loader = SlideLoader(self.training_bags(rows, bags), turns[rank::world], workers, PREFETCH)
        for item in loader:
            if bag := self.on_before_batch_transfer(item, 0):
                yield bag

    @property
    def varies(self) -> bool:
        """Return whether a slide's bag differs by epoch."""
        few = self.tiles_per_slide is not None
        return few or any(vars(self.augment).values())

    @property
    def room(self) -> int:
        """Bytes of host memory for this process's tiles, beside its features."""
        return max(0, self.budget - (self.features.kept_bytes if self.features else 0))

    @property
    def budget(self) -> int:
        """Bytes of host memory for this process's tiles or features."""
        return tile_budget(self.host_gb, self.trainer)

    @property
    def streaming_workers(self) -> int:
        """Return the number of processes that read one slide."""
        return 0 if self.tile_source.cache_dir else self.workers  # quicker than one is to start

    @property
    def place(self) -> tuple[int, int]:
        """Return this process's rank, from 0, and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def val_dataloader(self) -> Streamed | KnownBags:
        """Slides of the val split, all tiles, streamed; each process takes its share.

        Raises:
            CohortError: the split has fewer slides than there are processes, or none.
        """
        rank, world = self.place
        return self.streamed(check_val(self.rows("val"), world)[rank::world])

    def test_dataloader(self) -> Streamed | KnownBags:
        """Slides of the test split, all tiles, streamed."""
        return self.streamed(self.rows("test"))

    def streamed(self, rows: list[SlideRow]) -> Streamed | KnownBags:
        """Bags in the table's order, all tiles, read as the model asks for them."""
        if features := self.known(rows):
            return KnownBags(rows, features)
        prefetcher = Prefetcher(self.workers)
        return Streamed([self.bag(row, prefetcher) for row in rows], prefetcher)

    def bag(self, row: SlideRow, prefetcher: Prefetcher | None = None) -> Bag:
        """Return one slide or case with all tiles, read when they are asked for."""
        how = prefetcher or self.streaming_workers, partial(self.skip, row.slide_id)
        parts = [self.tile_source.tiles(slide, *how) for slide in row.slides]
        places = places_of([self.tile_source.index(slide) for slide in row.slides])
        labels_K = torch.tensor(row.labels, dtype=torch.float32)
        return Bag(row.slide_id, row.case_id, joined(parts), places, labels_K, seed=0)

    def skip(self, slide_id: str, fault: SlideError) -> None:
        """Note a slide that cannot be read and raise `SkippedBag`, if `on_error` is skip."""
        if self.on_error == "skip":
            self.skipped.note({slide_id: str(fault)})
            raise SkippedBag(slide_id) from fault

    def transfer_batch_to_device(self, batch, device, dataloader_idx: int):
        """Return the batch unmoved: the engine moves its chunks."""
        return batch

    def on_before_batch_transfer(self, batch, dataloader_idx: int) -> Bag | None:
        """Return a loader's item as a `Bag`; note a skipped slide and return None."""
        return as_bag(batch, self)

    def trained(self, turn: Turn) -> None:
        """Note a finished turn: resuming begins after it."""
        self.sampler.trained(turn)
