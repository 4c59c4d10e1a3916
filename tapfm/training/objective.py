"""What stands between pass 1 and backward: bag transforms, aggregator, task loss, regularisers.

    objective = Objective(task.loss(), transforms, regularisers)
    outcome = objective(aggregator, tiles, target_Y, moment)      outcome.loss.backward()

`tiles` are the leaves of the slide model's graph, so whatever is done here has its exact gradient
in the encoder, and pass 2 knows nothing of it. What is off is bit for bit as if it were absent.

Shapes: Y numbers of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfm.bag_transforms import make_bag_transforms
from tapfm.bag_transforms.contract import Step
from tapfm.data.bag import Moment
from tapfm.regularisers import make_regularisers
from tapfm.settings import SettingsError, Spec
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet
from tapfm.tasks import Task


@dataclass(frozen=True)
class Outcome:
    """The loss of a step, the model's output, and figures to log."""

    loss: Tensor
    """Task's loss, terms of transforms, and regularisers."""
    output: SlideOutput
    figures: dict[str, Tensor]
    """By column of metrics.csv, detached: train/loss is of the task alone."""


class Objective(nn.Module):
    """The loss of a slide as a function of its tiles' features and scores.

    Args:
        task_loss: the task's.
        transforms: bag transforms by name, applied in order.
        regularisers: by name.
        mixed_loss: the task's loss of a bag with tiles of several slides; None if it has none.
    """

    def __init__(
        self,
        task_loss: nn.Module,
        transforms: nn.ModuleDict,
        regularisers: nn.ModuleDict,
        mixed_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.task_loss, self.transforms, self.regularisers = task_loss, transforms, regularisers
        self.mixed_loss = mixed_loss

    @property
    def parts(self) -> list[nn.Module]:
        """Return the transforms and regularisers in order."""
        return [*self.transforms.values(), *self.regularisers.values()]

    def columns(self, aggregator: Aggregator) -> list[str]:
        """Return the columns of metrics.csv that a step fills beside train/loss."""
        own = [name for each in self.parts for name in each.columns]
        return [f"train/{name}" for name in [*aggregator.terms, *own]]

    def forward(
        self, aggregator: Aggregator, tiles: TileSet, target_Y: Tensor, moment: Moment
    ) -> Outcome:
        """Return the loss of a slide, its graph ending in the tiles' features and scores."""
        aggregator.set_moment(moment)
        for transform in self.transforms.values():
            tiles = transform(tiles, moment)
        output = aggregator(tiles)
        terms = aggregator.losses(output, target_Y, self.task_loss)
        loss = torch.stack([*terms.values()]).sum()
        figures = {f"train/{name}": terms[name].detach() for name in aggregator.terms}
        figures["train/loss"] = loss.detach()
        step = Step(aggregator, output, target_Y, self.task_loss, self.mixed_loss, moment)
        for transform in self.transforms.values():
            term, own = transform.term(step)
            if term is not None:
                loss = loss + term
            figures |= {f"train/{name}": value.detach() for name, value in own.items()}
        for regulariser in self.regularisers.values():
            weight = regulariser.weight(moment)
            with torch.set_grad_enabled(weight != 0):
                term, own = regulariser(tiles, output, moment)
            if weight != 0:
                loss = loss + weight * term
            figures |= {f"train/{name}": value.detach() for name, value in own.items()}
        return Outcome(loss, output, figures)

    def after_update(self) -> None:
        """Tell the transforms that the aggregator's weights were updated."""
        for transform in self.transforms.values():
            transform.after_update()


def make_objective(
    task_loss: nn.Module,
    aggregator: Aggregator,
    bag_transforms: Sequence[Spec] | None,
    regularisers: Sequence[Spec] | None,
    *,
    task: Task | None = None,
    encoder: str | None = None,
) -> Objective:
    """Return the objective of a run, its transforms and regularisers named as in a config.

    Args:
        task_loss: the task's.
        aggregator: what the transforms and regularisers stand beside.
        bag_transforms: as in a config.
        regularisers: as in a config.
        task: whose loss that is; None refuses transforms that ask it for more.
        encoder: name of the frozen encoder; "" is unknown, and None one that learns.

    Raises:
        SettingsError: one of them cannot be, or cannot serve with this aggregator or task.
    """
    transforms = make_bag_transforms(bag_transforms or [], aggregator)
    for name, each in transforms.items():
        if each.mixes_slides and not (task and task.mixes_slides):
            raise SettingsError(
                f"model.bag_transforms: {name} makes bags of several slides, and "
                f"{type(task).__name__.lower()} has no target for those. Leave it out, or take "
                "data.task: multilabel or multiclass."
            )
        if each.encoder is not None and encoder not in ("", each.encoder):
            found = f"are of {encoder}" if encoder else "change as the encoder learns"
            raise SettingsError(
                f"model.bag_transforms: {name} was fitted to frozen features of {each.encoder}, "
                f"and these {found}. Leave it out, or take those features."
            )
        if (
            task
            and each.targets is not None
            and (each.targets != tuple(task.targets) or task.loss_has_memory)
        ):
            raise SettingsError(
                f"model.bag_transforms: {name} trains on {', '.join(each.targets)} as well, and "
                f"this run predicts {', '.join(task.targets)}. Take the same targets, and no Cox "
                "loss, which remembers slides of one cohort."
            )
    terms = make_regularisers(regularisers or [], aggregator)
    return Objective(task_loss, transforms, terms, task and task.mixed_loss)
