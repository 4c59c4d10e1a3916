"""`tapfm export`: writes a model, adapted or not, for programs that do not have tapfm.

    --format timm (the default), the encoder alone:
    model.safetensors   timm's state dict, at the size of the tiles it was trained on
    config.json         as timm's hub has it: architecture, arguments, transform

    --format onnx, torchscript       encoder and aggregator, see `inference.runtimes`
    --format peft                    the adapter of `lora` and `dora`, see `adapt.peft_layout`

    provenance.json     model, licence, cohort, commit, versions, fingerprint
    README.md           the lines of Python that load it; of timm also in TRIDENT, slide2vec and eva

The adapted model is a derivative of the foundation model: its licence goes with it.

Differs: timm's hub files cannot name an MLP's class, so the README's lines give it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.layers import SwiGLUPacked
from torch import nn

from slides.files import WriteError, write_json, write_text
from tapfm import __version__
from tapfm.adapt.peft_layout import CONFIG, WEIGHTS, write_peft
from tapfm.encoders.backbones import BackboneError, Encoder
from tapfm.encoders.checkpoints import PACKAGED
from tapfm.inference import runtimes
from tapfm.inference.runtime_texts import HEAD, PEFT, fast_pipeline, runtime_readme
from tapfm.slide_model import model as models
from tapfm.slide_model.feature_encoder import need_encoder
from tapfm.slide_model.plain_encoder import load_encoder
from tapfm.tasks import make_task
from tapfm.weights import write_weights

BESIDE = ("provenance.json", "README.md")
FILES = {
    "timm": ("model.safetensors", "config.json", *BESIDE),
    "onnx": ("encoder.onnx", "aggregator.onnx", "slide.onnx", "slide.fpl", *BESIDE),
    "torchscript": ("encoder.pt", "aggregator.pt", *BESIDE),
    "peft": (WEIGHTS, CONFIG, *BESIDE),
}
PLAIN = (bool, int, float, str)
PYTHON_NAMES = ((SwiGLUPacked, "timm.layers.SwiGLUPacked"), (nn.SiLU, "torch.nn.SiLU"))
TOKENS = """
Its feature is the CLS token joined with the mean of the patch tokens:

```python
tokens = model.forward_features(tiles)
feature = torch.cat([tokens[:, 0], tokens[:, {prefix}:].mean(1)], 1)
```
"""
EVA = """eva, in a config:

```yaml
backbone:
  class_path: eva.core.models.wrappers.ModelFromFunction
  init_args:
    path: timm.create_model
    arguments: {arguments}
```
"""
EVA_BY_FUNCTION = """eva cannot spell a class in a config: put the first two lines above into a
function of yours that returns the model, and give its name as `path` of
eva.core.models.wrappers.ModelFromFunction.
"""
README = (
    HEAD
    + """
```python
import functools, timm, torch
model = timm.create_model({call}, checkpoint_path={file!r}).eval()
transform = timm.data.create_transform({transform})
```
{tokens}
TRIDENT:

```python
from trident.patch_encoder_models import CustomInferenceEncoder
encoder = CustomInferenceEncoder("{name}", model, transform, torch.{precision})
```

slide2vec, and anything that takes a timm name (timm 1.0.20 or newer):

```python
model = timm.create_model({local!r}, pretrained=True{classes})
```

