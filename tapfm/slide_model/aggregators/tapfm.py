"""The paper's aggregator: tiles weighed by how CLS looks at them.

    w = softmax(minmax(s) / temperature)

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184).
"""

from __future__ import annotations

from dataclasses import dataclass

from tapfm.slide_model.aggregators.pooling import AttentionPooling, check_temperature


@dataclass(frozen=True)
class Tapfm:
    """The CLS score weighs the tiles; nothing of the weights is learned beside the encoder."""

    temperature: float = 0.1
    """Of the score's softmax; the paper's."""

    def __post_init__(self):
        check_temperature("tapfm", self.temperature)

    def build(self, dim: int, labels: int) -> AttentionPooling:
        """See `AggregatorOptions`."""
        return AttentionPooling(dim, labels, temperature=self.temperature, gate=False)
