"""PathPT's mixer: tiles attend to their neighbours on the slide, then to the whole slide.

    z <- z + mix(sum_k relu(norm(conv_k(z))))     k = 3, 5, 7 tiles wide, on the tiles' own grid
    z <- z + attention(norm(z))                   every tile to every other

Convolutions are depth-wise and two-dimensional on the tiles' true places, so the order in which
tiles come does not matter, and a tile without neighbours has zeros around it. Empty rows and
columns of the grid are shortened to just more than a kernel can reach, which changes no number and
keeps far-apart sections cheap. Both additions start at 0: at first the mixer is the identity, and
zero-shot predictions are those without it.

Price: d x (4 d + d + 83) + 7 d numbers, 2.9 M at d = 768; memory grows with the grid and, since
    attention is never held as a matrix, linearly with the tiles.

Source: PathPT (arXiv 2508.15904): three convolutions of 3, 5 and 7 into one norm, ReLU, their sum
    beside the residual, then one attention layer of 8 heads with a residual of its own.
Differs: by our choice, where the release runs full convolutions along the stored order and an
    approximate (Nystrom) attention: convolutions on true coordinates, depth-wise with one matrix
    that mixes their channels behind the sum; exact attention; zero-initialised outputs, and no
    norm at the end, which would undo the identity. Dropout is on the attention's output.

Shapes: N tiles, d width, Y X rows and columns of the grid.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNELS = (3, 5, 7)
REACH = max(KERNELS) // 2


class PlaceError(ValueError):
    """Tiles do not lie on a regular grid."""


class Mixer(nn.Module):
    """A module that mixes tile vectors (N, d) over neighbours and over the slide.

    Args:
        dim: d.
        heads: heads of the attention, a divisor of d.
        dropout: dropout rate of the attention's output.
    """

    def __init__(self, dim: int, heads: int = 8, dropout: float = 0.1):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: {heads} do not divide a width of {dim}")
        self.heads = heads
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in KERNELS
        )
        self.near, self.mix = nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False)
        self.far, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim, bias=False)
        self.out, self.dropout = nn.Linear(dim, dim), nn.Dropout(dropout)
        for zero in (self.mix.weight, self.out.weight, self.out.bias):
            nn.init.zeros_(zero)

    def forward(self, z_Nd: Tensor, places_N2: Tensor) -> Tensor:
        """Return mixed tiles (N, d), in the given order.

        Args:
            z_Nd: tiles.
            places_N2: row and column of each on the grid, from `places`; all distinct.
        """
        z_Nd = z_Nd + self.neighbours(z_Nd, places_N2)
        return z_Nd + self.slide(z_Nd)

    def neighbours(self, z_Nd: Tensor, places_N2: Tensor) -> Tensor:
        """Return what the convolutions add, (N, d)."""
        row_N, column_N = compact(places_N2).unbind(1)
        map_YXd = z_Nd.new_zeros(int(row_N.max()) + 1, int(column_N.max()) + 1, z_Nd.shape[1])
        map_YXd = map_YXd.index_put((row_N, column_N), z_Nd)
        map_1dYX = map_YXd.permute(2, 0, 1)[None]
        seen = (conv(map_1dYX)[0].permute(1, 2, 0)[row_N, column_N] for conv in self.convs)
        return self.mix(sum(F.relu(self.near(each_Nd)) for each_Nd in seen))

    def slide(self, z_Nd: Tensor) -> Tensor:
        """Return what the attention adds, (N, d)."""
        q, k, v = self.qkv(self.far(z_Nd)).unflatten(1, (3, self.heads, -1)).unbind(1)
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        seen_Nd = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)
        return self.dropout(self.out(seen_Nd))


def places(coords0: np.ndarray, step0: float) -> Tensor:
    """Return row and column (N, 2) of tiles, int64, from their corners (N, 2), columns x0, y0.

    Args:
        coords0: level-0 pixels; sections need not share a lattice.
        step0: distance between neighbours, level-0 pixels. Corners are rounded to it.

    Raises:
        PlaceError: two tiles have the same place: the step is too long for these corners.
    """
    offset_N2 = np.asarray(coords0, float) - np.min(coords0, axis=0)
    places_N2 = np.floor(offset_N2 / step0 + 0.5).astype(np.int64)[:, ::-1]
    distinct = len(np.unique(places_N2, axis=0))
    if distinct != len(places_N2):
        raise PlaceError(
            f"{len(places_N2)} tiles are at {distinct} places of a grid of {step0:g} level-0 "
            "pixels: they overlap, or come from another grid. Index the slide with this grid."
        )
    return torch.from_numpy(places_N2.copy())


def compact(places_N2: Tensor) -> Tensor:
    """Return places with every empty stretch shortened to just more than a kernel can reach."""
    kept = []
    for axis_N in places_N2.unbind(1):
        values, back_N = torch.unique(axis_N, return_inverse=True)
        steps = torch.diff(values, prepend=values[:1]).clamp(max=REACH + 1)
        kept.append(steps.cumsum(0)[back_N])
    return torch.stack(kept, dim=1)
