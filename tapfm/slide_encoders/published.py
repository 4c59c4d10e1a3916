"""Published files of Madeleine and MOOZY, as weights of the aggregators of these names.

    Madeleine   FOLDER/model_config.json, model.pt     a state dict
    MOOZY       moozy.pt                               two state dicts and the sizes of both parts

Files are read without running code from them. Sizes come from the file: the aggregator that is to
take them must have them as its options, and a message says which. The head is never there: it is
of the new labels.

Source: names of tensors and settings in the publishers' files (MADELEINE of 2025-02, MOOZY of
    2026-07); no code of theirs.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tapfm.settings import SettingsError

MADELEINE, MOOZY = ("model_config.json", "model.pt"), "moozy.pt"
Found = tuple[dict[str, Any], dict[str, Tensor]]
"""Name and options of an aggregator, and its weights without the head."""


def is_published(path: Path) -> bool:
    """Return whether a path holds a published slide encoder, and not a run."""
    return path.suffix == ".pt" or any((path / name).is_file() for name in (MOOZY, *MADELEINE))


def read_published(path: Path) -> Found:
    """Return the aggregator of a published file, and its weights.

    Args:
        path: Madeleine's folder; MOOZY's file or its folder.

    Raises:
        SettingsError: it is missing, holds code, or is no file of these.
    """
    if all((path / name).is_file() for name in MADELEINE):
        return _read(path / MADELEINE[1], lambda state: _madeleine(state, path / MADELEINE[0]))
    file = path / MOOZY if path.is_dir() else path
    if not file.is_file():
        raise SettingsError(
            f"{path}: neither Madeleine's folder ({', '.join(MADELEINE)}) nor {MOOZY}. Correct the "
            "path, or fetch the files from their publisher."
        )
    return _read(file, _moozy)


def _read(file: Path, understand: Callable[[Mapping[str, Any]], Found]) -> Found:
    """Return what a file holds, once it is understood and finite."""
    try:
        found = understand(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise SettingsError(
            f"{file}: it is damaged, or holds more than tensors, numbers and text, which is not "
            "loaded, since it can run code. Fetch it again from its publisher."
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise SettingsError(
            f"{file}: it is damaged, or not laid out as its publisher does ({why}). Fetch it again."
        ) from error
    if bad := [name for name, value in found[1].items() if not value.isfinite().all()]:
        raise SettingsError(f"{file}: {bad[0]} is not finite. Fetch it again.")
    return found


def _madeleine(state: Mapping[str, Tensor], config: Path) -> Found:
    """Return Madeleine's network; `module.` in front of names is a parallel run's."""
    settings = json.loads(config.read_text())
    if settings.get("activation", "softmax") != "softmax":
        raise SettingsError(
            f"{config}: its attention is {settings['activation']!r}, and the aggregator's is "
            "softmax. Take the published one."
        )
    state = {name.removeprefix("module."): value for name, value in state.items()}
    below = "wsi_embedders."
    places = {
        f"{below}pre_attn.{theirs}": f"mlp.{ours}"
        for theirs, ours in ((0, 0), (1, 1), (4, 3), (5, 4), (8, 6), (9, 7))
    } | {"projector": "project"}
    heads = int(settings.get("n_heads", 4))
    for h in range(heads):
        for theirs, ours in (("attention_a.0", "tanh"), ("attention_b.0", "sigmoid")):
            places[f"{below}attn.{h}.{theirs}"] = f"attention.{h}.{ours}"
    weights = {
        f"{ours}.{kind}": state[f"{theirs}.{kind}"].float()
        for theirs, ours in places.items()
        for kind in ("weight", "bias")
    }
    for h in range(heads):
        weights[f"attention.{h}.last.weight"] = state[f"{below}attn.{h}.attention_c.weight"].float()
    width, units = weights["project.weight"].shape[0], weights["attention.0.tanh.bias"].shape[0]
    return {"name": "madeleine", "width": width, "heads": heads, "units": units}, weights


def _moozy(payload: Mapping[str, Any]) -> Found:
    """Return MOOZY's network: slide encoder and case transformer."""
    slide, case = payload["teacher_slide_encoder"], payload["case_transformer"]
    of_slide, of_case = payload["slide_encoder_config"], payload["case_transformer_config"]
    width = int(of_slide["d_model"])
    wide = [each for each in (of_slide, of_case) if int(each["dim_feedforward"]) != 4 * width]
    if wide or int(of_case["num_heads"]) != int(of_slide["n_heads"]):
        raise SettingsError(
            "a MOOZY of other proportions: the aggregator has as many heads for slides as for "
            "cases, and layers of 4 times the width. Take the published one."
        )
    options = {
        "name": "moozy", "width": width, "layers": int(of_slide["n_layers"]),
        "case_layers": int(of_case["num_layers"]), "heads": int(of_slide["n_heads"]),
        "registers": int(of_slide.get("num_registers", 0)),
        "case_registers": int(of_case.get("num_registers", 0)),
        "qk_norm": bool(of_slide.get("qk_norm", False)),
        "case_qk_norm": bool(of_case.get("qk_norm", False)),
        "scale": _scale(slide, of_slide), "case_scale": _scale(case, of_case),
    }  # fmt: skip
    weights = {
        "project.0.weight": slide["input_proj.0.weight"],
        "project.0.bias": slide["input_proj.0.bias"],
        "slopes_H": -slide["pos_bias.slopes"].flatten(),
        **_tokens(slide, "slide", slide["cls_token"], options["layers"]),
        **_tokens(case, "case", case["case_token"], options["case_layers"]),
    }
    return options, {name: value.float() for name, value in weights.items()}


def _scale(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """Return LayerScale's start where there is one; it is trained since, and only not 0 matters."""
    scaled = "blocks.0.ls_attn.gamma" in state
    return float(settings.get("layerscale_init") or 1e-5) if scaled else 0.0


def _tokens(
    state: Mapping[str, Tensor], part: str, token: Tensor, layers: int
) -> dict[str, Tensor]:
    """Return the weights of one transformer by our names."""
    found = {f"{part}.token_W": token.flatten()}
    if "register_tokens" in state:
        found[f"{part}.registers_RW"] = state["register_tokens"][0]
    names = {"norm1": "norm", "norm2": "norm_mlp", "q_norm": "norm_q", "k_norm": "norm_k",
             "out_proj": "out", "fc1": "mlp.0", "fc2": "mlp.2"}  # fmt: skip
    for n in range(layers):
        theirs, ours = f"blocks.{n}.", f"{part}.blocks.{n}."
        for kind in ("weight", "bias"):
            found[f"{ours}qkv.{kind}"] = torch.cat(
                [state[f"{theirs}{each}_proj.{kind}"] for each in "qkv"]
            )
            for name, own in names.items():
                if f"{theirs}{name}.{kind}" in state:
                    found[f"{ours}{own}.{kind}"] = state[f"{theirs}{name}.{kind}"]
        for name, own in (("ls_attn", "scale_W"), ("ls_mlp", "scale_mlp_W")):
            if f"{theirs}{name}.gamma" in state:
                found[f"{ours}{own}"] = state[f"{theirs}{name}.gamma"]
    return found | {f"{part}.norm.{kind}": state[f"norm.{kind}"] for kind in ("weight", "bias")}
