"""Mamba: tiles in a row, each of which sees a decaying memory of those before it.

    S_t = a_t S_{t-1} + d_t x_t B_t^T,  y_t = S_t C_t + D x_t       a, d, x, B, C from tile t
    x <- x + out(norm(y * silu(gate)))                               `layers` times
    w = softmax(V tanh(U x)),  logits = head(sum_t w_t x_t)

Tiles come row by row, slide after slide, as their places say. `scan` says what a layer reads:
    forward     that sequence, once
    reordered   MambaMIL: also the sequence with every `rate`-th tile beside each other, with a
                memory of its own; both are added
    local       LBMamba: within each run of `chunk` tiles also the tiles behind, at no further
                scan; every second layer reads the whole sequence from its end
The recurrence is computed in chunks (state space duality): within a chunk as a masked product of
matrices, between chunks as a state of P x N numbers a head. That is the recurrence itself, not an
approximation of it, linear in the tiles, without a kernel of our own.

Price: 3.8 M parameters on 1,024 features; memory grows as T x chunk x heads.
Condition: coordinates. Order matters: with `data.tiles_per_slide` neighbours in it lie far apart.
Source: Yang et al. 2024 (MambaMIL, arXiv 2403.06800); Zhang et al. 2025 (LBMamba, arXiv
    2506.15976); Dao and Gu 2024 (Mamba-2, arXiv 2405.21060), the layer and its chunks.
Differs: both papers take Mamba-1's layer, whose decay differs in every one of D x N states and
    which needs a kernel; here it is Mamba-2's, one decay a head. LBMamba looks back within the
    tiles of one thread, and turns every two layers, of many; here within a chunk, and every layer.
    No dropout.

Shapes: T tiles, D features, W width, H heads of P numbers, N state, Q chunk, M chunks, K labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tapfm.settings import below, did_you_mean, refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet, need_coords

SCANS = ("forward", "reordered", "local")
EXPAND, HEAD, KERNEL, UNITS = 2, 64, 4, 128  # Mamba-2's; MambaMIL's for attention
SLOWEST, FASTEST = 1e-3, 1e-1  # steps d at the start; Mamba's


@dataclass(frozen=True)
class Mamba:
    """State space layers over the tiles in a row, pooled by attention."""

    scan: str = "reordered"
    """`forward`, `reordered` (MambaMIL) or `local` (LBMamba)."""
    width: int = 512
    """Of the tokens, W; a layer computes in twice as many."""
    layers: int = 2
    state: int = 16
    """Numbers that each channel remembers, N."""
    rate: int = 10
    """Stride of the second order, of `reordered`."""
    chunk: int = 64
    """Tiles computed at once, Q; with `local`, how far a tile may look behind itself."""

    def __post_init__(self):
        faults = below(
            {key: value for key, value in vars(self).items() if key != "scan"},
            {"width": 1, "layers": 1, "state": 1, "rate": 1, "chunk": 1},
        )
        if self.scan not in SCANS:
            near = did_you_mean(self.scan, SCANS)
            faults.append(f"scan {self.scan!r} is none of {', '.join(SCANS)}.{near}")
        if not faults and EXPAND * self.width % min(HEAD, EXPAND * self.width):
            faults.append(f"width must be a multiple of {HEAD // EXPAND}, got {self.width}")
        refuse(f"model.aggregator mamba: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> TilesInARow:
        """Return the module; see `AggregatorOptions`."""
        return TilesInARow(dim, labels, self)


class TilesInARow(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits K.
        options: of the method.
    """

    uses_coords = True
    has_attention = True

    def __init__(self, dim: int, labels: int, options: Mamba):
        super().__init__(dim, labels)
        width = options.width
        self.project = nn.Linear(dim, width)
        self.layers = nn.ModuleList(
            Layer(options, turned=options.scan == "local" and n % 2 == 1)
            for n in range(options.layers)
        )
        self.norm_tiles = nn.LayerNorm(width)
        self.attention = nn.Sequential(
            nn.Linear(width, UNITS), nn.Tanh(), nn.Linear(UNITS, 1, bias=False)
        )
        self.head = nn.Linear(width, labels)

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, attention over the tiles, and their weighted mean."""
        order_T = row_by_row(need_coords(tiles, "mamba"), tiles.slide_of_T).to(tiles.z_TD.device)
        x_TW = F.gelu(self.project(self.standardised(tiles.z_TD[order_T])))
        for layer in self.layers:
            x_TW = layer(x_TW)
        x_TW = self.norm_tiles(x_TW)
        scores_T = self.attention(x_TW)[:, 0]
        weights_T, back_T = scores_T.softmax(0), order_T.argsort()
        b_W = weights_T @ x_TW
        log_T = scores_T.log_softmax(0)[back_T]
        return SlideOutput(self.head(b_W), weights_T[back_T], b_W, log_T)


class Memory(nn.Module):
    """One order's own part of a layer: convolution, and the recurrence."""

    def __init__(self, inner: int, state: int):
        super().__init__()
        heads = inner // min(HEAD, inner)
        self.conv = nn.Conv1d(
            inner + 2 * state, inner + 2 * state, KERNEL, groups=inner + 2 * state
        )
        step_H = torch.exp(torch.rand(heads) * math.log(FASTEST / SLOWEST) + math.log(SLOWEST))
        self.step_bias_H = nn.Parameter(step_H + torch.log(-torch.expm1(-step_H)))
        self.log_decay_H = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip_H = nn.Parameter(torch.ones(heads))
        self.sizes = [inner, state, state]

    def forward(self, xbc: Tensor, step_TH: Tensor, chunk: int, local: bool) -> Tensor:
        """Return y (T, H P) of x, B and C side by side, and of the steps before their softplus."""
        xbc = F.silu(self.conv(F.pad(xbc.T, (KERNEL - 1, 0))[None])[0].T)
        x, B_TN, C_TN = xbc.split(self.sizes, dim=1)
        x_THP = x.unflatten(1, (len(self.skip_H), -1))
        step_TH = F.softplus(step_TH + self.step_bias_H)
        log_a_TH = -step_TH * self.log_decay_H.exp()
        y_THP = scan(x_THP * step_TH[..., None], log_a_TH, B_TN, C_TN, chunk, local)
        return (y_THP + self.skip_H[:, None] * x_THP).flatten(1)


