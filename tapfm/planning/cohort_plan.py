"""`tapfm plan --config C --gpus 1,8,64`: hours of a run on its cohort, from the index's tiles.

The model, strategy and settings are the config's; what it leaves open follows the plan for the card
(`plan.fitting`), as a run on that card would.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slides.errors import SlideError
from slides.streaming.tile_source import TileSource
from tapfm.adapt.strategies import make_strategy, strategy_spec
from tapfm.config import merged, read_source
from tapfm.encoders.backbones import find
from tapfm.planning.cards import card_named
from tapfm.planning.epoch import epoch_table
from tapfm.planning.plan import PlanError, fitting
from tapfm.planning.speed import rates, update_seconds

OPEN = ("precision", "optimizer", "recompute", "chunk")
EPOCHS = 20  # of `tapfm fit`, where the config does not say


def run_cohort_plan(configs: Sequence[Path], gpu: str | None, gpus: Sequence[int]) -> int:
    """Print hours and efficiency on each number of GPUs; return 0.

    Raises:
        PlanError: no training slide is indexed, or the model cannot be planned or does not fit.
    """
    settings = merged(configs)
    model, data = settings.get("model") or {}, settings.get("data") or {}
    tiles_N = training_tiles(configs, data.get("tiles_per_slide"))
    row = find(model.get("model", "demo_vit"))
    strategy = strategy_spec(make_strategy(model.get("strategy", "full")))
    if not row.prefix_tokens or strategy["name"] == "frozen":
        raise PlanError(f"plan: {row.key}, {strategy['name']}: nothing of a ViT learns: no passes")
    fixed = {key: model[key] for key in OPEN if model.get(key) is not None}
    fixed["merge_tokens"] = model.get("merge_tokens") or 0
    tile_px = (data.get("tiles") or {}).get("tile_px", row.tile_px)
    option, reason = fitting(row, tile_px, strategy, fixed, gpu)
    card, steps = card_named(gpu), model.get("steps") or {}
    accumulate = steps.get("accumulate", 1)
    epochs = (settings.get("trainer") or {}).get("max_epochs", EPOCHS)
    speed = rates(option.setup, option.cost, card, data.get("workers", 2))
    print(f"{row.key}: {option.name}, chunk {option.chunk}. {reason}")
    print(
        f"{card.name}: {1 / speed.tile_s:.0f} tiles/s and "
        f"{update_seconds(option.setup, option.cost, card):.2f} s an update of {accumulate} "
        "slides, at rates that are assumed"
    )
    print(epoch_table(tiles_N, gpus, speed, accumulate, epochs))
    return 0


def training_tiles(configs: Sequence[Path], most: int | None) -> list[int]:
    """Return the tiles that each training slide gives, at most so many.

    Raises:
        PlanError: none is indexed.
    """
    source, found, without = read_source(configs), [], 0
    tiles = TileSource.of(source)
    for row in source.rows:
        if row.split != "train":
            continue
        try:
            found.append(len(tiles.index(row)))
        except SlideError:
            without += 1
    if not found:
        raise PlanError(
            f"plan: no training slide has tiles in {source.index_dir}: run `tapfm index` first"
        )
    if without:
        print(f"{without} of {without + len(found)} training slides are not indexed: left out")
    return [min(count, most or count) for count in found]
