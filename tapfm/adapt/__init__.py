"""Which of the encoder's parameters learn: one file a strategy, one small contract.

Adding a strategy is a file with a class that has the four methods of `Strategy`, and its name
here. A strategy never imports another.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from tapfm.adapt.full import Full


class Strategy(Protocol):
    """What the trainer asks of a strategy. `vit` is the bare timm model throughout."""

    def prepare(self, vit: nn.Module) -> None:
        """Freeze what stays, insert what is new; the output must not change yet."""

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW parameter groups of what learns."""

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """The adapted model as a plain timm state dict."""

    def describe(self, vit: nn.Module) -> str:
        """One line: what learns, and how much of the model that is."""


STRATEGIES = {"full": Full}


def make_strategy(name: str) -> Strategy:
    """A strategy by name.

    Raises:
        ValueError: no such name.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy: {name!r} is none of {', '.join(STRATEGIES)}")
    return STRATEGIES[name]()
