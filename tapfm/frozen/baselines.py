"""Frozen baselines: what the encoder gives without adaptation.

    linear probe       z averaged over the tiles, then a linear model (`linear_probe`)
    mean-pool MLP      z averaged over the tiles, then Linear, GELU, Linear
    gated attention    Linear, GELU on each tile, then learned attention (ABMIL)

A run that cannot say whether tuning beats these is not finished, so they are fitted with care: the
same splits, tiles, task and loss as the run, class weights even where the run draws classes evenly
instead, features standardised by the training split, and learning rate, width and epoch chosen on
validation by macro AUROC (or the task's own figure), then by loss. Nothing reads the test split.
The same seed gives the same model on one machine.

One more row costs nothing and guards against a shortcut: the same attention on six numbers a tile,
the means and deviations of red, green and blue (`RgbStatistics`). What it can predict, colour alone
predicts.

Price: 1 to 4 s for the MLP, 10 to 30 s for attention: 100 bags of 150 tiles, 128 to 1024 features,
    one core of a busy machine.
Source: Sun et al. 2025 (SiMLP, arXiv 2502.20823); Ilse et al. 2018 (ABMIL, arXiv 1802.04712).
Differs: both are standardised and selected as above; attention is per slide, shared by the labels.

Shapes: T tiles of a slide, D features, W hidden units, K labels, N slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tapfm.frozen.fitter import (
    CPU,
    Candidate,
    Fitted,
    Recipe,
    Schedule,
    SeveralSlides,
    fit,
    undisturbed,
)
from tapfm.frozen.frozen_slide import (
    FrozenSlide,
    check_slides,
    feature_statistics,
    mean_tiles,
    standardise,
)
from tapfm.frozen.linear_probe import fit_linear_probe
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet
from tapfm.tasks import Task

MEAN_POOL_GRID = (Candidate(1e-3, 64), Candidate(1e-3, 256), Candidate(3e-4, 256))
MEAN_POOL_DROPOUT = 0.25
MEAN_POOL_SCHEDULE = Schedule(epochs=150, patience=40)
# On synthetic bags with one to three planted tiles in ten, 128 units, or a dropout of 0.5 at 64 to
# 128 units, each cost about .05 of macro AUROC.
GATED_GRID = (Candidate(1e-3, 256), Candidate(3e-4, 256), Candidate(1e-4, 256))
GATED_DROPOUT = 0.1
GATED_SCHEDULE = Schedule(epochs=30, patience=8)


class MeanPoolMLP(SeveralSlides):
    """The mean tile to logits; tiles weigh the same."""

    def __init__(self, dim: int, labels: int, width: int):
        super().__init__(dim, labels)
        self.layers = nn.Sequential(
            nn.Linear(dim, width),
            nn.GELU(),
            nn.Dropout(MEAN_POOL_DROPOUT),
            nn.Linear(width, labels),
        )

    def outputs(self, slides: Sequence[TileSet]) -> list[SlideOutput]:
        """Return each slide's output; its embedding is the standardised mean tile."""
        x_TD = self.standardised(torch.cat([each.z_TD for each in slides]))
        counts = [len(each) for each in slides]
        mean_ND = torch.stack([own_TD.mean(0) for own_TD in x_TD.split(counts)])
        weights = (x_TD.new_full((count,), 1 / count) for count in counts)
        return [*map(SlideOutput, self.layers(mean_ND), weights, mean_ND)]


class GatedAttention(SeveralSlides):
    """Projected tiles to logits through the aggregator `gated`."""

    has_attention = True

    def __init__(self, dim: int, labels: int, width: int):
        super().__init__(dim, labels)
        self.project = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Dropout(GATED_DROPOUT))
        self.aggregator = make_aggregator("gated", width, labels)

    def outputs(self, slides: Sequence[TileSet]) -> list[SlideOutput]:
        """Return each slide's output, of projected tiles."""
        x_TD = self.standardised(torch.cat([each.z_TD for each in slides]))
        x_TW = self.project(x_TD)  # one matrix product for all the slides
        parts = zip(slides, x_TW.split([len(each) for each in slides]), strict=True)
        return [self.aggregator(replace(each, z_TD=own_TW)) for each, own_TW in parts]


def fit_mean_pool_mlp(
    train: Sequence[FrozenSlide], val: Sequence[FrozenSlide], task: Task, seed: int = 0,
    grid: Sequence[Candidate] = MEAN_POOL_GRID, schedule: Schedule = MEAN_POOL_SCHEDULE,
) -> Fitted:  # fmt: skip
    """Return the mean-pool MLP.

    Args:
        train: fitted on, and the source of standardisation.
        val: chooses candidate and epoch.
        task: target, loss and figure.
        seed: of weights, order and dropout.
        grid: candidates.
        schedule: for each candidate.

    Raises:
        FitError: slides are empty or of unequal width, or targets are not the task's.
    """
    check_slides(train, val, task)
    return _fit(MeanPoolMLP, mean_tiles(train), mean_tiles(val), task, seed, grid, schedule)


def fit_gated_attention(
    train: Sequence[FrozenSlide], val: Sequence[FrozenSlide], task: Task, seed: int = 0,
    grid: Sequence[Candidate] = GATED_GRID, schedule: Schedule = GATED_SCHEDULE,
) -> Fitted:  # fmt: skip
    """Return gated-attention MIL; arguments and errors as of `fit_mean_pool_mlp`."""
    check_slides(train, val, task)
    return _fit(GatedAttention, train, val, task, seed, grid, schedule)


def _fit(
    kind: type[SeveralSlides], train: Sequence[FrozenSlide], val: Sequence[FrozenSlide],
    task: Task, seed: int, grid: Sequence[Candidate], schedule: Schedule,
) -> Fitted:  # fmt: skip
    """Return the best of a kind of model, standardised by the training slides."""
    with undisturbed(CPU):
        moments = feature_statistics(train)

    def make(candidate: Candidate) -> Aggregator:
        return standardise(kind(len(moments[0]), len(task.labels), candidate.width), *moments)

    return fit(make, train, val, task, Recipe(grid, schedule), seed)


FROZEN_ROWS = (
    ("RGB statistics, gated attention", "rgb", fit_gated_attention),
    ("frozen, linear probe", "frozen", fit_linear_probe),
    ("frozen, mean-pool MLP", "frozen", fit_mean_pool_mlp),
    ("frozen, gated attention", "frozen", fit_gated_attention),
)
"""The frozen rows of a report: title, features, and what is fitted on them."""


class RgbStatistics:
    """Six numbers a tile, for `features.Extraction` to store as it stores an encoder's features."""

    dim, mean = 6, torch.zeros(3)
    row = SimpleNamespace(key="rgb", feature="means and deviations of R, G, B", licence="")

    def encode(self, tiles_CP: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """Return means and deviations of red, green and blue in [0, 1], (C, 6), and scores of 0.

        Args:
            tiles_CP: uint8 tiles (C, 3, H, W).
            precision: ignored; computed in float32.
        """
        pixels_C3P = tiles_CP.flatten(2).float() / 255
        z_C6 = torch.cat([pixels_C3P.mean(2), pixels_C3P.std(2, correction=0)], dim=1)
        return z_C6, z_C6.new_zeros(len(z_C6))
