"""`tapfm export`: writes an encoder, adapted or not, as a timm model that does not need tapfm.

    model.safetensors   timm's state dict, at the size of the tiles it was trained on
    config.json         as timm's hub has it: architecture, arguments, transform
    provenance.json     model, licence, cohort, commit, versions, fingerprint
    README.md           the lines of Python that load it, alone and in TRIDENT, slide2vec and eva

The adapted model is a derivative of the foundation model: its licence goes with it.

Differs: timm's hub files cannot name an MLP's class, so the README's lines give it.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from torch import nn

from slides.files import WriteError, replacing, write_json, write_text
from tapfm import __version__
from tapfm.encoders.backbones import BackboneError, Encoder
from tapfm.slide_model.model import load_encoder
from tapfm.tasks import make_task

FILES = ("model.safetensors", "config.json", "provenance.json", "README.md")
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
README = """# {name}

{title}, exported by tapfm {version}. Licence of the foundation model: {terms}.
Made for tiles of {tile_px} px at {mpp:g} microns per pixel{stain}. Fingerprint `{fingerprint}`.

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


def run_export(model: str, weights: str | None, out: Path) -> int:
    """Write the four files into a folder, replacing those of an earlier export; return 0.

    Raises:
        CheckpointError, BackboneError: no such model, or its weights do not fit.
        WriteError: the folder has files of the same names from another source.
    """
    refuse_others(out)
    encoder, header, fingerprint = load_encoder(model, weights)
    row = encoder.row
    if row.feature == "head":
        raise BackboneError(
            f"{row.key}: its feature comes from a head that timm does not have, so it cannot be "
            f"written as a plain timm model. Use `tapfm features`, or train {row.key}-cls."
        )
    provenance = {
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
        "adapted": header or None,
    }
    state = {name: value.contiguous() for name, value in encoder.vit.state_dict().items()}
    with replacing(out / "model.safetensors") as partial:
        save_file(state, partial, {"format": "pt", "tapfm": json.dumps(provenance)})
    write_json(out / "config.json", timm_config(encoder))
    write_json(out / "provenance.json", provenance)
    write_text(out / "README.md", readme(encoder, provenance, out))
    print(f"{out}: model.safetensors, config.json, provenance.json; README.md says how to load it")
    print(f"{row.key}: {row.terms}, which goes with the weights", file=sys.stderr)
    return 0


def refuse_others(out: Path) -> None:
    """Raise unless the files that would be replaced were exported by tapfm.

    Raises:
        WriteError: they were not.
    """
    there = [name for name in FILES if (out / name).exists()]
    ours = out / "provenance.json"
    if there and not (ours.is_file() and b'"exported_by": "tapfm ' in ours.read_bytes()):
        raise WriteError(
            f"{out}: has {', '.join(there)} from another source, which would be lost. Give another "
            "--out."
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
    """Return the README: how to load the model, in lines that run as they stand."""
    row, given = encoder.row, arguments(encoder)
    side, (mean, std) = encoder.tile_px, row.stats
    classes = {k: v for k, v in given.items() if not isinstance(v, PLAIN)}
    header = provenance["adapted"]
    stain = (header or {}).get("stain")
    predicted = make_task(header["task"], header["labels"]).targets if header else ()
    name = f"{row.key}_{provenance['fingerprint'][:8]}" if header else row.key
    file = f"{folder}/model.safetensors"
    named = {"model_name": row.arch, "checkpoint_path": file, **given}
    eva = EVA_BY_FUNCTION if classes else EVA.format(arguments=json.dumps(named))
    return README.format(
        name=name,
        title=f"{row.key} adapted to {', '.join(predicted)}" if header else row.key,
        version=__version__,
        terms=row.terms,
        tile_px=side,
        mpp=provenance["mpp"],
        stain=f", their stains normalised by {stain}" if stain else "",
        fingerprint=provenance["fingerprint"],
        file=file,
        local=f"local-dir:{folder}",
        call=", ".join([repr(row.arch), *(f"{k}={to_python(v)}" for k, v in given.items())]),
        transform=f"input_size=(3, {side}, {side}), mean={mean}, std={std}, crop_pct=1.0, "
        'interpolation="bicubic"',
        tokens=TOKENS.format(prefix=row.prefix_tokens) if row.feature == "cls+mean" else "",
        precision={"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[row.precision],
        classes="".join(f", {k}={to_python(v)}" for k, v in classes.items()),
        eva=eva.rstrip(),
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
