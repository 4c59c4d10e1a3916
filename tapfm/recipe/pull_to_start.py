"""L2-SP: after each update the encoder's weights are drawn toward the pretrained ones.

    p <- p + lr * strength * (p0 - p)

In place of weight decay, which draws them toward 0 and so away from what was pretrained: the
encoder has none then. Only what scales the change is drawn (`adapt.interpolation`): all weights of
full fine-tuning, LoRA's B. A strategy whose change has no scale is refused.

Price: a copy of what learns, on its device.
Source: Li et al. 2018 (L2-SP, arXiv 1802.01483).
Differs: decoupled from the gradient, as AdamW's decay is.
"""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tapfm.adapt.strategies import scaled_parts
from tapfm.recipe.weight_average import after_updates, learning


class PullToStart(Callback):
    """Draws the encoder's learned weights toward those it started from.

    Args:
        strength: factor on the learning rate, as a weight decay's.
    """

    def __init__(self, strength: float):
        self.strength, self.start = strength, {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put the pretrained weights beside those that learn."""
        moves = scaled_parts(module.strategy)
        named = [(name, p) for name, p in learning(module) if name.endswith(moves)]
        self.start: dict[str, Tensor] = {n: module.start[n].to(p.device) for n, p in named}
        after_updates(module, self.draw)

    @torch.no_grad()
    def draw(self, module: L.LightningModule) -> None:
        """Draw each weight toward its start, by its own learning rate, after an update."""
        rates = {id(p): group["lr"] for group in module.optimizers()[1].param_groups
                 for p in group["params"]}  # fmt: skip
        for name, parameter in learning(module):
            if name in self.start:
                parameter.lerp_(self.start[name], rates[id(parameter)] * self.strength)
