"""The pathology foundation models: one frozen row each, and one way to load them.

Adding a model is adding a row to `ROWS`. Nothing is fetched unasked: weights come from a local
file or folder, from the package (the demo encoder), or, with `weights="hub"`, from the model's
publisher, whose licence is printed first.

Source: the publishers' model cards, for recipes, normalisation and features.
Differs: kwargs are those that build the same model on timm >= 1.0.15.

Shapes: C tiles of a chunk, S pixels a side, D features, N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tapfm.attention import ClsTap

Triple = tuple[float, float, float]
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
H_OPTIMUS: tuple[Triple, Triple] = (
    (0.707223, 0.578729, 0.703617),
    (0.211883, 0.230117, 0.177517),
)
PACKAGED = Path(__file__).parent / "weights"
SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}


class BackboneError(ValueError):
    """A model cannot be built or loaded as asked."""


@dataclass(frozen=True)
class Backbone:
    """One model: what it is, how to build it, how its publisher uses it."""

    key: str
    """The name users type."""
    source: str
    """`hf-hub:` id, or `package` for weights that ship with tapfm."""
    arch: str
    """timm architecture."""
    width: int
    """Feature width D of the CLS token."""
    prefix_tokens: int
    """CLS and registers, in front of the patch tokens."""
    parameters: int
    """At `tile_px`, to the digit."""
    licence: str
    tile_px: int = 224
    """Side of the tile the model sees."""
    mpp: float = 0.5
    """Microns per pixel it was trained at."""
    feature: str = "cls"
    """`cls`, or `cls+mean`: CLS joined with the mean patch token."""
    stats: tuple[Triple, Triple] = IMAGENET
    """Mean and standard deviation of its inputs."""
    gated: bool = False
    """Whether the publisher asks to accept a licence first."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the architecture's defaults."""

    @property
    def dim(self) -> int:
        """Width of the feature the publisher prescribes."""
        return self.width * (2 if self.feature == "cls+mean" else 1)


_GIANT = {"mlp_ratio": 5.33334, "init_values": 1e-5}
_UNI2 = {"depth": 24, "num_heads": 24, "embed_dim": 1536, "reg_tokens": 8, "no_embed_class": True}
_VIRCHOW = {"mlp_ratio": 5.3375, "init_values": 1e-5, **SWIGLU}
_DEMO = {"embed_dim": 128, "depth": 6, "num_heads": 4, "reg_tokens": 4}
_NC_ND = "CC-BY-NC-ND-4.0"

# key, source, arch, width, prefix tokens, parameters, licence, then what differs
ROWS = (
    Backbone(
        "demo_vit", "package", "vit_tiny_patch16_224", 128, 5, 1_295_872, "Apache-2.0",
        tile_px=112, stats=HALF, kwargs=_DEMO,
    ),
    Backbone(
        "dinov2_vits14", "hf-hub:timm/vit_small_patch14_dinov2.lvd142m",
        "vit_small_patch14_dinov2", 384, 1, 21_628_800, "Apache-2.0",
    ),
    Backbone(
        "uni", "hf-hub:MahmoodLab/UNI", "vit_large_patch16_224", 1024, 1, 303_350_784, _NC_ND,
        gated=True, kwargs={"init_values": 1e-5},
    ),
    Backbone(
        "uni2_h", "hf-hub:MahmoodLab/UNI2-h", "vit_giant_patch14_224", 1536, 9, 681_394_176,
        _NC_ND, gated=True, kwargs=_UNI2 | _GIANT | SWIGLU,
    ),
    Backbone(
        "virchow2", "hf-hub:paige-ai/Virchow2", "vit_huge_patch14_224", 1280, 5, 631_239_424,
        _NC_ND, feature="cls+mean", gated=True, kwargs=_VIRCHOW | {"reg_tokens": 4},
    ),
    Backbone(
        "gigapath", "hf-hub:prov-gigapath/prov-gigapath", "vit_giant_patch14_dinov2", 1536, 1,
        1_134_953_984, "Apache-2.0, research conditions", gated=True,
        kwargs={"patch_size": 16} | _GIANT,
    ),
    Backbone(
        "h_optimus_0", "hf-hub:bioptimus/H-optimus-0", "vit_giant_patch14_reg4_dinov2", 1536, 5,
        1_134_774_272, "Apache-2.0", stats=H_OPTIMUS, kwargs={"init_values": 1e-5},
    ),
    Backbone(
        "h_optimus_1", "hf-hub:bioptimus/H-optimus-1", "vit_giant_patch14_reg4_dinov2", 1536, 5,
        1_134_774_272, _NC_ND, stats=H_OPTIMUS, gated=True, kwargs={"init_values": 1e-5},
    ),
)  # fmt: skip
BACKBONES: Mapping[str, Backbone] = MappingProxyType({row.key: row for row in ROWS})


