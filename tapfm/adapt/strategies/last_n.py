"""Partial fine-tuning: the last n blocks and the final norm learn.

Nothing in front of the first trained block needs a gradient, so autograd keeps nothing of it and
pass 2 stops there: the strategy that needs least memory.

Source: He et al. 2022 (MAE, arXiv 2111.06377), partial fine-tuning. Layer decay: Clark et al. 2020
    (ELECTRA, arXiv 2003.10555).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tapfm.adapt.parameter_groups import layerwise, parameter_groups
from tapfm.adapt.surgery import StrategyError, last_blocks, share


@dataclass(frozen=True)
class LastN:
    """Trains the last n blocks and the final norm."""

    n: int = 1
    """Number of blocks."""
    layer_decay: float = 1.0
    """Learning rate of a block over that of the block above it; 1 is one rate for all."""
    lr: ClassVar[float] = 1e-5

    def __post_init__(self):
        if self.n < 1 or not 0 < self.layer_decay <= 1:
            raise StrategyError(
                "model.strategy: last_n: n must be 1 or more and layer_decay in (0, 1], got "
                f"{self.n} and {self.layer_decay}"
            )

    def prepare(self, vit: nn.Module) -> None:
        """Freeze all but the last n blocks and the final norm.

        Raises:
            StrategyError: not a ViT with a CLS token, or fewer blocks.
        """
        vit.requires_grad_(False)
        for block in last_blocks(vit, self.n, "last_n"):
            block.requires_grad_(True)
        vit.norm.requires_grad_(True)

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of what learns, with lower rates for lower blocks if asked for."""
        shares = layerwise(len(vit.blocks), self.layer_decay)
        return parameter_groups(vit.named_parameters(), lr, weight_decay, shares)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """Return the model's own state dict."""
        return dict(vit.state_dict())

    def describe(self, vit: nn.Module) -> str:
        """Return what learns and its share of the model as text."""
        return f"last {self.n} of {len(vit.blocks)} blocks and the final norm: {share(vit)}"
