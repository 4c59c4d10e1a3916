"""The head in the aggregator's place for tile labels: class logits of each tile.

Shapes: T tiles, D features, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn


class TileHead(nn.Module):
    """A linear classifier of tiles.

    Args:
        dim: feature width D.
        labels: number of classes K.
    """

    uses_score, uses_coords, loss_calls, tasks = False, False, 1, ()

    def __init__(self, dim: int, labels: int):
        super().__init__()
        self.dropout = nn.Dropout(0.0)  # while training; who trains it sets how much
        self.head = nn.Linear(dim, labels)

    def forward(self, z_TD: Tensor) -> Tensor:
        """Return logits (T, K)."""
        return self.head(self.dropout(z_TD))