def find(key: str) -> Backbone:
    """The row of a model.

    Raises:
        BackboneError: no such model; the message lists those there are.
    """
    row = BACKBONES.get(key.lower().replace("-", "_"))
    if row is None:
        raise BackboneError(f"model: {key!r} is none of {', '.join(BACKBONES)}")
    return row


class Encoder(nn.Module):
    """A foundation model as tapfm sees it: uint8 tiles in, features and raw scores out.

    Args:
        vit: the timm model.
        row: its row.
        recompute: keep only block boundaries for backward (activation checkpointing). The last
            block is cheap and always kept, so that its q and k keep their graph.
    """

    def __init__(self, vit: nn.Module, row: Backbone, *, recompute: bool = False):
        super().__init__()
        self.vit, self.row, self.dim = vit, row, row.dim
        self.tap = ClsTap(vit)
        mean, std = (torch.tensor(each).view(3, 1, 1) * 255 for each in row.stats)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if recompute:
            for block in vit.blocks[:-1]:
                _recompute(block)

    def normalise(self, tiles_CP: Tensor) -> Tensor:
        """Tiles of 0 to 255, uint8 or float, as the model's publisher feeds it."""
        return (tiles_CP.to(self.mean.dtype) - self.mean) / self.std

    def forward(self, tiles_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Features z (C, D) and raw scores (C,), in float32 or better whatever the autocast."""
        tokens_CND = self.vit.forward_features(self.normalise(tiles_CP))
        z_CD = tokens_CND[:, 0]
        if self.row.feature == "cls+mean":
            mean_CD = tokens_CND[:, self.vit.num_prefix_tokens :].mean(1)
            z_CD = torch.cat([z_CD, mean_CD], dim=1)
        return z_CD.to(torch.promote_types(z_CD.dtype, torch.float32)), self.tap.take_score()


def _recompute(block: nn.Module) -> None:
    forward = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(  # the instance's: keys stay timm's
        forward, *args, use_reentrant=False, **kwargs
    )


def build(row: Backbone, tile_px: int | None = None, **kwargs: Any) -> nn.Module:
    """The bare timm model with fresh weights (on the meta device inside `torch.device("meta")`).

    Args:
        row: which model.
        tile_px: side of its input; None is the row's.
        kwargs: further timm arguments, such as `drop_path_rate`.

    Raises:
        BackboneError: the tile is not a multiple of the model's patch.
    """
    tile_px = tile_px or row.tile_px
    vit = timm.create_model(
        row.arch, pretrained=False, num_classes=0, img_size=row.tile_px, **{**row.kwargs, **kwargs}
    )
    patch = vit.patch_embed.patch_size[0]
    if tile_px % patch:
        below = tile_px // patch * patch
        raise BackboneError(
            f"{row.key}: a tile of {tile_px} px is not a multiple of the model's {patch} px patch. "
            f"Use {below} or {below + patch}."
        )
    if tile_px != row.tile_px:
        vit.set_input_size(img_size=tile_px)
    return vit


def load(
    key: str,
    weights: str | None = None,
    *,
    tile_px: int | None = None,
    recompute: bool = False,
    drop_path: float = 0.0,
) -> Encoder:
    """An encoder with its weights.

    Args:
        key: a model of `BACKBONES`.
        weights: a .safetensors file, a folder with one, `hub` (fetch from the publisher), `random`
            (for trials), or None: those in the package, where they ship.
        tile_px: side of the tiles; position embeddings are resampled where it is not the row's.
        recompute: activation checkpointing of all blocks but the last.
        drop_path: stochastic depth rate while training.

    Raises:
        BackboneError: unknown model, missing weights, or weights of another model.
    """
    row = find(key)
    vit = build(row, tile_px, **({"drop_path_rate": drop_path} if drop_path else {}))
    if weights != "random":
        load_state(vit, row, _state(row, weights))
    return Encoder(vit, row, recompute=recompute)


def load_state(vit: nn.Module, row: Backbone, state: Mapping[str, Tensor]) -> None:
    """Load a publisher's state dict strictly, resampling position embeddings where sizes differ.

    Raises:
        BackboneError: the weights are another model's; the message names the first differences.
    """
    try:
        state = checkpoint_filter_fn({k: v.float() for k, v in state.items()}, vit)
    except RuntimeError as error:  # resampling position embeddings of another width
        raise BackboneError(
            f"{row.key}: the weights are of another model: {error}. Give weights of {row.source}."
        ) from error
    wanted = vit.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    surplus = sorted(state.keys() - wanted.keys() - {"mask_token"})
    shapes = sorted(k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape)
    if missing or surplus or shapes:
        found = [
            f"{title} {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for title, keys in (("missing", missing), ("unknown", surplus), ("other shape", shapes))
            if keys
        ]
        raise BackboneError(
            f"{row.key}: the weights are of another model: {'; '.join(found)}. "
            f"Give weights of {row.source}."
        )
    vit.load_state_dict({k: state[k] for k in wanted})


def _state(row: Backbone, weights: str | None) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    if weights == "hub":
        return _fetch(row)
    if weights is None and row.source == "package":
        return load_file(PACKAGED / f"{row.key}.safetensors")
    if weights is None:
        gate = f" Accept its licence at https://huggingface.co/{row.source[7:]} first."
        raise BackboneError(
            f"{row.key}: no weights given, and nothing is downloaded unasked. Set model.weights to "
            f"a .safetensors file or folder, or to `hub` to fetch {row.source} "
            f"({row.licence}).{gate if row.gated else ''}"
        )
    path = Path(weights)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1 or files[0].suffix != ".safetensors" or not files[0].is_file():
        raise BackboneError(
            f"{row.key}: {path} is neither a .safetensors file nor a folder with just one. "
            "Pickled checkpoints are not opened, since they can run code: convert them first."
        )
    try:
        return load_file(files[0])
    except Exception as error:  # safetensors raises its own, undocumented kinds
        raise BackboneError(f"{row.key}: {files[0]} cannot be read: {error}") from error


def _fetch(row: Backbone) -> Mapping[str, Tensor]:
    if row.source == "package":
        raise BackboneError(f"{row.key}: its weights are in the package; leave model.weights out.")
    print(f"{row.key}: fetching {row.source}, licence {row.licence}")
    try:
        kwargs = {"num_classes": 0, **row.kwargs}
        return timm.create_model(row.source, pretrained=True, **kwargs).state_dict()
    except Exception as error:  # many kinds: no network, no token, licence not accepted
        raise BackboneError(
            f"{row.key}: {row.source} cannot be fetched ({type(error).__name__}: {error}). "
            f"Accept its licence ({row.licence}) at https://huggingface.co/{row.source[7:]}, run "
            "`huggingface-cli login`, or give a local file as model.weights."
        ) from error