{eva}
"""
)


def run_export(model: str, weights: str | None, out: Path, form: str = "timm") -> int:
    """Write a model's files into a folder, replacing those of an earlier export; return 0.

    Args:
        model: key of a foundation model, or the file of a saved model.
        weights: of a foundation model, as in `backbones.load`.
        out: the folder.
        form: one of `FILES`.

    Raises:
        CheckpointError, BackboneError: no such model, or its weights do not fit.
        StrategyError: its strategy cannot be written in this form.
        SettingsError: the form needs a package that is not installed.
        WriteError: the folder has files of the same names from another source.
    """
    refuse_others(out, form)
    write = {"timm": _write_timm, "peft": _write_peft}.get(form)
    if write is not None:
        encoder, provenance = write(model, weights, out)
    else:
        encoder, provenance = _write_runtime(model, weights, out, form)
    write_json(out / "provenance.json", provenance)
    there = [name for name in FILES[form] if (out / name).exists()]
    print(f"{out}: {', '.join(there[:-1])}; README.md says how to load it")
    print(f"{encoder.row.key}: {encoder.row.terms}, which goes with the weights", file=sys.stderr)
    return 0


def _write_timm(model: str, weights: str | None, out: Path) -> tuple[Encoder, dict[str, Any]]:
    """Write the encoder as timm weights; return it, and what is known of it."""
    encoder, header, fingerprint = load_encoder(model, weights)
    row = encoder.row
    if row.feature == "head":
        raise BackboneError(
            f"{row.key}: its feature comes from a head that timm does not have, so it cannot be "
            "written as a plain timm model. Use --format onnx, `tapfm features`, or train "
            f"{row.key}-cls."
        )
    provenance = provenance_of(encoder, header, fingerprint, "timm")
    weights_file = out / "model.safetensors"
    write_weights(weights_file, encoder.vit.state_dict(), "tapfm", provenance, format="pt")
    write_json(out / "config.json", timm_config(encoder))
    write_text(out / "README.md", readme(encoder, provenance, out))
    return encoder, provenance


def _write_peft(model: str, weights: str | None, out: Path) -> tuple[Encoder, dict[str, Any]]:
    """Write the adapter as the peft library reads it; return its encoder, and what is known."""
    whole, header = _load(model, weights, "peft")
    encoder, row, weights = whole.encoder, whole.encoder.row, whole.model_config.weights
    if weights == "random":
        raise models.CheckpointError(
            f"{model}: its base encoder was random and is in this file alone, so an adapter would "
            "fit no other. Use --format timm."
        )
    write_peft(encoder.vit, whole.strategy, out)
    provenance = provenance_of(encoder, header, models.adapted_fingerprint(whole), "peft")
    facts = _facts(encoder, provenance)
    given = "".join(f", {k}={to_python(v)}" for k, v in arguments(encoder).items())
    if weights == "hub" or (weights or "").startswith("hf-hub:"):
        source = row.source if weights == "hub" else weights
        first = f"{source!r}, pretrained=True"
    else:
        source = weights or PACKAGED / row.file
        file = f"dict(file={str(source)!r}, custom_load=False, num_classes=0)"
        first = f"{row.arch!r}, pretrained=True, pretrained_cfg_overlay={file}"
    text = HEAD + PEFT
    facts |= {"source": str(source), "folder": str(out), "call": first + given}
    write_text(out / "README.md", text.format(**facts, transform=_transform(encoder)))
    return encoder, provenance


def _write_runtime(
    model: str, weights: str | None, out: Path, form: str
) -> tuple[Encoder, dict[str, Any]]:
    """Write encoder and aggregator as graphs; return the encoder, and what is known of it."""
    if model.endswith(".safetensors"):
        whole, header = _load(model, weights, form)
        encoder, fingerprint = whole.encoder, models.adapted_fingerprint(whole)
    else:
        whole, (encoder, header, fingerprint) = None, load_encoder(model, weights)
    graphs = runtimes.parts(encoder, whole, whole=form == "onnx")
    write = {"onnx": runtimes.export_onnx, "torchscript": runtimes.export_torchscript}[form]
    for name in FILES[form]:  # none of an earlier export stays beside the new ones
        (out / name).unlink(missing_ok=True)
    worst = write(graphs, encoder.tile_px, out)
    provenance = provenance_of(encoder, header, fingerprint, form)
    provenance |= {"precision": "fp32", "max_difference": worst}
    provenance |= {"opset": runtimes.OPSET} if form == "onnx" else {}
    predictions = ", ".join(whole.task.predictions) if whole else ""
    facts = {**_facts(encoder, provenance), "difference": worst, "opset": runtimes.OPSET}
    facts |= {"predictions": predictions}
    write_text(out / "README.md", runtime_readme(form, out, facts, [*graphs], encoder.dim))
    if "slide" in graphs:
        write_text(out / "slide.fpl", fast_pipeline(facts))
    return encoder, provenance


def _load(model: str, weights: str | None, form: str) -> tuple[models.SlideModel, dict[str, Any]]:
    """Return a saved model in float32, its adapters in place, and its header.

    Raises:
        CheckpointError: it is no saved model, or was asked for with other weights.
    """
    if not model.endswith(".safetensors"):
        raise models.CheckpointError(
            f"export --format {form}: {model} has no adapter to write. Give the best.safetensors "
            "of a run with strategy lora or dora."
        )
    if weights is not None:
        raise models.CheckpointError(f"{model}: has its own weights; leave --weights out")
    config, facts = models.read_model_config(Path(model))
    need_encoder(Path(model), config.features)
    whole = models.load(Path(model)).float()
    return whole, {**asdict(config), **facts}


def provenance_of(
    encoder: Encoder, header: Mapping[str, Any], fingerprint: str | None, form: str
) -> dict[str, Any]:
    """Return what provenance.json says of a model."""
    row = encoder.row
    return {
        "format": form,
        "model": row.key,
        "source": row.source,
        "licence": row.licence,
        "gated": row.gated,
        "feature": row.feature,
        "tile_px": encoder.tile_px,
        "mpp": header.get("mpp", row.mpp),
        "mean": row.stats[0],
        "std": row.stats[1],
        "precision": header.get("precision", row.precision),
        "fingerprint": fingerprint,
        "exported_by": f"tapfm {__version__}",
        "adapted": dict(header) or None,
    }


def refuse_others(out: Path, form: str) -> None:
    """Raise unless the files that would be replaced were exported by tapfm, in the same form.

    Raises:
        WriteError: they were not.
    """
    there = [name for name in FILES[form] if (out / name).exists()]
    ours = out / "provenance.json"
    known = ours.read_bytes() if ours.is_file() else b""
    if there and b'"exported_by": "tapfm ' not in known:
        raise WriteError(
            f"{out}: has {', '.join(there)} from another source, which would be lost. Give another "
            "--out."
        )
    if there and (earlier := json.loads(known).get("format", "timm")) != form:
        raise WriteError(
            f"{out}: has an export of --format {earlier}, whose README.md would be lost. Give "
            "another --out."
        )


def arguments(encoder: Encoder) -> dict[str, Any]:
    """Return what timm needs beside the architecture's name to build this model."""
    return {"num_classes": 0, "img_size": encoder.tile_px, **encoder.row.kwargs}


