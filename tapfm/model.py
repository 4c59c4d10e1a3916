"""The adapted model: encoder, aggregator and what is needed to build both again.

Saved as one safetensors file whose header holds the recipe: loading runs no code from the file.

Shapes: T tiles of a slide, C tiles of a chunk, D features, K labels.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tapfm import __version__, backbones
from tapfm.aggregators import make_aggregator
from tapfm.bag import Tiles
from tapfm.chunked import encode_bag
from tapfm.files import replacing
from tapfm.fingerprint import state_fingerprint

PRECISIONS = ("fp32", "bf16")


class CheckpointError(ValueError):
    """A checkpoint cannot be used as asked."""


@dataclass(frozen=True)
class Recipe:
    """What a model is, apart from its weights."""

    model: str
    """Key of the foundation model."""
    aggregator: str
    """Key of the aggregator."""
    labels: tuple[str, ...]
    """Names of the K logits, in order."""
    tile_px: int
    """Side of a tile, in tile pixels."""
    mpp: float
    """Microns per tile pixel."""
    temperature: float | None = None
    """Of the CLS score's softmax; None is the aggregator's own."""
    precision: str = "fp32"
    """`fp32`, or `bf16`: autocast in the encoder; aggregator and loss are always fp32."""


class SlideModel(nn.Module):
    """A slide in, logits and tile weights out. Training, validation and prediction all use it."""

    def __init__(self, recipe: Recipe, encoder: backbones.Encoder):
        super().__init__()
        if recipe.precision not in PRECISIONS:
            raise ValueError(f"precision: {recipe.precision!r} is none of {', '.join(PRECISIONS)}")
        self.recipe, self.encoder = recipe, encoder
        self.aggregator = make_aggregator(
            recipe.aggregator, encoder.dim, len(recipe.labels), recipe.temperature
        )
        if self.aggregator.score_temperature is not None:
            encoder.require_score(f"aggregator {recipe.aggregator}")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.aggregator.head.weight.device

    def encode(self, tiles_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Features (C, D) and raw scores (C,) of uint8 tiles from anywhere."""
        return self.encoder.encode(tiles_CP, self.recipe.precision)

    @torch.no_grad()
    def forward(self, tiles: Tiles, chunk: int) -> tuple[Tensor, Tensor]:
        """Logits (K,) and tile weights (T,) of a slide, streamed in chunks."""
        z_TD, score_T, _ = encode_bag(self.encode, tiles.split(chunk), seed=0, device=self.device)
        return self.aggregator(z_TD, score_T)


def save(model: SlideModel, path: Path, **facts: object) -> None:
    """Write weights and recipe; `path` is whole or not there."""
    header = {"tapfm": __version__, **asdict(model.recipe), **facts}
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(path) as partial:
        save_file(state, partial, {"tapfm": json.dumps(header)})


def read_recipe(path: Path) -> tuple[Recipe, dict]:
    """Recipe and further facts of a saved model, without reading its weights.

    Raises:
        CheckpointError: no such file, or not one of ours.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file. Run `tapfm fit` first.")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["tapfm"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a model that tapfm saved ({type(error).__name__}: {error}). "
            "Give the best.safetensors of a run directory."
        ) from error
    names = Recipe.__dataclass_fields__
    fields = {k: header.pop(k) for k in list(header) if k in names}
    return Recipe(**{**fields, "labels": tuple(fields["labels"])}), header


def load(path: Path) -> SlideModel:
    """A saved model, in eval mode on the CPU.

    Raises:
        CheckpointError: missing, damaged, or weights that do not fit the recipe.
    """
    recipe, _ = read_recipe(path)
    encoder = backbones.load(recipe.model, "random", tile_px=recipe.tile_px)
    model = SlideModel(recipe, encoder)
    load_weights(model, path)
    return model.eval()


def load_encoder(
    model: str, weights: str | None = None, tile_px: int | None = None
) -> tuple[backbones.Encoder, dict, str]:
    """An encoder alone, as plain timm weights whatever it was trained by.

    Args:
        model: key of a foundation model, or the file of a saved model.
        weights: of a foundation model, as in `backbones.load`.
        tile_px: side of the tiles; None is the model's own.

    Returns:
        The encoder in eval mode on the CPU; the saved model's header, recipe and all (empty for a
        foundation model as published); its fingerprint.

    Raises:
        CheckpointError: as `load`, or asked for with other weights or another tile size.
        BackboneError: as `backbones.load`.
    """
    if not model.endswith(".safetensors"):
        encoder, header = backbones.load(model, weights, tile_px=tile_px).eval(), {}
    else:
        recipe, facts = read_recipe(Path(model))
        if weights is not None:
            raise CheckpointError(f"{model}: has its own weights; leave --weights out")
        if tile_px not in (None, recipe.tile_px):
            raise CheckpointError(
                f"{model}: was trained on tiles of {recipe.tile_px} px, not {tile_px}. "
                f"Use --tile-px {recipe.tile_px}."
            )
        encoder, header = load(Path(model)).encoder, {**asdict(recipe), **facts}
        print(f"{model}: adapted from {encoder.row.terms}", file=sys.stderr)
    plain = encoder.vit.state_dict()  # refused below if it is more than timm's
    return encoder, header, state_fingerprint(encoder.row, plain, encoder.tile_px)


def load_weights(model: SlideModel, path: Path) -> None:
    """Put a file's weights into a model.

    Raises:
        CheckpointError: they are another model's.
    """
    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    wrong = sorted(
        k for k in wanted.keys() | state.keys() if k not in state or wanted.get(k) != state[k].shape
    )
    if wrong:
        raise CheckpointError(
            f"{path}: the weights are not those of {model.recipe.model} with "
            f"{model.recipe.aggregator}: {len(wrong)} tensors differ, first {wrong[0]}. "
            "Give the run's own checkpoint, or start a new run directory."
        )
    model.load_state_dict(state)
