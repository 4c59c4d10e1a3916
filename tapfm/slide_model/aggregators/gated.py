"""Gated attention: tiles weighed by what is learned of their features.

    w = softmax(g(z))

Source: Ilse et al. 2018 (ABMIL, arXiv 1802.04712), gated attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapfm.slide_model.aggregators.pooling import AttentionPooling


@dataclass(frozen=True)
class Gated:
    """Learned attention alone; the CLS score is not looked at."""

    def build(self, dim: int, labels: int) -> AttentionPooling:
        """See `AggregatorOptions`."""
        return AttentionPooling(dim, labels, temperature=None, gate=True)
