"""Time to an event that not all cases had while they were seen.

    hazard    one logit a bin of time, the chance of the event in it for those who came so far;
              the default. Bins end at quantiles of the training split's event times.
    cox       one logit, the log relative hazard; its loss compares it with others
    (`tapfm.tasks.cox`)

A case without a time, or without word of its event, is unknown and masked. Time is in the table's
unit. What is predicted is `risk`, higher for sooner: of hazards the number of bins expected to be
lost, sum over bins of 1 - S; and, of hazards, S at the end of each bin but the last, the chance of
no event before then.

Source: Gensheimer and Narasimhan 2019 (nnet-survival, arXiv 1805.00917); Cox 1972.

Shapes: N slides, K logits, J bins, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tapfm.stats.outcomes import comparable, concordance, time_auc
from tapfm.tasks.cox import CoxLoss
from tapfm.tasks.losses import HazardNLL

LOSSES = ("hazard", "cox")


@dataclass(frozen=True)
class Survival:
    """See `tapfm.tasks.Task`."""

    labels: tuple[str, ...]
    """Names of the bins, or of the one logit of Cox."""
    time: str
    """Column of the table."""
    event: str
    """Column of the table."""
    edges: tuple[float, ...]
    """J - 1 rising times between the bins; none with Cox."""
    horizon: float
    """Median time of the training split's events, at which `auc` is measured."""
    with_loss: str = "hazard"

    options: ClassVar = ("time", "event", "bins", "loss")
    selects: ClassVar = "concordance"
    title: ClassVar = "concordance"

    @classmethod
    def learn(cls, names, classes, target_NY, time, event, bins=4, loss="hazard"):
        """See `tapfm.tasks.learn_task`."""
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is none of {', '.join(LOSSES)}")
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"bins must be 2 or more, got {bins!r}")
        seen = target_NY[target_NY[:, 1] == 1, 0]
        if not len(seen):
            raise ValueError("no event was seen in the training split: nothing can be learned")
        horizon = float(np.median(seen))
        if loss == "cox":
            return cls(("log_relative_hazard",), time, event, (), horizon, loss)
        edges = np.quantile(seen, np.arange(1, bins) / bins)
        filled = len(np.unique(np.searchsorted(edges, seen, side="right")))
        if filled < bins:
            raise ValueError(
                f"the training split's {len(seen)} events fall into {filled} of {bins} bins, and a "
                "bin without an event teaches nothing. Ask for fewer bins, or for loss: cox"
            )
        labels = tuple(f"hazard_{number + 1}" for number in range(bins))
        return cls(labels, time, event, tuple(float(x) for x in edges), horizon, loss)

    @property
    def truth(self):
        """Time and event."""
        return (self.time, self.event)

    @property
    def width(self):
        """Time, event, and the slide's number."""
        return 3

    @property
    def said(self):
        """The risk, and survival at the edges."""
        return ("risk", *(f"survival_{edge:g}" for edge in self.edges))

    def loss(self) -> nn.Module:
        """Of hazards, or Cox's."""
        return HazardNLL(self.edges) if self.with_loss == "hazard" else CoxLoss()

    def predict(self, logits_NK: Tensor) -> Tensor:
        """Risk and survival."""
        if self.with_loss == "cox":
            return logits_NK
        survival_NK = nn.functional.logsigmoid(-logits_NK).cumsum(-1).exp()
        risk_N1 = (1 - survival_NK).sum(-1, keepdim=True)
        return torch.cat([risk_N1, survival_NK[..., :-1]], -1)

    def spell(self, target_Y):
        """Time and event, or blanks."""
        time, event = target_Y[:2]
        return ["", ""] if np.isnan(time) else [f"{time:.7g}", str(int(event))]

    def parse(self, texts):
        """Time and event, or nan; whose slide's they are is not told."""
        return [*(float(text or "nan") for text in texts), np.nan]

    def unweighted(self):
        """Nothing is weighted."""
        return self

    def strata(self, target_NY):
        """Events, and cases last seen without one."""
        return [(1.0, [np.flatnonzero(target_NY[:, 1] == side) for side in (1, 0)])]

    def measure(self, target_NY, said_NP, times_BN):
        """Harrell's C, and AUROC at the training split's median event time."""
        time_N, event_N, risk_N = target_NY[:, 0], target_NY[:, 1], said_NP[:, 0]
        figures = {
            "concordance": concordance(time_N, event_N, risk_N, times_BN),
            "auc": time_auc(time_N, event_N, risk_N, self.horizon, times_BN),
        }
        return {"all": figures}

    def compared(self, target_NY, times_BN):
        """Pairs of which it is known who was first."""
        return {"all": comparable(target_NY[:, 0], target_NY[:, 1], times_BN)}
