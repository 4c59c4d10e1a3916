"""Renames weights from the layout of Hugging Face's `transformers` to the names that timm loads.

Phikon, Phikon-v2, Midnight, Hibou and the original DINOv2 are published for `transformers`. They
are the same ViTs, so they are loaded into timm's: score, strategies and export work as for the
others, and `transformers` is not needed. Its models are the reference in the tests, where
installed.

How: ViT and Dinov2 (plain and with registers) keep q, k and v apart, which timm stacks; everything
else is renaming. The result is timm's ViT layout, or DINOv2's where there are registers, which
timm's own filter then converts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FIRST = "encoder.layer.0.attention.attention.query.weight"
OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
INNER = (  # names within a block, longer ones first
    ("attention.output.dense.", "attn.proj."),
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("mlp.weights_in.", "mlp.fc1."),
    ("mlp.weights_out.", "mlp.fc2."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
)
APART = "attention.attention."


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Return whether the keys are those of `transformers`' ViT or Dinov2, with any prefix."""
    return any(key.endswith(FIRST) for key in state)


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under timm's names, q, k and v stacked; unknown keys are kept.

    Raises:
        KeyError: a block has its q but not its k or v.
    """
    prefix = next(key for key in state if key.endswith(FIRST)).removesuffix(FIRST)
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not name.startswith("encoder.layer."):
            renamed[OUTER.get(name, name)] = value
            continue
        block, _, rest = name.removeprefix("encoder.layer.").partition(".")
        if rest.startswith(APART):
            part, _, kind = rest.removeprefix(APART).partition(".")
            if part == "query":
                qkv = [state[key.replace(".query.", f".{x}.")] for x in ("query", "key", "value")]
                renamed[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(qkv)
            continue
        for theirs, ours in INNER:
            if rest.startswith(theirs):
                rest = ours + rest.removeprefix(theirs)
                break
        renamed[f"blocks.{block}.{rest}"] = value
    return renamed
