"""Madeleine's slide encoder: tiles through three layers, then several heads of gated attention.

    e_t = mlp(z_t), cut into H parts e_t1 .. e_tH of width W
    w_th = softmax_t(u_h . (tanh(V_h e_th) * sigmoid(U_h e_th)))
    b = P [sum_t w_t1 e_t1, .., sum_t w_tH e_tH],  logits = head(b)

A start for it is the published network: `model.start_from: FOLDER` with the publisher's files
(`tapfm.slide_encoders`), on the features that it was trained on. A tile's weight is the mean of its
heads'.

Price: D W + (1 + 2 H) W^2 + 2 H W A + H W^2 numbers and a little: 5.0 M published parameters, of
    which 0.3 M served pretraining alone.
Source: Jaume et al. 2024 (MADELEINE, arXiv 2408.02859), and its published files for sizes and
    the order of channels: the parts of a tile are interleaved, channel w of head h is w H + h.
Differs: no dropout; the attention's own bias, which a softmax ignores, is left out; narrow unless
    it is told otherwise: `{width: 512, heads: 4, units: 512}` is the published size.

Shapes: T tiles, D features, W width, H heads, A attention units, K labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfm.settings import below, refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


@dataclass(frozen=True)
class Madeleine:
    """Several heads of gated attention over projected tiles."""

    width: int = 128
    """Of a tile's part for each head, W, and of the slide's embedding."""
    heads: int = 4
    """H."""
    units: int = 128
    """Of each head's attention, A."""

    def __post_init__(self):
        faults = below(vars(self), {"width": 1, "heads": 1, "units": 1})
        refuse(f"model.aggregator madeleine: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> MultiHead:
        """Return the module; see `AggregatorOptions`."""
        return MultiHead(dim, labels, self)


class MultiHead(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: of the method.
    """

    has_attention = True

    def __init__(self, dim: int, labels: int, options: Madeleine):
        super().__init__(dim, labels)
        width, heads = options.width, options.heads
        self.heads = heads
        self.mlp = nn.Sequential(
            *_layer(dim, width), *_layer(width, width), *_layer(width, heads * width)
        )
        self.attention = nn.ModuleList(Part(width, options.units) for _ in range(heads))
        self.project = nn.Linear(heads * width, width)
        self.head = nn.Linear(width, labels)

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, the mean weight of the heads and the slide's embedding (W,)."""
        e_TWH = self.mlp(self.standardised(tiles.z_TD)).unflatten(1, (-1, self.heads))
        scores = [part(e_TWH[:, :, h]) for h, part in enumerate(self.attention)]
        log_TH = torch.stack(scores, dim=1).log_softmax(0)
        pooled_WH = (e_TWH * log_TH.exp()[:, None]).sum(0)
        b_W = self.project(pooled_WH.flatten())
        log_T = log_TH.logsumexp(1) - math.log(self.heads)
        return SlideOutput(self.head(b_W), log_T.exp(), b_W, log_T)


class Part(nn.Module):
    """Gated attention of one head."""

    def __init__(self, width: int, units: int):
        super().__init__()
        self.tanh, self.sigmoid = nn.Linear(width, units), nn.Linear(width, units)
        self.last = nn.Linear(units, 1, bias=False)  # softmax over tiles ignores a bias

    def forward(self, e_TW: Tensor) -> Tensor:
        """Return logits (T,)."""
        units_TA = torch.tanh(self.tanh(e_TW)) * torch.sigmoid(self.sigmoid(e_TW))
        return self.last(units_TA).squeeze(-1)


def _layer(width: int, out: int) -> list[nn.Module]:
    return [nn.Linear(width, out), nn.LayerNorm(out), nn.GELU()]
