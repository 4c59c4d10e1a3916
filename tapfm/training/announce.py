"""What `tapfm fit` prints before it trains: what learns, on which and how many slides."""

from __future__ import annotations

from pathlib import Path

from slides.cohort.counts import count_table
from tapfm.data.datamodule import SlideData
from tapfm.slide_model.aggregators import name_of
from tapfm.training.module import SlideModule


def announce(folder: Path, module: SlideModule, data: SlideData) -> None:
    """Print what is trained, on how many cases, slides and label values of each split."""
    model_config = module.slide_model.model_config
    print(
        f"{folder}: {encoder_of(module)}; aggregator {name_of(model_config.aggregator)}; predicts "
        f"{', '.join(module.task.targets)}; chunks of {module.chunk} tiles in "
        f"{model_config.precision}"
    )
    table = count_table(data.cohort)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        numbers = (cell.rjust(max(width, 7)) for cell, width in zip(cells, widths[1:], strict=True))
        print(f"  {name.ljust(widths[0])}{''.join(numbers)}")
    if left := len(data.cohort.rows) - len(data.used):
        print(
            f"{left} of {len(data.cohort.split('train'))} training slides have no known label: "
            "left out, neither indexed nor encoded"
        )


def encoder_of(module: SlideModule) -> str:
    """Return what a run has for an encoder, and what of it learns, in words."""
    config, encoder = module.slide_model.model_config, module.slide_model.encoder
    if known := config.features:
        made_by = f" of {known['encoder']}" if known["encoder"] else ""
        return f"features{made_by} in {known['folder']}, {known['dim']} a tile, strategy frozen"
    what = module.strategy.describe(encoder.vit)
    return f"{config.model}, {what} at {module.encoder_lr:g}"
