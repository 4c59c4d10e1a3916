"""DoRA: linear layers learn a change of low rank and, apart from it, the length of each row.

W becomes m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, row by row. Identity at the start:
B is 0 and m the length that W has. `export` writes the one weight that computes the same.

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
    """A low-rank change of the chosen layers learns, and the length of their rows."""

    name: ClassVar[str] = "DoRA"
    magnitude: ClassVar[bool] = True

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """All A and B, and the magnitudes, which do not decay."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)
