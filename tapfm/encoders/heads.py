"""Heads behind the final norm for models whose feature is not a token; timm has neither.

    Projection      KEEP: the CLS token through two linear layers, normalised to length 1
    AttentionPool   CONCH v1.5: one learned query attends to all tokens

Both take the tokens behind the final norm and are the model's `head`; the registry names them.

Source: the publishers' model code, for shapes and order (KEEP: Zhou et al. 2024, arXiv 2412.13126;
    CONCH v1.5: Ding et al. 2024, TITAN, arXiv 2411.19666).
Differs: not compared with the published weights, which tests do not download.

Shapes: C tiles, N tokens, D their width, E the feature's, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Sequential):
    """KEEP's head: Linear, GELU, Linear on the CLS token, normalised to length 1."""

    def __init__(self, width: int, dim: int):
        super().__init__(nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, tokens_CND: Tensor) -> Tensor:
        """Return features (C, E) of tokens (C, N, D)."""
        return F.normalize(super().forward(tokens_CND[:, 0]), dim=-1)


class AttentionPool(nn.Module):
    """CONCH v1.5's head: a learned query attends to all tokens, CLS included; then a norm."""

    def __init__(self, width: int, dim: int, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim))
        self.ln_q, self.ln_k, self.norm = nn.LayerNorm(dim), nn.LayerNorm(width), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens_CND: Tensor) -> Tensor:
        """Return features (C, E) of tokens (C, N, D)."""
        q_1E = self.to_q(self.ln_q(self.query))
        k_CNE, v_CNE = self.to_kv(self.ln_k(tokens_CND)).chunk(2, dim=-1)
        q_CH1, k_CHN, v_CHN = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (q_1E.expand(tokens_CND.shape[0], 1, -1), k_CNE, v_CNE)
        )
        pooled_CH1 = F.scaled_dot_product_attention(q_CH1, k_CHN, v_CHN)
        return self.norm(self.to_out(pooled_CH1.transpose(1, 2).flatten(2))[:, 0])
