"""PathPT's model: logits of tiles from the mixer, the class vectors, and the cosine between them.

Saved as one safetensors file with the model_config in its header. It holds the class vectors that
the prompts gave, so using it needs no text tower.

Source: PathPT (arXiv 2508.15904): logits are 10 times the cosine of mixed tile and class vector.
Differs: features of a vision-only encoder, which are not unit vectors, are first standardised with
    the training slides.

Shapes: N tiles, K classes of a tile, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tapfm import __version__
from tapfm.pathpt.spatial import Mixer
from tapfm.pathpt.text.prompts import ClassPrompts
from tapfm.weights import CheckpointError, read_header, read_tensors, write_weights


@dataclass(frozen=True)
class PathPTConfig:
    """The configuration of a saved model: everything but its weights."""

    classes: tuple[str, ...]
    """Names of the K classes, normal tissue first."""
    dim: int
    """Joint width d."""
    scale: float
    """Factor on the cosines."""
    towers: Mapping[str, str | None]
    """The towers, as in `Question.towers`."""
    fingerprint: str
    """Fingerprint of the image tower as published."""
    strategy: Mapping[str, Any] | None
    """How the image tower was trained; None if it was frozen."""
    tiles: Mapping[str, Any]
    """Tile geometry and tissue settings, as `slides.streaming.settings.TileSettings` fields."""
    stain: str | None
    """Method of stain normalisation."""


class PathPT(nn.Module):
    """The model from a slide's tiles to logits (N, K)."""

    def __init__(self, dim: int, prompts: ClassPrompts | None, scale: float = 10.0):
        super().__init__()
        self.mixer, self.prompts, self.scale = Mixer(dim), prompts, scale
        self.register_buffer("mean_d", torch.zeros(dim))
        self.register_buffer("std_d", torch.ones(dim))

    def standardise(self, slides: Sequence[Tensor]) -> None:
        """Set mean and deviation of features (N, d) from these slides, weighted equally."""
        mean_d = torch.stack([z_Nd.double().mean(0) for z_Nd in slides]).mean(0)
        spread = [(z_Nd.double() - mean_d).square().mean(0) for z_Nd in slides]
        std_d = torch.stack(spread).mean(0).sqrt()
        self.mean_d.copy_(mean_d)
        self.std_d.copy_(torch.where(std_d > 1e-6, std_d, torch.ones_like(std_d)))

    def forward(self, z_Nd: Tensor, places_N2: Tensor, classes_Kd: Tensor) -> Tensor:
        """Return logits of a slide's tiles at their places, against unit class vectors."""
        z_Nd = F.normalize((z_Nd - self.mean_d) / self.std_d, dim=-1)
        return self.scale * F.normalize(self.mixer(z_Nd, places_N2), dim=-1) @ classes_Kd.T


def save_pathpt(
    path: Path,
    model: PathPT,
    classes_Kd: Tensor,
    model_config: PathPTConfig,
    image: Mapping[str, Tensor],
) -> None:
    """Write a model to one file, atomically.

    Args:
        path: the file.
        model: the model; its prompts are not written.
        classes_Kd: the class vectors that the prompts gave.
        model_config: its configuration.
        image: trained weights of the image tower, by name; may be empty.
    """
    state = {f"mixer.{key}": value for key, value in model.mixer.state_dict().items()}
    state |= {"mean_d": model.mean_d, "std_d": model.std_d, "classes_Kd": classes_Kd}
    state |= {f"image.{key}": value for key, value in image.items()}
    write_weights(path, state, "pathpt", {"tapfm": __version__, **asdict(model_config)})


def is_pathpt(path: Path) -> bool:
    """Return whether a file is a saved PathPT model; False if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return "pathpt" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_pathpt(path: Path) -> tuple[PathPT, Tensor, PathPTConfig, dict[str, Tensor]]:
    """Return model (eval mode), class vectors, configuration, and trained image-tower weights.

    Raises:
        CheckpointError: no such file, or not a saved PathPT model.
    """
    try:
        header, state = read_header(path, "pathpt"), read_tensors(path)
        known = {k: header[k] for k in PathPTConfig.__dataclass_fields__}
        model_config = PathPTConfig(**{**known, "classes": tuple(known["classes"])})
        model, classes_Kd = PathPT(model_config.dim, None, model_config.scale), state["classes_Kd"]
        own = {k: v for k, v in state.items() if not k.startswith("image.") and k != "classes_Kd"}
        model.load_state_dict(own)
    except (OSError, SafetensorError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a model that `tapfm pathpt` saved ({type(error).__name__}: "
            f"{error!s:.100}). Give a pathpt.safetensors."
        ) from error
    image = {k.removeprefix("image."): v for k, v in state.items() if k.startswith("image.")}
    return model.eval(), classes_Kd, model_config, image
