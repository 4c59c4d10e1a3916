"""An aggregator that starts from another run's, as prognosis of one cancer from that of others.

    start_from(model, Path("runs/brca/gated"))      weights of the aggregator, and of its head

The head is taken where its logits have the same names: hazards of one cancer are a start for those
of another, and a head for KRAS is none for EGFR. The encoder of another run is a start by `tapfm
export` and `model.weights`.

Source: Path-PKT (Liu et al. 2025, arXiv 2508.02282), warm start from other cancers' models.
"""

from __future__ import annotations

from pathlib import Path

from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.model import SlideModel, read_model_config
from tapfm.weights import read_tensors

PART = "aggregator."


def start_from(model: SlideModel, run: Path) -> list[str]:
    """Give a model the aggregator of another run, and return the names of what it lacks.

    Args:
        model: of which the aggregator's weights are replaced.
        run: its folder, or its best.safetensors.

    Raises:
        SettingsError: an aggregator of another kind, or for features of another width.
        CheckpointError: no such file.
    """
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
    return sorted(answers)


def of_labels(model: SlideModel) -> set[str]:
    """Return the names of the aggregator's weights whose number depends on that of the labels."""
    config = model.model_config
    more = make_aggregator(config.aggregator, model.encoder.dim, len(config.labels) + 1)
    own = model.aggregator.state_dict()
    return {key for key, value in more.state_dict().items() if value.shape != own[key].shape}
