"""The adapted model: encoder, aggregator and what is needed to build both again.

Saved as one safetensors file whose header holds the model_config: loading runs no code from the
file. It holds what was trained and no more: all of a fully fine-tuned encoder, a few MB of a LoRA,
whose base encoder is then built from where it came from and checked to be the same.

Shapes: T tiles of a slide, C tiles of a chunk, D features, K labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tapfm import __version__
from tapfm.adapt.strategies import StrategyError, make_strategy, strategy_spec
from tapfm.data.bag import Bag
from tapfm.encoders import backbones
from tapfm.encoders.fingerprint import state_fingerprint
from tapfm.engine.chunked import encode_bag
from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators import as_of_0_1, make_aggregator
from tapfm.slide_model.aggregators.contract import SlideOutput, TileSet, check_task
from tapfm.slide_model.feature_encoder import FeatureEncoder
from tapfm.tasks import make_task
from tapfm.weights import CheckpointError, read_header, read_tensors, write_weights

PRECISIONS = ("fp32", "bf16", "bf16-true")
WHOLE = "all:"  # before a digest of all numbers; version 0.1 took the first of each tensor
KINDS = {"model": str, "aggregator": str | Mapping, "labels": list, "tile_px": int,
         "mpp": float | int, "strategy": Mapping, "weights": str | None, "task": Mapping,
         "features": Mapping | None}  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The settings that build a model again."""

    model: str
    """Key of the foundation model."""
    aggregator: str | Mapping[str, Any]
    """Name of the aggregator, or name and options, which is what it becomes."""
    labels: tuple[str, ...]
    """Names of the K logits, in order."""
    tile_px: int
    """Side of a tile, in tile pixels."""
    mpp: float
    """Microns per tile pixel."""
    precision: str = "fp32"
    """Of the encoder: `fp32`, `bf16` (autocast), or `bf16-true` (the weights are bfloat16 too).
    Aggregator, score and loss are always fp32."""
    strategy: Mapping[str, Any] = field(default_factory=lambda: {"name": "full"})
    """Name and options of the strategy."""
    weights: str | None = None
    """Where the base encoder came from: a path, `hub`, `random`, or None, the package."""
    task: Mapping[str, Any] = field(default_factory=lambda: {"name": "multilabel"})
    """What is predicted, with what came from the training split: `tapfm.tasks.task_config`."""
    features: Mapping[str, Any] | None = None
    """Of a model on features: `dim`; whether there are `scores`, `coords`; `encoder`, `folder`."""

    merge_tokens: int = 0
    """Patch tokens that each block of the encoder merges, see `tapfm.encoders.merging`."""

    def __post_init__(self):
        if isinstance(self.aggregator, str):
            object.__setattr__(self, "aggregator", {"name": self.aggregator})

    @property
    def sizes(self) -> dict[str, int]:
        """Return what `backbones.load` must know of the tiles and tokens."""
        return {"tile_px": self.tile_px, "merge": self.merge_tokens}


