"""Two levels of attention for cases: tiles within each slide, then the slides of the case.

    w_t = softmax over slides(h(slide embedding)) * softmax within the slide(minmax(s) / T + g(z))

h starts at 0, as the mean of the slides; a case of one slide is weighed as `tapfm_gated` does it.

Source: MOOZY for the two levels; Ilse et al. 2018 (arXiv 1802.04712), gated attention, for g and h.
Differs: MOOZY's slides meet in a transformer of 21 M weights; ours, which are few a case, in one
    more gate.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapfm.slide_model.aggregators.pooling import AttentionPooling, check_temperature


@dataclass(frozen=True)
class Hierarchical:
    """Tiles of a slide and slides of a case are weighed one after the other."""

    temperature: float = 1.0
    """Of the score's softmax within each slide."""

    def __post_init__(self):
        check_temperature("hierarchical", self.temperature)

    def build(self, dim: int, labels: int) -> AttentionPooling:
        """See `AggregatorOptions`."""
        return AttentionPooling(dim, labels, temperature=self.temperature, gate=True, by_slide=True)
