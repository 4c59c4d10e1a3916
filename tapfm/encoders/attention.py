"""The score of a tile: how much the last block's CLS token looks away from the prefix tokens.

The paper's score is the mean, over heads and *patch* columns, of the CLS row of the last block's
attention. A row sums to 1, so that mean is (1 - m) / P with m the mass on the prefix columns (CLS,
registers) averaged over heads, and P patches. Only one row per head is ever computed: H x N
numbers a tile instead of H x N x N.

How: in every timm attention, q and k pass through `q_norm` and `k_norm` (identities where the
model has no such norm), whatever the projection, bias or fused kernel. Hooks there see exactly
the q and k that the block goes on to use; RoPE, which leaves prefix tokens alone, is replayed on
the patch keys.

Price: one (H, 1, N) product a tile. Condition: a ViT with a CLS token whose last block
normalises q and k this way; anything else is refused by name.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184), attention-based tile weights.
Differs: returns -m, not (1 - m) / P. Min-max over the bag makes both the same, but tiles differ in
    the third digit of m and subtracting it from 1 would round that away. Registers are prefix
    columns here; as patch columns they would outweigh the tissue.

Shapes: C tiles, H heads, N tokens (prefix first), E head width.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from slides.errors import SettingsError
from tapfm.autocast import without_autocast


class NoClsAttentionError(SettingsError):
    """The model has no CLS row to read; it can only be trained with learned attention."""


def cls_row(q_CHNE: Tensor, k_CHNE: Tensor, scale: float) -> Tensor:
    """Return the logits of the CLS row (C, H, N), in float32 or better."""
    dtype = torch.promote_types(q_CHNE.dtype, torch.float32)
    with without_autocast(q_CHNE.device):
        q_CH1E = q_CHNE[:, :, :1].to(dtype)
        return (q_CH1E @ k_CHNE.to(dtype).transpose(-2, -1)).squeeze(2) * scale


def prefix_mass(logits_CHN: Tensor, prefix: int) -> Tensor:
    """Return the attention on the first `prefix` columns, averaged over heads: (C,), 0 to 1."""
    prefix_CH = logits_CHN[..., :prefix].logsumexp(-1)
    return (prefix_CH - logits_CHN.logsumexp(-1)).exp().mean(1)


class ClsTap:
    """Hooks that read the CLS row of a model's last block during its forward pass.

    Args:
        vit: a timm VisionTransformer or Eva with a CLS token.

    Raises:
        NoClsAttentionError: no CLS token, or the attention has no q_norm and k_norm.
    """

    def __init__(self, vit: nn.Module):
        name = type(vit).__name__
        blocks = getattr(vit, "blocks", None)
        attn = getattr(blocks[-1], "attn", None) if blocks is not None and len(blocks) else None
        norms = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        if getattr(vit, "cls_token", None) is None or None in norms:
            raise NoClsAttentionError(
                f"{name}: the last block has no CLS attention row to score tiles by "
                "(no CLS token, or an attention without q_norm and k_norm). "
                "Use a ViT with a CLS token, or the aggregator `gated`."
            )
        self.attn, self.prefix = attn, int(vit.num_prefix_tokens)
        self.scale: float = attn.scale
        self.rotate_half: bool = getattr(attn, "rotate_half", False)
        self.rope: Tensor | None = None
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.row: Tensor | None = None
        self.log_size_CN: Tensor | None = None  # of merged tokens, see `encoders.merging`
        attn.register_forward_pre_hook(self._see_rope, with_kwargs=True)
        for name, norm in zip("qk", norms, strict=True):
            norm.register_forward_hook(partial(self._see, name))  # a lambda would not be copied

    def _see_rope(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.rope = kwargs.get("rope")

    def _see(self, name: str, _module: nn.Module, _args: tuple, out: Tensor) -> None:
        setattr(self, name, out)
        self.row = None  # drop a row of an earlier pass that was not taken

    @property
    def first_patch(self) -> int:
        """Return the column of the first patch token, behind prefix tokens and prompts."""
        return getattr(self.attn, "num_prefix_tokens", self.prefix)

    def take_row(self) -> Tensor:
        """Return the CLS row's logits (C, H, N) of the last pass and release its tensors."""
        row_CHN = self.make_row() if self.row is None else self.row
        self.row = None
        return row_CHN

    def make_row(self) -> Tensor:
        """Return the CLS row of the q and k just recorded, during the pass (`encoders.tail`)."""
        q_CHNE, k_CHNE, rope = self.q, self.k, self.rope
        self.q = self.k = self.rope = None  # or a chunk's q and k would outlive their graph
        if rope is not None:
            first = self.first_patch
            patches = apply_rot_embed_cat(k_CHNE[:, :, first:], rope, half=self.rotate_half)
            k_CHNE = torch.cat([k_CHNE[:, :, :first], patches.to(k_CHNE.dtype)], dim=2)
        self.row = cls_row(q_CHNE, k_CHNE, self.scale)
        if self.log_size_CN is not None:
            self.row = self.row + self.log_size_CN[:, None].to(self.row.dtype)
        return self.row

    def take_score(self) -> Tensor:
        """Return the score (C,), minus the mass on prefix tokens, of the last pass; float32.

        Columns of prompts that a strategy put between prefix and patches are left out.
        """
        row_CHN, first = self.take_row(), self.first_patch
        if first > self.prefix:
            row_CHN = torch.cat([row_CHN[..., : self.prefix], row_CHN[..., first:]], dim=-1)
        return -prefix_mass(row_CHN, self.prefix)
