"""What people do with tapfm in Python, as five functions; `from tapfm import ...` gives them.

    slide = open_slide("slide.svs", mpp=0.5)             its tissue tiles
    found = features("slide.svs", "uni", weights="hub")  what an encoder makes of each
    run = fit("cohort.yaml", {"trainer.max_epochs": 5})  a run's folder
    table = predict(["slide.svs"], run / "best.safetensors")
    encoder = load_encoder(run / "best.safetensors")     the adapted encoder, as a module

They are the verbs of the command line: the same code, settings and errors. Every fault that a user
can mend is a `SettingsError` or a `SlideError` of `slides.errors`.

Shapes: T tiles of a slide, C of a chunk, S pixels a side, D features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from slides.errors import SlideError
from slides.streaming.loose_slides import rows_of_files
from slides.streaming.settings import TileSettings
from slides.streaming.tile_source import TileSource, new_slides
from tapfm.engine.chunked import encode_bag
from tapfm.frozen.features import tiles_of
from tapfm.slide_model.plain_encoder import load_encoder as load_encoder_of

if TYPE_CHECKING:
    import pandas as pd

    from slides.cohort.table import SlideRow
    from slides.tiling.index import TileIndex
    from tapfm.encoders.backbones import Encoder


class TiledSlide:
    """A slide and the tissue tiles that were found on it; made by `open_slide`."""

    def __init__(self, row: SlideRow, index: TileIndex, source: TileSource, keep: ExitStack):
        self._row, self._index, self._source, self._keep = row, index, source, keep

    def __len__(self) -> int:
        """Return T, the number of tiles."""
        return len(self._index)

    @property
    def name(self) -> str:
        """Return the slide's name: its file's, without the ending."""
        return self._row.slide_id

    @property
    def coords0(self) -> np.ndarray:
        """Return the upper left corners, (T, 2) int64 level-0 pixels, x and y."""
        return self._index.coords0

    @property
    def side0(self) -> int:
        """Return the side of a tile in level-0 pixels."""
        return self._index.size0

    @property
    def mpp(self) -> float:
        """Return the microns per level-0 pixel of the slide."""
        return self._index.slide_mpp

    def chunks(self, size: int = 16) -> Iterator[Tensor]:
        """Yield the tiles in order, (C, 3, S, S) uint8, `size` at a time.

        Raises:
            SlideError: a tile cannot be read.
        """
        yield from self._source.tiles(self._row).split(size)

    def tile(self, number: int) -> np.ndarray:
        """Return one tile, (S, S, 3) uint8.

        Raises:
            IndexError: there are fewer tiles.
            SlideError: it cannot be read.
        """
        x0, y0 = self.coords0[number].tolist()
        pixels, _ = self._source(self._row)
        return pixels.read(x0, y0, self._source.grid)


@dataclass(frozen=True)
class Features:
    """What an encoder makes of a slide."""

    features: np.ndarray
    """(T, D) float32."""
    scores: np.ndarray
    """(T,) float32: how much the CLS token looks at the tissue; 0 without a CLS token."""
    coords0: np.ndarray
    """(T, 2) int64 level-0 pixels of each tile's upper left corner."""


def open_slide(
    path: str | Path,
    *,
    tile_px: int = 224,
    mpp: float = 0.5,
    slide_mpp: float | None = None,
    masks: str | Path | None = None,
) -> TiledSlide:
    """Return a slide with its tissue tiles.

    Args:
        path: the slide's file.
        tile_px: side of a tile, pixels.
        mpp: microns per tile pixel.
        slide_mpp: microns per level-0 pixel, if the file does not state them.
        masks: folder of `<slide>.geojson` or `<slide>.png`, to be taken for the tissue.

    Raises:
        SlideError: it cannot be opened, states no resolution, or has no tissue.
    """
    from slides.tiling.tissue import Tissue

    tissue = Tissue(masks=None if masks is None else str(masks))
    return _tiled(path, TileSettings(tile_px, mpp, tissue=tissue), slide_mpp, None)


