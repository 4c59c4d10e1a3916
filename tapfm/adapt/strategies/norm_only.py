"""Norm tuning: the affine weights of every normalisation learn, and nothing else.

Source: Basu et al. 2023 (arXiv 2304.01917), LayerNorm tuning of ViTs.
Differs: norms of q and k learn too, where a model has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tapfm.adapt.parameter_groups import parameter_groups
from tapfm.adapt.surgery import share


@dataclass(frozen=True)
class NormOnly:
    """Trains scale and shift of every norm."""

    lr: ClassVar[float] = 1e-3

    def prepare(self, vit: nn.Module) -> None:
        """Freeze all but the norms, LayerNorm or RMSNorm of any library."""
        vit.requires_grad_(False)
        for module in vit.modules():
            if "norm" in type(module).__name__.lower():
                module.requires_grad_(True)

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of the norms, without weight decay."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """Return the model's own state dict."""
        return dict(vit.state_dict())

    def describe(self, vit: nn.Module) -> str:
        """Return what learns and its share of the model as text."""
        return f"norms: {share(vit)}"
