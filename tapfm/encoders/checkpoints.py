"""Reads a model's weights: from the package, a local file or folder, or the publisher's hub.

A file is safetensors, or a torch checkpoint that is read without running code from it; the hub is
asked only if the user says so. timm's own layout, DINOv2's and that of Hugging Face's
`transformers` are understood, inside whatever outer keys a trainer adds. Whether the weights fit
the model is checked in `encoders.backbones`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slides.errors import SettingsError
from tapfm.encoders.registry import Backbone
from tapfm.encoders.transformers_layout import is_transformers, to_timm
from tapfm.weights import CheckpointError, must_be_finite, read_tensors

PACKAGED = Path(__file__).parent / "weights"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
UNUSED = ("mask_token", "head.", "pooler.")  # used in pretraining and classification only
WRAPPERS = ("teacher", "state_dict", "model", "module")  # outer keys, the best network first
PREFIXES = ("encoder.vit.", "module.", "backbone.", "visual.trunk.")


class BackboneError(SettingsError):
    """A model cannot be built or loaded as asked."""


def read_weights(row: Backbone, weights: str | None) -> Mapping[str, Any]:
    """Return the content of the weights' file, unchanged.

    Args:
        row: which model.
        weights: as in `backbones.load`, except `random`.

    Raises:
        BackboneError: no weights given, no such file, or one that cannot be read or fetched.
    """
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
    """Return the one checkpoint of a folder."""
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
                f"{', '.join(path.name for path in files[:5])}. Give the path of one of them."
            )
    raise BackboneError(
        f"{row.key}: {folder} has no checkpoint: no file ending in .safetensors or "
        f"{', '.join(PICKLED)}. Give the folder or file that holds the weights."
    )


def _read(row: Backbone, file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise BackboneError(
            f"{row.key}: {file} is neither a checkpoint (.safetensors, {', '.join(PICKLED)}) "
            "nor a folder with one: there is no such file. Correct model.weights."
        )
    try:
        if file.suffix == ".safetensors":
            return read_tensors(file)
        state = torch.load(file, map_location="cpu", weights_only=True)  # runs no code from it
    except CheckpointError as error:
        raise BackboneError(f"{row.key}: {error}") from error
    except Exception as error:  # many undocumented kinds
        why = str(error).partition("\n")[0]
        way_out = "Fetch it again, or give another file."
        if file.suffix != ".safetensors":
            way_out = (
                "Checkpoints that hold more than tensors are not opened, since they can run "
                "code: convert it to .safetensors first."
            )
        raise BackboneError(f"{row.key}: {file} cannot be read: {why}. {way_out}") from error
    if not isinstance(state, Mapping):
        raise BackboneError(
            f"{row.key}: {file} holds a {type(state).__name__}, not a state dict. Give another."
        )
    return state


def _hub_files(row: Backbone) -> tuple[str, ...]:
    """Return the names a checkpoint may have at its publisher, the likeliest first."""
    return (*([row.file] if row.file else []), "model.safetensors", "pytorch_model.bin")


def _fetch(row: Backbone, source: str) -> Mapping[str, Any]:
    """Return the publisher's checkpoint, from the hub or its local cache."""
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


def bare(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return a state dict without a trainer's outer keys, prefixes and other networks."""
    for outer in WRAPPERS:
        if isinstance(state.get(outer), Mapping):
            return bare(state[outer])
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in state):
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            return bare(inner)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    must_be_finite(tensors, "model.weights", BackboneError)
    return to_timm(tensors) if is_transformers(tensors) else tensors
