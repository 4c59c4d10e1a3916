"""What strategies do to a timm ViT: freeze it, find its parts, say what is left to learn.

Nothing is replaced. What a strategy adds are parameters below the module they adapt and a hook that
uses them, so timm's names stay timm's, blocks can still be recomputed, and the tap still reads the
q and k that the last block goes on to use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tapfm.adapt.parameter_groups import parameter_groups


class StrategyError(ValueError):
    """A strategy cannot be configured, or cannot be used with this model, as asked."""


class Inserted:
    """A strategy that leaves the model frozen and puts in modules that no plain timm model has."""

    name: ClassVar[str]
    """As users give it."""
    adds: ClassVar[str]
    """What it puts in, for messages."""

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """All that was put in; prompts, biases and norms without weight decay."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """There is none.

        Raises:
            StrategyError: always.
        """
        raise StrategyError(
            f"model.strategy: {self.name} cannot be merged: a plain timm model has no place for "
            f"{self.adds}. Use the run's best.safetensors with tapfm, or train lora, whose changes "
            "can."
        )


def train_only(vit: nn.Module, learns: Callable[[str], bool]) -> None:
    """Freeze every parameter but those whose name is chosen."""
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(learns(name))


def share(vit: nn.Module) -> str:
    """`786,432 of 304,137,216 parameters (0.26 %)`: those that learn, of all."""
    every = sum(p.numel() for p in vit.parameters())
    learn = sum(p.numel() for p in vit.parameters() if p.requires_grad)
    return f"{learn:,} of {every:,} parameters ({100 * learn / every:.2g} %)"


def timm_state(vit: nn.Module, added: str) -> dict[str, Tensor]:
    """The state dict without what a strategy added: keys with a part that starts with `added`."""
    return {
        key: value
        for key, value in vit.state_dict().items()
        if not any(part.startswith(added) for part in key.split("."))
    }


def last_blocks(vit: nn.Module, n: int, strategy: str) -> list[nn.Module]:
    """The last n blocks; 0 is all of them.

    Raises:
        StrategyError: there are not as many, or none in one row.
    """
    need_vit(vit, strategy)
    if n > len(vit.blocks):
        raise StrategyError(
            f"model.strategy: {strategy} was asked for the last {n} blocks and the model has "
            f"{len(vit.blocks)}. Give {len(vit.blocks)} or fewer."
        )
    return list(vit.blocks)[-n:]


def need_vit(vit: nn.Module, strategy: str) -> None:
    """Refuse what has no one row of blocks behind a CLS token.

    Raises:
        StrategyError: the model is another kind of encoder.
    """
    if not (hasattr(vit, "blocks") and getattr(vit, "num_prefix_tokens", 0)):
        raise StrategyError(
            f"model.strategy: {strategy} needs a ViT with a CLS token, and this model is "
            f"{type(vit).__name__}. Use bitfit, norm_only, or full at one rate."
        )


def new_prompts(vit: nn.Module, rows: int, n: int) -> nn.Parameter:
    """Prompt tokens (rows, n, D), uniform within sqrt(6 / (3 p^2 + D)).

    Source: Jia et al. 2022 (VPT, arXiv 2203.12119), the released initialisation.
    """
    like = vit.blocks[0].norm1.weight
    bound = math.sqrt(6 / (3 * math.prod(vit.patch_embed.patch_size) + vit.embed_dim))
    prompts_RND = torch.empty(rows, n, vit.embed_dim, device=like.device, dtype=like.dtype)
    return nn.Parameter(nn.init.uniform_(prompts_RND, -bound, bound))


def hold_prompts(vit: nn.Module, n: int) -> None:
    """Make room for n prompts behind the prefix tokens of every block.

    RoPE and the tap are told where the patches begin, and behind the last block the prompts are
    taken out, so that whatever pools the tokens never sees one. Who calls this puts them in.
    """
    prefix = vit.num_prefix_tokens
    for block in vit.blocks:
        block.attn.num_prefix_tokens = prefix + n
    vit.norm.register_forward_pre_hook(partial(_take_prompts, prefix, prefix + n))


def _take_prompts(prefix: int, first_patch: int, _norm: nn.Module, args: tuple) -> tuple:
    x_CND, *rest = args
    return torch.cat([x_CND[:, :prefix], x_CND[:, first_patch:]], dim=1), *rest


def mlp_linears(block: nn.Module) -> list[nn.Linear]:
    """fc1 and fc2, or those of a SwiGLU: all linear layers of a block's MLP."""
    return [m for m in block.mlp.children() if isinstance(m, nn.Linear)]


def qkv_linears(block: nn.Module, strategy: str) -> list[nn.Linear]:
    """The fused qkv projection, or q, k and v where they are apart; callable, so hooks see them.

    An Eva attention with a bias hands the weight of its qkv to a function and never calls the
    module; it is told to add the bias apart, which is the same sum.

    Raises:
        StrategyError: an attention of another make.
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
