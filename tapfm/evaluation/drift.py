"""How far an encoder's features have moved in training: 1 - linear CKA, block by block.

It is 0 if a block's features are equal up to rotation, shift and one scale; 1 if they have nothing
in common.

Limits: with fewer tiles than features it is biased to 0; a few hundred tiles are quick enough.
Source: Kornblith et al. 2019 (arXiv 1905.00414), equation 3, for linear CKA.

Shapes: N tiles, D features of one model, E of the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tapfm.slide_model.model import SlideModel


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Return linear centred kernel alignment, 0 to 1, of two feature sets of the same tiles.

    It does not change if either is shifted, scaled by one number, or rotated; nan if either is
    equal for all tiles.
    """
    x_ND, y_NE = (each.double() - each.double().mean(0) for each in (x_ND, y_NE))
    own = torch.linalg.norm(x_ND.T @ x_ND) * torch.linalg.norm(y_NE.T @ y_NE)
    return (torch.linalg.norm(y_NE.T @ x_ND).square() / own).item() if own else math.nan


@torch.no_grad()
def cls_by_block(model: SlideModel, tiles: Tensor, chunk: int) -> list[Tensor]:
    """Return the CLS token (N, D) behind each block, on the CPU."""
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
