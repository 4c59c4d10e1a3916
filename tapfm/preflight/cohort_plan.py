"""`tapfm plan --config C --gpus 1,8,64`: hours of a run on its cohort, and what it may gain.

The model, strategy and settings are the config's; what it leaves open follows the plan for the card
(`plan.fitting`), as a run on that card would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slides.errors import SlideError
from slides.streaming.settings import Source
from slides.streaming.tile_source import TileSource
from tapfm.adapt.strategies import make_strategy, strategy_spec
from tapfm.config import merged, read_source
from tapfm.encoders.backbones import find
from tapfm.planning.cards import card_named
from tapfm.planning.epoch import Run, run_table
from tapfm.planning.plan import PlanError, fitting
from tapfm.planning.speed import rates, update_seconds
from tapfm.preflight.gains import advice
from tapfm.recipe.warm_start import VIEWS
from tapfm.training.optim import Steps

OPEN = ("precision", "optimizer", "recompute", "chunk")
EPOCHS = 20  # of `tapfm fit`, where the config does not say
BUDGET = "tiles_per_slide"


def run_cohort_plan(configs: Sequence[Path], gpu: str | None, gpus: Sequence[int]) -> int:
    """Print hours and efficiency on each number of GPUs; return 0.

    Raises:
        PlanError: no training slide is indexed, or the model cannot be planned or does not fit.
    """
    settings = merged(configs)
    model, data = settings.get("model") or {}, settings.get("data") or {}
    source = read_source(configs)
    counts = {split: indexed_tiles(source, split) for split in ("train", "val")}
    row = find(model.get("model", "demo_vit"))
    strategy = strategy_spec(make_strategy(model.get("strategy", "full")))
    if not row.prefix_tokens or strategy["name"] == "frozen":
        raise PlanError(f"plan: {row.key}, {strategy['name']}: nothing of a ViT learns: no passes")
    fixed = {key: model[key] for key in OPEN if model.get(key) is not None}
    fixed["merge_tokens"] = model.get("merge_tokens") or 0
    tile_px = (data.get("tiles") or {}).get("tile_px", row.tile_px)
    option, reason = fitting(row, tile_px, strategy, fixed, gpu)
    card, run = card_named(gpu), planned_run(settings, counts["train"], counts["val"])
    speed = rates(option.setup, option.cost, card, data.get("workers", 2))
    print(f"{row.key}: {option.name}, chunk {option.chunk}. {reason}")
    print(
        f"{card.name}: {1 / speed.tile_s:.0f} tiles/s and "
        f"{update_seconds(option.setup, option.cost, card):.2f} s an update of {run.accumulate} "
        "slides, at rates that are assumed"
    )
    print(run_table(run, gpus, speed))
    print(advice(len({row.case_id for row in source.rows if row.split == "train"})))
    return 0


def planned_run(settings: Mapping[str, Any], train: Sequence[int], val: Sequence[int]) -> Run:
    """Return the passes of a run over training and validation slides of so many tiles."""
    steps = Steps(**((settings.get("model") or {}).get("steps") or {}))
    trainer, most = settings.get("trainer") or {}, (settings.get("data") or {}).get(BUDGET)
    epochs = trainer.get("max_epochs", EPOCHS)
    return Run(
        train_N=[min(count, most or count) for count in train],
        val_N=val,
        seen_N=[min(count, VIEWS * most if most else count) for count in train],
        accumulate=steps.accumulate,
        epochs=epochs,
        validations=-(-epochs // (trainer.get("check_val_every_n_epoch") or 1)),
        looks=len(steps.interpolate or ()) + bool(steps.warm_start),
        head_first=steps.head_first,
    )


def indexed_tiles(source: Source, split: str) -> list[int]:
    """Return the number of tiles of each slide of a split.

    Raises:
        PlanError: none is indexed.
    """
    tiles, found, without = TileSource.of(source), [], 0
    for row in source.rows:
        if row.split != split:
            continue
        try:
            found.append(len(tiles.index(row)))
        except SlideError:
            without += 1
    if not found:
        raise PlanError(
            f"plan: no slide of {split} has tiles in {source.index_dir}: run `tapfm index` first"
        )
    if without:
        print(f"{without} of {without + len(found)} slides of {split} are not indexed: left out")
    return found
