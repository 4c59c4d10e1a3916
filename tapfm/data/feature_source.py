"""Bags of features that were extracted before, in place of slides.

Every file is read once at the start, so that all faults are told together, and what fits the budget
stays in memory; the rest is read again for each bag. Which tiles a training bag takes is the same
function of seed, epoch and slide as it is of pixels.

Price: the files' size in memory, at most `budget`; then nothing is read in an epoch.

Shapes: T tiles of a bag, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slides.cohort.table import SPLITS, SlideRow
from slides.errors import FeatureFileError, SettingsError, SlideError, all_faults, refuse, some
from slides.progress import progress_bar
from slides.streaming.order import Turn
from slides.streaming.stream import BagDataset
from slides.wsi.reader import Slide
from tapfm.data.bag import Bag, Features, Places
from tapfm.data.feature_files import SlideFeatures, read_scales
from tapfm.data.streamed import chunk_seed


class NoPixels:
    """The tiles of a bag that is features alone."""

    def split(self, size: int) -> Iterator[Tensor]:
        """Fail: whoever has `Bag.features` asks for no pixels."""
        raise AssertionError("pixels were asked of a bag of features")


class FeatureSource:
    """The features of a cohort's slides.

    Args:
        folders: of the files, see `tapfm.data.feature_files`; one, or one a magnification.
        rows: the slides.
        mpp: microns per tile pixel, as the run has it.
        budget: bytes of features to keep in memory.
        on_error: `stop` at slides whose file is at fault, or `skip` them.
        splits: which of them are features; the others' bags are read from slides.

    Raises:
        FeatureFileError: files are missing or at fault, all of them listed; with `skip`, all are.
        SettingsError: there is no such folder.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        rows: Sequence[SlideRow],
        mpp: float,
        budget: int,
        on_error: str = "stop",
        splits: Sequence[str] = SPLITS,
    ):
        refuse(
            f"data.features_dir: there is no folder {each}. Correct it."
            for each in folders
            if not each.is_dir()
        )
        self.folders, self.mpp, self.splits = folders, mpp, tuple(splits)
        self.named = ", ".join(map(str, folders))
        self.rows = {row.slide_id: row for row in rows}
        self.kept: dict[str, Tensor] = {}
        self.slides: dict[str, SlideFeatures] = {}
        self.faults: dict[str, str] = {}
        self._read_all(budget)
        if self.faults and (on_error == "stop" or not self.slides):
            first, *more = self.faults.values()
            where = f"features in {self.named}"
            raise FeatureFileError(all_faults(where, [first, *more]) if more else first)

    @property
    def kept_bytes(self) -> int:
        """Bytes of features in memory."""
        return sum(z_TD.nbytes for z_TD in self.kept.values())

    def trim(self, budget: int) -> None:
        """Drop features beyond so many bytes; they are read again for each bag."""
        for name, z_TD in list(self.kept.items()):
            budget -= z_TD.nbytes
            if budget < 0:
                del self.kept[name]

    def _read_all(self, budget: int) -> None:
        """Read every slide, keep what fits, and note what is wrong."""
        for row in progress_bar(self.rows.values(), "features", unit="slide", disable=None):
            try:
                found = read_scales(self.folders, row.slide_id, partial(slide_mpp, row), row.path)
            except SlideError as fault:
                self.faults[row.slide_id] = str(fault)
                continue
            budget -= found.z_TD.nbytes
            if budget >= 0:
                self.kept[row.slide_id] = found.z_TD
            blank = found.z_TD.new_empty(1, found.z_TD.shape[1]).expand(found.z_TD.shape)
            self.slides[row.slide_id] = replace(found, z_TD=blank)
        widths = Counter(each.z_TD.shape[1] for each in self.slides.values())
        self.dim = widths.most_common(1)[0][0] if widths else 0
        for name, each in list(self.slides.items()):
            if (width := each.z_TD.shape[1]) != self.dim:
                self.faults[name] = (
                    f"{name}: {each.path} has {width} features a tile, and {widths[self.dim]} "
                    f"other slides have {self.dim}. Give features of one encoder."
                )
                del self.slides[name]

    @property
    def spec(self) -> dict[str, Any]:
        """Return what a model on these features must know of them; see `ModelConfig.features`."""
        slides = self.slides.values()
        made_by = sorted({each.encoder for each in slides} - {""})
        return {
            "dim": self.dim,
            "scores": all(each.score_T is not None for each in slides),
            "coords": all(each.coords0 is not None for each in slides),
            "encoder": ", ".join(made_by),
            "folder": self.named,
        }

    def index(self, row: SlideRow) -> SlideFeatures:
        """Return where a slide's tiles lie: its features, less their values.

        Raises:
            FeatureFileError: what is wrong with the slide's file.
        """
        if row.slide_id not in self.slides:
            raise FeatureFileError(self.faults.get(row.slide_id, f"{row.slide_id}: no features"))
        return self.slides[row.slide_id]

    def values(self, row: SlideRow) -> Tensor:
        """Return a slide's features (T, D) as they are stored, from memory or from the file."""
        if row.slide_id in self.kept:
            return self.kept[row.slide_id]
        return read_scales(self.folders, row.slide_id, lambda: 1.0, row.path).z_TD

    def bag(
        self,
        row: SlideRow,
        chosen: Sequence[np.ndarray | slice] | None = None,
        seed: int = 0,
        turn: Turn | None = None,
    ) -> Bag:
        """Return a slide or case as features.

        Args:
            row: the slide or case.
            chosen: rows of each of its slides; None is all.
            seed: of the bag.
            turn: its place in training.
        """
        slides = [self.index(each) for each in row.slides]
        chosen = chosen or [slice(None)] * len(slides)
        z = [self.values(each)[rows] for each, rows in zip(row.slides, chosen, strict=True)]
        score = [
            torch.zeros(len(each))[rows] if each.score_T is None else each.score_T[rows]
            for each, rows in zip(slides, chosen, strict=True)
        ]
        features = Features(torch.cat(z).float(), torch.cat(score))
        labels_K = torch.tensor(row.labels, dtype=torch.float32)
        places = self._places(slides, chosen, [len(each) for each in z])
        name = row.slide_id, row.case_id
        return Bag(*name, NoPixels(), places, labels_K, seed, turn, features)

    def _places(
        self, slides: Sequence[SlideFeatures], chosen: Sequence[Any], counts: Sequence[int]
    ) -> Places:
        """Return tile places; without corners unless every slide has coordinates."""
        if all(each.coords0 is not None for each in slides):
            coords0 = [each.coords0[rows] for each, rows in zip(slides, chosen, strict=True)]
            steps = [each.step0_T[rows] for each, rows in zip(slides, chosen, strict=True)]
            where = Places.of(coords0, [each.step0 for each in slides], self.mpp)
            return replace(where, grid_px0_T=torch.from_numpy(np.concatenate(steps)))
        slide_of_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return Places(coords0_T2=None, slide_of_T=slide_of_T, grid_px0_T=None, mpp=self.mpp)


