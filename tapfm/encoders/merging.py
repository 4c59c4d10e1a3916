"""Token merging: like patch tokens of a tile are merged block by block, so later ones cost less.

Between the attention and the MLP of each block but the last, patch tokens are split into every
second one and the others. Each of the first is matched with the likest of the second, by the cosine
of their keys (mean over heads), and the `count` likest pairs become one token each, the mean of
theirs weighted by how many patches they stand for. Attention adds log(size) to a key's logit, so a
token of n patches has the weight of n, in the CLS row and the tile's score as well: patches that
are equal can be merged and nothing changes. CLS and registers are never merged.

    merging = TokenMerging(encoder, count=8)      the blocks of encoder.vit from now on

Deterministic, and of each tile by itself: pass 2 and recomputation merge as pass 1 did, so the
gradient is that of one graph, of the matching that was made. A model that was trained with it is
used with it, and its count is saved.

Price: features change; `benchmarks/token_merging.py` measures how much. The frozen prefix is off.
Condition: timm's VisionTransformer of plain blocks with a CLS token and no RoPE; a strategy that
    puts no tokens of its own into blocks.
Source: Bolya et al. 2023 (ToMe, arXiv 2210.09461); PathoHR (Luo et al. 2025, arXiv 2503.17970) for
    merging in pathology.
Differs: sums of tokens are products with a matrix of 0 and 1, whose order of addition is fixed.

Shapes: C tiles, N tokens (prefix first), D width, H heads, E head width, A and B tokens of the two
    sets, R merged pairs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slides.errors import SettingsError, refuse
from tapfm.autocast import without_autocast


class TokenMerging:
    """The merging blocks of one encoder, and the sizes of tokens on their way through it.

    Args:
        encoder: its ViT's blocks get other forwards, and its tap's CLS row counts sizes.
        count: patch tokens that each block merges, R; half of them where there are no more.
        recompute: keep block boundaries only, and compute the rest again for backward.

    Raises:
        SettingsError: blocks, a feature or an option for which this cannot be done.
    """

    def __init__(self, encoder: nn.Module, count: int, recompute: bool = False):
        vit, row = encoder.vit, encoder.row
        kinds = {type(block).__name__ for block in getattr(vit, "blocks", ())}
        plain = type(vit).__name__ == "VisionTransformer" and kinds == {"Block"}
        refuse(
            f"model.merge_tokens {count} {fault}. Set model.merge_tokens: 0"
            for fault, found in (
                ("must be 0 or more", count < 0),
                ("does not go together with model.compile", encoder.compiled),
                (f"needs a plain ViT with a CLS token; {row.key} is a {type(vit).__name__} of "
                 f"{', '.join(sorted(kinds))}", not plain or encoder.tap is None),
                (f"needs a feature of tokens; that of {row.key} is of its {row.feature}",
                 row.feature not in ("cls", "cls+mean")),
            ) if found
        )  # fmt: skip
        self.vit, self.tap, self.count, self.recompute = vit, encoder.tap, count, recompute
        self.prefix = int(vit.num_prefix_tokens)
        self.size_CN: Tensor | None = None
        *merging, last = vit.blocks
        for number, block in enumerate(merging):
            block.forward = partial(self._forward, block, number == 0)
        last.forward = partial(self._last, last.forward)

    def check(self, strategy: str) -> None:
        """Refuse a strategy that puts tokens of its own into blocks.

        Raises:
            SettingsError: it does.
        """
        if any(block._forward_pre_hooks for block in self.vit.blocks):
            raise SettingsError(
                f"model.merge_tokens {self.count}: strategy {strategy} adds to tokens by their "
                "place, and merged tokens have none. Take lora or full, or leave merge_tokens out."
            )

    def _forward(self, block: nn.Module, first: bool, x_CND: Tensor, **given: object) -> Tensor:
        """Return a block's tokens, fewer than it was given."""
        size_CN = None if first else self.size_CN
        if size_CN is None:
            size_CN = ones_like_tokens(x_CND)
        run = partial(merging_block, block, self.prefix, self.count)
        if self.recompute:
            x_CND, self.size_CN = checkpoint(run, x_CND, size_CN, use_reentrant=False)
        else:
            x_CND, self.size_CN = run(x_CND, size_CN)
        return x_CND

    def _last(self, forward: nn.Module, x_CND: Tensor, **given: object) -> Tensor:
        """Return the last block's tokens, unmerged; the CLS row and the attention count sizes."""
        self.tap.log_size_CN = self.size_CN.log()
        if getattr(forward.__self__, "on", False):  # `encoders.tail` is at work
            return forward(x_CND)
        return forward(x_CND, attn_mask=self.tap.log_size_CN[:, None, None].to(x_CND.dtype))

    def mean(self, patches_CND: Tensor) -> Tensor:
        """Return the mean of the patch tokens behind the last block, each by its size, (C, D)."""
        share_CN = self.size_CN[:, self.prefix :]
        share_CN = (share_CN / share_CN.sum(1, keepdim=True)).to(patches_CND.dtype)
        return (share_CN[:, None] @ patches_CND).squeeze(1)


