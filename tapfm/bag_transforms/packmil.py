"""PackMIL's residual branch: tiles left out of several slides make one more bag, a hyperslide.

    main, residual = a random split of a slide's tiles, `share` of them main
    loss = task(main) + weight * task(residual tiles of `slides` slides in a row as one bag)

The aggregator is given the main tiles. Residual tiles wait until `slides` slides have left theirs;
the bag of all of them has as target what any of the slides has: of labels of 0 and 1, 1 if one is
1, unknown if none is 1 and one is unknown; of classes, every class that is there, each by a binary
cross-entropy. A slide of fewer than `least` tiles is whole in both.

The term comes with the last slide of a pack, times `slides`, so that it weighs as in the authors'
batch of a pack: with `model.steps.accumulate` equal to `slides` an update is that batch's.

Price: half an aggregator's forward and backward more; residual features of a pack, in memory.
Condition: labels of 0 and 1, or classes. From slides, only the last slide's residual tiles have a
    gradient in the encoder; the others' features are as they were.
Source: Fang et al. 2025 (PackMIL, arXiv 2509.20923).
Differs: `share` is that of the main branch, as in the authors' code, whose option is called
    `token_dropout`. Slides of a pack come one after the other, which gives the same sums as packed
    and padded sequences. The downsampler, which acts in prediction too, is the aggregator `ads`.
    One predictor.

Shapes: T tiles, D features, N slides of a pack, Y numbers of a target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tapfm.bag_transforms.contract import BagTransform, Step
from tapfm.data.bag import Moment, Places
from tapfm.settings import refuse, unmet
from tapfm.slide_model.aggregators.contract import Aggregator, TileSet


@dataclass(frozen=True)
class PackMil:
    """A bag of the tiles that several slides leave out."""

    share: float = 0.5
    """Share of a slide's tiles in the main branch; the rest is residual."""
    slides: int = 4
    """Slides of a pack."""
    weight: float = 0.2
    """Factor of the hyperslide's loss."""
    least: int = 8
    """A slide of fewer tiles is whole in both branches."""

    def __post_init__(self):
        faults = unmet(
            ("share", self.share, "in (0, 1)", 0 < self.share < 1),
            ("slides", self.slides, "2 or more", self.slides >= 2),
            ("weight", self.weight, "0 or more", self.weight >= 0),
            ("least", self.least, "2 or more", self.least >= 2),
        )
        refuse(f"model.bag_transforms packmil: {fault}" for fault in faults)

    def build(self, aggregator: Aggregator) -> Hyperslide:
        """See `BagTransformOptions`."""
        return Hyperslide(self)


class Hyperslide(BagTransform):
    """The transform; see the file's docstring."""

    columns = ("hyperslide_loss",)
    mixes_slides = True

    def __init__(self, options: PackMil):
        super().__init__()
        self.options = options
        self.residual: TileSet | None = None
        self.waiting: list[tuple[TileSet, Tensor]] = []

    def forward(self, tiles: TileSet, moment: Moment) -> TileSet:
        """Return the main tiles in their order, and keep the others for `term`."""
        self.residual = tiles
        if len(tiles) < self.options.least:
            return tiles
        drawn = torch.Generator().manual_seed(moment.seed)
        rows_T = torch.randperm(len(tiles), generator=drawn)
        main = min(max(1, round(self.options.share * len(tiles))), len(tiles) - 1)
        self.residual = tiles.take(rows_T[main:].sort().values)
        return tiles.take(rows_T[:main].sort().values)

    def term(self, step: Step) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the loss of the hyperslide with the last slide of a pack; nan before that."""
        options, nothing = self.options, step.output.logits_K.new_full((), torch.nan)
        pack = [*self.waiting, (self.residual, step.target_Y)]
        self.residual = None
        if len(pack) < options.slides:
            self.waiting = [*pack[:-1], (without_graph(pack[-1][0]), step.target_Y)]
            return None, {"hyperslide_loss": nothing}
        self.waiting = []
        with torch.set_grad_enabled(options.weight > 0):
            logits_K = step.aggregator(together([tiles for tiles, _ in pack])).logits_K
            target_NY = torch.stack([target_Y.to(logits_K.device) for _, target_Y in pack])
            loss = step.mixed_loss(logits_K, target_NY)
        term = options.weight * options.slides * loss if options.weight else None
        return term, {"hyperslide_loss": loss}

    def get_extra_state(self) -> dict[str, Any]:
        """Return the residual tiles that wait, for the resume point."""
        return {"waiting": [(vars(tiles), target_Y) for tiles, target_Y in self.waiting]}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self.waiting = [(TileSet(**tiles), target_Y) for tiles, target_Y in state["waiting"]]


def without_graph(tiles: TileSet) -> TileSet:
    """Return tiles whose features and scores are held constant."""
    return replace(tiles, z_TD=tiles.z_TD.detach(), score_T=tiles.score_T.detach())


def together(pack: Sequence[TileSet]) -> TileSet:
    """Return the tiles of all slides as one bag; where one has no coordinates, without any."""
    device = pack[-1].z_TD.device
    ends = [0]
    for tiles in pack:
        ends.append(ends[-1] + int(tiles.slide_of_T.max()) + 1)
    known = all(tiles.coords0_T2 is not None and tiles.grid_px0_T is not None for tiles in pack)
    places = Places(
        coords0_T2=torch.cat([tiles.coords0_T2 for tiles in pack]) if known else None,
        slide_of_T=torch.cat([t.slide_of_T + end for t, end in zip(pack, ends, strict=False)]),
        grid_px0_T=torch.cat([tiles.grid_px0_T for tiles in pack]) if known else None,
        mpp=pack[-1].mpp,
    )
    z_TD = torch.cat([tiles.z_TD.to(device) for tiles in pack])
    return TileSet.of(places, z_TD, torch.cat([tiles.score_T.to(device) for tiles in pack]))
