"""What a run leaves behind: the model of the chosen share, and the frozen one beside it.

    best.safetensors       encoder at W(a) with its slide model; for a = 0 the frozen one
    adapted.safetensors    the best epoch as it was trained, whatever was chosen
    control.safetensors    the frozen encoder with the slide model fitted on its features
    interpolation.json     a, the curve over a, and the reason

`tapfm test` compares the two: what adapting gained over the frozen encoder with the same kind of
slide model, chosen in the same way.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import lightning as L

from slides.files import replacing, write_text
from tapfm.adapt.interpolation import between, learned, put
from tapfm.adapt.strategies import scaled_parts
from tapfm.data.datamodule import SlideData
from tapfm.distributed import gather
from tapfm.recipe.best_weights import ADAPTED, BEST, CONTROL, INTERPOLATION
from tapfm.recipe.interpolation import Candidates, Interpolation, frozen_model, interpolate
from tapfm.recipe.warm_start import VIEWS
from tapfm.recipe.weight_average import WeightAverage
from tapfm.slide_model.model import (
    adapted_fingerprint,
    load_weights,
    read_model_config,
    save,
)


def looks_to_choose(module: L.LightningModule) -> int:
    """Return passes over training and validation slides after the last epoch: one for each a."""
    steps = module.steps
    shares = len(steps.interpolate or ()) if scaled_parts(module.strategy) else 2
    return (shares + bool(steps.average)) * module.chooses  # two ends at a = 1, if a mean is kept


def encoder_moved(module: L.LightningModule, epoch: int) -> bool:
    """Return whether the encoder had learned by the end of an epoch; -1 is the warm start."""
    return epoch + 1 > module.steps.head_first * module.trainer.max_epochs


def choose_and_save(
    module: L.LightningModule, data: SlideData, folder: Path, mean: WeightAverage | None
) -> Interpolation:
    """Choose the share of the change, and write the files; return the choice.

    Args:
        module: the run after its last epoch, on the device to compute on.
        data: its slides.
        folder: the run's; it holds the best epoch.
        mean: of the weights, if one was kept.
    """
    model, start = module.slide_model, module.start
    best = folder / ADAPTED
    if module.trainer.is_global_zero:
        with replacing(best) as copy:
            shutil.copyfile(folder / BEST, copy)
    gather(None)  # the other processes wait for the file
    _, facts = read_model_config(best)
    load_weights(model, best)
    ends = {}
    if encoder_moved(module, facts["epoch"]):
        ends["best epoch"] = learned(model.encoder.vit)
    if mean:
        ends["mean of the weights"] = mean.weights()
    train = partial(data.seen_in_training, VIEWS, plain=True)  # as validation sees its slides
    candidates = Candidates(
        module, train, data.val_dataloader, data.weighted_task, start, data.seed
    )
    choice, heads, end = interpolate(candidates, ends, module.steps.interpolate)
    if not module.trainer.is_global_zero:
        return choice
    control = frozen_model(model, start)
    control.aggregator.load_state_dict(heads[0.0].state_dict())
    put(model.encoder.vit, between(start, end, choice.a, candidates.scaled))
    model.aggregator.load_state_dict(heads[choice.a].state_dict())
    saved = control if choice.a == 0 else model
    facts |= {"interpolation": choice.facts(), "trained": model.model_config.strategy}
    write_text(folder / INTERPOLATION, json.dumps(choice.facts(), indent=1) + "\n")
    for which, path, a in ((control, CONTROL, 0.0), (saved, BEST, choice.a)):  # BEST says: done
        figure = next(point.figure for point in choice.curve if point.a == a)
        own = {f"val_{module.task.monitor}": figure, "fingerprint": adapted_fingerprint(which)}
        save(which, folder / path, **{**facts, **own})
    return choice