class Layer(nn.Module):
    """A state space layer, added to its input.

    Args:
        options: of the method.
        turned: whether it reads the sequence from its end.
    """

    def __init__(self, options: Mamba, *, turned: bool):
        super().__init__()
        self.options, self.turned = options, turned
        inner = EXPAND * options.width
        self.norm = nn.LayerNorm(options.width)
        heads = inner // min(HEAD, inner)
        self.sizes = [inner, inner + 2 * options.state, heads]
        self.enter = nn.Linear(options.width, sum(self.sizes), bias=False)
        orders = 2 if options.scan == "reordered" else 1
        self.memories = nn.ModuleList(Memory(inner, options.state) for _ in range(orders))
        self.norm_out = nn.RMSNorm(inner, eps=1e-5)
        self.leave = nn.Linear(inner, options.width, bias=False)

    def forward(self, x_TW: Tensor) -> Tensor:
        """Return the tokens (T, W) with what each remembers of the others."""
        gate, xbc, step_TH = self.enter(self.norm(x_TW)).split(self.sizes, dim=1)
        how = self.options.chunk, self.options.scan == "local"
        if self.turned:
            y = self.memories[0](xbc.flip(0), step_TH.flip(0), *how).flip(0)
        else:
            y = self.memories[0](xbc, step_TH, *how)
        for memory in self.memories[1:]:
            rows, back_T = strided(len(xbc), self.options.rate, xbc.device)
            y = y + memory(xbc[rows], step_TH[rows], *how)[back_T]
        return x_TW + self.leave(self.norm_out(y * F.silu(gate)))


