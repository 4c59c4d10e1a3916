"""Each training slide's mean frozen feature, for regularisers that look back at it."""

from __future__ import annotations

from collections import defaultdict

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from tapfm.distributed import gather
from tapfm.frozen.cached_features import cache_features
from tapfm.frozen.frozen_slide import feature_statistics


class FrozenMeans(Callback):
    """Encodes the training bags before the first slide; a resumed run remembers.

    All processes are given all slides' means, since a slide goes to another process each epoch.
    """

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give the means to the regularisers that want them."""
        wanting = [each for each in module.objective.regularisers.values() if each.needs_frozen]
        if module.slides_seen or not wanting:
            return
        bags = trainer.datamodule.seen_in_training(1)
        slides = cache_features(module.slide_model, module.chunk, bags, "frozen train")
        _, scale_D = feature_statistics(slides, shared=True)
        views = defaultdict(list)
        for share in gather([(slide.slide_id, slide.z_TD.mean(0)) for slide in slides]):
            for name, mean_D in share:
                views[name].append(mean_D)
        means = [torch.stack(each).mean(0) for each in views.values()]
        for each in wanting:
            each.see_frozen([*views], means, scale_D)