class SlideModel(nn.Module):
    """The model from a slide's tiles to logits and tile weights, in training and prediction.

    Args:
        model_config: what it is.
        encoder: the base encoder; the model_config's strategy prepares it here.

    Raises:
        StrategyError: the strategy cannot be used with this encoder.
        SettingsError: no such precision or aggregator, or not with this task's loss.
    """

    def __init__(self, model_config: ModelConfig, encoder: backbones.Encoder | FeatureEncoder):
        super().__init__()
        if model_config.precision not in PRECISIONS:
            raise SettingsError(
                f"precision: {model_config.precision!r} is none of {', '.join(PRECISIONS)}"
            )
        self.model_config, self.encoder = model_config, encoder
        self.task = make_task(model_config.task, model_config.labels)
        self.strategy = make_strategy(model_config.strategy)
        self.strategy.prepare(encoder.vit)
        if encoder.merging:
            encoder.merging.check(model_config.strategy["name"])
        spec = model_config.aggregator
        self.aggregator = make_aggregator(spec, encoder.dim, len(model_config.labels))
        if self.aggregator.uses_score:
            encoder.require_score(f"aggregator {spec['name']}")
        if self.aggregator.uses_coords and model_config.features:
            encoder.require_coords(f"aggregator {spec['name']}")
        task = model_config.task["name"]
        check_task(self.aggregator, spec["name"], task, memory=self.task.loss_has_memory)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.aggregator.parameters()).device

    def encode(self, tiles_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Features (C, D) and raw scores (C,) of uint8 tiles from anywhere."""
        return self.encoder.encode(tiles_CP, self.model_config.precision)

    def round_weights(self) -> None:
        """Turn the weights of a bf16-true encoder to bfloat16, once loaded or once optimized."""
        if self.model_config.precision == "bf16-true":
            for parameter in self.encoder.parameters():  # not buffers: RoPE's angles need fp32
                parameter.data = parameter.data.to(torch.bfloat16)

    @torch.no_grad()
    def tiles(self, bag: Bag, chunk: int) -> TileSet:
        """Return features and raw scores of a bag, streamed in chunks unless they are known."""
        if bag.features is not None:
            known = bag.features
            return TileSet.of(bag.places, known.z_TD.to(self.device), known.score_T.to(self.device))
        encode = self.encoder.sized(self.encode, chunk)
        z_TD, score_T, _ = encode_bag(encode, bag.tiles.split(chunk), seed=0, device=self.device)
        return TileSet.of(bag.places, z_TD.detach(), score_T.detach())

    @torch.no_grad()
    def forward(self, bag: Bag, chunk: int) -> SlideOutput:
        """Return the aggregator's output for a bag, streamed in chunks."""
        return self.aggregator(self.tiles(bag, chunk))

    def trained_state(self) -> dict[str, Tensor]:
        """Return a checkpoint's tensors: all but frozen weights of a known source."""
        frozen = {n for n, p in self.named_parameters() if not p.requires_grad}
        if self.model_config.weights == "random":
            frozen = set()
        return {key: value for key, value in self.state_dict().items() if key not in frozen}

    def base_digest(self, whole: bool = True) -> str:
        """Return the SHA-256 of the frozen tensors, to compare bases.

        Position embeddings are left out, since resampling them rounds differently elsewhere.
        `whole` False takes the first numbers of each tensor, as version 0.1 did.
        """
        digest = hashlib.sha256()
        for name, parameter in self.encoder.vit.named_parameters():
            if not parameter.requires_grad and "pos_embed" not in name:
                numbers = parameter.detach().flatten()[: None if whole else 64].float().cpu()
                digest.update(name.encode())
                digest.update(numbers.numpy())
        return f"{WHOLE if whole else ''}{digest.hexdigest()}"


def build(
    config: ModelConfig, *, recompute: bool = False, compiled: bool = False, drop_path: float = 0.0
) -> SlideModel:
    """Return an untrained model, its encoder loaded from where the config says.

    Args:
        config: what the model is; a path of weights is made absolute, to be found from anywhere.
        recompute: keep block boundaries only, and compute the rest again for backward.
        compiled: blocks by torch.compile.
        drop_path: stochastic depth while training.

    Raises:
        BackboneError: as `backbones.load`.
        StrategyError, SettingsError: as `SlideModel`.
    """
    if config.features:
        return SlideModel(config, FeatureEncoder(config.features))
    if (weights := config.weights) not in (None, "hub", "random"):
        weights = str(Path(weights).resolve())
    how = {"recompute": recompute, "compiled": compiled, "drop_path": drop_path}
    encoder = backbones.load(config.model, weights, **config.sizes, **how)
    return SlideModel(replace(config, weights=weights), encoder)


def save(model: SlideModel, path: Path, **facts: object) -> None:
    """Write what was trained, and the model_config; `path` is whole or not there."""
    trained = model.trained_state()
    base = None if len(trained) == len(model.state_dict()) else model.base_digest()
    model_config = {**asdict(model.model_config), "strategy": strategy_spec(model.strategy)}
    header = {**facts, "tapfm": __version__, **model_config, "base_digest": base}
    write_weights(path, trained, "tapfm", header)


def read_model_config(path: Path) -> tuple[ModelConfig, dict]:
    """Return a saved model's ModelConfig and other facts; read no weights.

    Raises:
        CheckpointError: no such file, or not one of ours.
    """
    header = read_header(path, "tapfm")
    names = ModelConfig.__dataclass_fields__
    fields = {k: header.pop(k) for k in list(header) if k in names}
    wrong = [k for k, kind in KINDS.items() if k in fields and not isinstance(fields[k], kind)]
    wrong += [k for k in ("model", "aggregator", "labels", "tile_px", "mpp") if k not in fields]
    if wrong:
        raise CheckpointError(
            f"{path}: its header has no {wrong[0]} as tapfm writes it: {fields.get(wrong[0])!r:.60}"
            ". Give the best.safetensors of a run directory."
        )
    fields["labels"] = tuple(fields["labels"])
    if isinstance(fields["aggregator"], str):  # version 0.1
        fields["aggregator"] = as_of_0_1(fields["aggregator"], header.pop("temperature", None))
    return ModelConfig(**fields), header


def load(path: Path) -> SlideModel:
    """Return a saved model, in eval mode on the CPU.

    Where the file holds only what was trained, the base encoder comes from where it came from in
    training; a local file that was moved is also looked for beside `path`.

    Raises:
        CheckpointError: missing, damaged, or its weights or base encoder are not its config's.
    """
    model_config, facts = read_model_config(path)
    state = _read_tensors(path)  # sound, before anything is built as its header says
    try:
        features = bool(model_config.features)
        model = build(model_config) if features else _on_base(model_config, facts, path)
    except (SettingsError, CheckpointError):
        raise
    except Exception as error:  # a header may hold anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise CheckpointError(
            f"{path}: no model can be built from its header ({why}). Give the best.safetensors of "
            "a run directory."
        ) from error
    return _with_weights(model, state, path).eval()


