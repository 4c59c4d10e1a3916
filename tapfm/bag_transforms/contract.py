"""The interface of bag transforms, which change the tiles that the aggregator is given.

It acts on the leaves of the slide model's graph, in training alone. A tile that it leaves out gets
no gradient, and pass 2 does not encode it again: train/skipped_tiles counts those.

A transform may add a term of its own to the loss, of what it knows of the tiles that it changed. It
may have parameters, which are trained with the aggregator's, and buffers, which are saved with the
run and change in `term` or `after_update`. Random numbers come from a generator that is seeded by
`moment.seed`, so that a repeated or resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from tapfm.data.bag import Moment
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


@dataclass(frozen=True)
class Step:
    """What a step knows once the aggregator has answered."""

    aggregator: Aggregator
    output: SlideOutput
    """Of the tiles that the transforms left."""
    target_Y: Tensor
    """What is known of the bag."""
    task_loss: nn.Module
    mixed_loss: Callable[[Tensor, Tensor], Tensor]
    """Loss of logits (K,) of a bag with tiles of several slides, given their targets (N, Y)."""
    moment: Moment


class BagTransform(nn.Module):
    """Base of all bag transforms."""

    columns: ClassVar[tuple[str, ...]] = ()
    """Names of the figures that `term` returns: columns `train/<name>` of metrics.csv."""
    mixes_slides: ClassVar[bool] = False
    """Whether `term` asks for the loss of a bag with tiles of several slides."""
    encoder: str | None = None
    """Name of the encoder whose features, frozen, it serves alone; None serves all."""
    targets: tuple[str, ...] | None = None
    """Names of the targets that it trains on beside the run's; None is none."""

    def forward(self, tiles: TileSet, moment: Moment) -> TileSet:
        """Return the tiles that the aggregator is given."""
        raise NotImplementedError

    def term(self, step: Step) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return a term to add to the loss, or None, and figures to log by name."""
        return None, {}

    def after_update(self) -> None:
        """Follow an update of the aggregator's weights."""


class BagTransformOptions(Protocol):
    """The frozen dataclass by which a config names a transform; its fields are its options."""

    def build(self, aggregator: Aggregator) -> BagTransform:
        """Return the module; SettingsError where it cannot serve with this aggregator."""
