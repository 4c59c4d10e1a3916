"""Attention over tiles: min-max of a score, a learned gate, and how many tiles are looked at.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184), min-max; Ilse et al. 2018 (arXiv 1802.04712),
    gated attention.
Differs: min-max ignores a spread below rounding (the paper divides by spread + 1e-8, which makes
    equal tiles unequal).

Shapes: T tiles, D features, A units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPREAD_ULPS = 64  # scores closer than this many roundings of their size are equal
GATE_UNITS = 128


def minmax(score_T: Tensor) -> Tensor:
    """Return scores moved to [0, 1] over the bag; all 0 where they are equal up to rounding."""
    low, high = score_T.min(), score_T.max()
    rounding = SPREAD_ULPS * torch.finfo(score_T.dtype).eps * score_T.abs().max().detach()
    spread = high - low
    equal = spread.detach() <= rounding
    # where on both sides: a division by 0 in the untaken branch would still give nan gradients
    safe = torch.where(equal, torch.ones_like(spread), spread)
    return torch.where(equal, torch.zeros_like(score_T), (score_T - low) / safe)


def effective_tiles(weights_T: Tensor) -> Tensor:
    """Return 1 / sum w^2: how many tiles the bag embedding really stands on, 1 to T."""
    return 1 / weights_T.square().sum()


class Gate(nn.Module):
    """Gated attention, tanh x sigmoid, one logit a tile."""

    def __init__(self, dim: int, units: int = GATE_UNITS, *, start_at_zero: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.tanh = nn.Linear(dim, units)
        self.sigmoid = nn.Linear(dim, units)
        self.last = nn.Linear(units, 1, bias=False)  # softmax over tiles ignores a bias
        if start_at_zero:
            nn.init.zeros_(self.last.weight)

    def forward(self, z_TD: Tensor) -> Tensor:
        """Return logits (T,)."""
        x_TD = self.norm(z_TD)
        units_TA = torch.tanh(self.tanh(x_TD)) * torch.sigmoid(self.sigmoid(x_TD))
        return self.last(units_TA).squeeze(-1)
