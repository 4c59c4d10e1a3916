"""A run with a frozen encoder encodes each slide once, before its first epoch.

What is encoded lies where `tapfm test` keeps frozen features (`<run_dir>/frozen`), in the files of
`tapfm features`, and the epochs read it from there, or from memory where it fits. Where training
tiles are drawn or changed anew each epoch, only the val split is encoded once.

Price: a forward pass a tile, once; on disk 4 bytes a feature.
Differs: bf16-true runs encode each epoch, since their weights are rounded after features are made.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from slides.streaming.settings import Source
from tapfm.data.datamodule import SlideData
from tapfm.data.feature_source import FeatureSource
from tapfm.distributed import gather
from tapfm.frozen.cached_features import evaluating
from tapfm.frozen.features import extract, frozen_extraction
from tapfm.training.module import SlideModule


def splits_to_encode(module: SlideModule, data: SlideData) -> tuple[str, ...]:
    """Return the splits whose features are the same in each epoch of a run."""
    rounded = module.slide_model.model_config.precision == "bf16-true"
    if module.learns or data.features or rounded:
        return ()
    return ("val",) if data.varies or module.passes.noisy else ("train", "val")


class EncodeOnce(Callback):
    """Encodes what is not encoded yet, and lets the data module give features from then on.

    Args:
        folder: of the frozen features of a cohort's runs.
        splits: to encode.
    """

    def __init__(self, folder: Path, splits: tuple[str, ...]):
        self.folder, self.splits = folder, splits

    def setup(self, trainer: L.Trainer, module: SlideModule, stage: str) -> None:
        """Encode this process's share of the slides, and wait for the others'."""
        data: SlideData = trainer.datamodule
        module.to(trainer.strategy.root_device)
        model, stain = module.slide_model, data.tile_source.stain
        extraction = frozen_extraction(model, module.chunk, stain)
        folder = self.folder / data.tiles.grid.tag / f"features_{extraction.name}"
        source: Source = data.source
        rows = [each for split in self.splits for row in data.rows(split) for each in row.slides]
        rank, world = trainer.global_rank, trainer.world_size
        with evaluating(model):
            kept, tiles, failed = extract(extraction, rows[rank::world], source, folder)
        for share in gather(failed):
            data.skipped |= share
        print(
            f"{folder}: {tiles} tiles encoded once, {kept} slides were there already; epochs read "
            f"{' and '.join(self.splits)} features from there",
            flush=True,
        )
        rows = [row for row in rows if row.slide_id not in data.skipped]
        folder.mkdir(parents=True, exist_ok=True)  # where there is no slide to encode
        data.features = FeatureSource(
            folder, rows, data.tiles.mpp, data.budget, data.on_error, self.splits
        )
