"""DoRA: linear layers learn a low-rank change of the weight and, apart, the length of its rows.

W becomes m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, row by row. Identity at the start:
B is 0 and m is the length of the rows of W. `export` writes the one weight that computes the same.

Source: Liu et al. 2024 (DoRA, arXiv 2402.09353).
Differs: q, k and v of a fused projection share one A, as in the peft library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from tapfm.adapt.lowrank import LowRank
from tapfm.adapt.parameter_groups import parameter_groups


@dataclass(frozen=True)
class Dora(LowRank):
    """Trains a low-rank change of the chosen layers and the length of their rows."""

    name: ClassVar[str] = "DoRA"
    magnitude: ClassVar[bool] = True

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of all A and B, and of the magnitudes, which do not decay."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)
