"""A running mean of the encoder's learned weights, which validates better than the last step.

After each update the mean moves toward the weights by 1 / (window of updates), at first by more, so
that the start is soon forgotten. The window is a share of the run, so that one setting serves runs
of 100 and of 100,000 updates.

Price: a copy of what learns, on its device and in the resume point.
Source: Polyak and Juditsky 1992 (SIAM J. Control Optim. 30:838); the exponential mean and its ramp
    as is usual.
"""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from tapfm.adapt import interpolation


class WeightAverage(Callback):
    """Keeps the mean of the weights of the encoder that learn.

    Args:
        window: share of the run's updates over which the mean looks back.
    """

    def __init__(self, window: float):
        self.window, self.updates, self.mean = window, 0, {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin with the weights as they are; a resumed run has its mean."""
        there = {name: p for name, p in learning(module) if name not in self.mean}
        self.mean |= {name: p.detach().float().clone() for name, p in there.items()}
        self.mean = {name: self.mean[name].to(p.device) for name, p in learning(module)}
        after_updates(module, self.follow)

    @torch.no_grad()
    def follow(self, module: L.LightningModule) -> None:
        """Move the mean toward the weights after an update."""
        self.updates += 1
        window = max(1.0, self.window * module.slides_in_run / module.steps.accumulate)
        keep = min(1 - 1 / window, self.updates / (self.updates + 9))
        for name, parameter in learning(module):
            self.mean[name].lerp_(parameter.float(), 1 - keep)

    def weights(self) -> dict[str, Tensor]:
        """Return the mean on the CPU, by name."""
        return {name: value.cpu() for name, value in self.mean.items()}

    def state_dict(self) -> dict[str, object]:
        """Return the mean and the number of updates in it."""
        return {"updates": self.updates, "mean": self.mean}

    def load_state_dict(self, state) -> None:
        """Put them back."""
        self.updates, self.mean = state["updates"], state["mean"]


def after_updates(module: L.LightningModule, follow: Callable[[L.LightningModule], None]) -> None:
    """Have `follow` called after each update of the encoder, whichever turn completes it."""
    _, encoder_optimizer = module.optimizers(use_pl_optimizer=False)
    encoder_optimizer.register_step_post_hook(lambda *_: follow(module))


def learning(module: L.LightningModule) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters of the encoder that learn."""
    return list(interpolation.learning(module.slide_model.encoder.vit).items())
