"""DoRA: linear layers learn a change of low rank and, apart from it, the length of each row.

W becomes m (W + (alpha / rank) B A) / |W + (alpha / rank) B A|, row by row. Identity at the start:
B is 0 and m the length that W has. `export` writes the one weight that computes the same.

Source: Liu et al. 2024 (DoRA, arXiv 2402.09353).
Differs: q, k and v of a fused projection share one A, as in the peft library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tapfm.lowrank import adapted, check, insert, merged_state
from tapfm.optim import parameter_groups
from tapfm.surgery import share, timm_state


@dataclass(frozen=True)
class Dora:
    """A low-rank change of the chosen layers learns, and the length of their rows."""

    rank: int = 8
    """Rows of A, columns of B."""
    alpha: float = 16.0
    """The change is alpha / rank times B A."""
    dropout: float = 0.0
    """Of the input of A, while training."""
    targets: tuple[str, ...] = ("q", "k", "v")
    """Which layers of a block: some of q, k, v, proj, mlp."""
    last: int = 0
    """In how many blocks, counted from the last; 0 is all."""
    lr: ClassVar[float] = 2e-4

    def __post_init__(self):
        check("dora", self.rank, self.alpha, self.dropout, self.targets, self.last)

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the model; give the chosen layers an A, a B and a magnitude.

        Raises:
            StrategyError: the model has no such layers.
        """
        options = self.rank, self.alpha, self.dropout, self.targets, self.last
        insert(vit, "dora", *options, magnitude=True)

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """All A and B, and the magnitudes, which do not decay."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """The model's own state dict, the changes added in."""
        return merged_state(vit, timm_state(vit, "lora_"))

    def describe(self, vit: nn.Module) -> str:
        """Rank, where, and how much that is."""
        where = f"{len(list(adapted(vit)))} layers ({', '.join(self.targets)})"
        return f"DoRA of rank {self.rank} in {where}: {share(vit)}"
