"""The warm start of a run: head and attention fitted on frozen features before its first slide."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback

from tapfm.frozen.cached_features import cache_splits
from tapfm.frozen.warm_heads import figures, fit_slide_model
from tapfm.recipe.best_weights import BestWeights

VIEWS = 4  # of each training slide, where they differ: a forward each, together an epoch's work


class WarmStart(Callback):
    """Fits the slide model before the first slide of a run; a resumed run has had it.

    Of several processes each caches the tiles of its own slides; slides' embeddings go to all.

    Args:
        best: is given the outcome, as the first that may be best.
    """

    def __init__(self, best: BestWeights):
        self.best = best

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Cache features, solve the head, train attention and head, and start from the better."""
        if module.slides_seen:
            return
        data = trainer.datamodule
        task = data.weighted_task  # here every slide comes as often, however the run draws them
        model, chunk = module.slide_model, module.chunk
        views = VIEWS if data.varies else 1
        bags = data.seen_in_training(views), data.val_dataloader()
        train, val = cache_splits(model, chunk, *bags, "frozen")
        aggregator = model.aggregator
        lines, _ = fit_slide_model(aggregator, train, val, task, data.seed)
        figure, loss, _ = figures(aggregator, val, module.task)  # as the run's epochs are
        aggregator.to(module.device)
        if trainer.is_global_zero:
            print("; ".join([f"warm start: {len(train)} views of slides", *lines]), flush=True)
            self.best.offer(module, figure, loss, epoch=-1)
