"""`tapfm features`: what an encoder makes of every tile, plain or adapted, as TRIDENT lays it out.

    <job>/<M>x_<P>px_<O>px_overlap/patches/<slide>_patches.h5          the tiles (`tapfm index`)
    <job>/<M>x_<P>px_<O>px_overlap/features_<encoder>/<slide>.h5       `features` (T, D), `coords`,
                                                                       `scores` (T,)

so that TRIDENT and Patho-Bench read them as their own; CLAM and STAMP have layouts of their own
(other_formats.py). `coords` carries the index's attributes, `features` the encoder's fingerprint,
licence and precision; `scores` are raw CLS scores, for aggregators that use them
(`data.features_dir`). A file is whole or not there; run again, what is there and of the same tiles,
weights and precision is kept. The frozen baselines of `tapfm test` keep features and RGB numbers
the same way: this is the one writer.

Price: one forward pass a tile; in memory, the pixels of a few chunks and the features of one slide.

Source: TRIDENT 0.3 for names of folders, datasets and attributes.
Differs: chunks of 1,024 rows instead of one, nine times quicker to write; half precision if asked.

Shapes: T tiles of a slide, D features.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from slides.cohort.table import SlideRow
from slides.errors import SlideError
from slides.hdf5 import open_h5, writing_h5
from slides.progress import progress_bar
from slides.streaming.settings import Source, TileSettings, index_and_cache
from slides.streaming.stain import refuse_other_stains
from slides.streaming.tile_source import TileSource
from slides.tiling.index_file import TileIndex, index_attributes
from slides.tiling.tissue import Tissue
from tapfm import __version__
from tapfm.data.bag import Tiles
from tapfm.encoders.backbones import Encoder, find
from tapfm.engine.chunked import encode_bag
from tapfm.frozen.other_formats import write_formats
from tapfm.slide_model.model import SlideModel, adapted_fingerprint, read_model_config
from tapfm.slide_model.plain_encoder import load_encoder

ROWS = 1024  # of a chunk on disk: 2 to 6 MB, one read for a bag of usual size
DTYPES = {"fp32": np.float32, "fp16": np.float16}


class FeatureError(ValueError):
    """Features cannot be extracted or kept as asked."""


@dataclass(frozen=True)
class Extraction:
    """An encoder, how it is run, and under which name its features are kept."""

    encoder: Encoder
    """In eval mode, on its device; or `baselines.RgbStatistics`."""
    name: str
    """Of the encoder, in `features_<name>`."""
    fingerprint: str
    """Of the encoder, see `encoders.fingerprint`."""
    precision: str = "fp32"
    """What it computes in: `fp32`, `fp16` or `bf16`."""
    dtype: str = "fp32"
    """What is stored: `fp32` or `fp16`."""
    chunk: int = 16
    """Tiles at once; it changes the memory and nothing else."""
    stain: str | None = None
    """How the tiles it is given were normalised."""

    @property
    def has_scores(self) -> bool:
        """Whether the encoder gives CLS scores."""
        return getattr(self.encoder, "tap", None) is not None

    def fault(self, path: Path, index: TileIndex, *, scores: bool = True) -> str | None:
        """Return why a file is not the features of these tiles by this encoder; None if it is.

        Args:
            path: of the file.
            index: of the slide.
            scores: whether it must have CLS scores where the encoder gives them.

        Raises:
            FeatureError: the file's features are another encoder's, or another program's.
        """
        if not path.exists():
            return "not there"
        try:
            with open_h5(path) as file:
                attrs, features = file["features"].attrs, file["features"]
                if "fingerprint" not in attrs:
                    raise FeatureError(
                        f"{index.slide_id}: {path} was not written by tapfm, and its features "
                        "would be lost. Give another --name or --out."
                    )
                weights, made = str(attrs["fingerprint"]), str(attrs["precision"])
                whole = features.shape == (len(index), self.encoder.dim)
                same_tiles = whole and np.array_equal(file["coords"][:], index.coords0)
                stain = str(attrs.get("stain", "")) or None
                size0, dtype = file["coords"].attrs["patch_size_level0"], features.dtype
                scored = "scores" in file and file["scores"].shape == features.shape[:1]
        except (OSError, KeyError) as error:
            return f"damaged: {error}"
        if weights != self.fingerprint:
            raise FeatureError(
                f"{index.slide_id}: {path} has features of other weights (fingerprint {weights}, "
                f"now {self.fingerprint}). Give another --name, or delete {path.parent}."
            )
        if not same_tiles or size0 != index.size0:
            return "of other tiles"
        if stain != self.stain:
            return f"of tiles whose stain was normalised by {stain or 'nothing'}"
        if (made, dtype) != (self.precision, DTYPES[self.dtype]):
            return "in other numbers"
        return "without scores" if scores and self.has_scores and not scored else None

    def write(self, path: Path, tiles: Tiles, index: TileIndex, tissue: Tissue) -> None:
        """Encode a slide and write its file.

        Raises:
            FeatureError: a feature is not finite in the numbers asked for.
            WriteError: the disk is full.
            SlideError: the slide cannot be read.
        """
        device = self.encoder.mean.device

        def encode(tiles_CP: Tensor) -> tuple[Tensor, Tensor]:
            return self.encoder.encode(tiles_CP, self.precision)

        if hasattr(self.encoder, "sized"):
            encode = self.encoder.sized(encode, self.chunk)
        z_TD, score_T, _ = encode_bag(encode, tiles.split(self.chunk), seed=0, device=device)
        with np.errstate(over="ignore"):  # said below, with the way out
            stored_TD = z_TD.detach().cpu().numpy().astype(DTYPES[self.dtype])
        if not np.isfinite(stored_TD).all():
            raise FeatureError(
                f"{index.slide_id}: features of {self.name} computed in {self.precision} are not "
                f"finite in {self.dtype}. Use --precision fp32 --dtype fp32."
            )
        with writing_h5(path) as file:
            rows = min(ROWS, len(stored_TD))
            chunks = rows, stored_TD.shape[1]
            features = file.create_dataset("features", data=stored_TD, chunks=chunks)
            features.attrs.update(self.facts(path, index))
            if self.has_scores:
                file["scores"] = score_T.detach().float().cpu().numpy()
            coords = file.create_dataset("coords", data=index.coords0, chunks=(rows, 2))
            coords.attrs.update(index_attributes(index, tissue, path.parent.parent))

    def facts(self, path: Path, index: TileIndex) -> dict[str, str]:
        """Attributes of `features`: TRIDENT's three, then ours."""
        row = self.encoder.row
        return {
            "encoder": self.name,
            "name": index.slide_id,
            "savetodir": str(path.parent),
            "fingerprint": self.fingerprint,
            "model": row.key,
            "feature": row.feature,
            "licence": row.licence,
            "precision": self.precision,
            "stain": self.stain or "",
            "writer": f"tapfm {__version__}",
        }


