"""Feature anchor: a slide's mean feature stays near that of the frozen encoder.

    R = mean_d ((z - z0)_d / sigma_d)^2,    loss = task + weight * R

z is the mean feature of the tiles of a step, z0 that of the slide's tiles under the frozen encoder,
sigma the spread of the frozen features over tiles. What is common to a cohort's slides then moves
little, so that the encoder does not drift to the cohort, while what tells slides apart can grow.

Off by default. Where few tiles are drawn a step, z differs from z0 by the draw as well.

Price: one forward pass over the training bags before the first slide; no more in a step.
Source: distillation to the pretrained model, as in Li et al. 2019 (DELTA, arXiv 1901.09229).
Differs: of the bag's mean, so that a step needs no second encoder.

Shapes: T tiles, D features, N slides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tapfm.data.bag import Moment
from tapfm.regularisers.contract import Regulariser, check_weight
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


@dataclass(frozen=True)
class Anchor:
    """Distance of a slide's mean feature to the frozen encoder's."""

    weight: float = 0.1
    """Factor of the term."""

    def __post_init__(self):
        check_weight("anchor", self.weight)

    def build(self, aggregator: Aggregator) -> FeatureAnchor:
        """See `RegulariserOptions`."""
        return FeatureAnchor(self.weight)


class FeatureAnchor(Regulariser):
    """The term; see the file's docstring."""

    columns = ("anchor_distance",)
    needs_frozen = True

    def __init__(self, weight: float):
        super().__init__(weight)
        self.frozen: dict[str, Tensor] = {}
        self.scale_D = torch.ones(1)

    def see_frozen(self, names: Sequence[str], means: Sequence[Tensor], scale_D: Tensor) -> None:
        """Keep each slide's mean frozen feature (D,), and the spread of features over tiles."""
        self.frozen, self.scale_D = dict(zip(names, means, strict=True)), scale_D

    def forward(
        self, tiles: TileSet, output: SlideOutput, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R, and its root as a figure; 0 for a slide whose frozen features are unknown."""
        z_D = tiles.z_TD.mean(0)
        z0_D = self.frozen.get(moment.slide_id)
        if z0_D is None:
            value = z_D.new_zeros(())
        else:
            apart_D = (z_D - z0_D.to(z_D.device)) / self.scale_D.to(z_D.device)
            value = apart_D.square().mean()
        return value, {"anchor_distance": value.detach().sqrt()}

    def get_extra_state(self) -> dict[str, Any]:
        """Return what was seen, for the resume point."""
        return {"frozen": self.frozen, "scale_D": self.scale_D}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self.frozen, self.scale_D = state["frozen"], state["scale_D"]
