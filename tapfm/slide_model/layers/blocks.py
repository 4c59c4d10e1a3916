"""A transformer block over short sequences of tokens, which several aggregators share.

    X <- X + g * attention(norm(X)),  X <- X + g' * mlp(norm(X))

Source: Vaswani et al. 2017 (arXiv 1706.03762), normalised first; Touvron et al. 2021 (CaiT, arXiv
    2103.17239) for LayerScale, g and g'.

Shapes: B sequences, N tokens, W width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NOWHERE = -1e9  # of padding, before a softmax: an infinity has no gradient in `log_shares`


class Block(nn.Module):
    """Attention and two linear layers, each scaled and added.

    Args:
        width: of the tokens, W.
        heads: of the attention, H.
        scale: of LayerScale at the start.
    """

    def __init__(self, width: int, heads: int, scale: float):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale_W = nn.Parameter(torch.full((width,), scale))
        self.scale_mlp_W = nn.Parameter(torch.full((width,), scale))

    def forward(self, x_BNW: Tensor, there_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the tokens, and the first one's attention (B, H, N) before its softmax.

        Args:
            x_BNW: tokens.
            there_BN: False for padding, which no token looks at; None is all there.
        """
        qkv = self.qkv(self.norm(x_BNW)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores_BHNN = q @ k.mT / q.shape[-1] ** 0.5
        if there_BN is not None:
            scores_BHNN = scores_BHNN.masked_fill(~there_BN[:, None, None], NOWHERE)
        seen_BNW = (scores_BHNN.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x_BNW = x_BNW + self.scale_W * self.out(seen_BNW)
        x_BNW = x_BNW + self.scale_mlp_W * self.mlp(self.norm_mlp(x_BNW))
        return x_BNW, scores_BHNN[:, :, 0]


def log_shares(scores_BHN: Tensor) -> Tensor:
    """Return the logarithm (B, N) of the mean of the heads' attention, given it before softmax."""
    return scores_BHN.log_softmax(2).logsumexp(1).log_softmax(1)
