"""Files of weights: written with a hash of all that they hold; read whole and finite, or refused.

A file is safetensors, so reading it runs no code. Its header holds a text, the settings that build
a model again, and in it `sha256`: of that text and of every number. Files without one (of version
0.1, of other programs) are read as they are.

Price: a gigabyte takes about a second, once in a process for a file of the same size and time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slides.files import replacing

HASH = "sha256"
_sound: set[tuple] = set()  # path, size and time of files that were found sound


class CheckpointError(ValueError):
    """A checkpoint cannot be used as asked."""


def write_weights(
    path: Path, state: Mapping[str, Tensor], key: str, header: Mapping[str, Any], **more: str
) -> None:
    """Write tensors and a header; `path` is whole or not there, and the same bytes each time.

    Args:
        path: the file.
        state: the tensors.
        key: of the header in the file's metadata.
        header: what JSON can hold.
        more: further metadata.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    header = json.loads(json.dumps({k: v for k, v in header.items() if k != HASH}))
    text = json.dumps({**header, HASH: digest(state, header)})
    with replacing(path) as partial:
        save_file(state, partial, {key: text, **more})
        _order_metadata(partial)


def read_header(path: Path, key: str) -> dict[str, Any]:
    """Return a file's header without its hash; read no weights.

    Raises:
        CheckpointError: no such file, or none with such a header.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file. Run `tapfm fit` first.")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[key])
            header.pop(HASH, None)
            return header
    except (OSError, SafetensorError, LookupError, ValueError, AttributeError,
            RecursionError) as error:  # fmt: skip
        raise CheckpointError(
            f"{path}: not a model that tapfm saved ({type(error).__name__}: {error!s:.100}). "
            "Give the best.safetensors of a run directory. (A pathpt.safetensors is for "
            "`tapfm predict` and `heatmap` alone.)"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors, once they are what was written.

    Raises:
        CheckpointError: it is damaged, or some of its numbers are not finite.
        OSError, SafetensorError: it cannot be read as safetensors.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    stat = os.stat(path)
    seen = str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns
    if seen in _sound:
        return state
    known, header = _hashed(metadata)
    if known and digest(state, header) != known:
        raise CheckpointError(
            f"{path}: damaged: its content is not what was written (its SHA-256 differs). Copy it "
            "again from where it was made, or fit anew."
        )
    must_be_finite(state, str(path))
    _sound.add(seen)
    return state


def is_hashed(path: Path) -> bool:
    """Return whether a file that can be read holds the hash of its content."""
    with safe_open(path, "pt") as file:
        return bool(_hashed(file.metadata() or {})[0])


def must_be_finite(
    state: Mapping[str, Any], where: str, error: type[ValueError] = CheckpointError
) -> None:
    """Raise if a tensor of weights holds nan or infinity; masks may.

    Raises:
        CheckpointError: one does; `error` names another class.
    """
    wrong = [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name
        and not torch.isfinite(value).all()
    ]  # fmt: skip
    if wrong:
        raise error(
            f"{where}: {len(wrong)} of its {len(state)} tensors hold numbers that are not finite "
            f"(nan or infinity), first {wrong[0]}. The file is damaged, or its training diverged: "
            "give another."
        )


def digest(state: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a header, and of every tensor's name, type, shape and numbers."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(state):
        value = state[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _hashed(metadata: Mapping[str, str]) -> tuple[str | None, dict[str, Any]]:
    """Return the hash that a file's metadata states, and the header that it covers."""
    for text in metadata.values():
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(header, dict) and HASH in header:
            return str(header.pop(HASH)), header
    return None, {}


def _order_metadata(path: Path) -> None:
    """Sort a file's metadata by key: safetensors writes it in an order that changes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
