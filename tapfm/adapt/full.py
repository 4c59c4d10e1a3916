"""Full fine-tuning: every parameter of the encoder learns.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tapfm.optim import parameter_groups


class Full:
    """Every parameter learns."""

    def prepare(self, vit: nn.Module) -> None:
        """All parameters require a gradient."""
        vit.requires_grad_(True)

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """All of them, norms, biases and tokens without weight decay."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """The model's own state dict."""
        return dict(vit.state_dict())

    def describe(self, vit: nn.Module) -> str:
        """All parameters, counted."""
        return f"full fine-tuning: all {sum(p.numel() for p in vit.parameters()):,} parameters"
