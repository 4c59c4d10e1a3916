"""AdaptFormer: a small bottleneck beside the MLP of every block learns.

x + MLP(norm(x)) + scale Up(ReLU(Down(x))), on the residual stream without norm, and outside
LayerScale and drop-path. Identity at the start (Up is 0). No plain timm model computes the same:
there is no `export`, only the small checkpoint.

Source: Chen et al. 2022 (AdaptFormer, arXiv 2205.13535), section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tapfm.adapt.surgery import Inserted, StrategyError, need_vit, share


class Bottleneck(nn.Module):
    """The module scale Up(dropout(ReLU(Down(x)))); x is the input of the block's second norm."""

    def __init__(self, block: nn.Module, width: int, scale: float, dropout: float):
        super().__init__()
        like = block.norm2.weight
        dim, kwargs = like.numel(), {"device": like.device, "dtype": like.dtype}
        self.down, self.up = nn.Linear(dim, width, **kwargs), nn.Linear(width, dim, **kwargs)
        self.dropout, self.scale = nn.Dropout(dropout), scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.x: Tensor | None = None
        block.norm2.register_forward_pre_hook(self._see)
        block.drop_path2.register_forward_hook(self._add)

    def forward(self, x_CND: Tensor) -> Tensor:
        """Return what is added to tokens (C, N, D)."""
        return self.up(self.dropout(self.down(x_CND).relu())) * self.scale

    def _see(self, _norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x = args[0]

    def _add(self, _drop_path: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x_CND, self.x = self.x, None  # free it with its graph
        return out + self(x_CND)


@dataclass(frozen=True)
class AdaptFormer(Inserted):
    """Trains a bottleneck beside each MLP."""

    width: int = 64
    """Width of the bottleneck."""
    scale: float = 0.1
    """Factor on the bottleneck's output."""
    dropout: float = 0.1
    """Dropout rate within it, while training."""
    lr: ClassVar[float] = 5e-4
    scaled: ClassVar[tuple[str, ...]] = ("up.weight", "up.bias")
    name: ClassVar[str] = "adaptformer"
    adds: ClassVar[str] = "its bottlenecks"

    def __post_init__(self):
        if self.width < 1 or not 0 <= self.dropout < 1 or self.scale <= 0:
            raise StrategyError(
                "model.strategy: adaptformer: width must be 1 or more, scale above 0 and dropout "
                f"in [0, 1), got {self.width}, {self.scale} and {self.dropout}"
            )

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the model; insert a bottleneck into each block.

        Raises:
            StrategyError: not a ViT with a CLS token, or blocks other than timm's Block and
                EvaBlock, which may order norm, MLP and residual otherwise.
        """
        need_vit(vit, "adaptformer")
        vit.requires_grad_(False)
        for block in vit.blocks:
            if type(block).__name__ not in ("Block", "EvaBlock"):
                raise StrategyError(
                    f"model.strategy: adaptformer knows Block and EvaBlock, and this model has "
                    f"{type(block).__name__}. Use lora."
                )
            block.adaptformer = Bottleneck(block, self.width, self.scale, self.dropout)

    def describe(self, vit: nn.Module) -> str:
        """Return what learns and its share of the model as text."""
        return f"AdaptFormer of width {self.width} in {len(vit.blocks)} blocks: {share(vit)}"
