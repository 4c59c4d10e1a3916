"""Nothing of the encoder learns: the control of every other strategy.

The same run in all else: tiles, augmentation, schedule, slide model. What another strategy has
above it is owed to adapting the encoder; what this has above the baselines of `tapfm test`, which
see each tile once and as it is, is owed to how the slide model was trained. In a report it is one
of the frozen rows.

Price: one forward a tile, where full fine-tuning pays three to five; no graph of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Frozen:
    """Nothing learns."""

    lr: ClassVar[float] = 0.0

    def prepare(self, vit: nn.Module) -> None:
        """No parameter requires a gradient."""
        vit.requires_grad_(False)

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One group with nothing in it: an optimizer takes no fewer."""
        return [{"params": [], "lr": lr, "weight_decay": weight_decay}]

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """The model's own state dict, as it came."""
        return dict(vit.state_dict())

    def describe(self, vit: nn.Module) -> str:
        """How much of it stays."""
        return f"frozen: 0 of {sum(p.numel() for p in vit.parameters()):,} parameters learn"
