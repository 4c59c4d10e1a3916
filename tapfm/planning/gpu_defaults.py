"""Settings of `tapfm fit` that its config leaves open: on a GPU they follow the plan.

`model.chunk`, `precision`, `optimizer` and `recompute` are null unless they are set. On a GPU the
first setup of `tapfm plan` that fits this card, with the run's strategy and what is set, fills
them in; on a CPU they are 16, fp32, adamw and false. A run that is resumed keeps what it began
with, on whatever card. What was filled in stands in the run's config.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from tapfm.adapt.strategies import make_strategy, strategy_spec
from tapfm.encoders.backbones import find
from tapfm.planning.footprint import CONTEXT_GIB, Setup
from tapfm.planning.plan import fitting, forecast, must_fit

if TYPE_CHECKING:
    import lightning as L

ON_CPU = {"chunk": 16, "precision": "fp32", "optimizer": "adamw", "recompute": False}
LOG_EVERY = 10  # slides on a GPU, which would wait at each row; on a CPU every slide is logged


def on_cpu(precision: str | None, optimizer: str | None) -> Mapping[str, Any]:
    """Return the settings of a CPU beside a precision or an optimizer that is set."""
    if precision == "bf16-true":
        return {**ON_CPU, "precision": precision, "optimizer": optimizer or "master"}
    if optimizer not in (None, "adamw"):
        return {**ON_CPU, "precision": "bf16-true", "optimizer": optimizer}
    return ON_CPU


def on_gpu(accelerator: object) -> bool:
    """Return whether a run with this `trainer.accelerator` is on a CUDA GPU."""
    return torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")


def fill_in(config: Any, folder: Path) -> str:
    """Fill in what a run's config leaves open; return a line that says what and why, or "".

    Args:
        config: of the command line; `model` and `trainer` are changed.
        folder: the run's; an unfinished run there is continued with its own settings.

    Raises:
        PlanError: with what is set, nothing fits this machine's GPU.
    """
    model, gpu = config.model, on_gpu(config.trainer.accelerator)
    if config.trainer.log_every_n_steps is None:
        config.trainer.log_every_n_steps = LOG_EVERY if gpu else 1
    for key, value in begun_with(folder).items():
        if key in ON_CPU and model[key] is None:
            model[key] = value
    unset = [key for key in ON_CPU if model[key] is None]
    if not unset:
        return ""
    given, reason = on_cpu(model.precision, model.optimizer), ""
    if gpu:
        given, reason = planned(model, bool(config.data.get("features_dir")))
    for key in unset:
        model[key] = given[key]
    said = ", ".join(f"{key} {str(model[key]).lower()}" for key in unset)
    return f"for this GPU: {said}. {reason}" if reason else ""


def begun_with(folder: Path) -> Mapping[str, Any]:
    """Return `model` of the config of the run in a folder; nothing if there is none."""
    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text())["model"] if path.exists() else {}


def planned(model: Any, features: bool) -> tuple[Mapping[str, Any], str]:
    """Return the open settings for this machine's GPU, and the reason."""
    row, strategy = find(model.model), make_strategy(model.strategy)
    spec = strategy_spec(strategy)
    if features:
        return ON_CPU, "Features are given: there is no encoder."
    if spec["name"] == "frozen" or not row.prefix_tokens:
        what = "the encoder stays frozen" if spec["name"] == "frozen" else "its blocks differ"
        given = on_cpu(model.precision, model.optimizer)
        if given is ON_CPU:
            given = {**ON_CPU, "precision": "bf16"}
        return given, f"Nothing to plan: {what}."
    fixed = {key: model[key] for key in ON_CPU if model[key] is not None}
    fixed["merge_tokens"] = model.merge_tokens
    if hasattr(strategy, "optimizer") or model.steps.pull:
        fixed.setdefault("optimizer", "adamw")  # it has one of its own, or needs the weights
    option, reason = fitting(row, model.tile_px, spec, fixed)
    setup = option.setup
    return {
        "chunk": option.chunk, "precision": setup.precision, "optimizer": setup.optimizer,
        "recompute": setup.recompute,
    }, reason  # fmt: skip


def foretell(module: L.LightningModule) -> dict[str, float] | None:
    """Return the GPU memory that the run will take by phase, in GiB, and print the peak.

    None for models of other blocks, and for an encoder of which nothing learns.

    Raises:
        PlanError: it is more than the card has.
    """
    model_config, row = module.slide_model.model_config, module.slide_model.encoder.row
    if not row.prefix_tokens or not module.learns:
        return None
    setup = Setup(model_config.precision, module.optimizer, module.recompute,
                  model_config.strategy, model_config.merge_tokens)  # fmt: skip
    expected = forecast(row, model_config.tile_px, setup, module.chunk, module.passes.keep)
    peak = max(expected.values()) + CONTEXT_GIB
    print(f"expect {peak:.1f} GiB of GPU memory, whatever the number of tiles")
    must_fit(row, model_config.tile_px, peak)
    return expected


def say_retries() -> None:
    """Print how often the GPU's allocator had to empty its cache to go on, if it had to."""
    if retries := torch.cuda.memory_stats().get("num_alloc_retries", 0):
        print(
            f"GPU memory was short {retries} times and was gathered anew, which costs time: take a "
            "smaller model.chunk, or see `tapfm plan`"
        )
