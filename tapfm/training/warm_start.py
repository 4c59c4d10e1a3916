"""The warm start as a run has it: before its first slide, and once."""

from __future__ import annotations

from copy import deepcopy

import lightning as L
from lightning.pytorch.callbacks import Callback

from tapfm.distributed import gather
from tapfm.frozen.cached_features import cache_features, standardise
from tapfm.frozen.solved_head import embed, judge, solve_head
from tapfm.frozen.taught_head import teach
from tapfm.training.callbacks import BestWeights

VIEWS = 4  # of each training slide, where they differ: a forward each, together an epoch's work


class WarmStart(Callback):
    """Before the first slide of a run; a resumed one has had it.

    Of several processes each remembers the tiles of its own slides; slides' embeddings go to all.

    Args:
        best: is given the outcome, as the first that may be best.
    """

    def __init__(self, best: BestWeights):
        self.best = best

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Encode the slides as they are, solve the head, teach the gate, and take the better."""
        if module.slides_seen:
            return
        data = trainer.datamodule
        task = data.weighted_task  # here every slide comes as often, however the run draws them
        views = VIEWS if data.varies else 1
        train = cache_features(module, data.seen_in_training(views), "frozen train")
        val = cache_features(module, data.val_dataloader(), "frozen val")
        aggregator = module.slide_model.aggregator
        standardise(aggregator, train)
        fresh = deepcopy(aggregator)
        aggregator.cpu()
        embedded = embed(aggregator, val)  # the head is no part of it
        probe = solve_head(aggregator, embed(aggregator, train), embedded, task)
        together = judge(aggregator, embedded, task)[-1]
        said = f"a linear probe, {probe.describe()}, validation loss {together:.3f}"
        if aggregator.learns_weights:
            taught = teach(fresh, train, val, task, data.seed)
            said += f"; attention taught on them, {taught.describe()}"
            if taught.loss < together:
                aggregator.load_state_dict(taught.aggregator.state_dict())
                embedded = embed(aggregator, val)
                said += ", which begins the run"
        figure, loss, _ = judge(aggregator, embedded, module.task)  # as the run's epochs are
        aggregator.load_state_dict(gather(aggregator.state_dict())[0])  # rounding parts processes
        aggregator.to(module.device)
        if trainer.is_global_zero:
            print(f"warm start: {len(train)} views of slides; {said}", flush=True)
            self.best.offer(module, figure, loss, epoch=-1)
