"""LoRA: linear layers learn a change of low rank, W + (alpha / rank) B A.

Identity at the start (B is 0), gone at the end: `export` adds the change into the weights. Rank 8
on qkv is 0.26 % of a ViT-L.

Source: Hu et al. 2021 (LoRA, arXiv 2106.09685).
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
class Lora:
    """A low-rank change of the chosen layers learns."""

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
        check("lora", self.rank, self.alpha, self.dropout, self.targets, self.last)

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the model; give the chosen layers an A and a B.

        Raises:
            StrategyError: the model has no such layers.
        """
        options = self.rank, self.alpha, self.dropout, self.targets, self.last
        insert(vit, "lora", *options, magnitude=False)

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """All A and B."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """The model's own state dict, the changes added in."""
        return merged_state(vit, timm_state(vit, "lora_"))

    def describe(self, vit: nn.Module) -> str:
        """Rank, where, and how much that is."""
        where = f"{len(list(adapted(vit)))} layers ({', '.join(self.targets)})"
        return f"LoRA of rank {self.rank} in {where}: {share(vit)}"
