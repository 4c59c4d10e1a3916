"""OTSurv: tiles are transported to a few learned prototypes, the surest first.

    x = relu(W z),  C_tk = |x_t - p_k| / max C,  C_t0 = 0           0 is the dustbin
    P = argmin <P, C> - eps H(P) + gamma KL(P^T 1 | rho / K)        P 1 = 1/T; dustbin: 1 - rho
    B_k = sum_t P_tk x_t / rho,  logits = head(sum_k v_k B_k + v_0)

Every tile has the same mass to give; the share 1 - rho of it, of the tiles far from all prototypes,
goes to the dustbin. rho grows in training from `start` to 1, over the share `until` of the run:
    rho(u) = min(1, start + exp(-5 (1 - u)^2)),  u = progress / until
What it was last is saved with the weights. Tile weights are the mass that a tile does not leave in
the dustbin: at rho = 1 all alike, so they say something early in training alone.

Price: K x T numbers an iteration, all differentiated.
Condition: it was made for survival, and takes any task.
Source: Ren et al. 2025 (OTSurv, arXiv 2506.20741); Zhang et al. 2024 (P2OT, arXiv 2401.09266) for
    the dustbin and the scaling; Sejourne et al. 2022 (arXiv 2201.00730) for the shift.
Differs: the published code iterates in double precision up to 1000 times, to 1e-10; here logarithms
    are scaled `iterations` times in the run's precision, and the shift makes them as near. Features
    are not shifted to a least value of 0, since relu has left them there. rho ends with `until` of
    a run, not at a tenth epoch. No dropout.

Shapes: T tiles, D features, W width, K prototypes, C = K + 1 columns with the dustbin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tapfm.data.bag import Moment
from tapfm.settings import below, refuse
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet


@dataclass(frozen=True)
class OtSurv:
    """Optimal transport of tiles to prototypes, with a growing share of them."""

    prototypes: int = 16
    """K."""
    width: int = 256
    """Of the projected tiles, W."""
    eps: float = 0.1
    """Of the plan's entropy: higher is softer."""
    gamma: float = 1.0
    """How far prototypes are held to equal shares."""
    start: float = 0.1
    """Share of the tiles' mass that is transported as the run begins."""
    until: float = 0.2
    """Share of the run after which all of it is."""
    iterations: int = 50

    def __post_init__(self):
        faults = below(vars(self), {"prototypes": 1, "width": 1, "iterations": 1})
        faults += [
            f"{key} must be above 0 and at most 1, got {value}"
            for key, value in (("start", self.start), ("until", self.until))
            if not 0 < value <= 1
        ]
        positive = {"eps": self.eps, "gamma": self.gamma}
        faults += [f"{k} must be above 0, got {v}" for k, v in positive.items() if not v > 0]
        refuse(f"model.aggregator otsurv: {fault}" for fault in faults)

    def build(self, dim: int, labels: int) -> Transport:
        """Return the module; see `AggregatorOptions`."""
        return Transport(dim, labels, self)


class Transport(Aggregator):
    """The aggregator.

    Args:
        dim: feature width D.
        labels: number of logits.
        options: of the method.
    """

    def __init__(self, dim: int, labels: int, options: OtSurv):
        super().__init__(dim, labels)
        self.options = options
        self.project = nn.Linear(dim, options.width)
        self.prototypes_KW = nn.Parameter(torch.empty(options.prototypes, options.width))
        nn.init.xavier_uniform_(self.prototypes_KW)
        self.pool = nn.Linear(options.prototypes, 1)
        self.head = nn.Linear(options.width, labels)
        self.register_buffer("rho", torch.ones(()))  # without a run, all tiles

    def set_moment(self, moment: Moment) -> None:
        """Take over rho at this share of the run."""
        self.rho.fill_(transported(moment.progress, self.options))

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return logits, each tile's mass, and the pooled prototypes."""
        x_TW = self.project(self.standardised(tiles.z_TD)).relu()
        plan_TK = self.plan(x_TW)
        pooled_W = self.pool((plan_TK.T @ x_TW / self.rho).T)[:, 0]
        mass_T = plan_TK.detach().sum(1)
        return SlideOutput(self.head(pooled_W), mass_T / mass_T.sum(), pooled_W)

    def plan(self, x_TW: Tensor) -> Tensor:
        """Return what each tile gives to each prototype, (T, K); about rho in all."""
        o = self.options
        cost_TK = torch.cdist(x_TW, self.prototypes_KW, compute_mode="donot_use_mm_for_euclid_dist")
        return scale(cost_TK / cost_TK.max(), self.rho, o.eps, o.gamma, o.iterations)


def transported(progress: float, options: OtSurv) -> float:
    """Return rho, the share of the mass that is transported at a share of the run."""
    behind = max(0.0, 1 - progress / options.until)
    return min(1.0, options.start + math.exp(-5 * behind**2))


def scale(cost_TK: Tensor, rho: Tensor, eps: float, gamma: float, iterations: int) -> Tensor:
    """Return the plan (T, K), less its dustbin, after so many scalings of rows and columns.

    Rows keep to 1/T and the dustbin to 1 - rho; prototypes keep to rho/K as far as `gamma` holds
    them: their logarithms move by the share gamma / (gamma + eps) of the step that would do it.
    After each scaling columns are shifted by the best number for all of them, which rows undo:
    without it, that number converges by the same share an iteration, and takes hundreds.
    """
    tiles, prototypes = cost_TK.shape
    kernel_TC = -torch.cat([cost_TK, cost_TK.new_zeros(tiles, 1)], 1) / eps
    wanted_C = torch.cat([(rho / prototypes).log().expand(prototypes), (1 - rho).log()[None]])
    held_C = wanted_C.new_ones(prototypes + 1)
    held_C[:-1] = gamma / (gamma + eps)
    column_C, shift = torch.zeros_like(wanted_C), 0.0
    stiff = eps / gamma
    for _ in range(iterations):
        row_T = -math.log(tiles) - (kernel_TC + column_C + shift).logsumexp(1)
        column_C = held_C * (wanted_C - (kernel_TC + row_T[:, None]).logsumexp(0))
        shift = ((-stiff * column_C[:-1]).logsumexp(0) - math.log(prototypes)) / stiff
    return (kernel_TC + row_T[:, None] + column_C)[:, :-1].exp()
