"""How far an encoder's features have moved: 1 - linear CKA, block by block.

Zero where a block's features are the same but for a rotation, a shift or one scale; 1 where they
have nothing in common.

Limits: with fewer tiles than features it leans to 0; some hundred tiles are few enough to be quick.
Source: Kornblith et al. 2019 (arXiv 1905.00414), equation 3, for linear CKA.

Shapes: N tiles, D features of one model, E of the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tapfm.slide_model.model import SlideModel


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same tiles: 0 to 1.

    It does not change when either is shifted, scaled by one number, or rotated. nan where either
    is the same for all tiles.
    """
    x_ND, y_NE = (each.double() - each.double().mean(0) for each in (x_ND, y_NE))
    own = torch.linalg.norm(x_ND.T @ x_ND) * torch.linalg.norm(y_NE.T @ y_NE)
    return (torch.linalg.norm(y_NE.T @ x_ND).square() / own).item() if own else math.nan


@torch.no_grad()
def cls_by_block(model: SlideModel, tiles: Tensor, chunk: int) -> list[Tensor]:
    """The CLS token (N, D) behind each block, on the CPU."""
    model.eval()
    blocks = model.encoder.vit.blocks
    found: list[list[Tensor]] = [[] for _ in blocks]
    hooks = [
        block.register_forward_hook(lambda _b, _a, out, kept=kept: kept.append(out[:, 0].cpu()))
        for block, kept in zip(blocks, found, strict=True)
    ]
    try:
        for tiles_CP in tiles.split(chunk):
            model.encode(tiles_CP)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(each) for each in found]