def row_by_row(cells_T2: Tensor, slide_of_T: Tensor) -> Tensor:
    """Return the tiles (T,) of each slide in turn, row by row."""
    rows, columns = (cells_T2.amax(0) + 1).tolist()
    return ((slide_of_T * rows + cells_T2[:, 0]) * columns + cells_T2[:, 1]).argsort(stable=True)


def strided(count: int, rate: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the second order of so many tiles: every `rate`-th side by side; and its inverse.

    MambaMIL pads to a multiple of `rate` at the end, where it can only be read last in each run;
    leaving the padding out is the same but for empty steps.
    """
    place_T = torch.arange(count, device=device)
    order_T = (place_T % rate * count + place_T // rate).argsort()
    return order_T, order_T.argsort()


def scan(
    x_THP: Tensor, log_a_TH: Tensor, B_TN: Tensor, C_TN: Tensor, chunk: int, local: bool
) -> Tensor:
    """Return y (T, H, P) of S_t = a_t S_{t-1} + x_t B_t^T, y_t = S_t C_t.

    With `local`, y_t also has C_t of R_t = a_t (R_{t+1} + x_{t+1} B_{t+1}^T), a memory of the tiles
    behind t that begins anew at the end of each chunk; tile t itself counts once.

    Args:
        x_THP: what is remembered.
        log_a_TH: logarithm of the decay, 0 or less.
        B_TN: where it is written.
        C_TN: where it is read.
        chunk: tiles computed at once.
        local: whether tiles behind take part.
    """
    count, chunk = len(x_THP), min(chunk, len(x_THP))
    x, log_a, B, C = (in_chunks(each, chunk) for each in (x_THP, log_a_TH, B_TN, C_TN))
    sums_MHQ = log_a.cumsum(1).mT  # of log a, from a chunk's first tile to each of its tiles
    decay_MHQQ = within_chunk(sums_MHQ, log_a.mT, local)
    near = torch.einsum("mqn,msn->mqs", C, B)[:, None] * decay_MHQQ
    y = torch.einsum("mhqs,mshp->mqhp", near, x)
    left_MQH = (sums_MHQ[..., -1:] - sums_MHQ).exp().mT  # of each tile at its chunk's end
    own_MHPN = torch.einsum("mqhp,mqn->mhpn", x * left_MQH[..., None], B)
    kept_MH11 = sums_MHQ[..., -1].exp()[..., None, None]
    state, before = torch.zeros_like(own_MHPN[0]), []
    for kept, own in zip(kept_MH11, own_MHPN, strict=True):
        before.append(state)
        state = kept * state + own
    far = torch.einsum("mqn,mhpn->mqhp", C, torch.stack(before))
    return (y + far * sums_MHQ.exp().mT[..., None]).flatten(0, 1)[:count]


def within_chunk(sums_MHQ: Tensor, log_a_MHQ: Tensor, local: bool) -> Tensor:
    """Return how much of tile s is left at tile t of its chunk, (M, H, t, s).

    Ahead of s that is a_{s+1} .. a_t; behind it, where `local`, a_t .. a_{s-1}, otherwise 0.
    """
    ahead = sums_MHQ[..., :, None] - sums_MHQ[..., None, :]
    upper = torch.ones(ahead.shape[-2:], dtype=torch.bool, device=ahead.device).triu(1)
    if local:
        before_MHQ = sums_MHQ - log_a_MHQ  # sums without the tile's own
        behind = before_MHQ[..., None, :] - before_MHQ[..., :, None]
        return torch.where(upper, behind, ahead).exp()
    return ahead.masked_fill(upper, -torch.inf).exp()


def in_chunks(each_T: Tensor, chunk: int) -> Tensor:
    """Return a sequence (T, ...) as (M, Q, ...), zeros behind its end."""
    missing = -len(each_T) % chunk
    padded = torch.cat([each_T, each_T.new_zeros(missing, *each_T.shape[1:])])
    return padded.unflatten(0, (-1, chunk))
