"""Forecasts a whole run before it: index, cache, fit and test in hours, disk and memory in GB.

A few slides are indexed and some of their tiles read, to measure this machine and this cohort; the
encoder's work is counted (`planning.footprint`) and divided by a rate that is measured by matrix
products, of which a real encoder reaches about half.

Condition: right within a factor of about two; slides that are unlike the sample make it worse.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slides.cohort.table import SlideRow
from slides.errors import SlideError
from slides.streaming.settings import Source
from slides.tiling.choose import index_slide
from slides.wsi.reader import Slide
from tapfm.adapt.strategies import make_strategy, strategy_spec
from tapfm.encoders.registry import Backbone
from tapfm.planning.footprint import Footprint, Setup

SAMPLES = 3  # slides that are indexed
READ = 24  # tiles that are read of each
REACHED = {"cuda": 0.5, "cpu": 0.6}  # share of the rate of matrix products, by device
SECONDS = 0.3  # of matrix products


@dataclass(frozen=True)
class Sample:
    """What a few slides of a cohort measure; means."""

    tiles: float
    index_s: float
    """Seconds to index a slide."""
    tile_s: float
    """Seconds to read a tile, in one process."""


@dataclass(frozen=True)
class Forecast:
    """Hours of each part of a run, and bytes that it writes."""

    hours: dict[str, float]
    disk: dict[str, float]
    """Bytes by place: index, cache, run."""
    tiles: int
    """Tiles of all slides."""


def spread(rows: Sequence[SlideRow], count: int = SAMPLES) -> list[SlideRow]:
    """Return a few slides, evenly spread over the table."""
    if not rows:
        return []
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in dict.fromkeys(places.tolist())]


def sample(source: Source, rows: Sequence[SlideRow]) -> Sample | None:
    """Index a few slides and read some tiles of each; None if none of them can be."""
    found = []
    for row in rows:
        try:
            with Slide(row.path, mpp=row.mpp, name=row.slide_id) as slide:
                began = time.perf_counter()
                index = index_slide(slide, source.tiles.grid, source.tiles.tissue)
                indexed = time.perf_counter()
                some = index.coords0[:: max(1, len(index.coords0) // READ)][:READ]
                for x0, y0 in some.tolist():
                    slide.read(x0, y0, source.tiles.grid)
                read = (time.perf_counter() - indexed) / len(some)
        except SlideError:
            continue
        found.append((len(index.coords0), indexed - began, read))
    return Sample(*np.mean(found, axis=0)) if found else None


def rate(device: str, precision: str) -> float:
    """Return the FLOP/s that an encoder is expected to reach, from matrix products."""
    dtype = torch.float32 if precision == "fp32" or device == "cpu" else torch.bfloat16
    side = 4096 if device == "cuda" else 768
    one = torch.rand(side, side, device=device, dtype=dtype)
    for _ in range(2):
        (one @ one).sum().item()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        (one @ one).sum().item()
        count += 1
    return REACHED[device] * count * 2 * side**3 / (time.perf_counter() - began)


def work(row: Backbone, tile_px: int, setup: Setup) -> tuple[float, float]:
    """Return the FLOP of a tile in a training step and in one forward pass."""
    frozen = strategy_spec(make_strategy(setup.strategy))["name"] == "frozen"
    learns = Setup(setup.precision, merge_tokens=setup.merge_tokens) if frozen else setup
    step, forward = Footprint(row, tile_px).flops(learns)
    return forward if frozen else step, forward


def forecast_run(
    counts: dict[str, int], found: Sample, flop: tuple[float, float], flops: float, config: Any,
    row: Backbone, parameters: int, views: int,
) -> Forecast:  # fmt: skip
    """Return hours and bytes of a whole run.

    Args:
        counts: slides of train, val and test.
        found: what a few of them measured.
        flop: of a tile in a training step and in a forward pass.
        flops: this machine's rate.
        config: the run's, as `tapfm fit` reads it.
        row: the encoder.
        parameters: of the encoder.
        views: of a training slide, of `tiles_per_slide` each, in a pass that starts or chooses.
    """
    data, trainer, steps = config.data, config.trainer, config.model.steps
    slides, workers = sum(counts.values()), max(1, data.workers)
    drawn = min(data.tiles_per_slide or found.tiles, found.tiles)
    read = found.tile_s / workers * (0.1 if data.cache_dir else 1)  # from a cache: a tenth of it
    step, forward = (max(each / flops, read) for each in flop)
    frozen = strategy_spec(make_strategy(config.model.strategy))["name"] == "frozen"
    alone = 0 if frozen else steps.head_first  # share of the epochs without pass 2
    tile = alone * forward + (1 - alone) * step
    tiles = {split: count * found.tiles for split, count in counts.items()}
    epochs = 1 if frozen and data.tiles_per_slide is None else trainer.max_epochs
    validations = 1 if frozen else -(-trainer.max_epochs // (trainer.check_val_every_n_epoch or 1))
    looks = 0 if frozen else len(steps.interpolate or ()) + bool(steps.warm_start)
    seen = counts["train"] * min(found.tiles, views * drawn)
    seconds = {
        "index": slides * found.index_s / workers,
        "cache": slides * found.tiles * found.tile_s / workers * bool(data.cache_dir),
        "fit": epochs * counts["train"] * drawn * tile
        + validations * tiles["val"] * forward
        + looks * (seen + tiles["val"]) * forward,
        # frozen features of all, RGB numbers of all, and the run and its control on two splits
        "test": sum(tiles.values()) * (forward + read)
        + 2 * (tiles["val"] + tiles["test"]) * forward * (not frozen),
    }
    every = sum(tiles.values())
    disk = {
        "index": every * 32,
        "cache": every * data.tiles.tile_px**2 * 3 * bool(data.cache_dir),
        "run": every * row.dim * 4 + parameters * (4 * 3 + 12 * 2) * (not frozen),
    }
    return Forecast({key: value / 3600 for key, value in seconds.items()}, disk, round(every))
