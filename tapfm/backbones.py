"""How a foundation model is built, loaded and called. What there is stands in `tapfm.registry`.

Nothing is fetched unasked: weights come from a local file or folder, from the package (the demo
encoder), or, with `weights="hub"`, from the model's publisher. Its licence and gate are printed
whenever weights are loaded. A file is safetensors, or a torch checkpoint that is read without
running code from it; timm's own layout, DINOv2's and that of Hugging Face's `transformers` are
understood, and anything that does not fit the row exactly is refused.

Shapes: C tiles of a chunk, S pixels a side, D features, N tokens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tapfm.attention import ClsTap, NoClsAttentionError
from tapfm.registry import LEFT_OUT, ROWS, Backbone
from tapfm.transformers_layout import is_transformers, to_timm

PACKAGED = Path(__file__).parent / "weights"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
UNUSED = ("mask_token", "head.", "pooler.")  # of pretraining and classification
WRAPPERS = ("teacher", "state_dict", "model", "module")  # outer keys, the best network first
PREFIXES = ("encoder.vit.", "module.", "backbone.", "visual.trunk.")


class BackboneError(ValueError):
    """A model cannot be built or loaded as asked."""


def _plain(name: str) -> str:
    """A name as it is compared: letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _names() -> Mapping[str, Backbone]:
    """Every spelling of every model: its key, aliases and source, each feature's suffix behind."""
    names = {}
    for row in ROWS:
        hub = [row.source, row.source.partition(":")[2]] if row.source != "package" else []
        for name in (row.key, *row.aliases, *hub):
            assert names.setdefault(_plain(name), row) is row, f"{name} names two models"
    for name, row in list(names.items()):
        for feature in ("cls", "cls+mean") if row.prefix_tokens else ():
            key = f"{row.key}_{feature.replace('+', '_')}"
            other = row if feature == row.feature else replace(row, key=key, feature=feature)
            names.setdefault(name + _plain(feature), other)
    return MappingProxyType(names)


BACKBONES: Mapping[str, Backbone] = MappingProxyType({row.key: row for row in ROWS})
NAMES = _names()