def merging_block(
    block: nn.Module, prefix: int, count: int, x_CND: Tensor, size_CN: Tensor
) -> tuple[Tensor, Tensor]:
    """Return tokens and sizes behind a block that merges `count` pairs behind its attention."""
    keys: list[Tensor] = []
    hook = block.attn.k_norm.register_forward_hook(lambda _module, _args, out: keys.append(out))
    try:
        mask = size_CN.log()[:, None, None].to(x_CND.dtype)
        x_CND = x_CND + block.drop_path1(block.ls1(block.attn(block.norm1(x_CND), attn_mask=mask)))
    finally:
        hook.remove()
    with without_autocast(x_CND.device):
        x_CND, size_CN = merge(x_CND, size_CN, keys[0].detach().mean(1), prefix, count)
    return x_CND + block.drop_path2(block.ls2(block.mlp(block.norm2(x_CND)))), size_CN


def merge(
    x_CND: Tensor, size_CN: Tensor, key_CNE: Tensor, prefix: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return tokens and sizes with `count` pairs of patch tokens merged, prefix tokens first."""
    count = min(count, (x_CND.shape[1] - prefix) // 2)
    if count < 1:
        return x_CND, size_CN
    kept_CA, gone_CR, into_CR = match(key_CNE[:, prefix:], count)
    patches_CND, size_patch_CN = x_CND[:, prefix:], size_CN[:, prefix:]
    a_CAD, b_CBD = patches_CND[:, ::2], patches_CND[:, 1::2]
    size_a_CA, size_b_CB = size_patch_CN[:, ::2], size_patch_CN[:, 1::2]
    width = x_CND.shape[-1]

    def rows(of: Tensor, at: Tensor) -> Tensor:
        return of.gather(1, at[..., None].expand(-1, -1, width))

    into_CBR = nn.functional.one_hot(into_CR, b_CBD.shape[1]).mT.to(size_CN.dtype)
    size_gone_CR = size_a_CA.gather(1, gone_CR)
    total_CB = size_b_CB + (into_CBR @ size_gone_CR[..., None]).squeeze(-1)
    gone_CRD = rows(a_CAD, gone_CR) * size_gone_CR[..., None]
    merged_CBD = (b_CBD * size_b_CB[..., None] + into_CBR @ gone_CRD) / total_CB[..., None]
    kept_CAD = rows(a_CAD, kept_CA)
    x_CND = torch.cat([x_CND[:, :prefix], kept_CAD, merged_CBD.to(x_CND.dtype)], 1)
    return x_CND, torch.cat([size_CN[:, :prefix], size_a_CA.gather(1, kept_CA), total_CB], 1)


@torch.no_grad()
def match(key_CNE: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which of every second token stay, which go, and into which of the others.

    Returns:
        Rows among tokens 0, 2, 4, ... of those that stay (C, A - R) and go (C, R), and rows among
        tokens 1, 3, 5, ... into which they go (C, R).
    """
    dtype = torch.promote_types(key_CNE.dtype, torch.float32)
    key_CNE = nn.functional.normalize(key_CNE.to(dtype), dim=-1)
    near_CA, into_CA = (key_CNE[:, ::2] @ key_CNE[:, 1::2].mT).max(-1)
    order_CA = near_CA.argsort(dim=1, descending=True, stable=True)
    gone_CR = order_CA[:, :count]
    return order_CA[:, count:].sort(1).values, gone_CR, into_CA.gather(1, gone_CR)


def ones_like_tokens(x_CND: Tensor) -> Tensor:
    """Return the sizes (C, N) of tokens of which none is merged, in float32 or better."""
    dtype = torch.promote_types(x_CND.dtype, torch.float32)
    return torch.ones(x_CND.shape[:2], dtype=dtype, device=x_CND.device)
