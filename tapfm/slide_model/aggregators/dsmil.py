"""DSMIL: two streams, of which one finds a critical tile and the other weighs tiles by it.

    c_max = max_t W0 h_t,   m = argmax_t W0 h_t           the instance stream, for each label
    a_t = softmax_t(<q_t, q_m> / sqrt(A)),  q = Wq h      how near each tile is to the critical one
    c_bag = <Wb, sum_t a_t Wv h_t>                        the bag stream
    logits = (c_max + c_bag) / 2,   h = norm(z)

Each label has its own critical tile and row of attention. Both streams learn by the task's loss, at
a half each; columns instance_loss and bag_loss of metrics.csv are those halves, and add up to the
loss. `tile_logits_TK` is the instance stream's.

Price: D x D numbers for Wv; K T attention.
Condition: the instance stream learns from one tile a label and step, so it needs many slides.
Source: Li et al. 2021 (DSMIL, arXiv 2011.08939), the two-stream aggregator.
Differs: features are normalised first, since encoders differ in scale; <q, q> is divided by the
    root of its width, without which a new model's attention is all on the critical tile.

Shapes: T tiles, D features, A query units, K labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


@dataclass(frozen=True)
class Dsmil:
    """An instance stream by maximum, and a bag stream by likeness to the critical tile."""

    units: int = 128
    """Width of the queries, A."""

    def __post_init__(self):
        if self.units < 1:
            raise SettingsError(
                f"model.aggregator dsmil: units must be 1 or more, got {self.units}. "
                "Leave it out for 128."
            )

    def build(self, dim: int, labels: int) -> DualStream:
        """Return the module; see `AggregatorOptions`."""
        return DualStream(dim, labels, self.units)


class DualStream(Aggregator):
    """The aggregator of the two streams.

    Args:
        dim: feature width D.
        labels: number of logits K.
        units: query width A.
    """

    has_attention = True
    linear_head = False
    loss_calls = 2
    terms = ("instance_loss", "bag_loss")

    def __init__(self, dim: int, labels: int, units: int):
        super().__init__(dim, labels)
        self.norm = nn.LayerNorm(dim)
        self.instance_head = nn.Linear(dim, labels)
        self.query = nn.Linear(dim, units, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.bag_head = nn.Linear(dim, labels)  # row k reads the bag embedding of label k

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return the mean of both streams' logits, and the mean attention of all labels."""
        h_TD = self.norm(self.standardised(tiles.z_TD))
        instance_TK = self.instance_head(h_TD)
        instance_K, critical_K = instance_TK.max(0)
        q_TA = self.query(h_TD)
        near_KT = q_TA[critical_K] @ q_TA.T / math.sqrt(q_TA.shape[1])
        a_KT = near_KT.softmax(1)
        b_KD = a_KT @ self.value(h_TD)
        bag_K = (b_KD * self.bag_head.weight).sum(1) + self.bag_head.bias
        return SlideOutput(
            logits_K=(instance_K + bag_K) / 2,
            weights_T=a_KT.mean(0),
            embedding_E=b_KD.flatten(),
            log_weights=near_KT.log_softmax(1),
            tile_logits_TK=instance_TK,
            extras={"instance_K": instance_K, "bag_K": bag_K},
        )

    def losses(self, output: SlideOutput, target_Y: Tensor, loss: nn.Module) -> dict[str, Tensor]:
        """Return half the task's loss of each stream, by its name in `terms`."""
        streams = output.extras["instance_K"], output.extras["bag_K"]
        halves = (loss(logits_K, target_Y) / 2 for logits_K in streams)
        return dict(zip(self.terms, halves, strict=True))
