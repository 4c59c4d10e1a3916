"""Time to an event, censored for cases that did not have it while they were followed.

    hazard    one logit a bin of time: the chance of the event in the bin, given none before it; the
              default. Bins end at quantiles of the training split's event times.
    cox       one logit, the log relative hazard (`tapfm.tasks.cox`)

A case without a time or an event indicator is unknown and masked. Time is in the table's unit.
Predicted is `risk`, higher for an earlier event: with hazards, the sum over bins of 1 - S, S being
the chance of no event before a bin's end; then S at the end of each bin but the last.

Source: Gensheimer and Narasimhan 2019 (nnet-survival, arXiv 1805.00917); Cox 1972.

Shapes: N slides, K logits, J bins, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tapfm.settings import SettingsError
from tapfm.stats.outcomes import comparable, concordance, time_auc
from tapfm.tasks.contract import Task
from tapfm.tasks.cox import CoxLoss
from tapfm.tasks.losses import HazardNLL

LOSSES = ("hazard", "cox")


@dataclass(frozen=True)
class Survival(Task):
    """Time to an event; a target is time, event (1 or 0) and the number of the slide."""

    labels: tuple[str, ...]
    """Names of the bins, or of the one logit of Cox."""
    time: str
    """Column of times."""
    event: str
    """Column of events."""
    edges: tuple[float, ...]
    """J - 1 rising times between the bins; none with Cox."""
    horizon: float
    """Median time of the training split's events, at which `auc` is measured."""
    with_loss: str = "hazard"

    monitor: ClassVar = "concordance"
    title: ClassVar = "concordance"
    report: ClassVar = "times"

    @classmethod
    def learn(cls, names, classes, target_NY, *, time, event, bins=4, loss="hazard"):
        """Return the task, with the edges of its bins and the median event time."""
        if loss not in LOSSES:
            raise SettingsError(f"loss {loss!r} is none of {', '.join(LOSSES)}")
        if not isinstance(bins, int) or bins < 2:
            raise SettingsError(f"bins must be 2 or more, got {bins!r}")
        seen = target_NY[target_NY[:, 1] == 1, 0]
        if not len(seen):
            raise SettingsError("no event was seen in the training split: nothing can be learned")
        horizon = float(np.median(seen))
        if loss == "cox":
            return cls(("log_relative_hazard",), time, event, (), horizon, loss)
        edges = np.quantile(seen, np.arange(1, bins) / bins)
        filled = len(np.unique(np.searchsorted(edges, seen, side="right")))
        if filled < bins:
            raise SettingsError(
                f"the training split's {len(seen)} events fall into {filled} of {bins} bins, and a "
                "bin without an event teaches nothing. Ask for fewer bins, or for loss: cox"
            )
        labels = tuple(f"hazard_{number + 1}" for number in range(bins))
        return cls(labels, time, event, tuple(float(x) for x in edges), horizon, loss)

    @property
    def loss_has_memory(self):
        """Return whether the loss is Cox's, whose bank keeps one risk of each slide."""
        return self.with_loss == "cox"

    @property
    def targets(self):
        """Return the columns of time and event."""
        return (self.time, self.event)

    @property
    def width(self):
        """Return 3: time, event, number of the slide."""
        return 3

    @property
    def predictions(self):
        """Return risk, and with hazards survival at each edge."""
        return ("risk", *(f"survival_{edge:g}" for edge in self.edges))

    def loss(self) -> nn.Module:
        """Return the likelihood of hazards, or Cox's."""
        return HazardNLL(self.edges) if self.with_loss == "hazard" else CoxLoss()

    def predict(self, logits_NK: Tensor) -> Tensor:
        """Return risk, and with hazards survival at each edge."""
        if self.with_loss == "cox":
            return logits_NK
        survival_NK = nn.functional.logsigmoid(-logits_NK).cumsum(-1).exp()
        risk_N1 = (1 - survival_NK).sum(-1, keepdim=True)
        return torch.cat([risk_N1, survival_NK[..., :-1]], -1)

    def format_target(self, target_Y):
        """Return time and event, or two blanks."""
        time, event = target_Y[:2]
        return ["", ""] if np.isnan(time) else [f"{time:.7g}", str(int(event))]

    def parse(self, texts):
        """Return time and event, or nan; the number of the slide is not kept in files: nan."""
        return [*(float(text or "nan") for text in texts), np.nan]

    def strata(self, target_NY):
        """Return slides with the event, and those censored."""
        return [(1.0, [np.flatnonzero(target_NY[:, 1] == side) for side in (1, 0)])]

    def measure(self, target_NY, predicted_NP, times_BN):
        """Return Harrell's C, and AUROC at the training split's median event time."""
        time_N, event_N, risk_N = target_NY[:, 0], target_NY[:, 1], predicted_NP[:, 0]
        figures = {
            "concordance": concordance(time_N, event_N, risk_N, times_BN),
            "auc": time_auc(time_N, event_N, risk_N, self.horizon, times_BN),
        }
        return {"all": figures}

    def fold_weights(self, target_NY, times_BN):
        """Return the number of pairs in which the earlier event is known."""
        return {"all": comparable(target_NY[:, 0], target_NY[:, 1], times_BN)}

    def notes(self):
        """Return what `auc` is."""
        return [
            f"auc: of an event up to {self.time} = {self.horizon:g}, the training split's median, "
            "against being seen for longer; weighted by the inverse chance of being censored."
        ]
