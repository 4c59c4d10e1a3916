"""The head solved anew at the start of each epoch, on the features that the encoder gives by then.

Between solves the head follows the encoder by gradient descent; solved, it is the best linear head
of the slides' embeddings at once, so that the encoder's gradient is of a head that has settled.
Attention stays as it is. How strong the head is held is chosen before the first slide, on frozen
features: later ones flatter the cases that the encoder has learned from.

Price: a forward pass over the training bags and the val split, each epoch.
Source: Kumar et al. 2022 (LP-FT, arXiv 2202.10054), the two steps in turn.
"""

from __future__ import annotations

from copy import deepcopy

import lightning as L
from lightning.pytorch.callbacks import Callback

from tapfm.frozen.cached_features import cache_splits
from tapfm.frozen.warm_heads import solve_head


class SolvedHead(Callback):
    """Solves the head at the start of each epoch but the first, which keeps the head it has."""

    def __init__(self):
        self.solved, self.strengths = -1, ()

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Cache features and solve; an epoch that is resumed within has had its solve."""
        epoch = trainer.current_epoch
        if epoch <= self.solved or not module.slide_model.aggregator.linear_head:
            return
        self.solved = epoch
        data, model, chunk = trainer.datamodule, module.slide_model, module.chunk
        bags = data.seen_in_training(1), data.val_dataloader()
        train, val = cache_splits(model, chunk, *bags, f"epoch {epoch + 1}")
        aggregator = model.aggregator if epoch else deepcopy(model.aggregator)
        aggregator.cpu()
        probe = solve_head(aggregator, train, val, data.weighted_task, self.strengths)
        self.strengths = probe.chosen
        aggregator.to(module.device)

    def state_dict(self) -> dict[str, object]:
        """Return the last epoch that was begun with a solve, and the head's strengths."""
        return {"solved": self.solved, "strengths": self.strengths}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Put them back; an older resume point has no strengths: the next solve chooses them."""
        self.solved, self.strengths = state["solved"], tuple(state.get("strengths", ()))
