"""Cox's partial likelihood at one slide a step, against a bank of risks of earlier slides.

    L = -1/E sum over events i of (eta_i - log sum over j at risk at t_i of exp(eta_j))

The loss of a slide alone is 0 whatever its risk eta. So a bank keeps the latest risks of the slides
trained last, without gradient, and L is computed over the bank and the slide of this step, which
alone has a gradient. A slide that is trained again replaces its entry. With the whole cohort in the
bank and fixed weights, the gradients of the slides add up to that of Cox's partial likelihood; in
training the stored risks are up to an epoch old. The bank is saved in checkpoints, so a resumed run
ends as one that was never stopped. Ties are handled as by Breslow.

Source: Cox 1972 (JRSS B 34:187); Breslow 1974 for ties; a memory of earlier outputs as in He et al.
    2020 (MoCo, arXiv 1911.05722).
Differs: the stored risks are the model's own, not those of a slowly moving copy, whose forward pass
    would double the cost.

Shapes: N slides, M slides in the bank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZE = 256  # slides in the bank: a risk set of this size estimates that of the cohort well


class CoxLoss(nn.Module):
    """Partial likelihood over the given slides and the bank; in `eval` the bank does not change.

    Args:
        size: M, slides in the bank.
    """

    def __init__(self, size: int = SIZE):
        super().__init__()
        bank_M4 = torch.full((size, 4), torch.nan)  # time, event, number, risk
        self.register_buffer("bank_M4", bank_M4)

    def forward(self, risk_N1: Tensor, y_N3: Tensor) -> Tensor:
        """Return the loss, one number; 0, still with a graph, without an event or a risk set.

        Args:
            risk_N1: (1,) or (N, 1), log relative hazards eta.
            y_N3: time, event (1 or 0), and the number of the slide, which finds its entry.
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
        """Put the newest slides first in the bank; the oldest drop out."""
        size = len(self.bank_M4)
        bank = torch.cat([fresh_N4, others_M4])[:size]
        empty = bank.new_full((size - len(bank), 4), torch.nan)
        self.bank_M4.copy_(torch.cat([bank, empty]))


def partial_likelihood(risk_N: Tensor, time_N: Tensor, event_N: Tensor) -> Tensor:
    """Return minus the log partial likelihood, averaged over events; 0 without an event."""
    at_risk_NN = time_N[None, :] >= time_N[:, None]
    beside_NN = risk_N[None, :].expand(len(risk_N), -1).masked_fill(~at_risk_NN, -torch.inf)
    event_N = event_N == 1
    each_N = risk_N[event_N] - beside_NN[event_N].logsumexp(1)
    return -each_N.sum() / event_N.sum().clamp(min=1)
