"""VPT-deep: every block gets prompt tokens of its own, which learn; the model stays frozen.

n tokens stand between the prefix tokens (CLS, registers) and the patches. A block's output for them
is dropped and the next block gets its own; behind the last block they are taken out, so that no
pooling sees them. They have no position embedding, and RoPE leaves them alone.

The tile's score leaves their columns out too: it is computed from the CLS row over prefix and patch
columns alone, renormalised, since prompts absorb attention that says nothing about the tile.

Not the identity at the start (random prompts are attended to), and no plain timm model computes the
same: there is no `export`, only the small checkpoint.

Source: Jia et al. 2022 (VPT, arXiv 2203.12119), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from tapfm.adapt.surgery import Inserted, StrategyError, hold_prompts, need_vit, new_prompts, share


@dataclass(frozen=True)
class VptDeep(Inserted):
    """Trains n prompt tokens before every block."""

    n: int = 10
    """Number of prompts before each block."""
    lr: ClassVar[float] = 1e-3
    scaled: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = "vpt_deep"
    adds: ClassVar[str] = "prompts"

    def __post_init__(self):
        if self.n < 1:
            raise StrategyError(f"model.strategy: vpt_deep: n must be 1 or more, got {self.n}")

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the model; insert prompts, uniform within sqrt(6 / (3 p^2 + D)).

        Raises:
            StrategyError: not a ViT with a CLS token.
        """
        need_vit(vit, "vpt_deep")
        vit.requires_grad_(False)
        prefix = vit.num_prefix_tokens
        vit.prompts = new_prompts(vit, len(vit.blocks), self.n)
        for depth, block in enumerate(vit.blocks):
            first_patch = prefix + (self.n if depth else 0)
            give = partial(_give_prompts, vit, depth, prefix, first_patch)
            block.register_forward_pre_hook(give)
        hold_prompts(vit, self.n)

    def describe(self, vit: nn.Module) -> str:
        """Return what learns and its share of the model as text."""
        return f"VPT-deep, {self.n} prompts before each of {len(vit.blocks)} blocks: {share(vit)}"


def _give_prompts(
    vit: nn.Module, depth: int, prefix: int, first_patch: int, _block: nn.Module, args: tuple
) -> tuple:
    x_CND, *rest = args
    prompts_CND = vit.prompts[depth].to(x_CND.dtype).expand(x_CND.shape[0], -1, -1)
    return torch.cat([x_CND[:, :prefix], prompts_CND, x_CND[:, first_patch:]], dim=1), *rest
