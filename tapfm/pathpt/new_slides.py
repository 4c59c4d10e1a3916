"""A saved PathPT model on slides outside a cohort: `tapfm predict` and `tapfm heatmap`.

    <out>/predictions.csv         slide_id, case_id, called, p_<subtype> each, normal, model; rows
                                  of other slides are kept
    <out>/<slide>_tiles.h5        probabilities (N, K) of the classes in its attributes, coords
    <out>/<slide>.png, .geojson   with `draw`: the predicted subtype; all classes, for QuPath

A subtype's probability is its share of the deciding votes (`tapfm.pathpt.vote`), and `normal` the
share of tiles without a vote in the first count. Class vectors are saved, so no text tower is
loaded; the image tower is loaded from its own source and checked to be the same.

Price: one forward pass a tile; in memory a few chunks of pixels and the vectors of one slide.

Shapes: N tiles, C subtypes, K = C + 1 classes of a tile, d joint width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from slides.cohort.table import SlideRow
from slides.errors import SlideError
from slides.files import file_fingerprint, join_csv, rows_there
from slides.hdf5 import writing_h5
from slides.progress import progress_bar
from slides.streaming.settings import TileSettings
from slides.streaming.tile_source import new_slides, tiles_as_trained
from slides.tiling.index import TileIndex
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tapfm.adapt.strategies import make_strategy
from tapfm.encoders.backbones import BackboneError
from tapfm.pathpt.findings import draw_classes
from tapfm.pathpt.model import PathPT, PathPTConfig, load_pathpt
from tapfm.pathpt.spatial import places
from tapfm.pathpt.text.towers import TextError
from tapfm.pathpt.tiles import Towers, encode_slide, load_towers
from tapfm.pathpt.vote import ballot
from tapfm.slide_model.model import CheckpointError


def name_slides(
    path: Path,
    rows: Sequence[SlideRow],
    out: Path,
    *,
    case: str | None = None,
    mpp: float | None = None,
    masks: str | None = None,
    chunk: int = 16,
    workers: int = 2,
    device: str | None = None,
    draw: bool = False,
) -> int:
    """Name slides and their tiles; a bad slide is reported and the others go on.

    Arguments as in `tapfm.inference.predict.predict_slides`, with a pathpt.safetensors as `path`.
    The slides of a `case` are named as one: all their tiles vote, and a slide that cannot be read
    leaves the case without prediction. Returns 0, or 2 if any slide failed.

    Raises:
        CheckpointError: the file is damaged, or the image tower is unavailable or another.
        WriteError: `predictions.csv` exists with other columns.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, classes_Kd, model_config, towers = load_whole(path, device)
    trained = TileSettings(
        **{**model_config.tiles, "tissue": Tissue(**model_config.tiles["tissue"])}
    )
    tiles, names, votes = tiles_as_trained(trained, mpp, masks), model_config.classes, []
    table = out / "predictions.csv"
    rows_there(table, vote_columns(names))  # refused now, not after all slides
    with new_slides(rows, tiles, workers, model_config.stain) as (tile_source, left, failed):
        left = [] if case and failed else left
        read = tile_source.streamed(left, workers)
        for row, each in progress_bar(read, None, len(left), unit="slide"):
            try:
                z_Nd, index = encode_slide(towers, each, chunk), tile_source.index(row)
                spots_N2 = places(index.coords0, index.grid.step0(index.slide_mpp)).to(device)
                with torch.no_grad():
                    logits_NK = model(z_Nd, spots_N2, classes_Kd).cpu()
                p_NK = logits_NK.softmax(1).numpy()
                write_tiles(out / f"{row.slide_id}_tiles.h5", names, p_NK, index)
                if draw:
                    with Slide(row.path, mpp=row.mpp, name=row.slide_id) as slide:
                        draw_classes(out, slide, index, names, p_NK, ballot(logits_NK)[0])
            except SlideError as fault:
                tqdm.write(f"tapfm: {fault}", file=sys.stderr)
                failed[row.slide_id] = str(fault)
                continue
            votes.append((row.slide_id, row.case_id, logits_NK))
    if case and failed:
        print(f"tapfm: {case}: one of its slides failed, so it is not predicted", file=sys.stderr)
        votes = []
    elif case:
        votes = [(case, case, torch.cat([logits_NK for *_, logits_NK in votes]))]
    if votes:
        write_votes(table, names, votes, file_fingerprint(path))
    return 2 if failed else 0


def write_votes(
    path: Path, names: Sequence[str], votes: Sequence[tuple[str, str, torch.Tensor]], model: str
) -> None:
    """Write and print a row a slide, from slide id, case id and its tiles' logits (N, K)."""
    rows = []
    for slide_id, case_id, logits_NK in votes:
        called, share_C = ballot(logits_NK)
        normal = (logits_NK.argmax(1) == 0).float().mean()
        shares = [f"{share:.6f}" for share in (*share_C, normal)]
        rows.append([slide_id, case_id, names[called + 1], *shares, model])
        print(f"{slide_id}: {len(logits_NK)} tiles; {names[called + 1]}, by {max(share_C):.3f}")
    join_csv(path, vote_columns(names), rows)


def vote_columns(names: Sequence[str]) -> list[str]:
    """Return the columns of `write_votes`; the first name is normal tissue."""
    shares = [f"p_{name}" for name in names[1:]]
    return ["slide_id", "case_id", "called", *shares, "normal", "model"]


def load_whole(path: Path, device: str) -> tuple[PathPT, torch.Tensor, PathPTConfig, Towers]:
    """Return model, class vectors, configuration and trained image tower, on the device.

    Raises:
        CheckpointError: as in `name_slides`.
    """
    model, classes_Kd, model_config, image = load_pathpt(path)
    tower = model_config.towers["images"] or model_config.towers["teacher"]
    needs = f"{path}: needs the image tower {tower} that it was trained with"
    try:
        towers = load_towers(device, **model_config.towers, learned=True)
    except (BackboneError, TextError) as error:
        raise CheckpointError(f"{needs}: {error}") from error
    if towers.mark() != model_config.fingerprint:
        raise CheckpointError(
            f"{needs} (fingerprint {model_config.fingerprint}), and the one found is another "
            f"({towers.mark()}). Put back the weights that it was trained with."
        )
    if model_config.strategy:
        vit = towers.encoder.vit
        make_strategy(model_config.strategy).prepare(vit)
        vit.load_state_dict(image, strict=False)  # the rest is frozen, and was checked above
        vit.to(device).requires_grad_(False)
    return model.to(device), classes_Kd.to(device), model_config, towers


def write_tiles(path: Path, names: Sequence[str], p_NK: np.ndarray, index: TileIndex) -> None:
    """Write tile probabilities and their corners (N, 2), level-0 pixels, as h5."""
    with writing_h5(path) as file:
        file["probabilities"] = p_NK
        file["probabilities"].attrs["classes"] = list(names)
        coords = file.create_dataset("coords", data=index.coords0)
        coords.attrs["patch_size_level0"] = index.size0
