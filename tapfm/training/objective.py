"""What stands between pass 1 and backward: bag transforms, aggregator, task loss, regularisers.

    objective = Objective(task.loss(), transforms, regularisers)
    outcome = objective(aggregator, tiles, target_Y, moment)      outcome.loss.backward()

`tiles` are the leaves of the slide model's graph, so whatever is done here has its exact gradient
in the encoder, and pass 2 knows nothing of it. What is off is bit for bit as if it were absent.

Shapes: Y numbers of a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfm.bag_transforms import make_bag_transforms
from tapfm.data.bag import Moment
from tapfm.regularisers import make_regularisers
from tapfm.settings import Spec
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


@dataclass(frozen=True)
class Outcome:
    """The loss of a step, the model's output, and figures to log."""

    loss: Tensor
    """Task's loss and regularisers."""
    output: SlideOutput
    figures: dict[str, Tensor]
    """By column of metrics.csv, detached: train/loss is of the task alone."""


class Objective(nn.Module):
    """The loss of a slide as a function of its tiles' features and scores.

    Args:
        task_loss: the task's.
        transforms: bag transforms by name, applied in order.
        regularisers: by name.
    """

    def __init__(
        self, task_loss: nn.Module, transforms: nn.ModuleDict, regularisers: nn.ModuleDict
    ):
        super().__init__()
        self.task_loss, self.transforms, self.regularisers = task_loss, transforms, regularisers

    def columns(self, aggregator: Aggregator) -> list[str]:
        """Return the columns of metrics.csv that a step fills beside train/loss."""
        own = [name for each in self.regularisers.values() for name in each.columns]
        return [f"train/{name}" for name in [*aggregator.terms, *own]]

    def forward(
        self, aggregator: Aggregator, tiles: TileSet, target_Y: Tensor, moment: Moment
    ) -> Outcome:
        """Return the loss of a slide, its graph ending in the tiles' features and scores."""
        aggregator.set_progress(moment.progress)
        for transform in self.transforms.values():
            tiles = transform(tiles, moment)
        output = aggregator(tiles)
        terms = aggregator.losses(output, target_Y, self.task_loss)
        loss = torch.stack([*terms.values()]).sum()
        figures = {f"train/{name}": terms[name].detach() for name in aggregator.terms}
        figures["train/loss"] = loss.detach()
        for regulariser in self.regularisers.values():
            weight = regulariser.weight(moment)
            with torch.set_grad_enabled(weight != 0):
                term, own = regulariser(tiles, output, moment)
            if weight != 0:
                loss = loss + weight * term
            figures |= {f"train/{name}": value.detach() for name, value in own.items()}
        return Outcome(loss, output, figures)


def make_objective(
    task_loss: nn.Module,
    aggregator: Aggregator,
    bag_transforms: Sequence[Spec] | None,
    regularisers: Sequence[Spec] | None,
) -> Objective:
    """Return the objective of a run, its transforms and regularisers named as in a config.

    Raises:
        SettingsError: one of them cannot be, or cannot serve with this aggregator.
    """
    transforms = make_bag_transforms(bag_transforms or [], aggregator)
    return Objective(task_loss, transforms, make_regularisers(regularisers or [], aggregator))
