"""Full fine-tuning: every parameter of the encoder learns.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184). Layer decay: Clark et al. 2020 (ELECTRA, arXiv
    2003.10555).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tapfm.adapt.parameter_groups import layerwise, parameter_groups
from tapfm.adapt.surgery import StrategyError, need_vit


@dataclass(frozen=True)
class Full:
    """Trains every parameter."""

    layer_decay: float = 1.0
    """Learning rate of a block over that of the block above it; 1 is one rate for all."""
    lr: ClassVar[float] = 1e-6

    def __post_init__(self):
        if not 0 < self.layer_decay <= 1:
            raise StrategyError(
                f"model.strategy: full: layer_decay must be in (0, 1], got {self.layer_decay}"
            )

    def prepare(self, vit: nn.Module) -> None:
        """Set `requires_grad` of all parameters to True.

        Raises:
            StrategyError: layer_decay is below 1 and the model has no sequence of blocks.
        """
        if self.layer_decay < 1:
            need_vit(vit, "full with layer_decay")
        vit.requires_grad_(True)

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of all parameters; norms, biases and tokens without weight decay."""
        named = vit.named_parameters()
        if self.layer_decay == 1:
            return parameter_groups(named, lr, weight_decay)
        shares = layerwise(len(vit.blocks), self.layer_decay)
        return parameter_groups(named, lr, weight_decay, shares)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """Return the model's own state dict."""
        return dict(vit.state_dict())

    def describe(self, vit: nn.Module) -> str:
        """Return what learns and its share of the model as text."""
        return f"full fine-tuning: all {sum(p.numel() for p in vit.parameters()):,} parameters"
