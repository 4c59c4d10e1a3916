"""A slide as the weighted mean of its tiles, for the four aggregators that differ in the weights.

    w_t = softmax_t(minmax(s)_t / temperature + g(z_t)),  b = sum_t w_t z_t,  logits = W norm(b)

The slide model stands on a graph of its own whose leaves are `z_TD` and the raw `score_T`, so
min-max and softmax keep their exact Jacobian and the encoder's chunks separate (`engine.chunked`).

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184); Ilse et al. 2018 (arXiv 1802.04712), gated
    attention, for g.
Differs: the score may be any increasing affine function of the paper's s, since min-max removes it.

Shapes: T tiles, S slides of a case, D features, K labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet
from tapfm.slide_model.layers.attention import Gate, minmax


def check_temperature(name: str, temperature: float) -> None:
    """Refuse a temperature that is not above 0.

    Raises:
        SettingsError: it is not.
    """
    if temperature <= 0:
        raise SettingsError(
            f"model.aggregator {name}: temperature must be above 0, got {temperature}"
        )


class AttentionPooling(Aggregator):
    """A slide as the weighted mean of its tiles.

    Args:
        dim: feature width D.
        labels: number of labels K.
        temperature: of the CLS score; None leaves the score out.
        gate: whether g(z) takes part.
        by_slide: whether the slides of a case are weighed, each as a whole.
    """

    has_attention = True

    def __init__(
        self,
        dim: int,
        labels: int,
        *,
        temperature: float | None,
        gate: bool,
        by_slide: bool = False,
    ):
        super().__init__(dim, labels)
        self.temperature, self.uses_score = temperature, temperature is not None
        # Beside the score g starts as nothing, so training starts as the paper's TAPFM.
        self.gate = Gate(dim, start_at_zero=self.uses_score) if gate else None
        self.slide_gate = Gate(dim, start_at_zero=True) if by_slide else None
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, labels)

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, weights and the normalised weighted mean; see `Aggregator`."""
        x_TD = self.standardised(tiles.z_TD)
        weights_T, log_weights_T = self.attention(x_TD, tiles)
        b_D = self.norm(weights_T @ x_TD)
        return SlideOutput(self.head(b_D), weights_T, b_D, log_weights_T)

    def attention(self, x_TD: Tensor, tiles: TileSet) -> tuple[Tensor, Tensor]:
        """Return tile weights (T,), positive, summing to 1, and their logarithms."""
        if self.slide_gate is None:
            return self._weigh(x_TD, tiles.score_T)
        x_STD, score_ST = x_TD.split(tiles.counts), tiles.score_T.split(tiles.counts)
        within_ST, log_ST = zip(*map(self._weigh, x_STD, score_ST), strict=True)
        slide_SD = torch.stack([w_T @ x_TD for w_T, x_TD in zip(within_ST, x_STD, strict=True)])
        logits_S = self.slide_gate(slide_SD)
        share_S, log_share_S = logits_S.softmax(0), logits_S.log_softmax(0)
        weights = [share * w_T for share, w_T in zip(share_S, within_ST, strict=True)]
        logs = [share + log_T for share, log_T in zip(log_share_S, log_ST, strict=True)]
        return torch.cat(weights), torch.cat(logs)

    def _weigh(self, x_TD: Tensor, score_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights of tiles that are weighed against each other, and their logarithms."""
        logits_T = torch.zeros_like(score_T)
        if self.temperature is not None:
            logits_T = logits_T + minmax(score_T) / self.temperature
        if self.gate is not None:
            logits_T = logits_T + self.gate(x_TD)
        return logits_T.softmax(0), logits_T.log_softmax(0)
