"""Slides as the frozen encoder sees them, remembered on the CPU.

Shapes: T tiles of a slide, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn
from tqdm import tqdm

from slides.seeds import stable_seed
from tapfm.data.bag import Bag, Places, SkippedBag
from tapfm.distributed import gather
from tapfm.frozen.baselines import FeatureBag, divisor
from tapfm.slide_model.aggregators.contract import Aggregator, TileSet

MOST_TILES = 2048  # of a slide that are remembered: 12 MB of a ViT-g


@dataclass(frozen=True)
class CachedFeatures(FeatureBag):
    """A slide as the frozen encoder sees it, on the CPU."""

    score_T: Tensor
    places: Places

    def to(self, device: torch.device) -> TileSet:
        """Return its tiles as an aggregator takes them, on a device."""
        z_TD, score_T = (each.to(device, non_blocking=True) for each in (self.z_TD, self.score_T))
        return TileSet.of(self.places, z_TD, score_T)


def cache_features(
    module: L.LightningModule, bags: Iterable[Bag], title: str
) -> list[CachedFeatures]:
    """Slides as the encoder sees them now."""
    model, found = module.slide_model, []
    with evaluating(model), tqdm(desc=title, unit=" tiles") as bar:
        for bag in bags:
            with suppress(SkippedBag):
                tiles = model.tiles(bag, module.chunk)
                drawn = torch.Generator().manual_seed(
                    stable_seed("head start", bag.slide_id) % 2**63
                )
                kept_T = torch.randperm(bag.count, generator=drawn)[:MOST_TILES].sort().values
                z_TD, score_T = tiles.z_TD.cpu()[kept_T], tiles.score_T.cpu()[kept_T]
                slide = bag.slide_id, bag.case_id, z_TD, bag.labels_K
                found.append(CachedFeatures(*slide, score_T, bag.places.take(kept_T)))
            bar.update(bag.count)
    return found


@torch.no_grad()
def standardise(aggregator: Aggregator, mine: Sequence[CachedFeatures]) -> None:
    """Let the aggregator bring features to mean 0 and deviation 1 over all processes' slides.

    Every slide counts the same, and a feature that is constant is divided by 1.
    """
    moments = [
        torch.stack([z_TD.mean(0), z_TD.square().mean(0)])
        for z_TD in (slide.z_TD.double() for slide in mine)
    ]
    mean_D, square_D = torch.stack([each for share in gather(moments) for each in share]).mean(0)
    std_D = (square_D - mean_D.square()).clamp_min(0).sqrt()
    aggregator.center_D.copy_(mean_D)
    aggregator.scale_D.copy_(divisor(mean_D, std_D))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, and then as before."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
