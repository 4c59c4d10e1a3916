"""What an aggregator is given and what it returns; what every aggregator has.

    tiles = TileSet.of(places, z_TD, score_T)      features and scores are leaves of a graph
    output = aggregator(tiles)                     SlideOutput: logits, weights, embedding

`aggregators/` has one file a method. A method declares what it uses: where the score is not used,
the encoder gets no gradient through it; where coordinates are, a bag without them is refused.

Shapes: T tiles of a bag, S slides of a case, D features, E width of the embedding, K logits, Y
numbers of a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from tapfm.data.bag import Moment, Places
from tapfm.settings import SettingsError

ALONE = 4096  # tiles at once: bounds memory on slides of any size


@dataclass(frozen=True, kw_only=True)
class TileSet(Places):
    """The tiles of one slide, or of all slides of a case, as an aggregator sees them."""

    z_TD: Tensor
    """Features."""
    score_T: Tensor
    """Raw CLS scores."""

    @classmethod
    def of(cls, places: Places, z_TD: Tensor, score_T: Tensor) -> TileSet:
        """Return the features and scores of the tiles at these places."""
        return cls(**vars(places), z_TD=z_TD, score_T=score_T)


@dataclass(frozen=True, kw_only=True)
class OneSlide(TileSet):
    """The tiles of one slide, whose number a graph or a map over tiles may leave open."""

    @classmethod
    def of_features(cls, z_TD: Tensor, score_T: Tensor) -> OneSlide:
        """Return tiles of one slide whose places are unknown."""
        of_T = torch.zeros_like(score_T, dtype=torch.int64)
        unknown = {"coords0_T2": None, "grid_px0_T": None, "mpp": 0.0}
        return cls(slide_of_T=of_T, z_TD=z_TD, score_T=score_T, **unknown)

    @property
    def counts(self) -> list[int]:
        """Return the number of all tiles."""
        return [self.z_TD.shape[0]]


@dataclass(frozen=True)
class SlideOutput:
    """An aggregator's output for a slide or case."""

    logits_K: Tensor
    weights_T: Tensor
    """Tile weights, not negative, summing to 1; of K rows of attention, their mean."""
    embedding_E: Tensor
    """The bag's embedding; where `linear_head` holds, logits are `head(embedding_E)`."""
    log_weights: Tensor | None = None
    """Logarithm of the weights, (T,) or (K, T), for regularisers of attention; None where the
    method has no attention that learns."""
    tile_logits_TK: Tensor | None = None
    """Logits of each tile, where the slide's are made of them."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method's own `losses` need beside the logits."""


