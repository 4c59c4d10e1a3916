"""The default: the CLS score leans, and a gate that starts at 0 learns.

    w = softmax(minmax(s) / temperature + g(z))

At temperature 0.1 the score outvotes a young gate 10 to 0, right or wrong; at 1 it only leans. At
the start, with g = 0, this is the paper's aggregator at the same temperature.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184); Ilse et al. 2018 (ABMIL, arXiv 1802.04712).
"""

from __future__ import annotations

from dataclasses import dataclass

from tapfm.slide_model.aggregators.pooling import AttentionPooling, check_temperature


@dataclass(frozen=True)
class TapfmGated:
    """The CLS score and a learned gate weigh the tiles together."""

    temperature: float = 1.0
    """Of the score's softmax."""

    def __post_init__(self):
        check_temperature("tapfm_gated", self.temperature)

    def build(self, dim: int, labels: int) -> AttentionPooling:
        """See `AggregatorOptions`."""
        return AttentionPooling(dim, labels, temperature=self.temperature, gate=True)
