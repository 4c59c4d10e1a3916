"""PackMIL's downsampler (ADS): in training, groups of tiles stand for their tiles.

    w = softmax_t(m(x_t)),  x_t <- x_t + w_t x_t,  h_t = gelu(A x_t)
    h_g = keep of the `ratio` tiles of g,  y_g = B h_g      training: tiles are shuffled, then cut
    y_t = B h_t                                             prediction: no groups
    logits = head(sum a y),  a = softmax(gate(y))

`keep: max` takes the largest of each feature; `keep: random` puts the tiles of a group behind each
other and keeps D of the ratio x D numbers, drawn once a step, the same of all groups. A tile of a
group has an equal part of its weight. The last group, where T is no multiple of `ratio`, repeats
its tiles until it is whole, and its weight is that of as many tiles as it has.

What is drawn is a function of the step's seed, so a resumed run goes on to the bit. Every tile has
a gradient, by w at least, so pass 2 encodes them all.

Price: 2 D x D and (D + 2) x width numbers, and the gate's. With `random` a feature is another one
    in each step, and learning takes more updates than with `max` (benchmarks/LOG.md).
Source: Fang et al. 2025 (PackMIL, arXiv 2509.20923), with ratio 4 and `random` to tell subtypes,
    ratio 3 and `max` for survival; `max` is the default here. Its hyperslide is the bag
    transform `packmil`.
Differs: tiles that fill no whole group are trained on as said above. Slides of a case are one bag.
    m has one hidden layer of `width`.

Shapes: T tiles, D features, G groups, R tiles of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tapfm.data.bag import Moment
from tapfm.settings import below, refuse, unmet
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet
from tapfm.slide_model.layers.attention import Gate

KEEPS = ("max", "random")


@dataclass(frozen=True)
class Ads:
    """Attention over groups of tiles in training, over tiles in prediction."""

    ratio: int = 4
    """Tiles of a group, R."""
    keep: str = "max"
    """Keep the `max` of each feature of a group, or `random` features of its tiles."""
    width: int = 128
    """Hidden units of m, which emphasises tiles."""

    def __post_init__(self):
        faults = below(vars(self), {"ratio": 2, "width": 1})
        faults += unmet(("keep", self.keep, f"one of {', '.join(KEEPS)}", self.keep in KEEPS))
        refuse(f"model.aggregator ads: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> Downsampled:
        """Return the module; see `AggregatorOptions`."""
        return Downsampled(dim, labels, self)


class Downsampled(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: of the method.
    """

    has_attention = True

    def __init__(self, dim: int, labels: int, options: Ads):
        super().__init__(dim, labels)
        self.options = options
        self.seed = 0
        """Seeds what a training step draws; each step brings its own, so none is saved."""
        self.emphasis = nn.Sequential(
            nn.Linear(dim, options.width), nn.GELU(), nn.Linear(options.width, 1, bias=False)
        )
        self.before = nn.Sequential(nn.Linear(dim, dim), nn.GELU())
        self.after = nn.Linear(dim, dim)
        self.gate = Gate(dim, start_at_zero=False)
        self.head = nn.Linear(dim, labels)

    def set_moment(self, moment: Moment) -> None:
        """Take over the step's seed."""
        self.seed = moment.seed

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, the tiles' weights and the pooled groups; in prediction, tiles."""
        x_TD = self.standardised(tiles.z_TD)
        h_TD = self.before(x_TD + self.emphasis(x_TD).softmax(0) * x_TD)
        if self.training:
            log_T, b_D = self.pooled_groups(h_TD)
        else:
            y_TD = self.after(h_TD)
            log_T = self.gate(y_TD).log_softmax(0)
            b_D = log_T.exp() @ y_TD
        return SlideOutput(self.head(b_D), log_T.exp(), b_D, log_T)

    def pooled_groups(self, h_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of each tile's weight, (T,), and the groups' weighted mean, (D,)."""
        tiles, dim, ratio = *h_TD.shape, self.options.ratio
        # of numpy, since torch refuses random numbers where a function is mapped over tiles
        drawn = np.random.default_rng(self.seed)
        rows_GR, group_T = (torch.from_numpy(each) for each in groups(tiles, ratio, drawn))
        h_GRD = h_TD.index_select(0, rows_GR.flatten().to(h_TD.device)).unflatten(0, rows_GR.shape)
        if self.options.keep == "max":
            h_GD = h_GRD.amax(1)
        else:
            kept_D = torch.from_numpy(drawn.choice(ratio * dim, dim, replace=False))
            h_GD = h_GRD.flatten(1).index_select(1, kept_D.to(h_TD.device))
        y_GD = self.after(h_GD)
        count_G = group_T.bincount().to(h_TD)
        log_G = (self.gate(y_GD) + (count_G / ratio).log()).log_softmax(0)
        log_T = (log_G - count_G.log()).index_select(0, group_T.to(h_TD.device))
        return log_T, log_G.exp() @ y_GD


def groups(tiles: int, ratio: int, drawn: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the tiles of each group, (G, R), and the group of each tile, (T,).

    The last group repeats its tiles where there are fewer than `ratio`.
    """
    shuffled_T = drawn.permutation(tiles)
    place = np.arange(-(-tiles // ratio) * ratio)
    last = len(place) - ratio
    place[last:] = last + np.arange(ratio) % (tiles - last)
    return shuffled_T[place].reshape(-1, ratio), shuffled_T.argsort() // ratio
