"""The encoder of a saved or published model as plain timm weights, and its fingerprint."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from tapfm.encoders import backbones
from tapfm.encoders.fingerprint import fingerprint
from tapfm.slide_model.feature_encoder import need_encoder
from tapfm.slide_model.model import load, read_model_config
from tapfm.weights import CheckpointError, is_hashed


def load_encoder(
    model: str, weights: str | None = None, tile_px: int | None = None
) -> tuple[backbones.Encoder, dict, str]:
    """Return an encoder as plain timm weights, whatever its strategy.

    Args:
        model: key of a foundation model, or the file of a saved model.
        weights: of a foundation model, as in `backbones.load`.
        tile_px: side of the tiles; None is the model's own.

    Returns:
        The encoder in eval mode on the CPU; the saved model's header, model_config and all (empty
        for a foundation model as published); its fingerprint.

    Raises:
        CheckpointError: as `load`, or asked for with other weights or another tile size.
        StrategyError: its strategy cannot be merged into plain timm weights.
        BackboneError: as `backbones.load`.
    """
    if not model.endswith(".safetensors"):
        encoder = backbones.load(model, weights, tile_px=tile_px).eval()
        return encoder, {}, _fingerprint(encoder)
    model_config, facts = read_model_config(Path(model))
    need_encoder(Path(model), model_config.features)
    if weights is not None:
        raise CheckpointError(f"{model}: has its own weights; leave --weights out")
    if tile_px not in (None, model_config.tile_px):
        raise CheckpointError(
            f"{model}: was trained on tiles of {model_config.tile_px} px, not {tile_px}. "
            f"Use --tile-px {model_config.tile_px}."
        )
    adapted = load(Path(model))
    row = adapted.encoder.row
    vit = backbones.build(row, model_config.tile_px)
    backbones.load_state(vit, row, adapted.strategy.export(adapted.encoder.vit))
    print(f"{model}: adapted from {row.terms}", file=sys.stderr)
    encoder = backbones.Encoder(vit, row, merge=model_config.merge_tokens).eval()
    found, known = _fingerprint(encoder), facts.get("fingerprint")
    if known not in (None, found):
        what = f"{model}: its encoder has the fingerprint {found}, and {known} was saved"
        if not is_hashed(Path(model)) and not facts.get("base_digest"):
            raise CheckpointError(f"{what}: damaged. Copy it again from where it was made.")
        print(f"{what}: position embeddings round differently here", file=sys.stderr)
    return encoder, {**asdict(model_config), **facts}, found


def _fingerprint(encoder: backbones.Encoder) -> str:
    """Return an encoder's fingerprint; the encoder stays in float32."""
    found = fingerprint(encoder)
    encoder.float()
    return found
