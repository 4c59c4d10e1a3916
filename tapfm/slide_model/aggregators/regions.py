"""Mixed magnification: tiles of several scales meet region by region, then regions are pooled.

    x_t = W z_t + e_scale(t) + U place(t)                    place within the region, 0 to 1
    X_r = [c, x_t of region r];  `layers` times X_r <- block(X_r)
    w = softmax(gate(c_r)),  logits = head(norm(sum_r w_r c_r))

A region is one tile of the coarsest scale and all tiles of finer ones whose middle lies in it: of
5, 10 and 20x 1 + 4 + 16. The scale of a tile is its lattice's step against the finest of its slide.
Where a bag has one scale, as with slides, a region is `span` x `span` of its tiles. A tile's weight
is its region's times how much the region's token looks at it in the last layer.

Price: 12 W x W numbers a layer; time grows as the tiles times those of a region.
Condition: coordinates. Several scales come as `data.features_dir: FOLDER,FOLDER`, in features mode.
Source: Mixed magnification aggregation (2025): a region encoder over tokens of 5, 10 and 20x.
Differs: its encoder is first taught to restore masked tokens, which it gains most from; here it
    learns with the label alone. Depth and width are not published; these are small. Regions are
    pooled by gated attention. No dropout.

Shapes: T tiles, R regions, M tiles of the largest region, D features, W width, K labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfm.settings import below, refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet, need_places
from tapfm.slide_model.layers.attention import Gate
from tapfm.slide_model.layers.blocks import Block, log_shares

WAVES = 4  # of each axis of a place


@dataclass(frozen=True)
class Regions:
    """A transformer over the tiles of each region, of all scales, then attention over regions."""

    width: int = 256
    """Of the tokens, W."""
    layers: int = 2
    heads: int = 4
    """Of each attention; a divisor of `width`."""
    span: int = 4
    """Least side of a region, in tiles of the finest scale."""
    scales: int = 3
    """How many are told apart, each half as fine as the one before."""

    def __post_init__(self):
        faults = below(vars(self), dict.fromkeys(vars(self), 1))
        if not faults and self.width % self.heads:
            faults = [f"width must be a multiple of heads, got {self.width} and {self.heads}"]
        refuse(f"model.aggregator regions: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> RegionMixer:
        """Return the module; see `AggregatorOptions`."""
        return RegionMixer(dim, labels, self)


class RegionMixer(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: of the method.
    """

    uses_coords = True
    has_attention = True

    def __init__(self, dim: int, labels: int, options: Regions):
        super().__init__(dim, labels)
        self.options, width = options, options.width
        self.project = nn.Linear(dim, width)
        self.scale_SW = nn.Parameter(torch.randn(options.scales, width) * 0.02)
        self.place = nn.Linear(4 * WAVES, width, bias=False)
        self.token_W = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(Block(width, options.heads, 1.0) for _ in range(options.layers))
        self.norm_regions = nn.LayerNorm(width)
        self.gate = Gate(width, start_at_zero=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, labels)

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, tile weights, and the normalised weighted mean of the regions."""
        need_places(tiles, "regions")
        where = regions_of(tiles, self.options.span, self.options.scales)
        region_T, slot_T, scale_T, place_T2 = (each.to(tiles.z_TD.device) for each in where)
        x_TW = self.project(self.standardised(tiles.z_TD)) + self.scale_SW[scale_T]
        x_TW = x_TW + self.place(waves(place_T2.to(x_TW)))
        regions, most = int(region_T.max()) + 1, int(slot_T.max()) + 1
        there_RM = torch.zeros(regions, most + 1, dtype=torch.bool, device=x_TW.device)
        there_RM[region_T, slot_T + 1] = True
        there_RM[:, 0] = True
        x_RMW = x_TW.new_zeros(regions, most, x_TW.shape[1]).index_put((region_T, slot_T), x_TW)
        x_RMW = torch.cat([self.token_W.expand(regions, 1, -1), x_RMW], 1)
        for layer in self.layers:
            x_RMW, scores_RHM = layer(x_RMW, there_RM)
        c_RW = self.norm_regions(x_RMW[:, 0])
        log_R = self.gate(c_RW).log_softmax(0)
        b_W = self.norm(log_R.exp() @ c_RW)
        log_T = log_R[region_T] + log_shares(scores_RHM[..., 1:])[region_T, slot_T]
        return SlideOutput(self.head(b_W), log_T.exp(), b_W, log_T)


def regions_of(tiles: TileSet, span: int, scales: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each tile's region, number in it, scale (0 is the finest) and place in it (T, 2).

    A slide's regions begin at the first tile of its coarsest scale, so that they are those tiles.
    """
    cell_T3, scale_T, place_T2 = [], [], []
    for number in tiles.slide_of_T.unique():
        own_T = tiles.slide_of_T == number
        step_T, xy0_T2 = tiles.grid_px0_T[own_T], tiles.coords0_T2[own_T]
        fine, coarse = step_T.min(), step_T.max()
        side = torch.maximum(coarse, span * fine)
        first_2 = xy0_T2[step_T > coarse / math.sqrt(2)].amin(0)
        middle_T2 = ((xy0_T2 - first_2) + step_T[:, None] / 2) / side
        cell_T2 = middle_T2.floor()
        cell_T3.append(torch.cat([number.expand(len(cell_T2), 1), cell_T2.long()], 1))
        place_T2.append(middle_T2 - cell_T2)
        scale_T.append((step_T / fine).log2().round().long().clamp(max=scales - 1))
    region_T = torch.cat(cell_T3).unique(dim=0, return_inverse=True)[1]
    order_T = region_T.argsort(stable=True)
    counts_R = region_T.bincount()
    rank_T = torch.arange(len(region_T)) - (counts_R.cumsum(0) - counts_R)[region_T[order_T]]
    slot_T = torch.empty_like(rank_T).index_copy(0, order_T, rank_T)
    return region_T, slot_T, torch.cat(scale_T), torch.cat(place_T2)


def waves(place_T2: Tensor) -> Tensor:
    """Return sines and cosines of places in a region, (T, 4 WAVES)."""
    waves_W = math.pi * torch.arange(1, WAVES + 1, dtype=place_T2.dtype, device=place_T2.device)
    turned_TW = (place_T2[..., None] * waves_W).flatten(1)
    return torch.cat([turned_TW.sin(), turned_TW.cos()], 1)