def frozen_extraction(model: SlideModel, chunk: int, stain: str | None) -> Extraction:
    """Return how an untrained model's encoder is run, and its name in `tapfm test`."""
    mark = adapted_fingerprint(model)  # untrained, so that of the model as published
    precision = model.model_config.precision
    name = f"{model.encoder.row.key}_{mark[:8]}" + f"_{precision}" * (precision != "fp32")
    return Extraction(model.encoder, name, mark, precision, chunk=chunk, stain=stain)


def extract(
    extraction: Extraction, rows: Sequence[SlideRow], source: Source, folder: Path
) -> tuple[int, int, dict[str, str]]:
    """Write what is not in a folder yet, slide after slide, the next one's tiles read ahead.

    Args:
        extraction: of what, and how.
        rows: indexed slides.
        source: how they are read, and whether a fault of one stops the others.
        folder: of `<slide_id>.h5`.

    Returns:
        How many slides were there already, the tiles encoded, and the slides left out, each with
        its reason.

    Raises:
        FeatureError: features of other weights, or of another program, are there.
        WriteError: the disk is full.
        SlideError: with `on_error: stop`, the first slide's fault.
    """
    tile_source, wanted, failed, tiles = TileSource.of(source), [], {}, 0
    for row in rows:
        with _left_out(row, source, failed):
            why = extraction.fault(folder / f"{row.slide_id}.h5", tile_source.index(row))
            if why not in (None, "not there"):
                print(f"{row.slide_id}: the features there are {why}: made anew")
            wanted += [row] * (why is not None)
    kept = len(rows) - len(wanted) - len(failed)
    streamed = tile_source.streamed(wanted, source.workers)
    for row, each in progress_bar(streamed, folder.name, len(wanted), unit="slide"):
        with _left_out(row, source, failed):
            path, tissue = folder / f"{row.slide_id}.h5", source.tiles.tissue
            extraction.write(path, each, tile_source.index(row), tissue)
            tiles += each.count
    return kept, tiles, failed


