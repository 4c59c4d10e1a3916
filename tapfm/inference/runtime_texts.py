"""The README of an export that is no timm model, and its pipeline for FastPathology.

A pipeline is FAST's text form, a statement a line: PipelineName, PipelineInputData (the slide that
the program opens), process objects, renderers, a view. It cuts the slide into tiles at the model's
microns per pixel and shows what the model makes of each, as if the slide were that tile alone.

Source: FAST 4, "Text Pipelines" (fast-imaging.github.io); NoCodeSeg (Pettersen et al. 2022,
    arXiv 2111.00525) uses the same files.
Differs: FAST finds tissue by its own threshold, so its tiles are not those of `tapfm index`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = """# {name}

{title}, exported by tapfm {version}. Licence of the foundation model: {terms}.
Made for tiles of {tile_px} px at {mpp:g} microns per pixel{stain}. Fingerprint `{fingerprint}`.
"""
RUNTIME = {
    "onnx": """
ONNX, opset {opset}, fp32; any number of tiles. Differs from the model by {difference:.0e} of the
largest value, by onnxruntime on made tiles.

```python
import numpy, onnxruntime
encoder = onnxruntime.InferenceSession({encoder!r})
features, scores = encoder.run(None, {{"tiles": tiles.astype(numpy.float32)}})
```
""",
    "torchscript": """
TorchScript, fp32; any number of tiles. Differs from the model by {difference:.0e} of the largest
value, on made tiles.

```python
import torch
encoder = torch.jit.load({encoder!r})
with torch.no_grad():
    features, scores = encoder(torch.as_tensor(tiles).float())
```
""",
}
TILES = """
`tiles` are RGB, (T, 3, {tile_px}, {tile_px}), 0 to 255: normalisation is inside. A slide is read
chunk by chunk; features (T, {dim}) and scores (T,) are joined, and then:
"""
SLIDE = {
    "onnx": """
```python
aggregator = onnxruntime.InferenceSession({aggregator!r})
given = {{"features": features, "scores": scores}}
wanted = {{each.name for each in aggregator.get_inputs()}}
predictions, *weights = aggregator.run(None, {{k: v for k, v in given.items() if k in wanted}})
```
""",
    "torchscript": """
```python
aggregator = torch.jit.load({aggregator!r})
with torch.no_grad():
    predictions, *weights = aggregator(features, scores)
```
""",
}
AFTER = """
`predictions` are {predictions}; `weights` are of the tiles, and sum to 1.
"""
FAST = """
FastPathology and NoCodeSeg: put slide.onnx and slide.fpl into one folder and open slide.fpl. It
shows each tile's prediction, and not the slide's; its tissue is FAST's and not tapfm's.
"""
PEFT = """
The adapter alone, as the peft library reads it over the timm model that it was trained on
(`{source}`):

```python
import functools, timm, torch
from peft import PeftModel
base = timm.create_model({call})
model = PeftModel.from_pretrained(base, {folder!r}).eval()
transform = timm.data.create_transform({transform})
```
"""
PIPELINE = """PipelineName "{name}"
PipelineDescription "{title}: {predictions} of single tiles, {mpp:g} microns per pixel"
PipelineInputData WSI "Whole-slide image"
PipelineOutputData heatmap stitcher 0

### Processing chain

ProcessObject tissue TissueSegmentation
Input 0 WSI

ProcessObject tiles PatchGenerator
Attribute patch-size {tile_px} {tile_px}
Attribute patch-magnification {power:g}
Attribute mask-threshold 0.5
Input 0 WSI
Input 1 tissue 0

ProcessObject network NeuralNetwork
Attribute model "$CURRENT_PATH$/slide.onnx"
Attribute inference-engine ONNXRuntime
Attribute scale-factor 1.0
Input 0 tiles 0

ProcessObject stitcher PatchStitcher
Input 0 network 0

### Renderers

Renderer slide ImagePyramidRenderer
Input 0 WSI

Renderer heatmap HeatmapRenderer
Attribute interpolation false
Input 0 stitcher 0

View view slide heatmap
"""


def runtime_readme(
    form: str, out: Path, facts: Mapping[str, Any], names: Sequence[str], dim: int
) -> str:
    """Return the README of an export to a runtime, in lines that run as they stand.

    Args:
        form: `onnx` or `torchscript`.
        out: its folder.
        facts: what `HEAD` and the lines name.
        names: of the files written, without ending.
        dim: feature width.
    """
    end = {"onnx": "onnx", "torchscript": "pt"}[form]
    given = {**facts, "dim": dim, **{name: f"{out}/{name}.{end}" for name in names}}
    text = HEAD + RUNTIME[form] + TILES.replace(", and then:", ".")
    if "aggregator" in names:
        text = HEAD + RUNTIME[form] + TILES + SLIDE[form] + AFTER
    if "slide" in names:
        text += FAST
    return text.format(**given)


def fast_pipeline(facts: Mapping[str, Any]) -> str:
    """Return slide.fpl: FAST's text pipeline that runs slide.onnx on every tile of a slide."""
    quoted = {key: str(facts[key]).replace('"', "'") for key in ("name", "title", "predictions")}
    power = 10 / facts["mpp"]  # FAST takes 20 for 0.5 microns per pixel
    return PIPELINE.format(**{**facts, **quoted, "power": power})
