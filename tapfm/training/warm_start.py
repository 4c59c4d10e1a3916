"""The warm start of a run: head and attention fitted on frozen features before its first slide."""

from __future__ import annotations

import math
from copy import deepcopy

import lightning as L
from lightning.pytorch.callbacks import Callback

from tapfm.distributed import gather
from tapfm.frozen.cached_features import cache_features
from tapfm.frozen.frozen_slide import feature_statistics, standardise
from tapfm.frozen.warm_heads import figures, fit_attention, solve_head
from tapfm.training.callbacks import BestWeights

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
        views = VIEWS if data.varies else 1
        train = cache_features(module, data.seen_in_training(views), "frozen train")
        val = cache_features(module, data.val_dataloader(), "frozen val")
        val.sort(key=lambda slide: slide.slide_id)
        aggregator = module.slide_model.aggregator
        standardise(aggregator, *feature_statistics(train, shared=True))
        fresh = deepcopy(aggregator)
        aggregator.cpu()
        lines, best = [f"warm start: {len(train)} views of slides"], math.inf
        if aggregator.linear_head:
            probe = solve_head(aggregator, train, val, task)
            *_, best = figures(aggregator, val, task)
            lines.append(f"a linear probe, {probe.describe()}, validation loss {best:.3f}")
        if aggregator.learns_weights:
            fitted = fit_attention(fresh, train, val, task, data.seed)
            chosen = f"lr {fitted.chosen.lr:g}, epoch {fitted.epoch + 1}"
            lines.append(f"attention trained on them, {chosen}, validation loss {fitted.loss:.3f}")
            if fitted.loss < best:
                aggregator.load_state_dict(fitted.model.state_dict())
                lines[-1] += ", which begins the run"
        figure, loss, _ = figures(aggregator, val, module.task)  # as the run's epochs are
        aggregator.load_state_dict(gather(aggregator.state_dict())[0])  # rounding parts processes
        aggregator.to(module.device)
        if trainer.is_global_zero:
            print("; ".join(lines), flush=True)
            self.best.offer(module, figure, loss, epoch=-1)