class Aggregator(nn.Module):
    """Base of all aggregators: standardises features, and learns by the task's loss.

    Args:
        dim: feature width D.
        labels: number of logits K.
    """

    uses_score: ClassVar[bool] = False
    """Whether the output depends on the CLS score."""
    uses_coords: ClassVar[bool] = False
    """Whether the output depends on where tiles lie."""
    has_attention: ClassVar[bool] = False
    """Whether tile weights learn, and `log_weights` is given."""
    linear_head: ClassVar[bool] = True
    """Whether logits are `head(embedding_E)`, so that a linear probe can solve the head."""
    loss_calls: ClassVar[int] = 1
    """How often `losses` calls the task's loss."""
    tasks: ClassVar[tuple[str, ...]] = ()
    """Names of the tasks that it serves; empty is all."""
    terms: ClassVar[tuple[str, ...]] = ()
    """Names of the terms that `losses` returns where there are several: columns of metrics.csv."""

    def __init__(self, dim: int, labels: int):
        super().__init__()
        # Features are centred on and divided by these: by nothing, but after a warm start.
        self.register_buffer("center_D", torch.zeros(dim))
        self.register_buffer("scale_D", torch.ones(dim))
        self.labels = labels
        self.key = type(self).__name__
        """The name in configs, for messages; the class's where none made it from a config."""

    @property
    def learns_weights(self) -> bool:
        """Return whether layers before the head learn."""
        return any(not name.startswith(("norm.", "head.")) for name, _ in self.named_parameters())

    def set_moment(self, moment: Moment) -> None:
        """Take progress and seed in front of each training step, for schedules and draws."""

    def standardised(self, z_TD: Tensor) -> Tensor:
        """Return the features, centred and scaled."""
        return (z_TD - self.center_D) / self.scale_D

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, tile weights and embedding of a bag."""
        raise NotImplementedError

    def alone(self, tiles: TileSet) -> Tensor | None:
        """Return logits (T, K) of each tile, as if the slide were that tile alone.

        None where the method looks at where tiles lie.
        """
        if self.uses_coords:
            return None

        def logits(z_D: Tensor, score: Tensor) -> Tensor:
            return self(OneSlide.of_features(z_D[None], score[None])).logits_K

        with torch.no_grad():
            return torch.vmap(logits, chunk_size=ALONE)(tiles.z_TD, tiles.score_T)

    def losses(self, output: SlideOutput, target_Y: Tensor, loss: nn.Module) -> dict[str, Tensor]:
        """Return the terms to minimise, by name; one term, the task's loss of the logits.

        Args:
            output: of `forward`.
            target_Y: what is known of the bag.
            loss: the task's.
        """
        return {"loss": loss(output.logits_K, target_Y)}

    def loss(self, tiles: TileSet, target_Y: Tensor, loss: nn.Module) -> Tensor:
        """Return the sum of `losses` of a bag."""
        return torch.stack([*self.losses(self(tiles), target_Y, loss).values()]).sum()


class AggregatorOptions(Protocol):
    """The frozen dataclass by which a config names an aggregator; its fields are its options."""

    def build(self, dim: int, labels: int) -> Aggregator:
        """Return the module, for features of width `dim` and so many logits."""


def need_coords(tiles: Places, name: str) -> Tensor:
    """Return the tiles' row and column on the lattice, (T, 2) int64, from 0 in each slide.

    Raises:
        SettingsError: where they lie is not known, or they are of several magnifications.
    """
    need_places(tiles, name)
    for number in tiles.slide_of_T.unique():
        steps = tiles.grid_px0_T[tiles.slide_of_T == number]
        if steps.max() > 1.2 * steps.min():
            raise SettingsError(
                f"model.aggregator {name} looks at one lattice of tiles, and these are of several "
                f"magnifications: steps of {steps.min():g} to {steps.max():g} level-0 pixels. Take "
                "regions, or give one folder in data.features_dir."
            )
    return tiles.lattice()


def need_places(tiles: Places, name: str) -> None:
    """Refuse tiles of which nobody knows where they lie.

    Raises:
        SettingsError: it is not known.
    """
    if tiles.coords0_T2 is None or tiles.grid_px0_T is None:
        raise SettingsError(
            f"model.aggregator {name} looks at where tiles lie, and these features have no "
            "coordinates. Give features with coordinates, or take tapfm_gated."
        )


def check_task(aggregator: nn.Module, name: str, task: str, *, memory: bool) -> None:
    """Refuse a task that an aggregator cannot serve.

    Args:
        aggregator: an `Aggregator`, or the head of labelled tiles.
        name: the aggregator's.
        task: the task's.
        memory: whether its loss keeps numbers of earlier slides.

    Raises:
        SettingsError: it learns from others alone, or calls a loss with a memory more than once.
    """
    if aggregator.tasks and task not in aggregator.tasks:
        raise SettingsError(
            f"model.aggregator {name} as it is set learns from {' or '.join(aggregator.tasks)} "
            f"labels alone, and data.task is {task}. Take tapfm_gated, or change the task."
        )
    if memory and aggregator.loss_calls > 1:
        raise SettingsError(
            f"model.aggregator {name} with data.task survival, loss: cox: Cox's loss remembers one "
            f"risk of each slide, and this aggregator has {aggregator.loss_calls} that learn. Take "
            "loss: hazard, or tapfm_gated."
        )
