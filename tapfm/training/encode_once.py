"""A run with a frozen encoder encodes each slide once, before its first epoch.

What is encoded lies where `tapfm test` keeps frozen features (`<run_dir>/frozen`), in the files of
`tapfm features`, and the epochs read it from there, or from memory where it fits. Where training
tiles are drawn or changed anew each epoch, only the val split is encoded once.

Price: a forward pass a tile, once; on disk 4 bytes a feature.
Differs: bf16-true runs encode each epoch, since their weights are rounded after features are made.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from slides.streaming.settings import Source
from tapfm.data.datamodule import SlideData
from tapfm.data.feature_source import FeatureSource
from tapfm.distributed import gather
from tapfm.encoders.compiled import need_compiler
from tapfm.frozen.features import extract, frozen_extraction
from tapfm.frozen.fitter import evaluating
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
        if module.slide_model.encoder.compiled:
            need_compiler(trainer.strategy.root_device)
        model, stain = module.slide_model, data.tile_source.stain
        extraction = frozen_extraction(model, module.chunk, stain)
        folder = self.folder / data.tiles.grid.tag / f"features_{extraction.name}"
        source: Source = data.source
        bags = [bag for split in self.splits for bag in data.rows(split)]
        rows = [each for bag in bags for each in bag.slides]
        mine = rows[trainer.global_rank :: trainer.world_size]
        while True:
            try:
                with evaluating(model):
                    kept, tiles, failed = extract(extraction, mine, source, folder)
                break
            except torch.OutOfMemoryError as error:
                fault = error.with_traceback(None)  # which would keep the memory
            module.passes.shrink(fault)
            extraction = replace(extraction, chunk=module.chunk)
        for share in gather(failed):
            data.skipped.note(share)
        for bag in bags:  # a case is left out as a whole, as where it is streamed
            names = [each.slide_id for each in bag.slides]
            if lost := next((name for name in names if name in data.skipped), None):
                why = data.skipped[lost]
                data.skipped.note({name: f"{name}: with its case: {why}" for name in names})
        print(
            f"{folder}: {tiles} tiles encoded once, {kept} slides were there already; epochs read "
            f"{' and '.join(self.splits)} features from there",
            flush=True,
        )
        rows = [row for row in rows if row.slide_id not in data.skipped]
        folder.mkdir(parents=True, exist_ok=True)  # where there is no slide to encode
        budget = data.budget if "train" in self.splits else data.budget // 2  # tiles need the rest
        data.features = FeatureSource(
            [folder], rows, data.tiles.mpp, budget, data.on_error, self.splits
        )
