"""SSF: the output of every operation is scaled and shifted by channel; scale and shift learn.

Operations are the patch embedding, both norms, qkv, proj and the MLP's layers of each block, and
the final norm. Identity at the start; `export` folds scale and shift into weight and bias.

Source: Lian et al. 2022 (SSF, arXiv 2210.08823), section 3.2.
Differs: starts at exactly 1 and 0, not around them, so that the first features are the model's own.
    An operation without a bias gets no shift: it could not be folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tapfm.adapt.parameter_groups import parameter_groups
from tapfm.adapt.surgery import mlp_linears, need_vit, qkv_linears, share, timm_state


@dataclass(frozen=True)
class Ssf:
    """Trains a scale and a shift of every operation's output."""

    lr: ClassVar[float] = 1e-3

    def prepare(self, vit: nn.Module) -> None:
        """Freeze the model; give each operation a scale of 1 and a shift of 0.

        Raises:
            StrategyError: not a ViT with a CLS token, or an attention without qkv layers.
        """
        need_vit(vit, "ssf")
        vit.requires_grad_(False)
        for each in _operations(vit):
            each.ssf_scale = nn.Parameter(each.weight.new_ones(len(each.weight)))
            if each.bias is not None:
                each.ssf_shift = nn.Parameter(each.bias.new_zeros(len(each.bias)))
            each.register_forward_hook(_scale_and_shift)

    def parameters(self, vit: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return groups of scales and shifts, without weight decay."""
        return parameter_groups(vit.named_parameters(), lr, weight_decay)

    def export(self, vit: nn.Module) -> dict[str, Tensor]:
        """Return the model's own state dict, scales and shifts folded in."""
        state = timm_state(vit, "ssf_")
        for name, each in vit.named_modules():
            if hasattr(each, "ssf_scale"):
                scale = each.ssf_scale.detach()
                state[f"{name}.weight"] = (each.weight * _along(scale, each.weight)).detach()
                if each.bias is not None:
                    state[f"{name}.bias"] = (each.bias * scale + each.ssf_shift).detach()
        return state

    def describe(self, vit: nn.Module) -> str:
        """Return what learns and its share of the model as text."""
        return f"SSF of {len(list(_operations(vit)))} operations: {share(vit)}"


def _operations(vit: nn.Module) -> Iterator[nn.Module]:
    """Yield modules in the order of use; a norm without weights is skipped."""
    every = [vit.patch_embed.proj]
    for block in vit.blocks:
        every += [block.norm1, *qkv_linears(block, "ssf"), block.attn.proj]
        every += [block.norm2, *mlp_linears(block)]
    return (each for each in (*every, vit.norm) if getattr(each, "weight", None) is not None)


def _along(values: Tensor, weight: Tensor) -> Tensor:
    """Return values shaped to multiply a weight along its output channels."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def _scale_and_shift(each: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    tail = (1, 1) if isinstance(each, nn.Conv2d) else ()  # (C, D, H, W) there, (C, N, D) elsewhere
    changed = out * each.ssf_scale.view(-1, *tail)  # float32 under autocast: 1.001 is 1 in bf16
    if each.bias is not None:
        changed = changed + each.ssf_shift.view(-1, *tail)
    return changed.to(out.dtype)
