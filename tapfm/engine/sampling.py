"""An unbiased backward over a few of a slide's tiles, mostly those with large gradients.

Pass 1 gives how much the loss depends on each tile: the norm g of its row of dL/dz and dL/ds. If
pass 2 takes tile t with probability p_t and weighs it by 1 / p_t, the encoder's gradient is right
on average; p_t proportional to g_t, and at most 1, gives the least variance for a number of tiles.
With attention on a few tiles, a tenth of them carries most of the gradient.

    weight_T = draw_tiles(grad_z, grad_score, budget=100, seed=...)     0: left out; else 1 / p
    adapt_bag(encode, ChosenTiles(tiles, 16, weight_T).split(16), (grad_z * weight)[weight > 0])

`cosine` compares one slide's estimate with its exact gradient; `taken` reads either off the
parameters after a backward.

Price: the gradient is an estimate; all tiles still enter the slide's loss. Pass 2 costs 3 forwards
of `budget` tiles instead of all, and one wait for the device to learn which tiles were drawn.
Condition: no dropout and no drop-path, because their noise is drawn by the chunks of pass 1.
Source: Katharopoulos and Fleuret 2018 (arXiv 1803.00942), sampling by gradient norm; systematic
    sampling with unequal probabilities, Madow 1949.

Shapes: T tiles of a slide, C tiles of a chunk, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tapfm.data.bag import Tiles

Gradients = list[Tensor | None]
"""Gradients of parameters, in their order; None for a parameter without one."""


def draw_tiles(grad_z_TD: Tensor, grad_score_T: Tensor | None, budget: int, seed: int) -> Tensor:
    """Return weights (T,) on the CPU: 0 for a tile left out, else 1 over its chance to be drawn.

    Args:
        grad_z_TD: dL/dz.
        grad_score_T: dL/ds, or None where the aggregator does not use the score.
        budget: tiles to draw, give or take one. Tiles without gradient are never drawn; if no more
            than `budget` have one, all those are.
        seed: seed of the draw.
    """
    parts = [grad_z_TD] if grad_score_T is None else [grad_z_TD, grad_score_T[:, None]]
    norm_T = torch.cat(parts, dim=1).norm(dim=1).double().cpu()
    chance_T = _chances(norm_T, budget)
    # systematic sampling: tiles lie end to end on a line, each as long as its probability, and a
    # tile is drawn if a mark falls on it; marks are 1 apart, so no tile has two
    offset = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends_T = chance_T.cumsum(0) + offset
    taken_T = ends_T.floor() > torch.cat([offset[None], ends_T[:-1]]).floor()
    sure_T = chance_T >= 1
    weight_T = torch.where(taken_T | sure_T, 1 / chance_T.clamp_min(1e-300), 0.0)
    return torch.where(chance_T > 0, weight_T, 0.0).to(grad_z_TD.dtype)


def has_gradient(grad_z_TD: Tensor, grad_score_T: Tensor | None) -> Tensor:
    """Return 1 for tiles with a gradient, (T,) on the CPU: the others need no second forward."""
    some_T = (grad_z_TD != 0).any(1)
    some_T = some_T if grad_score_T is None else some_T | (grad_score_T != 0)
    return some_T.cpu().to(grad_z_TD.dtype)


def _chances(norm_T: Tensor, budget: int) -> Tensor:
    """Return probabilities (T,) proportional to the norm, at most 1, that sum to the budget."""
    chance_T = torch.zeros_like(norm_T)
    left_T = norm_T > 0
    room = float(budget)
    while left_T.any():
        if room <= 0:
            break
        share_T = room * norm_T / norm_T[left_T].sum()
        full_T = left_T & (share_T >= 1)
        if not full_T.any():
            return torch.where(left_T, share_T, chance_T)
        chance_T[full_T] = 1.0
        left_T &= ~full_T
        room -= int(full_T.sum())
    return chance_T


class ChosenTiles:
    """The tiles whose weight is above 0, in order, a chunk in memory at a time.

    Args:
        tiles: all tiles of the slide.
        size: tiles that are read at once.
        weight_T: of each tile, on the CPU.
    """

    def __init__(self, tiles: Tiles, size: int, weight_T: Tensor):
        self.tiles, self.size, self.chosen_T = tiles, size, weight_T > 0

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield chunks of `size` tiles; the last may be short."""
        left_CP, done = None, 0
        for tiles_CP in self.tiles.split(self.size):
            rows_C = self.chosen_T[done : done + len(tiles_CP)].to(tiles_CP.device)
            done += len(tiles_CP)
            own_CP = tiles_CP[rows_C]  # tokens may lie on either side
            left_CP = own_CP if left_CP is None else torch.cat([left_CP, own_CP.to(left_CP.device)])
            while len(left_CP) >= size:
                yield left_CP[:size]
                left_CP = left_CP[size:]
        if left_CP is not None and len(left_CP):
            yield left_CP


def taken(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Return the parameters' gradients and set each `.grad` to None."""
    grads = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


def give(parameters: Sequence[nn.Parameter], grads: Gradients) -> None:
    """Add gradients to the parameters' `.grad`."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def cosine(one: Gradients, other: Gradients) -> Tensor:
    """Return the cosine similarity of two gradients of the same parameters; nan if one is 0."""
    parts = [
        torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]).double()
        for a, b in zip(one, other, strict=True)
        if a is not None and b is not None
    ]
    if not parts:
        return torch.tensor(torch.nan)
    product, left, right = torch.stack(parts).sum(0)
    return product / (left * right).sqrt()
