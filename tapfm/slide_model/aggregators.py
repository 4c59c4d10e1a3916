"""From tiles to a slide or a case: ways to weigh tiles, one slide model.

    tapfm         w = softmax(minmax(s) / T)           T = 0.1, the paper's: how CLS looks
    gated         w = softmax(g(z))                    learned attention (ABMIL)
    tapfm_gated   w = softmax(minmax(s) / T + g(z))    T = 1, and g starts at 0: it can learn
    hierarchical  the same within each slide of a case, times softmax(h(slide embedding)) over its
                  slides; h starts at 0, as their mean: of one slide it is tapfm_gated

then the bag embedding b = sum_t w_t z_t, LayerNorm, Linear. The slide model stands on a graph of
its own whose leaves are `z_TD` and the raw `score_T`, so min-max and softmax keep their exact
Jacobian and the encoder's chunks separate (see `engine.chunked`).

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184) for `tapfm`; Ilse et al. 2018 (arXiv
    1802.04712), gated attention, for g and h; MOOZY for the two levels, tiles of a slide and
    slides of a case.
Differs: min-max ignores a spread below rounding (the paper divides by spread + 1e-8, which makes
    equal tiles unequal); the score may be any increasing affine function of the paper's s, since
    min-max removes it; MOOZY's slides meet in a transformer of 21 M weights, ours, which are few a
    case, in one more gate.

Shapes: T tiles of a slide, S slides of a case, D features, A attention units, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SPREAD_ULPS = 64  # scores closer than this many roundings of their size are equal
GATE_UNITS = 128


def minmax(score_T: Tensor) -> Tensor:
    """Scores moved to [0, 1] over the bag; all 0 where they are equal up to rounding."""
    low, high = score_T.min(), score_T.max()
    rounding = SPREAD_ULPS * torch.finfo(score_T.dtype).eps * score_T.abs().max().detach()
    spread = high - low
    equal = spread.detach() <= rounding
    # where on both sides: a division by 0 in the untaken branch would still give nan gradients
    safe = torch.where(equal, torch.ones_like(spread), spread)
    return torch.where(equal, torch.zeros_like(score_T), (score_T - low) / safe)


def effective_tiles(weights_T: Tensor) -> Tensor:
    """1 / sum w^2: how many tiles the bag embedding really stands on. 1 to T."""
    return 1 / weights_T.square().sum()


class Gate(nn.Module):
    """Gated attention, tanh x sigmoid, one logit a tile."""

    def __init__(self, dim: int, units: int = GATE_UNITS, *, start_at_zero: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.tanh = nn.Linear(dim, units)
        self.sigmoid = nn.Linear(dim, units)
        self.last = nn.Linear(units, 1, bias=False)  # softmax over tiles ignores a bias
        if start_at_zero:
            nn.init.zeros_(self.last.weight)

    def forward(self, z_TD: Tensor) -> Tensor:
        """Logits (T,)."""
        x_TD = self.norm(z_TD)
        units_TA = torch.tanh(self.tanh(x_TD)) * torch.sigmoid(self.sigmoid(x_TD))
        return self.last(units_TA).squeeze(-1)


class Aggregator(nn.Module):
    """Tile features and scores to slide logits.

    Args:
        dim: feature width D.
        labels: number of labels K.
        score_temperature: T of the CLS score; None leaves the score out.
        gate: whether g(z) takes part.
        by_slide: whether the slides of a case are weighed, each as a whole.
    """

    def __init__(
        self,
        dim: int,
        labels: int,
        *,
        score_temperature: float | None = 0.1,
        gate: bool = False,
        by_slide: bool = False,
    ):
        super().__init__()
        if score_temperature is None and not gate:
            raise ValueError("an aggregator needs the CLS score, a gate, or both")
        if score_temperature is not None and score_temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {score_temperature}")
        self.score_temperature = score_temperature
        # What the features are centred on and divided by: nothing, but after a head start.
        self.register_buffer("center_D", torch.zeros(dim))
        self.register_buffer("scale_D", torch.ones(dim))
        # Beside the score g starts as nothing, so training starts as the paper's TAPFM.
        self.gate = Gate(dim, start_at_zero=score_temperature is not None) if gate else None
        self.slide_gate = Gate(dim, start_at_zero=True) if by_slide else None
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, labels)

    def weights(self, x_TD: Tensor, score_T: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """Tile weights (T,), positive, summing to 1, of standardised features. See `forward`."""
        if self.slide_gate is None:
            return self.weights_within(x_TD, score_T)
        counts = list(counts) or [len(x_TD)]
        x_STD, score_ST = x_TD.split(counts), score_T.split(counts)
        within_ST = [self.weights_within(*each) for each in zip(x_STD, score_ST, strict=True)]
        slide_SD = torch.stack([w_T @ x_TD for w_T, x_TD in zip(within_ST, x_STD, strict=True)])
        share_S = self.slide_gate(slide_SD).softmax(0)
        return torch.cat([share * w_T for share, w_T in zip(share_S, within_ST, strict=True)])

    def weights_within(self, x_TD: Tensor, score_T: Tensor) -> Tensor:
        """Of tiles that are weighed against each other."""
        logits_T = torch.zeros_like(score_T)
        if self.score_temperature is not None:
            logits_T = logits_T + minmax(score_T) / self.score_temperature
        if self.gate is not None:
            logits_T = logits_T + self.gate(x_TD)
        return logits_T.softmax(0)

    def forward(
        self, z_TD: Tensor, score_T: Tensor, counts: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Slide logits (K,) and tile weights (T,).

        Args:
            z_TD: features, slide after slide.
            score_T: raw scores.
            counts: tiles of each slide, where they are a case's.
        """
        b_D, weights_T = self.embed(z_TD, score_T, counts)
        return self.head(b_D), weights_T

    def embed(
        self, z_TD: Tensor, score_T: Tensor, counts: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """The slide's embedding (D,), normalised, and tile weights (T,)."""
        x_TD = (z_TD - self.center_D) / self.scale_D
        weights_T = self.weights(x_TD, score_T, counts)
        return self.norm(weights_T @ x_TD), weights_T


class TileHead(nn.Module):
    """In an aggregator's place where labels are of tiles: class logits of each tile by itself.

    Args:
        dim: feature width D.
        labels: number of classes K.
    """

    score_temperature = None  # it does not look at the CLS score

    def __init__(self, dim: int, labels: int):
        super().__init__()
        self.dropout = nn.Dropout(0.0)  # while training; who trains it sets how much
        self.head = nn.Linear(dim, labels)

    def forward(self, z_TD: Tensor) -> Tensor:
        """Logits (T, K)."""
        return self.head(self.dropout(z_TD))


TILES = "tiles"
"""Name of `TileHead` in a model_config."""
AGGREGATORS = {
    "tapfm": {"gate": False, "score_temperature": 0.1},
    "gated": {"gate": True, "score_temperature": None},
    # At T = 0.1 the score outvotes a young gate 10 to 0, right or wrong; at 1 it only leans.
    "tapfm_gated": {"gate": True, "score_temperature": 1.0},
    "hierarchical": {"gate": True, "score_temperature": 1.0, "by_slide": True},
}


def make_aggregator(
    name: str, dim: int, labels: int, temperature: float | None = None
) -> Aggregator | TileHead:
    """One of `AGGREGATORS` by name, or `TILES`.

    Args:
        name: which.
        dim: feature width D.
        labels: number of labels K.
        temperature: of the CLS score; None is the aggregator's own.

    Raises:
        ValueError: no such name.
    """
    if name == TILES:
        return TileHead(dim, labels)
    if name not in AGGREGATORS:
        raise ValueError(f"aggregator: {name!r} is none of {', '.join(AGGREGATORS)}")
    settings = dict(AGGREGATORS[name])
    if temperature is not None and settings["score_temperature"] is not None:
        settings["score_temperature"] = temperature
    return Aggregator(dim, labels, **settings)
