"""The head solved anew at the start of each epoch, on the features that the encoder gives by then.

Between solves the head follows the encoder by gradient descent; solved, it is the best linear head
of the slides' embeddings at once, so that the encoder's gradient is of a head that has settled.
Attention, where there is some, stays as it is.

Price: a forward pass over the training bags and the val split, each epoch but the first.
Source: Kumar et al. 2022 (LP-FT, arXiv 2202.10054), the two steps in turn.
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback

from tapfm.frozen.cached_features import cache_splits
from tapfm.frozen.warm_heads import solve_head


class SolvedHead(Callback):
    """Solves the head at the start of each epoch but the first, which has the warm start's."""

    def __init__(self):
        self.solved = 0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Cache features and solve; an epoch that is resumed within has had its solve."""
        epoch = trainer.current_epoch
        if epoch <= self.solved or not module.slide_model.aggregator.linear_head:
            return
        self.solved = epoch
        data, model, chunk = trainer.datamodule, module.slide_model, module.chunk
        bags = data.seen_in_training(1), data.val_dataloader()
        train, val = cache_splits(model, chunk, *bags, f"epoch {epoch + 1}")
        model.aggregator.cpu()
        solve_head(model.aggregator, train, val, data.weighted_task)
        model.aggregator.to(module.device)

    def state_dict(self) -> dict[str, int]:
        """Return the last epoch that was begun with a solve."""
        return {"solved": self.solved}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Put it back."""
        self.solved = state["solved"]
