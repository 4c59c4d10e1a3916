"""TransMIL: tiles attend to each other, and to their neighbours on the slide.

    x_t = relu(W z_t),  X = [c, x_1 .. x_T]                   c is the class token
    X <- X + attention(norm(X))                               every token to every other
    x <- x + conv3(x) + conv5(x) + conv7(x)                   PPEG, on the lattice of the tiles
    c <- c + attention(norm(X)) of c alone,  logits = head(norm(c))

With more tokens than `landmarks`, the first attention is Nystrom's: Q~, K~ are means of so many
runs of tokens, and softmax(Q K^T) is softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T).
Tile weights are the class token's last row of attention over the tiles, the mean of its heads; they
are exact, for heatmaps, and carry no gradient.

Price: 2.1 M parameters beside W; memory and time grow as T x landmarks.
Condition: coordinates.
Source: Shao et al. 2021 (TransMIL, arXiv 2106.00908); Xiong et al. 2021 (Nystromformer, arXiv
    2102.03902) for landmarks and the pseudo-inverse.
Differs: the paper squares the sequence of tiles for PPEG, padding it with its first; here tiles lie
    where they lie on the slide, holes are 0, and slides of a case do not touch. Tokens are taken
    row by row, so their order in the bag does not matter. The last layer is exact, since only the
    class token's row is read. No dropout, and no convolution of values along the sequence.

Shapes: T tiles, N = T + 1 tokens, D features, W width, H heads, M landmarks, E = W / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfm.settings import refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet, need_coords

RADIUS = 3  # of PPEG's largest kernel
ITERATIONS = 6  # of the pseudo-inverse; the paper's


@dataclass(frozen=True)
class TransMil:
    """Two layers of attention with a convolution over the slide's lattice between them."""

    width: int = 512
    """Of the tokens, W."""
    heads: int = 8
    """Of each attention, H; a divisor of `width`."""
    landmarks: int = 256
    """Attention over more tokens than these is approximated through as many means."""

    def __post_init__(self):
        numbers = {"width": self.width, "heads": self.heads, "landmarks": self.landmarks}
        faults = [f"{key} must be 1 or more, got {n}" for key, n in numbers.items() if n < 1]
        if not faults and self.width % self.heads:
            faults = [f"width must be a multiple of heads, got {self.width} and {self.heads}"]
        refuse(f"model.aggregator transmil: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> LatticeTransformer:
        """Return the module; see `AggregatorOptions`."""
        return LatticeTransformer(dim, labels, self)


class LatticeTransformer(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: width, heads and landmarks.
    """

    uses_coords = True

    def __init__(self, dim: int, labels: int, options: TransMil):
        super().__init__(dim, labels)
        width = options.width
        self.project = nn.Linear(dim, width)
        self.class_token_W = nn.Parameter(torch.randn(width) * 0.02)
        self.first = Attention(width, options.heads, options.landmarks)
        self.neighbours = Neighbours(width)
        self.last = Attention(width, options.heads, options.landmarks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, labels)

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, the class token's attention to each tile, and the class token."""
        cells_T2 = packed(need_coords(tiles, "transmil"), tiles.slide_of_T)
        order_T = (cells_T2[:, 0] * (cells_T2[:, 1].max() + 1) + cells_T2[:, 1]).argsort()
        cells_T2, order_T = cells_T2[order_T], order_T.to(tiles.z_TD.device)
        x_TW = self.project(self.standardised(tiles.z_TD)[order_T]).relu()
        x_NW = self.first(torch.cat([self.class_token_W[None], x_TW]))
        x_NW = torch.cat([x_NW[:1], self.neighbours(x_NW[1:], cells_T2)])
        c_W, weights_T = self.last.first_token(x_NW)
        c_W = self.norm(c_W)
        return SlideOutput(self.head(c_W), weights_T[order_T.argsort()], c_W)


class Attention(nn.Module):
    """Self-attention of normalised tokens, added to them."""

    def __init__(self, width: int, heads: int, landmarks: int):
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x_NW: Tensor) -> Tensor:
        """Return all tokens (N, W); attention is exact where there are landmarks enough."""
        q, k, v = self._heads(x_NW)
        exact = len(x_NW) <= self.landmarks
        seen = softmax(q, k) @ v if exact else nystrom(q, k, v, self.landmarks)
        return x_NW + self.out(seen.transpose(0, 1).flatten(1))

    def first_token(self, x_NW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first token (W,), and its attention to the others, summing to 1."""
        q, k, v = self._heads(x_NW)
        seen_HE = (softmax(q[:, :1], k) @ v).squeeze(1)
        weights_T = softmax(q[:, :1], k[:, 1:]).detach().mean((0, 1))
        return x_NW[0] + self.out(seen_HE.flatten()), weights_T

    def _heads(self, x_NW: Tensor) -> Tensor:
        """Return queries, scaled, keys and values: (3, H, N, E)."""
        q, k, v = self.qkv(self.norm(x_NW)).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return torch.stack([q / math.sqrt(q.shape[-1]), k, v])


class Neighbours(nn.Module):
    """PPEG: depthwise convolutions of tiles on their lattice, added to the tiles."""

    def __init__(self, width: int):
        super().__init__()
        self.kernels = nn.ModuleList(
            nn.Conv2d(width, width, side, groups=width) for side in (3, 5, 2 * RADIUS + 1)
        )

    def forward(self, x_TW: Tensor, cells_T2: Tensor) -> Tensor:
        """Return the tiles (T, W), each with what lies around its cell (on the CPU)."""
        # The three kernels add up to one, so the lattice is convolved once.
        weight = sum(F.pad(k.weight, 4 * [RADIUS - k.kernel_size[0] // 2]) for k in self.kernels)
        bias_W = sum(k.bias for k in self.kernels)
        rows, columns = (cells_T2.amax(0) + 1).tolist()
        at_T = (cells_T2[:, 0] * columns + cells_T2[:, 1]).to(x_TW.device)
        lattice = x_TW.new_zeros(rows * columns, x_TW.shape[1]).index_add(0, at_T, x_TW)
        lattice = lattice.T.unflatten(1, (rows, columns))
        around = F.conv2d(lattice[None], weight, bias_W, padding=RADIUS, groups=len(bias_W))[0]
        return x_TW + around.flatten(1).T[at_T]


def packed(lattice_T2: Tensor, slide_of_T: Tensor) -> Tensor:
    """Return row and column of each tile on one lattice for all slides, as small as serves PPEG.

    Slides lie below each other. Empty rows and columns stay as far as a kernel reaches, and no
    further: so no slide reaches another, and tiles see the same neighbours as on their own lattice.
    """
    below_T = slide_of_T * (lattice_T2[:, 0].max() + RADIUS + 1)
    return torch.stack([_closed_up(lattice_T2[:, 0] + below_T), _closed_up(lattice_T2[:, 1])], 1)


def _closed_up(place_T: Tensor) -> Tensor:
    """Return places from 0 on, in order, gaps of more than RADIUS cut to RADIUS."""
    there, number_T = place_T.unique(return_inverse=True)
    return there.diff(prepend=there[:1]).clamp(max=RADIUS + 1).cumsum(0)[number_T]


def softmax(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention of queries to keys, rows summing to 1."""
    return (q @ k.mT).softmax(-1)


def nystrom(q: Tensor, k: Tensor, v: Tensor, landmarks: int) -> Tensor:
    """Return softmax(q k^T) v, (H, N, E), by way of so many landmarks, at most N."""
    q_M, k_M = run_means(q, landmarks), run_means(k, landmarks)
    return softmax(q, k_M) @ (pseudo_inverse(softmax(q_M, k_M)) @ (softmax(q_M, k) @ v))


def run_means(x: Tensor, runs: int) -> Tensor:
    """Return the means (H, M, E) of so many runs of tokens (H, N, E), of N / M each or one more."""
    run_N = torch.arange(x.shape[1], device=x.device) * runs // x.shape[1]
    sums = x.new_zeros(x.shape[0], runs, x.shape[2]).index_add(1, run_N, x)
    return sums / run_N.bincount(minlength=runs)[:, None]


def pseudo_inverse(a: Tensor) -> Tensor:
    """Return the iterated pseudo-inverse of matrices (H, M, M) whose rows sum to 1."""
    z = a.mT / a.sum(-2).amax(-1)[:, None, None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(ITERATIONS):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z
