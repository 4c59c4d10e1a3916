"""What a regulariser is: a term of the objective beside the task's loss.

It sees the tiles whose features are leaves, what the aggregator made of them, and the moment of the
run. Its gradient reaches the encoder as that of the task's loss does: exactly, chunk by chunk.

A regulariser may have parameters, which are trained with the aggregator's in groups of their own,
and buffers, which are saved with the run. Random numbers come from a generator that is seeded by
`moment.seed`, so that a repeated or resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn

from tapfm.data.bag import Moment
from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


class Regulariser(nn.Module):
    """Base of all regularisers."""

    columns: ClassVar[tuple[str, ...]] = ()
    """Names of the figures that `forward` returns: columns `train/<name>` of metrics.csv."""
    needs_frozen: ClassVar[bool] = False
    """Whether `see_frozen` is called before the first slide of a run."""

    def __init__(self, weight: float = 0.0):
        super().__init__()
        self.own_weight = weight

    def weight(self, moment: Moment) -> float:
        """Return the factor of the term, the same throughout unless a subclass says otherwise.

        Weight 0 is bit for bit as if the term were absent.
        """
        return self.own_weight

    def see_frozen(self, names: Sequence[str], means: Sequence[Tensor], scale_D: Tensor) -> None:
        """Take each training slide's mean frozen feature (D,), and their spread over tiles."""

    def forward(
        self, tiles: TileSet, output: SlideOutput, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the term, a scalar, and figures to log by name; called at weight 0 as well."""
        raise NotImplementedError


class RegulariserOptions(Protocol):
    """The frozen dataclass by which a config names a regulariser; its fields are its options."""

    def build(self, aggregator: Aggregator) -> Regulariser:
        """Return the module; SettingsError where it cannot serve with this aggregator."""


def check_weight(name: str, weight: float) -> None:
    """Refuse a weight below 0.

    Raises:
        SettingsError: it is.
    """
    if not weight >= 0:
        raise SettingsError(f"model.regularisers {name}: weight must be 0 or more, got {weight}")