@contextmanager
def _left_out(row: SlideRow, source: Source, failed: dict[str, str]) -> Iterator[None]:
    """Note a slide's fault in `failed`, or raise it."""
    try:
        yield
    except SlideError as fault:
        if source.on_error != "skip":
            raise
        failed[row.slide_id] = str(fault)


def read_features(path: Path) -> torch.Tensor:
    """Return a file's features (T, D), fp32."""
    with open_h5(path) as file:
        return torch.from_numpy(file["features"][:].astype(np.float32))


def tiles_of(model: str) -> TileSettings:
    """Return the tile settings of a model.

    Raises:
        BackboneError, CheckpointError: no such model.
    """
    if not model.endswith(".safetensors"):
        row = find(model)
        return TileSettings(row.tile_px, row.mpp)
    model_config, facts = read_model_config(Path(model))
    tissue = Tissue(
        **{**facts.get("tissue", {}), "masks": None, "coords": None}
    )  # as in training, but its slides
    return TileSettings(model_config.tile_px, model_config.mpp, tissue=tissue)


def run_features(
    source: Source,
    model: str,
    weights: str | None = None,
    *,
    out: Path | None = None,
    name: str | None = None,
    dtype: str = "fp32",
    precision: str | None = None,
    chunk: int = 16,
    device: str | None = None,
    formats: Sequence[str] = (),
) -> int:
    """`tapfm features`: index and extract what is not there yet; return 0, or 2 if a slide failed.

    Args:
        source: slides and tiles.
        model: key of a foundation model, or best.safetensors of a run.
        weights: of a foundation model, as in model.weights.
        out: the job folder; None is where the index is.
        name: of the encoder in `features_<name>`; None is its key, and for an adapted one its key
            and the start of its fingerprint.
        dtype: what is stored, `fp32` or `fp16`.
        precision: what is computed in; None is the publisher's on a GPU and fp32 on a CPU.
        chunk: tiles on the device at once.
        device: where to; None is CUDA where there is one.
        formats: layouts of other programs, to write too (`tapfm.frozen.other_formats`).

    Raises:
        BackboneError, CheckpointError: no such model, or its weights do not fit.
        FeatureError: features of other weights, or of another program, are there under that name.
        SlideError: with `on_error: stop`, the first slide's fault.
    """
    encoder, header, fingerprint = load_encoder(model, weights, source.tiles.tile_px)
    row, mpp = encoder.row, header.get("mpp") or encoder.row.mpp
    if source.tiles.mpp != mpp:
        print(f"tiles at {source.tiles.mpp:g} microns per pixel; the model is for {mpp:g}")
    name = name or (f"{row.key}_{fingerprint[:8]}" if header else row.key)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision or (row.precision if device.startswith("cuda") else "fp32")
    stain = header.get("stain") if header else source.stain  # an adapted model's, as in training
    if stain:
        refuse_other_stains(source.rows, f"stain normalisation by {stain}")
    extraction = Extraction(encoder.to(device), name, fingerprint, precision, dtype, chunk, stain)
    _, failed = index_and_cache(source)
    folder = (out or source.index_dir) / source.tiles.grid.tag / f"features_{name}"
    rows = [each for each in source.rows if each.slide_id not in failed]
    kept, tiles, lost = extract(extraction, rows, replace(source, stain=stain), folder)
    failed |= lost
    write_formats(formats, folder, [each for each in rows if each.slide_id not in failed], source)
    for reason in failed.values():
        print(f"tapfm: {reason}", file=sys.stderr)
    print(
        f"{folder}: {len(source.rows) - len(failed)} slides, {encoder.dim} numbers a tile in "
        f"{dtype}; {tiles} tiles encoded in {precision}, {kept} slides were there already; "
        f"fingerprint {fingerprint}"
    )
    return 2 if failed else 0
