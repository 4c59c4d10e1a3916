"""MOOZY's slide encoder and case transformer: tiles look at each other, the near ones more.

    X_i = [cls, registers, p(z_1) .. p(z_T)]           of slide i;  L times X_i <- block(X_i)
    softmax_u(q_t . k_u / sqrt(W / H) - m_h |place_t - place_u|)      a block's attention, head h
    C = [case, norm(X_1)[cls], .., norm(X_S)[cls]];    L' times C <- block'(C)
    logits = head(norm(C)[case])

Distances are counted in tiles; cls and registers are near to everything. The slopes m_h are fixed:
heads look from half the slide to a tile or two around them (ALiBi). Slides of a case have no order.
A start for it is the published network: `model.start_from: FILE` with the publisher's moozy.pt
(`tapfm.slide_encoders`). A tile's weight is how much cls looks at it in the last block, the mean of
the heads, times how much the case token looks at its slide.

Price: 12 W^2 numbers a block: 64.1 M as published. Attention of all tiles to all: time grows with
    T^2, and in training so does memory, 4 H T^2 bytes a block: set `data.tiles_per_slide`.
Condition: tiles of one lattice with coordinates.
Source: MOOZY (arXiv 2603.27048, 2026), and its published files for sizes; Press et
    al. 2022 (ALiBi, arXiv 2108.12409) for the slopes.
Differs: no dropout and no drop path; no mask token, which served pretraining; distances by the
    lattice's step, theirs by a tile's side, the same unless tiles overlap; small unless it is told
    otherwise: configs/aggregators/moozy.yaml is the published size.

Shapes: T tiles of a slide, S slides, N tokens, D features, W width, H heads, K labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tapfm.settings import below, refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet, need_coords
from tapfm.slide_model.layers.blocks import log_shares

ROWS = 512  # queries at once, so that without gradients attention takes T x ROWS numbers a head


@dataclass(frozen=True)
class Moozy:
    """A transformer over the tiles of each slide, then one over the slides of a case."""

    width: int = 96
    """Of the tokens, W."""
    layers: int = 2
    """Blocks of a slide."""
    case_layers: int = 1
    """Blocks of a case."""
    heads: int = 4
    """Of each attention, H; a divisor of `width`."""
    registers: int = 4
    """Tokens beside cls that hold what is not of a tile."""
    case_registers: int = 0
    qk_norm: bool = False
    """Normalise queries and keys, head by head, in the blocks of a slide."""
    case_qk_norm: bool = False
    scale: float = 0.0
    """What a slide's block changes is multiplied by this at the start, channel by channel
    (LayerScale); 0 is no such scale."""
    case_scale: float = 1e-5
    """The same of a case's blocks."""

    def __post_init__(self):
        least = {"width": 1, "layers": 1, "case_layers": 1, "heads": 1, "registers": 0,
                 "case_registers": 0, "scale": 0, "case_scale": 0}  # fmt: skip
        faults = below(vars(self), least)
        if not faults and self.width % self.heads:
            faults = [f"width must be a multiple of heads, got {self.width} and {self.heads}"]
        refuse(f"model.aggregator moozy: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> SlidesAndCase:
        """Return the module; see `AggregatorOptions`."""
        return SlidesAndCase(dim, labels, self)


class SlidesAndCase(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: of the method.
    """

    uses_coords = has_attention = True

    def __init__(self, dim: int, labels: int, options: Moozy):
        super().__init__(dim, labels)
        each = options.width, options.heads
        self.project = nn.Sequential(nn.Linear(dim, options.width), nn.GELU())
        self.register_buffer("slopes_H", torch.tensor(slopes(options.heads)))
        self.slide = Tokens(*each, options.layers, options.registers, options.qk_norm,
                            options.scale)  # fmt: skip
        self.case = Tokens(*each, options.case_layers, options.case_registers,
                           options.case_qk_norm, options.case_scale)  # fmt: skip
        self.head = nn.Linear(options.width, labels)

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, the tiles' weights in the case, and the case token (W,)."""
        yx_T2 = need_coords(tiles, "moozy").to(tiles.z_TD)
        x_TW = self.project(self.standardised(tiles.z_TD))
        parts = zip(x_TW.split(tiles.counts), yx_T2.split(tiles.counts), strict=True)
        found = [self.slide(own_TW, own_T2, self.slopes_H) for own_TW, own_T2 in parts]
        token_W, log_share_S = self.case(torch.stack([cls_W for cls_W, _ in found]))
        log_T = torch.cat([
            log_own_T + log_share
            for (_, log_own_T), log_share in zip(found, log_share_S, strict=True)
        ])  # fmt: skip
        return SlideOutput(self.head(token_W), log_T.exp(), token_W, log_T)


class Tokens(nn.Module):
    """A transformer of one token that sums up, registers, and what is summed up."""

    def __init__(
        self, width: int, heads: int, layers: int, registers: int, qk_norm: bool, scale: float
    ):
        super().__init__()
        self.token_W = nn.Parameter(torch.randn(width) * 0.02)
        drawn_RW = torch.randn(registers, width) * 0.02
        self.registers_RW = nn.Parameter(drawn_RW) if registers else None
        self.blocks = nn.ModuleList(Near(width, heads, qk_norm, scale) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self, x_TW: Tensor, yx_T2: Tensor | None = None, slopes_H: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the token (W,), and the logarithm of each x's share in it, (T,).

        Args:
            x_TW: what is summed up.
            yx_T2: places; None where there is no distance.
            slopes_H: what a distance of 1 takes from the attention, head by head.
        """
        registers = [] if self.registers_RW is None else [self.registers_RW]
        x_NW = torch.cat([self.token_W[None], *registers, x_TW])
        first = len(x_NW) - len(x_TW)
        for block in self.blocks:
            x_NW, scores_HN = block(x_NW, first, yx_T2, slopes_H)
        return self.norm(x_NW[0]), log_shares(scores_HN[None, :, first:])[0]


class Near(nn.Module):
    """Attention that distance weakens, and two linear layers; each normalised first and added."""

    def __init__(self, width: int, heads: int, qk_norm: bool, scale: float):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = (
            nn.LayerNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale_W, self.scale_mlp_W = (
            nn.Parameter(torch.full((width,), scale)) if scale else None for _ in range(2)
        )

    def forward(
        self, x_NW: Tensor, first: int, yx_T2: Tensor | None, slopes_H: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens, and the first one's attention (H, N) before its softmax.

        Args:
            x_NW: tokens; those from `first` on have places.
            first: number of tokens without one.
            yx_T2: places; None is none.
            slopes_H: see `Tokens`.
        """
        qkv = self.qkv(self.norm(x_NW)).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.permute(1, 2, 0, 3)
        q, k = self.norm_q(q), self.norm_k(k)
        seen = []
        for begun in range(0, len(x_NW), ROWS):
            bias = None
            if yx_T2 is not None:
                bias = -slopes_H[:, None, None] * _distances(yx_T2, first, begun)
            own = q[:, begun : begun + ROWS]
            seen.append(F.scaled_dot_product_attention(own, k, v, attn_mask=bias))
        seen_NW = torch.cat(seen, dim=1).transpose(0, 1).flatten(1)
        x_NW = x_NW + _scaled(self.out(seen_NW), self.scale_W)
        x_NW = x_NW + _scaled(self.mlp(self.norm_mlp(x_NW)), self.scale_mlp_W)
        scores_HN = (q[:, :1] @ k.mT)[:, 0] / math.sqrt(q.shape[-1])
        return x_NW, scores_HN


def slopes(heads: int) -> list[float]:
    """Return ALiBi's slope of each head: a falling series of powers of 2.

    Where the number of heads is no power of 2, that of the next smaller one is followed by every
    second slope of twice as many.
    """
    whole = 2 ** int(math.log2(heads))
    series = [2 ** (-8 * (n + 1) / whole) for n in range(whole)]
    return series + [2 ** (-4 * (n + 1) / whole) for n in range(0, 2 * whole, 2)][: heads - whole]


def _distances(yx_T2: Tensor, first: int, begun: int) -> Tensor:
    """Return distances (at most ROWS, N) of the tokens from `begun` on to all; 0 without place."""
    count = min(ROWS, first + len(yx_T2) - begun)
    far_RN = yx_T2.new_zeros(count, first + len(yx_T2))
    placed = min(count, max(0, first - begun))  # the first rows of this part have no place
    own_R2 = yx_T2[max(0, begun - first) :][: count - placed]
    far_RN[placed:, first:] = (own_R2[:, None] - yx_T2[None]).square().sum(-1).sqrt()
    return far_RN


def _scaled(x_NW: Tensor, scale_W: Tensor | None) -> Tensor:
    return x_NW if scale_W is None else scale_W * x_NW
