"""Frozen encoder: only the slide model learns; the control of every other strategy.

Everything else is the same run: tiles, augmentation, schedule, slide model. What another strategy
gains over it comes from adapting the encoder; what it gains over the baselines of `tapfm test`,
which see each tile once and unaugmented, comes from how the slide model was trained. In a report it
is one of the frozen rows.

Price: one forward a tile, where full fine-tuning pays three to five; no graph of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Frozen:
    """Trains nothing of the encoder."""

    lr: ClassVar[float] = 0.0

    def prepare(self, vit: nn.Module) -> None:
        """Set `requires_grad` of all parameters to False."""
        vit.requires_grad_(False)

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return one empty group: an optimizer needs at least one."""
        return [{"params": [], "lr": lr, "weight_decay": weight_decay}]

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """Return the model's own state dict, unchanged."""
        return dict(vit.state_dict())

    def describe(self, vit: nn.Module) -> str:
        """Return what learns and its share of the model as text."""
        return f"frozen: 0 of {sum(p.numel() for p in vit.parameters()):,} parameters learn"
