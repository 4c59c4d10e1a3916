"""Finds, builds, loads and calls a foundation model; the models are listed in `encoders.registry`.

Nothing is downloaded unasked: weights come from a local file or folder, from the package (the demo
encoder), or, with `weights="hub"`, from the publisher. Licence and gate are printed when weights
are loaded (`encoders.checkpoints` reads them), and weights that do not fit exactly are refused.

Shapes: C tiles of a chunk, S pixels a side, D features, N tokens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tapfm.autocast import without_autocast
from tapfm.encoders.attention import ClsTap, NoClsAttentionError
from tapfm.encoders.checkpoints import UNUSED, BackboneError, bare, read_weights
from tapfm.encoders.compiled import compile_blocks, pad_chunks
from tapfm.encoders.merging import TokenMerging
from tapfm.encoders.pinned import upload
from tapfm.encoders.registry import LEFT_OUT, ROWS, Backbone
from tapfm.encoders.tail import ClsTail, find_tail
from tapfm.encoders.unfilled import Unfilled
from tapfm.settings import did_you_mean, plain

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def _names() -> Mapping[str, Backbone]:
    """Return every spelling of every model (key, aliases, source, feature suffixes) and its row."""
    names = {}
    for row in ROWS:
        hub = [row.source, row.source.partition(":")[2]] if row.source != "package" else []
        for name in (row.key, *row.aliases, *hub):
            assert names.setdefault(plain(name), row) is row, f"{name} names two models"
    for name, row in list(names.items()):
        for feature in ("cls", "cls+mean") if row.prefix_tokens else ():
            other = row if feature == row.feature else _with_feature(row, feature)
            names.setdefault(name + plain(feature), other)
    return MappingProxyType(names)


def _with_feature(row: Backbone, feature: str) -> Backbone:
    """Return the row that takes another feature of the same weights, without an unused head."""
    other = replace(row, key=f"{row.key}_{feature.replace('+', '_')}", feature=feature)
    if row.head is None:
        return other
    unused = sum(p.numel() for p in _head(row, torch.device("meta")).parameters())
    return replace(other, head=None, parameters=row.parameters - unused)


def _head(row: Backbone, device: torch.device | None = None) -> nn.Module:
    make, dim = row.head
    with device or nullcontext():
        return make(row.width, dim)


BACKBONES: Mapping[str, Backbone] = MappingProxyType({row.key: row for row in ROWS})
NAMES = _names()


def find(key: str) -> Backbone:
    """Return the row of a model.

    Args:
        key: a key, alias or hub id, in any case and with any separators; `-cls` or `-cls-mean`
            behind it takes that feature of the same weights.

    Raises:
        BackboneError: no such model; the message says why, or lists those there are.
    """
    if row := NAMES.get(plain(key)):
        return row
    if reason := {plain(name): why for name, why in LEFT_OUT.items()}.get(plain(key)):
        raise BackboneError(f"model: {key} is known and left out: {reason}. Choose another.")
    near = did_you_mean(key, BACKBONES)
    raise BackboneError(f"model: {key!r} is none of {', '.join(BACKBONES)}.{near}")


class Encoder(nn.Module):
    """A foundation model with one interface: uint8 tiles in, features and raw scores out.

    Args:
        vit: the timm model.
        row: its row of the registry.
        recompute: keep only block boundaries for backward (activation checkpointing). The last
            block is cheap and always kept, so that its q and k keep their graph.
        tail: compute the last block for the CLS token alone where nothing else is read
            (`encoders.tail`).
        compiled: compile all blocks but the last (`encoders.compiled`); chunks are of one size.
        merge: patch tokens that each block but the last merges (`encoders.merging`).
    """

    def __init__(
        self,
        vit: nn.Module,
        row: Backbone,
        *,
        recompute: bool = False,
        tail: bool = True,
        compiled: bool = False,
        merge: int = 0,
    ):
        super().__init__()
        self.vit, self.row, self.dim = vit, row, row.dim
        # kept where timm keeps it: strategies that use the tile's colours undo the normalisation
        vit.pretrained_cfg = {**vit.pretrained_cfg, "mean": row.stats[0], "std": row.stats[1]}
        # None: no CLS token, no score; such a model is trained with learned attention
        self.tap = ClsTap(vit) if row.prefix_tokens else None
        self.tail: ClsTail | None = None
        self.no_tail = f"the feature is {row.feature}" if row.feature != "cls" else "not asked for"
        if self.tap and row.feature == "cls" and tail:
            self.tail, self.no_tail = find_tail(vit, self.tap)
        mean, std = (torch.tensor(each).view(3, 1, 1) * 255 for each in row.stats)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.compiled = compiled
        self.merging = TokenMerging(self, merge, recompute) if merge else None
        if compiled:
            compile_blocks(list(blocks(vit)[:-1]))
        if recompute and not merge:
            for block in blocks(vit)[:-1]:
                _recompute(block)

    @property
    def tile_px(self) -> int:
        """Return the side in pixels of the tiles it was built for."""
        return self.vit.patch_embed.img_size[0]

    def require_score(self, asked_by: str) -> None:
        """Raise if the model has no CLS score, which `asked_by` needs.

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
        """Return tiles of 0 to 255, uint8 or float, normalised as the publisher does."""
        return (tiles_CP.to(self.mean.dtype) - self.mean) / self.std

    def encode(self, tiles_CP: Tensor, precision: str = "fp32") -> tuple[Tensor, Tensor]:
        """Return features (C, D) and raw scores (C,) of uint8 tiles on any device."""
        with self.autocast(precision):
            return self(upload(tiles_CP, self.mean.device))

    def sized(self, encode: Encode, chunk: int) -> Encode:
        """Return `encode`, with chunks filled up to `chunk` tiles if blocks are compiled."""
        return pad_chunks(encode, chunk) if self.compiled else encode

    def autocast(self, precision: str) -> AbstractContextManager:
        """Return a new autocast context; one is made for each call.

        A longer context would cache cast weights: across an optimizer step they would be stale,
        and across a pass without and one with a graph parameters would get no gradient.
        """
        if precision not in ("fp16", "bf16"):
            return without_autocast(self.mean.device)
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return torch.autocast(self.mean.device.type, dtype)

    def forward(self, tiles_CP: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (C, D) and raw scores (C,), in float32 or better under any autocast.

        Scores are 0, without a graph, if the model has no CLS token.
        """
        with self.reading():
            tokens = self.vit.forward_features(self.pixels(tiles_CP))
        return self.read(tokens)

    def reading(self) -> AbstractContextManager:
        """Return a context in which the last block computes only what `read` needs."""
        return self.tail or nullcontext()

    def pixels(self, tiles_CP: Tensor) -> Tensor:
        """Return normalised tiles in the dtype of the model's weights."""
        return self.normalise(tiles_CP).to(self.vit.patch_embed.proj.weight.dtype)

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and raw scores from the tokens behind the final norm."""
        if self.row.feature == "mean":
            z_CD = self.vit.forward_head(tokens, pre_logits=True)
        elif self.row.feature == "head":
            z_CD = self.vit.head(tokens)
        else:
            z_CD = tokens[:, 0]
        if self.row.feature == "cls+mean":
            patches, merging = tokens[:, self.vit.num_prefix_tokens :], self.merging
            mean_CD = merging.mean(patches) if merging else patches.mean(1)
            z_CD = torch.cat([z_CD, mean_CD], dim=1)
        z_CD = z_CD.to(torch.promote_types(z_CD.dtype, torch.float32))
        score_C = self.tap.take_score() if self.tap else z_CD.new_zeros(z_CD.shape[0])
        return z_CD, score_C


def blocks(vit: nn.Module) -> Sequence[nn.Module]:
    """Return a model's blocks in order, over all stages of a Swin."""
    if hasattr(vit, "blocks"):
        return vit.blocks
    return [block for stage in vit.layers for block in stage.blocks]


def _recompute(block: nn.Module) -> None:
    # set on the instance, so keys stay timm's; a partial, so that a copied block calls its own
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def build(row: Backbone, tile_px: int | None = None, **kwargs: Any) -> nn.Module:
    """Return the timm model with fresh weights (on the meta device inside `torch.device("meta")`).

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
    given = {"num_classes": 0, "img_size": row.tile_px, **row.kwargs, **kwargs}
    with Unfilled():
        vit = timm.create_model(row.arch, pretrained=False, **given)
    if row.head is not None:
        vit.head = _head(row)
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
    compiled: bool = False,
    drop_path: float = 0.0,
    merge: int = 0,
) -> Encoder:
    """Return an encoder with its weights; print their source, licence and gate.

    Args:
        key: a model of the registry, see `find`.
        weights: a checkpoint, a folder with one, `hub` (fetch from the publisher), another
            `hf-hub:owner/name`, `random` (for trials), or None: those in the package, where they
            ship.
        tile_px: side of the tiles; position embeddings are resampled where it is not the row's.
        recompute: activation checkpointing of all blocks but the last.
        compiled: torch.compile of all blocks but the last.
        drop_path: stochastic depth rate while training.
        merge: patch tokens that each block merges.

    Raises:
        SettingsError: as `TokenMerging`.
        BackboneError: unknown model, missing weights, or weights of another model.
    """
    row = find(key)
    state = None
    if weights != "random":
        if row.source != "package" and weights is not None:
            print(f"{row.key}: {row.terms}", file=sys.stderr)
        state = read_weights(row, weights)
    vit = build(row, tile_px, drop_path_rate=drop_path)  # even if 0: some have a default
    if state is not None:
        load_state(vit, row, state)
    encoder = Encoder(vit, row, recompute=recompute, compiled=compiled, merge=merge)
    if encoder.tail is None and encoder.tap and row.feature == "cls":
        print(
            f"{row.key}: the last block is computed for every token: {encoder.no_tail}",
            file=sys.stderr,
        )
    return encoder


def _parts(state: Mapping[str, Tensor], row: Backbone) -> Mapping[str, Tensor]:
    """Return the parts of a publisher's model that the row uses, under our names."""
    if not any(key.startswith(theirs) for theirs, _ in row.parts for key in state):
        return state
    named = {
        ours + key.removeprefix(theirs): value
        for theirs, ours in row.parts
        for key, value in state.items()
        if key.startswith(theirs)
    }
    # layer scale, as `transformers` renames it in files it saves
    return {re.sub(r"(\.ls\d)\.weight$", r"\1.gamma", key): value for key, value in named.items()}


def load_state(vit: nn.Module, row: Backbone, state: Mapping[str, Tensor]) -> None:
    """Load a publisher's state dict strictly; position embeddings are resampled to the tile size.

    Raises:
        BackboneError: the weights belong to another model; the message names differences.
    """
    timms = sys.modules[type(vit).__module__].checkpoint_filter_fn  # each timm family has its own
    patch = "patch_embed.proj.weight"
    try:
        plain = {k: v.float() for k, v in _parts(bare(state), row).items()}
        if patch in plain and plain[patch].shape[-2:] != vit.patch_embed.proj.weight.shape[-2:]:
            raise KeyError(f"its patches are of {plain[patch].shape[-1]} px")  # timm would resize
        state = timms(plain, vit)
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
