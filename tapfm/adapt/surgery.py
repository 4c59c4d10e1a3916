"""Parts that strategies share: freezing a timm ViT, finding its layers, counting what learns.

No module is replaced. A strategy adds parameters below the module they adapt and a hook that uses
them, so timm's names stay, blocks can still be recomputed, and the tap reads the q and k that the
last block uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slides.errors import SettingsError
from tapfm.adapt.parameter_groups import parameter_groups


class StrategyError(SettingsError):
    """A strategy cannot be configured, or cannot be used with this model, as asked."""


class Inserted:
    """Base of strategies that freeze the model and insert modules no plain timm model has."""

    name: ClassVar[str]
    """Name that users give."""
    adds: ClassVar[str]
    """Name of the inserted parts, for messages."""

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of all inserted parameters; prompts, biases, norms without weight decay."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """Raise: a plain timm model cannot hold the inserted modules.

        Raises:
            StrategyError: always.
        """
        raise StrategyError(
            f"model.strategy: {self.name} cannot be merged: a plain timm model has no place for "
            f"{self.adds}. Use the run's best.safetensors with tapfm, or train lora, whose changes "
            "can."
        )


def train_only(vit: nn.Module, learns: Callable[[str], bool]) -> None:
    """Freeze every parameter except those for whose name `learns` returns True."""
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(learns(name))


def share(vit: nn.Module) -> str:
    """Return trainable and all parameters as text: `786,432 of 304,137,216 parameters (0.26 %)`."""
    every = sum(p.numel() for p in vit.parameters())
    learn = sum(p.numel() for p in vit.parameters() if p.requires_grad)
    return f"{learn:,} of {every:,} parameters ({100 * learn / every:.2g} %)"


def timm_state(vit: nn.Module, added: str) -> dict[str, Tensor]:
    """Return the state dict without keys that have a part starting with `added`."""
    return {
        key: value
        for key, value in vit.state_dict().items()
        if not any(part.startswith(added) for part in key.split("."))
    }


def last_blocks(vit: nn.Module, n: int, strategy: str) -> list[nn.Module]:
    """Return the last n blocks; 0 is all of them.

    Raises:
        StrategyError: there are fewer, or the model has no sequence of blocks.
    """
    need_vit(vit, strategy)
    if n > len(vit.blocks):
        raise StrategyError(
            f"model.strategy: {strategy} was asked for the last {n} blocks and the model has "
            f"{len(vit.blocks)}. Give {len(vit.blocks)} or fewer."
        )
    return list(vit.blocks)[-n:]


def need_vit(vit: nn.Module, strategy: str) -> None:
    """Raise unless the model has one sequence of blocks and a CLS token.

    Raises:
        StrategyError: the model is another kind of encoder.
    """
    if not (hasattr(vit, "blocks") and getattr(vit, "num_prefix_tokens", 0)):
        raise StrategyError(
            f"model.strategy: {strategy} needs a ViT with a CLS token, and this model is "
            f"{type(vit).__name__}. Use bitfit, norm_only, or full at one rate."
        )


def new_prompts(vit: nn.Module, rows: int, n: int) -> nn.Parameter:
    """Return new prompt tokens (rows, n, D), uniform within sqrt(6 / (3 p^2 + D)).

    Source: Jia et al. 2022 (VPT, arXiv 2203.12119), the released initialisation.
    """
    like = vit.blocks[0].norm1.weight
    bound = math.sqrt(6 / (3 * math.prod(vit.patch_embed.patch_size) + vit.embed_dim))
    prompts_RND = torch.empty(rows, n, vit.embed_dim, device=like.device, dtype=like.dtype)
    return nn.Parameter(nn.init.uniform_(prompts_RND, -bound, bound))


def hold_prompts(vit: nn.Module, n: int) -> None:
    """Reserve columns for n prompts behind the prefix tokens of every block.

    RoPE and the tap learn where the patches begin, and behind the last block the prompts are taken
    out, so that no pooling sees them. The caller inserts the prompts.
    """
    prefix = vit.num_prefix_tokens
    for block in vit.blocks:
        block.attn.num_prefix_tokens = prefix + n
    vit.norm.register_forward_pre_hook(partial(_take_prompts, prefix, prefix + n))


def _take_prompts(prefix: int, first_patch: int, _norm: nn.Module, args: tuple) -> tuple:
    x_CND, *rest = args
    return torch.cat([x_CND[:, :prefix], x_CND[:, first_patch:]], dim=1), *rest


def mlp_linears(block: nn.Module) -> list[nn.Linear]:
    """Return all linear layers of a block's MLP: fc1 and fc2, or those of a SwiGLU."""
    return [m for m in block.mlp.children() if isinstance(m, nn.Linear)]


def qkv_linears(block: nn.Module, strategy: str) -> list[nn.Linear]:
    """Return the fused qkv projection, or q, k and v where separate, so that hooks see them.

    An Eva attention with a bias passes its qkv weight to a function and never calls the module;
    `qkv_bias_separate` makes it call the module and add the bias afterwards, the same sum.

    Raises:
        StrategyError: the attention has no such layers.
    """
    attn = block.attn
    if getattr(attn, "q_bias", None) is not None:
        if not hasattr(attn, "qkv_bias_separate"):
            raise StrategyError(
                f"model.strategy: {strategy} cannot reach the qkv of {type(attn).__name__} in this "
                "version of timm. Use timm 1.0.20 or newer, or last_n."
            )
        attn.qkv_bias_separate = True
    fused = getattr(attn, "qkv", None)
    found = [fused] if fused is not None else [getattr(attn, f"{p}_proj", None) for p in "qkv"]
    if not all(isinstance(each, nn.Linear) for each in found):
        raise StrategyError(
            f"model.strategy: {strategy} finds no qkv in {type(attn).__name__}. Use last_n or full."
        )
    return found
