"""LoRA: linear layers learn a low-rank change of their weight, W + (alpha / rank) B A.

Identity at the start (B is 0); `export` adds the change to the weights. Rank 8
on qkv is 0.26 % of a ViT-L.

Source: Hu et al. 2021 (LoRA, arXiv 2106.09685).
Differs: q, k and v of a fused projection share one A, as in the peft library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from tapfm.adapt.lowrank import LowRank
from tapfm.adapt.parameter_groups import parameter_groups


@dataclass(frozen=True)
class Lora(LowRank):
    """Trains a low-rank change of the chosen layers."""

    name: ClassVar[str] = "LoRA"
    magnitude: ClassVar[bool] = False

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of all A and B."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)
