"""Additive tile head: each tile has a value in the label's unit, and the slide's is their mean.

    v_t = f(relu(W z_t)),  logits = sum_t a_t v_t              a = softmax(gate(z)), or all alike

So a map of `tile_logits_TK` is a map of the label: what a tile adds, not how much it is looked at.
`attention: false` is WeakSTIL's plain mean: of a share of cells, say, each tile has its own share,
and the slide the mean of them. `probability: true` takes the mean of probabilities, not of logits,
    p = sum_t a_t sigmoid(v_t),  logits = log p - log(1 - p)
so that tiles of .9 and .1 are a slide of .5, and no single tile can say more than it weighs.

Price: D x width numbers.
Condition: `probability` is of labels of 0 and 1.
Source: Schirris et al. 2021 (WeakSTIL, arXiv 2109.05892) for the mean of tile scores;
    Javed et al. 2022 (Additive MIL, arXiv 2206.01794) for the weighted sum of tile logits.
Differs: WeakSTIL's scores are bounded to the scale of its one label; here a regression is not
    bounded, and keeps the task's unit. Additive MIL classifies a_t h_t; here a_t weighs the
    classified h_t, so that a tile's value is its own and the values' mean is the slide's.

Shapes: T tiles, D features, W width, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from tapfm.settings import below, refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet
from tapfm.slide_model.layers.attention import Gate


@dataclass(frozen=True)
class Additive:
    """A slide's value is the mean of its tiles' values."""

    attention: bool = True
    """Whether the mean is weighted by learned attention."""
    probability: bool = False
    """Whether probabilities are averaged, not logits."""
    width: int = 256
    """Hidden units of a tile's value, W."""

    def __post_init__(self):
        faults = below({"width": self.width}, {"width": 1})
        refuse(f"model.aggregator additive: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> TileValues:
        """Return the module; see `AggregatorOptions`."""
        return TileValues(dim, labels, self)


class TileValues(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: of the method.
    """

    def __init__(self, dim: int, labels: int, options: Additive):
        super().__init__(dim, labels)
        self.has_attention, self.probability = options.attention, options.probability
        self.linear_head = not options.probability
        self.tasks = ("multilabel",) if options.probability else ()
        self.project = nn.Linear(dim, options.width)
        self.gate = Gate(dim, start_at_zero=False) if options.attention else None
        self.add_module(
            "head" if self.linear_head else "tile_head", nn.Linear(options.width, labels)
        )

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return the slide's logits, and those of each tile that they are made of."""
        x_TD = self.standardised(tiles.z_TD)
        h_TW = self.project(x_TD).relu()
        scores_T = x_TD.new_zeros(len(x_TD)) if self.gate is None else self.gate(x_TD)
        log_T, weights_T = scores_T.log_softmax(0), scores_T.softmax(0)
        b_W = weights_T @ h_TW
        if self.linear_head:
            logits_K, tile_logits_TK = self.head(b_W), self.head(h_TW)
        else:
            tile_logits_TK = self.tile_head(h_TW)
            log_p_K = torch.logsumexp(log_T[:, None] + logsigmoid(tile_logits_TK), 0)
            log_q_K = torch.logsumexp(log_T[:, None] + logsigmoid(-tile_logits_TK), 0)
            logits_K = log_p_K - log_q_K
        log_weights = None if self.gate is None else log_T
        return SlideOutput(logits_K, weights_T, b_W, log_weights, tile_logits_TK)