def features(
    path: str | Path,
    model: str | Path,
    *,
    weights: str | None = None,
    slide_mpp: float | None = None,
    chunk: int = 16,
    device: str | None = None,
) -> Features:
    """Return the features of a slide's tiles, by an encoder as published or adapted.

    Args:
        path: the slide's file.
        model: a model's key, or the best.safetensors of a run.
        weights: of a key: a file, a folder, or `hub`.
        slide_mpp: microns per level-0 pixel, if the file does not state them.
        chunk: tiles on the device at once.
        device: `cpu`, `cuda`; None is CUDA where there is one.

    Raises:
        BackboneError, CheckpointError: no such model, or its weights do not fit.
        SlideError: as `open_slide`.
    """
    encoder, header, _ = load_encoder_of(str(model), weights)
    encoder.to(_device(device))
    slide = _tiled(path, tiles_of(str(model)), slide_mpp, header.get("stain"))
    with torch.no_grad():
        z_TD, score_T, _ = encode_bag(
            encoder.encode, slide.chunks(chunk), seed=0, device=encoder.mean.device
        )
    return Features(z_TD.detach().cpu().numpy(), score_T.detach().cpu().numpy(), slide.coords0)


def fit(
    config: str | Path | Sequence[str | Path], changes: Mapping[str, Any] | None = None
) -> Path:
    """Train as `tapfm fit` does, and return the run's folder; a stopped run is continued.

    Args:
        config: a config, or several, of which later ones win.
        changes: keys by their full name, such as `trainer.max_epochs`, and their values.

    Raises:
        SettingsError: all that is wrong with the settings.
        CohortError: all that is wrong with the table.
    """
    import yaml

    from tapfm.training.fit import read_config, train
    from tapfm.training.stopping import running

    several = [config] if isinstance(config, str | Path) else list(config)
    arguments = [part for each in several for part in ("--config", str(each))]
    for key, value in (changes or {}).items():
        text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)
        arguments += [f"--{key}", text.removesuffix("\n...\n").strip()]
    cli = read_config(arguments)
    with running(cli.folder, writes=cli.trainer.is_global_zero):
        train(cli)
    return cli.folder


def predict(
    slides: Sequence[str | Path],
    model: str | Path,
    *,
    out: str | Path | None = None,
    case: str | None = None,
    slide_mpp: float | None = None,
    chunk: int = 16,
    workers: int = 0,
    device: str | None = None,
) -> pd.DataFrame:
    """Return a row a slide with the model's predictions.

    Args:
        slides: files.
        model: the best.safetensors of a run.
        out: folder for the table and the tile weights; None keeps none.
        case: name of the case that all slides belong to, predicted as one.
        slide_mpp: microns per level-0 pixel of files that do not state them.
        chunk: tiles on the device at once.
        workers: reading processes.
        device: `cpu`, `cuda`; None is CUDA where there is one.

    Raises:
        CheckpointError: no such model, or not one of slides.
        SlideError: none of the slides could be predicted; of some, each reason is printed.
    """
    import pandas as pd

    from tapfm.inference.predict import predict_slides

    rows = rows_of_files([Path(each) for each in slides], slide_mpp)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out or scratch)
        how = {"case": case, "chunk": chunk, "workers": workers, "device": device}
        predict_slides(Path(model), rows, folder, **how)
        if not (folder / "predictions.csv").is_file():
            names = ", ".join(row.slide_id for row in rows)
            raise SlideError(f"{names}: none could be predicted; the reasons are printed above")
        table = pd.read_csv(folder / "predictions.csv", dtype={"slide_id": str, "case_id": str})
    named = {case} if case else {row.slide_id for row in rows}
    return table[table.slide_id.isin(named)].reset_index(drop=True)


def load_encoder(
    model: str | Path, weights: str | None = None, *, tile_px: int | None = None
) -> Encoder:
    """Return an encoder in eval mode on the CPU: uint8 tiles to features and scores.

    Args:
        model: a model's key, or the best.safetensors of a run, whose adapted encoder it is.
        weights: of a key: a file, a folder, or `hub`.
        tile_px: side of the tiles; None is the model's own.

    Raises:
        BackboneError, CheckpointError: no such model, or its weights do not fit.
        StrategyError: the adapter cannot be merged (`tapfm export --format onnx` can write it).
    """
    return load_encoder_of(str(model), weights, tile_px)[0]


def _tiled(
    path: str | Path, tiles: TileSettings, slide_mpp: float | None, stain: str | None
) -> TiledSlide:
    keep = ExitStack()  # the folder of its index lives as long as the slide
    rows = rows_of_files([Path(path)], slide_mpp)
    source, left, failed = keep.enter_context(new_slides(rows, tiles, 0, stain))
    if failed:
        keep.close()
        raise SlideError(next(iter(failed.values())))
    return TiledSlide(left[0], source.index(left[0]), source, keep)


def _device(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")
