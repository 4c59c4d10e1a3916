"""Reads labelled tiles into batches.

Order, augmentation and dropout depend on (seed, epoch, tile) alone, so that a run that was stopped
goes on as if it had not been. A tile is turned and mirrored, and coloured if asked to, each by its
own draw: tiles of a batch are of many slides.

Shapes: C tiles of a batch, S side of a tile, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from slides.cohort.labelled_tiles import TileRow, read_tile, read_tiles
from slides.cohort.splits import FRACTIONS
from slides.errors import SettingsError
from slides.seeds import stable_seed
from slides.streaming.augment import draw_augmentation
from slides.streaming.order import Turn, epoch_order
from slides.streaming.stream import Augment, SlideLoader, SlideSampler, slide_generator
from tapfm.data.skipped import SkippedSlides
from tapfm.tile_training.batch import TileBatch


class TileDataset(Dataset):
    """Maps a turn to a batch of that epoch's order; a plain number i to the i-th in table order.

    Args:
        rows: the tiles.
        classes: their names, in the order of the logits.
        side: S.
        batch: C, but for the last.
        seed: of order and augmentation.
        how: how tiles are changed; None leaves them as they are.
    """

    def __init__(
        self,
        rows: Sequence[TileRow],
        classes: Sequence[str],
        side: int,
        batch: int,
        seed: int = 0,
        how: Augment | None = None,
    ):
        self.tiles, self.side, self.batch, self.seed, self.how = rows, side, batch, seed, how
        self.number = {name: number for number, name in enumerate(classes)}
        # what a loader names when a reading process dies: it cannot say which tile
        self.rows = [SimpleNamespace(slide_id=f"batch {n} of tiles") for n in range(len(self))]

    def __len__(self) -> int:
        return -(-len(self.tiles) // self.batch)

    def __getitem__(self, turn: Turn | int) -> TileBatch:
        if isinstance(turn, Turn):
            order = epoch_order(len(self.tiles), self.seed, turn.epoch)
        else:
            order, turn = range(len(self.tiles)), Turn(0, turn, turn)
        start = turn.slide * self.batch
        rows = [self.tiles[number] for number in order[start : start + self.batch]]
        seed = stable_seed("batch", self.seed, turn.epoch, turn.slide) % 2**63
        tiles_CP = torch.cat([self.read(row, turn.epoch) for row in rows])
        labels_C = torch.tensor([self.number[row.label] for row in rows])
        return TileBatch(tiles_CP, labels_C, seed, turn)

    def read(self, row: TileRow, epoch: int) -> Tensor:
        """Return one tile, shape (1, 3, S, S), uint8."""
        tile_1P = torch.from_numpy(read_tile(row.path, self.side))[None]
        if self.how is None:
            return tile_1P
        generator = slide_generator(self.seed, epoch, row.path.name)
        return draw_augmentation(1, generator, **vars(self.how))(tile_1P)


class TileData(L.LightningDataModule):
    """Data module of labelled tiles.

    Args:
        source: a table (path, label, case_id, split) or a folder, [part/]class/[case/]picture; see
            `slides.cohort.labelled_tiles` for published sets that are read as they ship.
        case_pattern: regular expression whose first group in a file's name is the tile's case;
            None takes the table's case_id or the folder below the class.
        fractions: of train, val and test, for tiles that have no part.
        tile_px: side of a tile as the model sees it; pictures k times as large are averaged k by k.
        mpp: microns per pixel of the tile as the model sees it.
        batch: tiles a step.
        balance: weigh the classes in the loss, so that each counts the same in training.
        colour: strength of the colour jitter of a training tile; 0 is none.
        stain_jitter: strength of the change of its haematoxylin and eosin.
        scale_jitter: strength of the change of its scale.
        workers: reading processes.
        seed: of dealing, order and augmentation.
    """

    def __init__(
        self,
        source: str,
        case_pattern: str | None = None,
        fractions: list[float] = list(FRACTIONS),  # noqa: B006 (never changed)
        tile_px: int = 224,
        mpp: float = 0.5,
        batch: int = 16,
        balance: bool = True,
        colour: float = 0.0,
        stain_jitter: float = 0.0,
        scale_jitter: float = 0.0,
        workers: int = 2,
        seed: int = 0,
    ):
        super().__init__()
        if batch < 1:
            raise SettingsError(f"data.batch must be 1 or more, got {batch}")
        self.tiles = read_tiles(Path(source), case_pattern, fractions, seed)
        self.tile_px, self.mpp, self.batch, self.workers = tile_px, mpp, batch, workers
        self.balance, self.seed = balance, seed
        self.augment = Augment(colour=colour, stain=stain_jitter, scale=scale_jitter)
        self.skipped = SkippedSlides()  # none is ever left out
        self.sampler: SlideSampler | None = None

    @property
    def class_names(self) -> list[str]:
        """Return the names of the K classes."""
        return list(self.tiles.classes)

    @property
    def class_weight(self) -> list[float]:
        """Return the weight of each class in the loss, from the training part alone."""
        return self.tiles.class_weights() if self.balance else [1.0] * len(self.tiles.classes)

    def train_dataloader(self) -> SlideLoader:
        """Return batches in a new order each epoch."""
        rows = self.tiles.part("train")
        batches = TileDataset(
            rows, self.tiles.classes, self.tile_px, self.batch, self.seed, self.augment
        )
        self.sampler = SlideSampler(len(batches), self.seed)
        return SlideLoader(batches, self.sampler, self.workers)

    def val_dataloader(self) -> SlideLoader:
        """Return the val part, not augmented."""
        return self.loader(self.tiles.part("val"))

    def loader(self, rows: Sequence[TileRow]) -> SlideLoader:
        """Return tiles in their order, not augmented."""
        batches = TileDataset(rows, self.tiles.classes, self.tile_px, self.batch)
        return SlideLoader(batches, workers=self.workers)

    def trained(self, turn: Turn) -> None:
        """Note that a batch's step is done: a resumed run begins after it."""
        self.sampler.trained(Turn(*turn))