def find(key: str) -> Backbone:
    """The row of a model.

    Args:
        key: a key, alias or hub id, in any case and with any separators; `-cls` or `-cls-mean`
            behind it takes that feature of the same weights.

    Raises:
        BackboneError: no such model; the message says why, or lists those there are.
    """
    row = NAMES.get(_plain(key))
    if row is not None:
        return row
    for name, reason in LEFT_OUT.items():
        if _plain(name) == _plain(key):
            raise BackboneError(f"model: {key} is known and left out: {reason}")
    raise BackboneError(f"model: {key!r} is none of {', '.join(BACKBONES)}")


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
        # None: no CLS token, no score; such a model is trained with learned attention
        self.tap = ClsTap(vit) if row.prefix_tokens else None
        mean, std = (torch.tensor(each).view(3, 1, 1) * 255 for each in row.stats)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        if recompute:
            for block in blocks(vit)[:-1]:
                _recompute(block)

    @property
    def tile_px(self) -> int:
        """Side of the tiles it was built for."""
        return self.vit.patch_embed.img_size[0]

    def require_score(self, asked_by: str) -> None:
        """Refuse what needs the CLS score of a model that has none.

        Raises:
            NoClsAttentionError: no CLS attention; the message says what can be used.
        """
        if self.tap is None:
            raise NoClsAttentionError(
                f"{asked_by} weighs tiles by the CLS row of the last block's attention, and "
                f"{self.row.key} ({type(self.vit).__name__}) has no CLS token. "
                "Use the aggregator `gated`, which learns its own attention."
            )

    def normalise(self, tiles_CP: Tensor) -> Tensor:
        """Tiles of 0 to 255, uint8 or float, as the model's publisher feeds it."""
        return (tiles_CP.to(self.mean.dtype) - self.mean) / self.std

    def forward(self, tiles_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Features z (C, D) and raw scores (C,), in float32 or better whatever the autocast.

        Scores are 0, without a graph, where the model has none.
        """
        tokens = self.vit.forward_features(self.normalise(tiles_CP))
        if self.row.feature == "mean":
            z_CD = self.vit.forward_head(tokens, pre_logits=True)
        else:
            z_CD = tokens[:, 0]
        if self.row.feature == "cls+mean":
            mean_CD = tokens[:, self.vit.num_prefix_tokens :].mean(1)
            z_CD = torch.cat([z_CD, mean_CD], dim=1)
        z_CD = z_CD.to(torch.promote_types(z_CD.dtype, torch.float32))
        score_C = self.tap.take_score() if self.tap else z_CD.new_zeros(len(z_CD))
        return z_CD, score_C


def blocks(vit: nn.Module) -> Sequence[nn.Module]:
    """A model's blocks in order, over all stages where it has several."""
    if hasattr(vit, "blocks"):
        return vit.blocks
    return [block for stage in vit.layers for block in stage.blocks]


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
        BackboneError: the tile is not a multiple of the model's patch, or timm is too old for it.
    """
    tile_px = tile_px or row.tile_px
    if not timm.is_model(row.arch):
        raise BackboneError(
            f"{row.key}: timm {timm.__version__} does not have {row.arch}. "
            "Run: pip install --upgrade timm"
        )
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
    """An encoder with its weights; prints where they are from, their licence and gate.

    Args:
        key: a model of the registry, see `find`.
        weights: a checkpoint, a folder with one, `hub` (fetch from the publisher), another
            `hf-hub:owner/name`, `random` (for trials), or None: those in the package, where they
            ship.
        tile_px: side of the tiles; position embeddings are resampled where it is not the row's.
        recompute: activation checkpointing of all blocks but the last.
        drop_path: stochastic depth rate while training.

    Raises:
        BackboneError: unknown model, missing weights, or weights of another model.
    """
    row = find(key)
    state = None
    if weights != "random":
        if row.source != "package" and weights is not None:
            print(f"{row.key}: {row.terms}", file=sys.stderr)
        state = _state(row, weights)
    vit = build(row, tile_px, drop_path_rate=drop_path)  # said even if 0: some have a default
    if state is not None:
        load_state(vit, row, state)
    return Encoder(vit, row, recompute=recompute)


def load_state(vit: nn.Module, row: Backbone, state: Mapping[str, Tensor]) -> None:
    """Load a publisher's state dict strictly, resampling position embeddings where sizes differ.

    Raises:
        BackboneError: the weights are another model's; the message names the first differences.
    """
    timms = sys.modules[
        type(vit).__module__
    ].checkpoint_filter_fn  # each family of timm has its own
    patch = "patch_embed.proj.weight"
    try:
        bare = {k: v.float() for k, v in _bare(state).items()}
        if patch in bare and bare[patch].shape[-2:] != vit.patch_embed.proj.weight.shape[-2:]:
            raise KeyError(f"its patches are of {bare[patch].shape[-1]} px")  # timm would resize
        state = timms(bare, vit)
    except (RuntimeError, KeyError, AttributeError) as error:  # another width, half a layout
        raise BackboneError(
            f"{row.key}: the weights are of another model: {error.args[0]}. "
            f"Give weights of {row.source}."
        ) from error
    wanted = vit.state_dict()
    state = {k: v for k, v in state.items() if k in wanted or not k.startswith(UNUSED)}
    missing = sorted(wanted.keys() - state.keys())
    surplus = sorted(state.keys() - wanted.keys())
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
    vit.load_state_dict(state)


def _bare(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """A state dict without what trainers wrap around one: outer keys, prefixes, other networks."""
    for outer in WRAPPERS:
        if isinstance(state.get(outer), Mapping):
            return _bare(state[outer])
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in state):
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            return _bare(inner)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return to_timm(tensors) if is_transformers(tensors) else tensors


def _state(row: Backbone, weights: str | None) -> Mapping[str, Any]:
    """What the weights' file holds, as it is."""
    if weights == "hub":
        return _fetch(row, row.source)
    if weights is not None and re.match(r"hf[-_]hub:", weights):
        return _fetch(row, weights)
    if weights is None and row.source == "package":
        return _read(row, PACKAGED / row.file)
    if weights is None:
        gate = f" Accept its licence at {row.page} first." if row.gated else ""
        raise BackboneError(
            f"{row.key}: no weights given, and nothing is downloaded unasked. Set model.weights to "
            f"a .safetensors file or folder, or to `hub` to fetch {row.source} "
            f"({row.licence}).{gate}"
        )
    path = Path(weights)
    return _read(row, _checkpoint_in(row, path) if path.is_dir() else path)


def _checkpoint_in(row: Backbone, folder: Path) -> Path:
    """The one checkpoint of a folder."""
    for name in _hub_files(row):
        if (folder / name).is_file():
            return folder / name
    for suffixes in ((".safetensors",), PICKLED):
        files = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
        if len(files) == 1:
            return files[0]
        if files:
            raise BackboneError(
                f"{row.key}: {folder} has {len(files)} checkpoints: "
                f"{', '.join(path.name for path in files[:5])}. Give the one that is meant."
            )
    raise BackboneError(
        f"{row.key}: {folder} has no checkpoint: no file ending in .safetensors or "
        f"{', '.join(PICKLED)}. Give the folder or file that holds the weights."
    )


def _read(row: Backbone, file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise BackboneError(
            f"{row.key}: {file} is neither a checkpoint (.safetensors, {', '.join(PICKLED)}) "
            "nor a folder with one: there is no such file."
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)  # runs no code from it
    except Exception as error:  # of many undocumented kinds
        why = str(error).partition("\n")[0]
        way_out = "Fetch it again, or give another file."
        if file.suffix != ".safetensors":
            way_out = (
                "Checkpoints that hold more than tensors are not opened, since they can run "
                "code: convert it to .safetensors first."
            )
        raise BackboneError(f"{row.key}: {file} cannot be read: {why}. {way_out}") from error
    if not isinstance(state, Mapping):
        raise BackboneError(f"{row.key}: {file} holds a {type(state).__name__}, not a state dict.")
    return state


def _hub_files(row: Backbone) -> tuple[str, ...]:
    """Names a checkpoint may have at the publisher's, the likeliest first."""
    return (*([row.file] if row.file else []), "model.safetensors", "pytorch_model.bin")


def _fetch(row: Backbone, source: str) -> Mapping[str, Any]:
    """The publisher's checkpoint, from the hub or the cache it was put in."""
    from huggingface_hub import errors, get_token, hf_hub_download

    if source == "package":
        raise BackboneError(f"{row.key}: its weights are in the package; leave model.weights out.")
    repo = source.partition(":")[2]
    page = f"https://huggingface.co/{repo}"
    way_out = (
        f"Accept its licence ({row.licence}) at {page}, run `hf auth login` (or set HF_TOKEN), or "
        "give a local file as model.weights."
    )
    if row.gated and source == row.source and not get_token():
        raise BackboneError(f"{row.key}: {source} is gated and there is no token. {way_out}")
    print(f"{row.key}: fetching {source}", file=sys.stderr)
    for name in _hub_files(row):
        try:
            return _read(row, Path(hf_hub_download(repo, name)))
        except errors.LocalEntryNotFoundError as error:  # offline, and not in the cache
            raise BackboneError(f"{row.key}: {source} cannot be reached. {way_out}") from error
        except errors.EntryNotFoundError:
            continue
        except BackboneError:
            raise
        except Exception as error:  # many kinds: no network, no access, no such repository
            raise BackboneError(
                f"{row.key}: {source} cannot be fetched ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}). {way_out}"
            ) from error
    raise BackboneError(
        f"{row.key}: {source} has none of {', '.join(_hub_files(row))}. Fetch the weights from "
        f"{page} and give the file as model.weights."
    )