def timm_config(encoder: Encoder) -> dict[str, Any]:
    """Return the model as timm's hub files describe one, without arguments that are classes."""
    row, side = encoder.row, encoder.tile_px
    mean, std = row.stats
    given = arguments(encoder)
    return {
        "architecture": row.arch,
        "num_classes": 0,
        "num_features": row.width,
        "model_args": {k: v for k, v in given.items() if isinstance(v, PLAIN)},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": mean,
            "std": std,
            "num_classes": 0,
            "license": row.licence,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def readme(encoder: Encoder, provenance: dict[str, Any], folder: Path) -> str:
    """Return the README of timm weights: how to load them, in lines that run as they stand."""
    row, given = encoder.row, arguments(encoder)
    classes = {k: v for k, v in given.items() if not isinstance(v, PLAIN)}
    file = f"{folder}/model.safetensors"
    named = {"model_name": row.arch, "checkpoint_path": file, **given}
    eva = EVA_BY_FUNCTION if classes else EVA.format(arguments=json.dumps(named))
    return README.format(
        **_facts(encoder, provenance),
        file=file,
        local=f"local-dir:{folder}",
        call=", ".join([repr(row.arch), *(f"{k}={to_python(v)}" for k, v in given.items())]),
        transform=_transform(encoder),
        tokens=TOKENS.format(prefix=row.prefix_tokens) if row.feature == "cls+mean" else "",
        precision={"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[row.precision],
        classes="".join(f", {k}={to_python(v)}" for k, v in classes.items()),
        eva=eva.rstrip(),
    )


def _facts(encoder: Encoder, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return what every README opens with."""
    row, header = encoder.row, provenance["adapted"]
    stain = (header or {}).get("stain")
    predicted = make_task(header["task"], header["labels"]).targets if header else ()
    fingerprint = provenance["fingerprint"] or "none: its adapter cannot be merged"
    return {
        "name": f"{row.key}_{fingerprint[:8].strip(':')}" if header else row.key,
        "title": f"{row.key} adapted to {', '.join(predicted)}" if header else row.key,
        "version": __version__,
        "terms": row.terms,
        "tile_px": encoder.tile_px,
        "mpp": provenance["mpp"],
        "stain": f", their stains normalised by {stain}" if stain else "",
        "fingerprint": fingerprint,
    }


def _transform(encoder: Encoder) -> str:
    """Return the arguments of timm's transform, as Python code."""
    side, (mean, std) = encoder.tile_px, encoder.row.stats
    return (
        f"input_size=(3, {side}, {side}), mean={mean}, std={std}, crop_pct=1.0, "
        'interpolation="bicubic"'
    )


def to_python(value: Any) -> str:
    """Return a timm argument as Python code, given `import functools, timm, torch`."""
    for known, name in PYTHON_NAMES:
        if value is known:
            return name
    if isinstance(value, functools.partial):
        given = "".join(f", {k}={to_python(v)}" for k, v in value.keywords.items())
        return f"functools.partial({to_python(value.func)}{given})"
    if isinstance(value, type) and value.__module__.startswith("torch.nn"):
        return f"torch.nn.{value.__name__}"
    if isinstance(value, PLAIN):
        return repr(value)
    raise TypeError(f"{value!r} has no Python name yet: add it to PYTHON_NAMES")
