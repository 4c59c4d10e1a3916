"""An aggregator that starts from another run's, as prognosis of one cancer from that of others.

    start_from(model, Path("runs/brca/gated"))      weights of the aggregator, and of its head
    start_from(model, Path("moozy.pt"))             a published slide encoder's, without a head

The head is taken where its logits have the same names: hazards of one cancer are a start for those
of another, and a head for KRAS is none for EGFR. The encoder of another run is a start by `tapfm
export` and `model.weights`. Madeleine and MOOZY, as their publishers give them, are starts for the
aggregators of these names (`tapfm.slide_encoders.published`).

Source: Path-PKT (Liu et al. 2025, arXiv 2508.02282), warm start from other cancers' models.
"""

from __future__ import annotations

from pathlib import Path

from tapfm.settings import SettingsError, spec_of
from tapfm.slide_encoders.published import is_published, read_published
from tapfm.slide_encoders.registry import find
from tapfm.slide_model.aggregators import AGGREGATORS, aggregator_options, make_aggregator
from tapfm.slide_model.model import SlideModel, read_model_config
from tapfm.weights import read_tensors

PART, VIT = "aggregator.", "encoder.vit."
SCALES = "scale", "case_scale"  # where they started says nothing of trained ones; 0 is none at all


def start_from(model: SlideModel, run: Path) -> list[str]:
    """Give a model the aggregator of another run, and return the names of what it lacks.

    Args:
        model: of which the aggregator's weights are replaced.
        run: its folder, or its best.safetensors; or files of a published slide encoder.

    Raises:
        SettingsError: an aggregator of another kind, or for features of another width.
        StrategyError: the strategy cannot go on from that run.
        CheckpointError: no such file.
    """
    if is_published(run):
        return start_from_published(model, run)
    path = run / "best.safetensors" if run.is_dir() else run
    own, (other, _) = model.model_config, read_model_config(path)
    tensors = read_tensors(path)
    state = {k.removeprefix(PART): v for k, v in tensors.items() if k.startswith(PART)}
    wanted = {key: value.shape for key, value in model.aggregator.state_dict().items()}
    answers = of_labels(model) if own.labels != other.labels else set()
    wrong = [
        key for key in wanted
        if key not in answers and (key not in state or state[key].shape != wanted[key])
    ]  # fmt: skip
    if own.aggregator["name"] != other.aggregator["name"] or wrong:
        raise SettingsError(
            f"model.start_from: {path} is {other.aggregator} on {other.model}, and this run is "
            f"{own.aggregator} on {own.model}: "
            f"{len(wrong)} tensors differ{', first ' + wrong[0] if wrong else ''}. Take the same "
            "aggregator and features, or leave start_from out."
        )
    taken = {key: value for key, value in state.items() if key in wanted.keys() - answers}
    model.aggregator.load_state_dict(taken, strict=False)
    if hasattr(model.strategy, "follow"):
        of_vit = {k.removeprefix(VIT): v for k, v in tensors.items() if k.startswith(VIT)}
        model.strategy.follow(model.encoder.vit, of_vit)
    return sorted(answers)


def start_from_published(model: SlideModel, path: Path) -> list[str]:
    """Give a model the weights of a published slide encoder; return the names of what it lacks.

    Raises:
        SettingsError: the aggregator or its options are others, or features of another encoder,
            tile size or width.
    """
    own, (options, state) = model.model_config, read_published(path)
    row = find(options["name"])
    tiles = (own.features["encoder"], None) if own.features else (own.model, own.tile_px * own.mpp)
    if why := row.fault(tiles[0], row.tile_dim, tiles[1], coords=True):
        raise SettingsError(
            f"model.start_from: {path} is {row.key}, for {row.needs}, and this run has {why}. Take "
            "those, or leave start_from out."
        )
    wanted = {key: value.shape for key, value in model.aggregator.state_dict().items()}
    given = spec_of(AGGREGATORS, aggregator_options(own.aggregator))
    alike = {key: bool if key in SCALES else lambda value: value for key in options}
    others = {k: v for k, v in options.items() if alike[k](given.get(k)) != alike[k](v)}
    if others:
        raise SettingsError(
            f"model.start_from: {path} is {options['name']} of other sizes than model.aggregator "
            f"{own.aggregator['name']}. Set in model.aggregator: "
            f"{', '.join(f'{key}: {value}' for key, value in others.items())}."
        )
    if wrong := [key for key, value in state.items() if value.shape != wanted.get(key)]:
        raise SettingsError(
            f"model.start_from: {path}: {wrong[0]} has shape {tuple(state[wrong[0]].shape)}, and "
            f"this run has {model.encoder.dim} features a tile. {row.key} is for {row.needs}. Give "
            "those."
        )
    model.aggregator.load_state_dict(state, strict=False)
    return sorted(wanted.keys() - state.keys())


def of_labels(model: SlideModel) -> set[str]:
    """Return the names of the aggregator's weights whose number depends on that of the labels."""
    config = model.model_config
    more = make_aggregator(config.aggregator, model.encoder.dim, len(config.labels) + 1)
    own = model.aggregator.state_dict()
    return {key for key, value in more.state_dict().items() if value.shape != own[key].shape}