def _on_base(model_config: ModelConfig, facts: Mapping[str, Any], path: Path) -> SlideModel:
    """Return a saved model with its base encoder, without what was trained."""
    digest = facts.get("base_digest")
    source = _base(model_config, path) if digest else "random"
    try:
        encoder = backbones.load(model_config.model, source, **model_config.sizes)
    except backbones.BackboneError as error:
        raise CheckpointError(f"{_needs_base(model_config, path)}: {error}") from error
    model = SlideModel(model_config, encoder)
    model.round_weights()
    if not digest and len(model.trained_state()) < len(model.state_dict()):
        raise CheckpointError(f"{path}: neither holds an encoder nor names one. Fit it anew.")
    if digest and model.base_digest(str(digest).startswith(WHOLE)) != digest:
        raise CheckpointError(
            f"{_needs_base(model_config, path)}, and {source or 'the package'} holds another one. "
            "Give the weights that it was trained from."
        )
    return model


def adapted_fingerprint(model: SlideModel) -> str | None:
    """Return the fingerprint of the exported encoder; None if it cannot be exported."""
    encoder = model.encoder
    if model.model_config.features:
        return None
    try:
        plain = model.strategy.export(encoder.vit)
    except StrategyError:
        return None
    return state_fingerprint(encoder.row, plain, encoder.tile_px)


def load_weights(model: SlideModel, path: Path) -> SlideModel:
    """Return a model that holds the base encoder already, with the weights of a file.

    Raises:
        CheckpointError: they are another model's.
    """
    return _with_weights(model, _read_tensors(path), path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. Copy it again.") from error


def _with_weights(model: SlideModel, state: Mapping[str, Tensor], path: Path) -> SlideModel:
    wanted = {k: v.shape for k, v in model.trained_state().items()}
    found = {k: v.shape for k, v in state.items()}
    wrong = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if wrong:
        config = model.model_config
        raise CheckpointError(
            f"{path}: the weights are not those of {config.model} with "
            f"{config.aggregator['name']}: {len(wrong)} tensors differ, first {wrong[0]}. "
            "Give the run's own checkpoint, or start a new run directory."
        )
    model.load_state_dict(state, strict=False)  # strict for what is trained: checked above
    return model


def _base(model_config: ModelConfig, path: Path) -> str | None:
    """Return the base weights' path."""
    if model_config.weights in (None, "hub"):
        return model_config.weights
    there = Path(model_config.weights)
    if found := [each for each in (there, path.parent / there.name) if each.exists()]:
        return str(found[0])
    raise CheckpointError(
        f"{_needs_base(model_config, path)}, and {there} is not there. "
        f"Put it back, or put {there.name} beside {path.name}."
    )


def _needs_base(model_config: ModelConfig, path: Path) -> str:
    return (
        f"{path}: holds only what {model_config.strategy['name']} trained and needs the base "
        f"encoder {model_config.model}"
    )
