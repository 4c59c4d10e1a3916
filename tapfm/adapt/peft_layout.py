"""Reads and writes LoRA and DoRA as files of the peft library, without the library.

A folder with `adapter_model.safetensors` and `adapter_config.json`, as `PeftModel.from_pretrained`
reads it over the same timm model and as `save_pretrained` writes it. Where only some of q, k and v
were adapted, the others get rows of 0 in peft's fused qkv (and the weight's own length as DoRA
magnitude); when read back, all three learn.

Source: peft 0.21 (Apache-2.0): its file layout, by names alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slides.files import replacing
from tapfm.adapt.lowrank import PARTS, adapted, rows_a, scatter_rows, select_rows
from tapfm.adapt.surgery import StrategyError
from tapfm.weights import read_tensors

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAGNITUDE = "lora_magnitude_vector"
LAYER = re.compile(r"blocks\.(\d+)\.(?:attn\.(qkv|[qkv]_proj|proj)|(mlp)\.\w+)")


def write_peft(vit: nn.Module, strategy: Any, folder: Path) -> None:
    """Write the adapter of a model that `lora` or `dora` prepared.

    Args:
        vit: the model.
        strategy: its strategy, for rank, alpha and dropout.
        folder: created if missing.

    Raises:
        StrategyError: the model has no adapter, or one that peft would not apply.
    """
    layers = dict(adapted(vit))
    if not layers:
        raise StrategyError("peft: the model has no LoRA or DoRA to write; train lora or dora")
    for block in vit.blocks:
        if hasattr(getattr(block.attn, "qkv", None), "lora_A") and (
            getattr(block.attn, "q_bias", None) is not None
        ):
            raise StrategyError(
                f"peft: {type(block.attn).__name__} never calls its qkv, so peft's adapter of it "
                "would do nothing. Use `export`, which merges."
            )
    state, dora = {}, False
    for name, linear in layers.items():
        state[f"{PREFIX}{name}.lora_A.weight"] = rows_a(linear)
        state[f"{PREFIX}{name}.lora_B.weight"] = scatter_rows(linear, linear.lora_B.weight)
        if hasattr(linear, MAGNITUDE):
            dora = True
            norm_O = torch.linalg.vector_norm(linear.weight, dim=1)
            ours = scatter_rows(linear, linear.lora_magnitude_vector)
            chosen = scatter_rows(linear, torch.ones_like(linear.lora_magnitude_vector)) > 0
            state[f"{PREFIX}{name}.{MAGNITUDE}"] = torch.where(chosen, ours, norm_O)
    config = {
        "peft_type": "LORA",
        "r": strategy.rank,
        "lora_alpha": strategy.alpha,
        "lora_dropout": strategy.dropout,
        "target_modules": sorted(layers),
        "use_dora": dora,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as partial:
        cpu = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(cpu, partial, {"format": "pt"})
    with replacing(folder / CONFIG) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n")


def peft_spec(folder: Path) -> dict[str, Any]:
    """Return name and options of the strategy equal to a peft adapter, for `make_strategy`.

    Raises:
        StrategyError: no such folder, or an adapter of another kind.
    """
    config, state = _read(folder)
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    other = [k for k in ("rank_pattern", "alpha_pattern", "modules_to_save") if config.get(k)]
    if not plain or other:
        raise StrategyError(
            f"{folder}: a peft adapter with {other or config.get('peft_type')}; only LoRA and DoRA "
            "of one rank, without biases, can be read"
        )
    blocks, targets = set(), set()
    for key in state:
        layer = LAYER.fullmatch(key.rsplit(".lora_", 1)[0])
        if layer is None:
            raise StrategyError(f"{folder}: {key} is in no layer of a timm ViT's blocks")
        blocks.add(int(layer[1]))
        part = layer[2] or layer[3]
        targets |= set("qkv") if part == "qkv" else {part.removesuffix("_proj")}
    rank = int(config["r"])
    alpha = config["lora_alpha"] * (rank**0.5 if config.get("use_rslora") else 1)
    return {
        "name": "dora" if config.get("use_dora") else "lora",
        "rank": rank,
        "alpha": float(alpha),
        "dropout": float(config.get("lora_dropout", 0)),
        "targets": [part for part in PARTS if part in targets],
        "last": max(blocks) + 1 - min(blocks),
    }


def read_peft(vit: nn.Module, folder: Path) -> None:
    """Load an adapter into a model that the strategy of `peft_spec` has prepared.

    Raises:
        StrategyError: its layers or shapes are not the model's.
    """
    _, state = _read(folder)
    wanted = {}
    for name, linear in adapted(vit):
        wanted[f"{name}.lora_A.weight"] = linear.lora_A.weight, None
        wanted[f"{name}.lora_B.weight"] = linear.lora_B.weight, linear
        if hasattr(linear, MAGNITUDE):
            wanted[f"{name}.{MAGNITUDE}"] = linear.lora_magnitude_vector, linear
    wrong = sorted(wanted.keys() ^ state.keys())
    wrong = wrong or [k for k, (p, m) in wanted.items() if _shape(p, m) != state[k].shape]
    if wrong:
        raise StrategyError(
            f"{folder}: {len(wrong)} tensors are not those of this model, first {wrong[0]}. "
            "Prepare the model it was trained on with the strategy that `peft_spec` says."
        )
    with torch.no_grad():
        for key, (parameter, linear) in wanted.items():
            parameter.copy_(select_rows(linear, state[key]) if linear else state[key])


def _shape(parameter: Tensor, linear: nn.Linear | None) -> torch.Size:
    """Return a tensor's shape in peft's file: with all rows of its layer, except for A."""
    rows = linear.out_features if linear else len(parameter)
    return torch.Size([rows, *parameter.shape[1:]])


def _read(folder: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        state = read_tensors(folder / WEIGHTS)
    except Exception as error:  # safetensors raises its own, undocumented kinds
        raise StrategyError(
            f"{folder}: no peft adapter ({type(error).__name__}: {error}). "
            f"Give a folder with {CONFIG} and {WEIGHTS}."
        ) from error
    return config, {key.removeprefix(PREFIX): value for key, value in state.items()}
