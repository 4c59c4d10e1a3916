"""An unbiased backward of a few of the slide's tiles: those whose gradients are large, mostly.

Pass 1 has told how much the loss depends on each tile: the norm g of its row of dL/dz and dL/ds.
If pass 2 takes tile t with probability p_t and weighs it by 1 / p_t, the encoder's gradient is
right on average; p_t proportional to g_t, and 1 at most, makes it vary least for a given number of
tiles. With attention on a few tiles, a tenth of them carries most of the gradient.

    weight_T = draw_tiles(grad_z, grad_score, budget=100, seed=...)     0: left out; else 1 / p
    adapt_bag(encode, chosen(chunks, weight_T).split(16), (grad_z * weight)[weight > 0], ...)

How near one slide's estimate is to its exact gradient, `cosine` says, of what was `taken` from the
parameters after a backward of each kind.

Price: the gradient is an estimate, of a slide whose every tile had a say in the loss. Pass 2 costs
3 forwards of `budget` tiles instead of all; which tiles these are is asked of the device once.
Condition: no dropout and no drop-path, whose noise belongs to the chunks of pass 1.
Source: Katharopoulos and Fleuret 2018 (arXiv 1803.00942), sampling by gradient norm; systematic
    sampling with unequal probabilities, Madow 1949.

Shapes: T tiles of a slide, C tiles of a chunk, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]
"""Of parameters, in their order; None where there is none."""


def draw_tiles(grad_z_TD: Tensor, grad_score_T: Tensor | None, budget: int, seed: int) -> Tensor:
    """Weights (T,) of the tiles: 0 where left out, else 1 over the probability of being taken.

    Args:
        grad_z_TD: dL/dz.
        grad_score_T: dL/ds, or None where the aggregator does not use the score.
        budget: tiles to take; one more or less may come of it. Tiles without gradient are never
            taken, and all others are where there are no more of them.
        seed: of the draw.
    """
    parts = [grad_z_TD] if grad_score_T is None else [grad_z_TD, grad_score_T[:, None]]
    norm_T = torch.cat(parts, dim=1).norm(dim=1).double().cpu()
    chance_T = _chances(norm_T, budget)
    # every tile is a stretch of its chance on a line, and is taken if a mark falls on it; the
    # marks are 1 apart, so that their number is the budget and no tile has two
    offset = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ends_T = chance_T.cumsum(0) + offset
    taken_T = ends_T.floor() > torch.cat([offset[None], ends_T[:-1]]).floor()
    sure_T = chance_T >= 1
    weight_T = torch.where(taken_T | sure_T, 1 / chance_T.clamp_min(1e-300), 0.0)
    return torch.where(chance_T > 0, weight_T, 0.0).to(grad_z_TD)


def _chances(norm_T: Tensor, budget: int) -> Tensor:
    """Proportional to the norm, 1 at most, adding up to the budget."""
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


def chosen(chunks_CP: Iterable[Tensor], weight_T: Tensor) -> Tensor:
    """The tiles with a weight, in order, together."""
    places = (weight_T > 0).cpu()
    rows, done = [], 0
    for tiles_CP in chunks_CP:
        rows.append(tiles_CP[places[done : done + len(tiles_CP)].to(tiles_CP.device)])
        done += len(tiles_CP)
    return torch.cat([each.to(rows[0].device) for each in rows])  # tokens may lie on either side


def taken(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Their gradients, which they have no longer."""
    grads = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return grads


def give(parameters: Sequence[nn.Parameter], grads: Gradients) -> None:
    """Add gradients to what the parameters have."""
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)


def cosine(one: Gradients, other: Gradients) -> Tensor:
    """Of the angle between two gradients of the same parameters; nan where one is 0."""
    parts = [
        torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]).double()
        for a, b in zip(one, other, strict=True)
        if a is not None and b is not None
    ]
    if not parts:
        return torch.tensor(torch.nan)
    product, left, right = torch.stack(parts).sum(0)
    return product / (left * right).sqrt()