class FeatureBags(BagDataset):
    """Maps a turn to the slide's `Bag` of features, by the draws of `BagDataset`."""

    def __init__(self, rows: Sequence[SlideRow], source: FeatureSource, **how: Any):
        """Store the settings; `how` is budget, seed, sampling and on_error of `BagDataset`."""
        super().__init__(rows, source.index, **how)
        self.source = source

    def _read(self, row: SlideRow, turn: Turn) -> Bag:
        slides = [(self.source.index(each), each.slide_id) for each in row.slides]
        chosen = [self.drawn(index, name, turn) for index, name in slides]
        seed = chunk_seed(self.seed, turn, row.slide_id)
        return self.source.bag(row, chosen, seed, turn)


class KnownBags:
    """Bags of features in a row, all tiles of each, read as they are asked for."""

    def __init__(self, rows: Sequence[SlideRow], source: FeatureSource):
        self.rows, self.source = rows, source

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Bag]:
        return map(self.source.bag, self.rows)


def open_features(folder: str, pixels: Mapping[str, object], data: Any) -> FeatureSource:
    """Return the features of `data.features_dir`.

    Args:
        folder: as given; several with commas between them.
        pixels: options of `data` that are of pixels alone, by name; each must be off.
        data: the data module.

    Raises:
        SettingsError: an option of pixels is given, or tiles are to be spread by coordinates that
            are not there; or as `FeatureSource`.
    """
    if given := [f"data.{key} {value}" for key, value in pixels.items() if value]:
        raise SettingsError(
            f"data.features_dir: features have no pixels, and {', '.join(given)} can only change "
            "pixels. Leave each at its default (null or 0), or leave features_dir out."
        )
    rows, how = data.used, (data.tiles.mpp, data.budget, data.on_error)
    several = [folder] if Path(folder).is_dir() else folder.split(",")
    source = FeatureSource([Path(each.strip()) for each in several], rows, *how)
    bare = [name for name, each in source.slides.items() if each.coords0 is None]
    if bare and data.sampling == "spatial":
        raise SettingsError(
            "data.sampling spatial spreads tiles over the slide, and features of "
            f"{some(bare)} have no coordinates. Take data.sampling: uniform."
        )
    return source


def slide_mpp(row: SlideRow) -> float | None:
    """Return microns per level-0 pixel, from the table, or from the slide where it is there."""
    if row.mpp is not None or not row.path.is_file():
        return row.mpp
    with Slide(row.path, name=row.slide_id) as slide:
        return slide.mpp
