"""`tapfm export --format onnx | torchscript`: a model for programs without tapfm and timm.

    encoder.onnx       tiles (T, 3, S, S), float32 of 0 to 255, RGB -> features (T, D), scores (T,)
    aggregator.onnx    features, scores -> predictions (P,), weights (T,)
    slide.onnx         tiles -> predictions (1, P): both, for slides that fit in memory at once
    slide.fpl          a pipeline of FastPathology and NoCodeSeg (`inference.fast_pipeline`)

TorchScript has the first two, as encoder.pt and aggregator.pt. Any number of tiles is taken; the
publisher's normalisation and what a strategy added are inside. A plain foundation model has an
encoder only. Every file is run on made tiles before the export counts: what it gives may differ
from the model's by `TOLERANCE` of the largest value, or 1.

Price: fp32, so 4.5 GB for a ViT-g, twice with slide.onnx; one forward pass to trace.
Condition: `pip install tapfm[onnx]` for ONNX. An aggregator that looks at coordinates is not
    exported: its lattice depends on the data. Of a case's slides each is a bag of its own.

Shapes: T tiles, S pixels a side, D features, P predicted numbers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from slides.files import replacing
from tapfm.encoders.backbones import BackboneError, Encoder
from tapfm.settings import SettingsError
from tapfm.slide_model.aggregators import TILES, name_of
from tapfm.slide_model.aggregators.contract import OneSlide
from tapfm.slide_model.model import SlideModel

OPSET = 18
TOLERANCE = 1e-4
COUNTS = (1, 2, 7)  # tiles of the checks: none is the number that is traced
TRACED = 3
OUTSIDE = (
    1_500_000_000  # bytes of weights from which an ONNX file keeps them beside it (2 GB limit)
)
Run = Callable[..., Sequence[np.ndarray]]


class Encode(nn.Module):
    """The encoder: `features` and `scores` of `tiles`."""

    takes, gives = ("tiles",), ("features", "scores")

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (T, D) and scores (T,)."""
        return self.encoder(tiles)


