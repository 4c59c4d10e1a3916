"""Settings of the two optimizers, and the learning rates over a run.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184): AdamW, weight decay 1e-4, LR 1e-6 (encoder)
    and 1e-5 (head), cosine.
    Kumar et al. 2022 (LP-FT, arXiv 2202.10054) for `head_first` and `warm_start`: a head that
    starts at random sends gradients that spoil the features before they can serve it.
Differs: one cosine over the run, after a warm-up, instead of warm restarts; norms, biases, scales
    and tokens do not decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tapfm.settings import SettingsError, unmet

SHARES = "some of [0, 1], 0 and 1 among them, or []"
END = 0.01  # the cosine ends at this share of the peak: 1e-8 for the paper's 1e-6


@dataclass(frozen=True)
class Steps:
    """Learning rates and their schedule, for encoder and head."""

    encoder_lr: float | None = None
    """Peak learning rate of the foundation model; None is the strategy's own (full: 1e-6)."""
    head_lr: float = 1e-5
    """Peak learning rate of the aggregator and head."""
    weight_decay: float = 1e-4
    """AdamW's, on matrices only."""
    warmup: float = 0.05
    """Share of the run over which both rates rise from 0."""
    clip: float = 1.0
    """Largest gradient norm of either update; 0 is no limit."""
    accumulate: int = 1
    """Slides per update; fewer at an epoch's end, each divided by this number all the same."""
    head_first: float = 0.0
    """Share of the run in which the encoder stays as it came and only the slide model learns."""
    warm_start: bool = False
    """Begin with the slide model fitted to the frozen features (`recipe.warm_start`)."""
    pull: float = 0.0
    """Weight decay of the encoder toward its pretrained weights (L2-SP), instead of toward 0; not
    for strategies whose change has no scale, such as prompts."""
    solve_head: bool = False
    """Solve the linear head anew at each epoch's start (`recipe.solved_head`)."""
    average: float = 0.1
    """Share of the run over which a mean of the encoder's weights looks back; 0 keeps none."""
    interpolate: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of the encoder's change from which validation chooses what is saved
    (`recipe.interpolation`); none of them: the best epoch is saved as it is."""
    head_start: bool | None = None
    """Old name of `warm_start`."""

    def __post_init__(self):
        if self.head_start is not None:
            object.__setattr__(self, "warm_start", self.warm_start or self.head_start)
            object.__setattr__(self, "head_start", None)
        faults = unmet(
            ("head_first", self.head_first, "in [0, 1)", 0 <= self.head_first < 1),
            ("encoder_lr", self.encoder_lr, "0 or more", (self.encoder_lr or 0) >= 0),
            ("head_lr", self.head_lr, "above 0", self.head_lr > 0),
            ("weight_decay", self.weight_decay, "0 or more", self.weight_decay >= 0),
            ("warmup", self.warmup, "in [0, 1)", 0 <= self.warmup < 1),
            ("clip", self.clip, "0 or more", self.clip >= 0),
            ("accumulate", self.accumulate, "1 or more", self.accumulate >= 1),
            ("pull", self.pull, "0 or more", self.pull >= 0),
            ("average", self.average, "in [0, 1]", 0 <= self.average <= 1),
            ("interpolate", self.interpolate, SHARES, are_shares(self.interpolate)),
        )
        faults += [
            f"{name} must be finite, got {value}"
            for name, value in vars(self).items()
            if isinstance(value, float) and math.isinf(value)
        ]
        if faults:
            raise SettingsError("model.steps: " + "; ".join(faults))


def are_shares(shares: Sequence[float]) -> bool:
    """Return whether shares of a change can be chosen from: none, or some of [0, 1] with both."""
    inside = all(0 <= share <= 1 for share in shares)
    return not shares or (inside and {0, 1} <= {*shares})


def warmup_cosine(done: float, warmup: float) -> float:
    """Return the share of the peak rate when a share `done` (0 to 1) of the run is over."""
    if done < warmup:
        return done / warmup
    after = min((done - warmup) / (1 - warmup), 1.0)
    return END + (1 - END) * (1 + math.cos(math.pi * after)) / 2
