"""Consistency: two views of a slide, one after the other, get the same logits.

    R = mean_k (l_k - l'_k)^2,    l' the logits of the view before, held constant

With `data.views: 2` each slide comes twice in a row, with other tiles, turns, colours and stains;
the second view is drawn toward the first. Since either view may be the first, the gradient is on
average half of that of the squared difference. Features then depend less on what the augmentation
changes, such as a site's stain, and on which tiles were drawn.

Off by default, for it doubles an epoch; meant for cohorts of several sites, with `data.colour` or
`data.stain_jitter` on.

Price: none in a step; an epoch has twice the steps.
Source: Sajjadi et al. 2016 (NeurIPS, arXiv 1606.04586); Tarvainen and Valpola 2017 (Mean Teacher,
    arXiv 1703.01780) for a constant target.

Shapes: K logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tapfm.data.bag import Moment
from tapfm.regularisers.contract import Regulariser, check_weight
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


@dataclass(frozen=True)
class Consistency:
    """Squared difference of the logits of two views of a slide."""

    weight: float = 0.1
    """Factor of the term."""

    def __post_init__(self):
        check_weight("consistency", self.weight)

    def build(self, aggregator: Aggregator) -> TwoViews:
        """See `RegulariserOptions`."""
        return TwoViews(self.weight)


class TwoViews(Regulariser):
    """The term; see the file's docstring."""

    columns = ("views_apart",)

    def __init__(self, weight: float):
        super().__init__(weight)
        self.before: dict[str, Tensor] = {}

    def forward(
        self, tiles: TileSet, output: SlideOutput, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return R, and its root as a figure; 0 for the first view of a slide."""
        logits_K = output.logits_K
        before_K = self.before.pop(moment.slide_id, None)
        self.before.clear()  # another slide's only view
        if before_K is None:
            self.before[moment.slide_id] = logits_K.detach()
            value = logits_K.new_zeros(())
        else:
            value = (logits_K - before_K.to(logits_K.device)).square().mean()
        return value, {"views_apart": value.detach().sqrt()}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the view that waits for its second, for the resume point."""
        return {"before": dict(self.before)}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Put it back."""
        self.before = dict(state["before"])