class Aggregate(nn.Module):
    """The aggregator and its task: `predictions` and `weights` of one slide's features."""

    takes, gives = ("features", "scores"), ("predictions", "weights")

    def __init__(self, model: SlideModel):
        super().__init__()
        self.aggregator, self.task = model.aggregator, model.task

    def forward(self, features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions (P,) and weights (T,)."""
        output = self.aggregator(OneSlide.of_features(features, scores))
        return self.task.predict(output.logits_K), output.weights_T


class NameTiles(nn.Module):
    """The head of a model of labelled tiles: `predictions` of each tile."""

    takes, gives = ("features", "scores"), ("predictions",)

    def __init__(self, model: SlideModel):
        super().__init__()
        self.head, self.task = model.aggregator, model.task

    def forward(self, features: Tensor, scores: Tensor) -> tuple[Tensor]:
        """Return predictions (T, P)."""
        return (self.task.predict(self.head(features)),)


class Whole(nn.Module):
    """Encoder and aggregator: `predictions` of `tiles`, all of a slide or a single one."""

    takes, gives = ("tiles",), ("predictions",)

    def __init__(self, encode: Encode, aggregate: nn.Module):
        super().__init__()
        self.encode, self.aggregate = encode, aggregate

    def forward(self, tiles: Tensor) -> tuple[Tensor]:
        """Return predictions (1, P); of labelled tiles (T, P)."""
        predictions = self.aggregate(*self.encode(tiles))[0]
        return (predictions if predictions.ndim == 2 else predictions[None],)


def parts(encoder: Encoder, model: SlideModel | None, *, whole: bool) -> dict[str, nn.Module]:
    """Return what can be exported, by file name; say on stderr what cannot, and why.

    Args:
        encoder: of the model, or alone.
        model: the model of slides; None for a plain foundation model.
        whole: whether a graph of both is wanted too.
    """
    found: dict[str, nn.Module] = {"encoder": Encode(encoder)}
    if model is None:
        return found
    name = name_of(model.model_config.aggregator)
    if model.aggregator.uses_coords:
        print(
            f"aggregator {name}: looks at where tiles lie, which a fixed graph cannot, so the "
            "encoder alone is exported; `tapfm predict` runs the aggregator",
            file=sys.stderr,
        )
        return found
    found["aggregator"] = NameTiles(model) if name == TILES else Aggregate(model)
    if whole:
        found["slide"] = Whole(found["encoder"], found["aggregator"])
    return found


def export_onnx(modules: Mapping[str, nn.Module], side: int, out: Path) -> float:
    """Write and check `<name>.onnx` of each module; return the largest relative difference.

    Raises:
        SettingsError: a package that it needs is not installed.
        BackboneError: a file does not give what the model gives.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise SettingsError(
            f"export --format onnx: {error.name} is not installed. Run: pip install 'tapfm[onnx]'"
        ) from error
    worst = 0.0
    for name, module in modules.items():
        path = out / f"{name}.onnx"
        _write_onnx(module, _example(module, modules, TRACED, side), path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(*inputs, session=session, takes=module.takes):
            return session.run(None, dict(zip(takes, inputs, strict=True)))

        worst = max(worst, check(path, run, module, modules, side))
    return worst


def export_torchscript(modules: Mapping[str, nn.Module], side: int, out: Path) -> float:
    """Write and check `<name>.pt` of each module; return the largest relative difference.

    Raises:
        BackboneError: a file does not give what the model gives.
    """
    worst = 0.0
    for name, module in modules.items():
        path, example = out / f"{name}.pt", _example(module, modules, TRACED, side)
        with torch.no_grad(), _silent(), replacing(path) as partial:
            torch.jit.trace(module.eval(), example, check_trace=False).save(partial)
        with _silent():
            loaded = torch.jit.load(path)

        def run(*inputs, loaded=loaded):
            with torch.no_grad():
                return [each.numpy() for each in loaded(*map(torch.from_numpy, inputs))]

        worst = max(worst, check(path, run, module, modules, side))
    return worst


def check(
    path: Path, run: Run, module: nn.Module, modules: Mapping[str, nn.Module], side: int
) -> float:
    """Return the largest relative difference of a file from its module, for all `COUNTS`.

    Raises:
        BackboneError: it is above `TOLERANCE`; the file is deleted.
    """
    worst = 0.0
    for count in COUNTS:
        inputs = _example(module, modules, count, side)
        with torch.no_grad():
            expected = [each.numpy() for each in module(*inputs)]
        try:
            found = run(*(each.numpy() for each in inputs))
        except Exception as error:  # each runtime has its own: another number of tiles, most often
            path.unlink()
            raise BackboneError(
                f"{path}: does not run on {count} tiles: {str(error).strip().splitlines()[0]} "
                "Export another --format, and report the model."
            ) from error
        worst = max(worst, *map(difference, found, expected))
    if worst > TOLERANCE:
        path.unlink()
        raise BackboneError(
            f"{path}: gives other numbers than the model, by {worst:.1e} of the largest; "
            f"{TOLERANCE:.0e} is allowed. Export another --format, and report the model."
        )
    return worst


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference relative to the largest value, or 1; inf if unlike."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def _example(
    module: nn.Module, modules: Mapping[str, nn.Module], count: int, side: int
) -> tuple[Tensor, ...]:
    """Return inputs of so many made tiles: flat colours with grain, so that no two are alike."""
    draw = torch.Generator().manual_seed(count)
    colour = torch.rand(count, 3, 1, 1, generator=draw) * 160 + 60
    grain = torch.randn(count, 3, side, side, generator=draw) * 25
    tiles = (colour + grain).clamp(0, 255).round()
    if module.takes == ("tiles",):
        return (tiles,)
    with torch.no_grad():
        return modules["encoder"](tiles)


def _write_onnx(module: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    """Write a module as ONNX, its first dimension free; weights beside it if they are large."""
    size = sum(each.numel() * each.element_size() for each in module.state_dict().values())
    free = torch.export.Dim("tiles_in_slide", min=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), _silent():
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=list(module.takes),
            output_names=list(module.gives),
            dynamic_shapes=tuple({0: free} for _ in example),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if size > OUTSIDE:  # under its own name: the file names the one beside it
        program.save(path, external_data=True)
        return
    with replacing(path) as partial:
        program.save(partial, external_data=False)


@contextmanager
def _silent():
    """Keep warnings and the exporter's own log off the terminal: the check is what counts."""
    import logging

    log = logging.getLogger("onnxscript"), logging.getLogger("torch.onnx")
    levels = [each.level for each in log]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in log:
            each.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for each, level in zip(log, levels, strict=True):
                each.setLevel(level)
