"""AEM: low entropy of attention is penalised, so that a slide does not stand on a few tiles.

    R = (1/K) sum_k sum_t a_kt log a_kt,    loss = task + weight * R

a are the tile weights, one row or a row a label. `top` takes the largest of each row alone, summing
to 1 again, so that a large slide's background does not outweigh the tiles that matter. `normalise`
divides by log(tiles), so that one weight serves small and large bags: R is then in [-1, 0]. The
weight falls on a cosine to `end` over the first part of the run.

Off by default: it helps where attention collapses, and costs where few tiles carry the label.

Price: O(K T), no memory.
Source: Zhang et al. 2024 (AEM, arXiv 2406.15303).
Differs: `normalise`; the weights of `top` are divided by their sum.

Shapes: T tiles, K labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tapfm.data.bag import Moment
from tapfm.regularisers.contract import Regulariser
from tapfm.settings import SettingsError, refuse, unmet
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


@dataclass(frozen=True)
class Aem:
    """Negative entropy of the tile weights, at a weight that falls over the run."""

    weight: float = 0.1
    """At the start; 0 logs the entropy and changes nothing."""
    end: float = 0.01
    """Weight from `until` on; not above `weight` unless that is meant."""
    until: float = 0.5
    """Share of the run over which the weight goes from `weight` to `end`."""
    top: int = 0
    """Largest weights of a bag that are looked at; 0 is all."""
    normalise: bool = True
    """Divide by the logarithm of the number of tiles."""

    def __post_init__(self):
        faults = unmet(
            ("weight", self.weight, "0 or more", self.weight >= 0),
            ("end", self.end, "0 or more", self.end >= 0),
            ("until", self.until, "in [0, 1]", 0 <= self.until <= 1),
            ("top", self.top, "0 or more", self.top >= 0),
        )
        refuse(f"model.regularisers aem: {fault}" for fault in faults)

    def build(self, aggregator: Aggregator) -> AttentionEntropy:
        """See `RegulariserOptions`."""
        if not aggregator.has_attention:
            raise SettingsError(
                f"model.regularisers: aem is of tile weights that learn, and "
                f"{aggregator.key} has none. Leave it out, or take tapfm_gated."
            )
        return AttentionEntropy(self)


class AttentionEntropy(Regulariser):
    """The term; see the file's docstring."""

    columns = ("attention_entropy",)

    def __init__(self, options: Aem):
        super().__init__()
        self.options = options

    def weight(self, moment: Moment) -> float:
        """Return the weight at this share of the run; 0 throughout where it starts at 0."""
        start, end, until = self.options.weight, self.options.end, self.options.until
        if start == 0:
            return 0.0
        done = min(moment.progress / until, 1.0) if until else 1.0
        return end + (start - end) * (1 + math.cos(math.pi * done)) / 2

    def forward(
        self, tiles: TileSet, output: SlideOutput, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R, and the entropy as a share of the largest there could be."""
        log_KT = torch.atleast_2d(output.log_weights)
        whole_T = log_KT.shape[1]
        with torch.no_grad():
            share = entropy(log_KT) / math.log(max(whole_T, 2))
        if 0 < self.options.top < whole_T:
            log_KT = log_KT.topk(self.options.top, dim=1).values.log_softmax(1)
        value = -entropy(log_KT)
        if self.options.normalise:
            value = value / math.log(max(log_KT.shape[1], 2))
        return value, {"attention_entropy": share}


def entropy(log_KT: Tensor) -> Tensor:
    """Return the mean entropy of rows of logarithms of weights, in nats."""
    return -(log_KT.exp() * log_KT).sum(1).mean()
