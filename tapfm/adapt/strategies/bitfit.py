"""BitFit: every bias learns, and nothing else.

Source: Ben Zaken et al. 2021 (BitFit, arXiv 2106.10199).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tapfm.adapt.parameter_groups import parameter_groups
from tapfm.adapt.surgery import share, train_only


@dataclass(frozen=True)
class BitFit:
    """Trains every bias: of linear layers, norms and the patch embedding."""

    lr: ClassVar[float] = 1e-3

    def prepare(self, vit: nn.Module) -> None:
        """Freeze all but the biases (`q_bias` and `v_bias` of an Eva attention too)."""
        train_only(vit, lambda name: name.endswith("bias"))

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of the biases, without weight decay."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """Return the model's own state dict."""
        return dict(vit.state_dict())

    def describe(self, vit: nn.Module) -> str:
        """Return what learns and its share of the model as text."""
        return f"biases: {share(vit)}"
