"""Cox's partial likelihood at one slide a step: the others' risks are remembered.

    L = -1/E sum over events i of (eta_i - log sum over j at risk at t_i of exp(eta_j))

One slide alone has no one to be compared with: its loss is 0 whatever its risk eta. So a bank holds
the last risk of each of the slides trained last, as plain numbers, and L is taken over the bank and
the slide under way; only the latter carries a gradient. A slide that comes again replaces its own
entry. With the whole cohort in the bank at fixed weights, the gradients of its slides add up to the
gradient of Cox's partial likelihood; in training the remembered risks are up to an epoch old.

Ties are Breslow's. The bank is part of a checkpoint, so a resumed run is the run.

Source: Cox 1972 (JRSS B 34:187); Breslow 1974 for ties; a memory of earlier outputs as in He et al.
    2020 (MoCo, arXiv 1911.05722).
Differs: no second, slowly moving network gives the remembered risks; it would cost a pass.

Shapes: N slides, M slides in the bank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = 256  # slides remembered: a risk set of this size estimates the cohort's well


class CoxLoss(nn.Module):
    """Partial likelihood over the slides given and those remembered. In `eval`, none is added.

    Args:
        size: M, slides remembered.
    """

    def __init__(self, size: int = SIZE):
        super().__init__()
        bank_M4 = torch.full((size, 4), torch.nan)  # time, event, number, risk
        self.register_buffer("bank_M4", bank_M4)

    def forward(self, risk_N1: Tensor, y_N3: Tensor) -> Tensor:
        """One number; 0, still with a graph, where no event is known or no one is at risk.

        Args:
            risk_N1: (1,) or (N, 1), log relative hazards eta.
            y_N3: time, event (1 or 0), and the slide's number, by which its entry is replaced.
        """
        y_N3, risk_N = y_N3.reshape(-1, 3).to(self.bank_M4.dtype), risk_N1.reshape(-1)
        known_N = ~y_N3[:, 0].isnan()
        again_M = (self.bank_M4[:, 2, None] == y_N3[:, 2]).any(1)
        others_M4 = self.bank_M4[~again_M & ~self.bank_M4[:, 0].isnan()]
        y_3 = torch.cat([y_N3[known_N], others_M4[:, :3]])
        risk = torch.cat([risk_N[known_N], others_M4[:, 3].to(risk_N)])
        if self.training:
            fresh_N4 = torch.cat([y_N3, risk_N.detach()[:, None].to(y_N3)], 1)[known_N]
            self.remember(fresh_N4, others_M4)
        return partial_likelihood(risk, y_3[:, 0], y_3[:, 1]) + 0 * risk_N.sum()

    def remember(self, fresh_N4: Tensor, others_M4: Tensor) -> None:
        """The newest first; the oldest drop out."""
        size = len(self.bank_M4)
        bank = torch.cat([fresh_N4, others_M4])[:size]
        empty = bank.new_full((size - len(bank), 4), torch.nan)
        self.bank_M4.copy_(torch.cat([bank, empty]))


def partial_likelihood(risk_N: Tensor, time_N: Tensor, event_N: Tensor) -> Tensor:
    """Mean over events of minus the log partial likelihood; 0 without an event."""
    at_risk_NN = time_N[None, :] >= time_N[:, None]
    beside_NN = risk_N[None, :].expand(len(risk_N), -1).masked_fill(~at_risk_NN, -torch.inf)
    event_N = event_N == 1
    each_N = risk_N[event_N] - beside_NN[event_N].logsumexp(1)
    return -each_N.sum() / event_N.sum().clamp(min=1)
