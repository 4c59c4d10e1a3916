"""Slides as a run's encoder sees them now, kept on the CPU.

Shapes: T tiles of a slide, D features.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import torch

from slides.progress import progress_bar
from slides.seeds import stable_seed
from tapfm.data.bag import Bag, SkippedBag
from tapfm.frozen.fitter import evaluating
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.slide_model.model import SlideModel

MOST_TILES = 2048  # tiles kept of a slide: 12 MB of a ViT-g


def cache_features(
    model: SlideModel, chunk: int, bags: Iterable[Bag], title: str
) -> list[FrozenSlide]:
    """Return bags as slides on features; of a large one, `MOST_TILES` tiles drawn by id."""
    found = []
    with evaluating(model), progress_bar(desc=title, unit="tile") as bar:
        for bag in bags:
            with suppress(SkippedBag):
                tiles = model.tiles(bag, chunk)
                drawn = torch.Generator().manual_seed(
                    stable_seed("head start", bag.slide_id) % 2**63
                )
                kept_T = torch.randperm(bag.count, generator=drawn)[:MOST_TILES].sort().values
                z_TD, score_T = tiles.z_TD.cpu()[kept_T], tiles.score_T.cpu()[kept_T]
                slide = bag.slide_id, bag.case_id, z_TD, bag.labels_K
                found.append(FrozenSlide.of(*slide, score_T, bag.places.take(kept_T)))
            bar.update(bag.count)
    return found


def cache_splits(
    model: SlideModel, chunk: int, train: Iterable[Bag], val: Iterable[Bag], title: str
) -> tuple[list[FrozenSlide], list[FrozenSlide]]:
    """Return training and validation bags as slides on features; the latter sorted by id."""
    train_slides = cache_features(model, chunk, train, f"{title} train")
    val_slides = cache_features(model, chunk, val, f"{title} val")
    return train_slides, sorted(val_slides, key=lambda slide: slide.slide_id)
