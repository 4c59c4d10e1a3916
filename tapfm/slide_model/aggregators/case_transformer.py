"""A transformer over the slides of a case: each slide is pooled, then the slides meet.

    s_i = P sum_t a_it z_it,  a_i = softmax(gate(z_i))                       each slide by itself
    X = [c, s_1 .. s_S];  L times X <- block(X)
    logits = head(norm(c))                                                   c is the case token

Slides have no order. A tile's weight is its weight in its slide, times how much the case token
looks at that slide in the last layer, the mean of its heads. A case of one slide passes through the
same layers, which are then a head that is shaped by its own case token.

Price: 12 W x W numbers a layer and D x W; time and memory are those of attention pooling.
Condition: `data.bags: case`, to have more than one slide in a bag.
Source: MOOZY's case transformer: 3 layers of width 768 with 12 heads, 21.3 M parameters, LayerScale
    of 1e-5, no positions. That it gains with one slide a case too is its authors' finding.
Differs: two layers of width 256, since cohorts here have hundreds of patients; `{width: 768,
    layers: 3, heads: 12}` is theirs. Slides are pooled by gated attention in place of their slide
    encoder. LayerScale starts at 0.1: at 1e-5 a slide is not seen before many thousand steps. No
    dropout.

Shapes: T tiles, S slides, N = S + 1 tokens, D features, W width, H heads, K labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfm.settings import below, refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet
from tapfm.slide_model.layers.attention import Gate
from tapfm.slide_model.layers.blocks import Block, log_shares


@dataclass(frozen=True)
class CaseTransformer:
    """Gated attention within each slide, then a transformer over the slides."""

    width: int = 256
    """Of the tokens, W."""
    layers: int = 2
    heads: int = 4
    """Of each attention, H; a divisor of `width`."""
    scale: float = 0.1
    """What a layer changes is multiplied by this at the start (LayerScale), channel by channel."""

    def __post_init__(self):
        faults = below(vars(self), {"width": 1, "layers": 1, "heads": 1})
        if not faults and self.width % self.heads:
            faults = [f"width must be a multiple of heads, got {self.width} and {self.heads}"]
        if not self.scale > 0:
            faults.append(f"scale must be above 0, got {self.scale}")
        refuse(f"model.aggregator case_transformer: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> SlidesOfACase:
        """Return the module; see `AggregatorOptions`."""
        return SlidesOfACase(dim, labels, self)


class SlidesOfACase(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: of the method.
    """

    has_attention = True

    def __init__(self, dim: int, labels: int, options: CaseTransformer):
        super().__init__(dim, labels)
        self.gate = Gate(dim, start_at_zero=False)
        self.project = nn.Linear(dim, options.width)
        self.case = Slides(options)
        self.head = nn.Linear(options.width, labels)

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, the tiles' weights in the case, and the case token."""
        x_TD = self.standardised(tiles.z_TD)
        parts = zip(x_TD.split(tiles.counts), self.gate(x_TD).split(tiles.counts), strict=True)
        within, slides = [], []
        for own_TD, scores_T in parts:
            within.append(scores_T.log_softmax(0))
            slides.append(within[-1].exp() @ own_TD)
        token_W, log_share_S = self.case(self.project(torch.stack(slides)))
        pairs = zip(within, log_share_S, strict=True)
        log_T = torch.cat([log_own_T + log_share for log_own_T, log_share in pairs])
        return SlideOutput(self.head(token_W), log_T.exp(), token_W, log_T)


class Slides(nn.Module):
    """The transformer: slides of a case to its token."""

    def __init__(self, options: CaseTransformer):
        super().__init__()
        self.token_W = nn.Parameter(torch.randn(options.width) * 0.02)
        self.layers = nn.ModuleList(
            Block(options.width, options.heads, options.scale) for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(options.width)

    def forward(self, slides_SW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the case token (W,), and the logarithm of each slide's share in it, (S,)."""
        x_1NW = torch.cat([self.token_W[None], slides_SW])[None]
        for layer in self.layers:
            x_1NW, scores_1HN = layer(x_1NW)
        return self.norm(x_1NW[0, 0]), log_shares(scores_1HN[..., 1:])[0]
