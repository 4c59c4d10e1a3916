"""`tapfm predict` and `tapfm heatmap`: slides outside a cohort, each alone or all as one case.

A case is predicted as the model's cases were in training: as one bag of all its tiles if bags were
cases, else from the mean or maximum of its slides' logits. If a slide cannot be read, its case gets
no prediction: that of the other slides would pass for the whole.

Shapes: K labels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from slides.cohort.cases import group_by_case
from slides.cohort.table import SlideRow
from slides.errors import SlideError
from slides.files import file_fingerprint, rows_there
from slides.progress import progress_bar
from slides.streaming.bounded_tiles import JoinedTiles, SlideTiles
from slides.streaming.settings import TileSettings
from slides.streaming.tile_source import new_slides, tiles_as_trained
from slides.tiling.index import TileIndex
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tapfm.data.bag import Bag
from tapfm.data.streamed import places_of
from tapfm.inference.heatmap import (
    effective_text,
    overlay_png,
    rank_percentile,
    weight_opacity,
    write_geojson,
)
from tapfm.inference.prediction import (
    Prediction,
    header_of,
    pool_cases,
    predict_bag,
    slide_by_slide,
    write_predictions,
    write_weights,
)
from tapfm.slide_model import model as models
from tapfm.slide_model.aggregators import TILES, name_of
from tapfm.slide_model.feature_encoder import need_encoder
from tapfm.tasks import Task


def predict_slides(
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
    """Predict slides outside a cohort, and report bad ones; return 0, or 2 if there was one.

    Args:
        path: a saved model.
        rows: the slides.
        out: folder for `predictions.csv` (its last column names the model; rows of other slides
            are kept), `<slide>_weights.h5` and, with `draw`, `<slide>.png` and `<slide>.geojson`.
        case: name of the case that all slides belong to, predicted as one; None: each slide alone.
        mpp: microns per tile pixel; None is the model's own.
        masks: folder of tissue masks; those of the training cohort are not used.
        chunk: tiles on the device at once.
        workers: reading processes.
        device: device to run on; None is CUDA if there is one.
        draw: write pictures and GeoJSON as well.

    Raises:
        CheckpointError: the model predicts tiles, or was not trained for cases.
        WriteError: `predictions.csv` exists with other columns.
    """
    model, facts = load_slide_model(path, device)
    pool = pool_of(path, facts) if case else None
    rows_there(table := out / "predictions.csv", [*header_of(model.task), "model"])  # refused now
    tiles = tiles_as_trained(trained_tiles(model, facts), mpp, masks)
    drawn = f"{path.absolute().parent.name}, {model.model_config.model}" if draw else None
    predictions: list[Prediction] = []
    rows = [_unknown(row, case, model.task) for row in rows]
    with new_slides(rows, tiles, workers, facts.get("stain")) as (tile_source, left, failed):
        left = [] if case and failed else left
        bags = group_by_case(left, ()) if pool == "union" else left
        read = tile_source.streamed(bags, workers)
        for row, each in progress_bar(read, None, len(bags), unit="slide"):
            try:
                indices = [tile_source.index(slide) for slide in row.slides]
                predictions.append(predict_row(model, row, each, indices, chunk, out, drawn))
            except SlideError as fault:
                tqdm.write(f"tapfm: {fault}", file=sys.stderr)
                failed[row.slide_id] = str(fault)
    if case and failed:
        print(f"tapfm: {case}: one of its slides failed, so it is not predicted", file=sys.stderr)
        return 2
    if case and pool != "union":
        predictions = pool_cases(predictions, model.task, pool, group_by_case(rows, ()))
        print(f"{case}: {pool} of {len(rows)} slides; {_values(model.task, predictions[0])}")
    if predictions:
        write_predictions(table, model.task, predictions, file_fingerprint(path))
    return 2 if failed else 0


def _unknown(row: SlideRow, case: str | None, task: Task) -> SlideRow:
    """Return a row without labels, of the case if one is given."""
    return replace(row, case_id=case or row.case_id, labels=(math.nan,) * task.width)


def load_slide_model(path: Path, device: str | None) -> tuple[models.SlideModel, Mapping]:
    """Return a saved model on its device, and the facts of its training.

    Raises:
        CheckpointError: it predicts tiles, or has no encoder.
    """
    need_encoder(path, models.read_model_config(path)[0].features)
    model = models.load(path)
    if name_of(model.model_config.aggregator) == TILES:
        raise models.CheckpointError(
            f"{path}: was trained on labelled tiles and cannot predict a slide. Use its encoder "
            "with `tapfm features` or `tapfm export`."
        )
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, models.read_model_config(path)[1]


def trained_tiles(model: models.SlideModel, facts: Mapping) -> TileSettings:
    """Return the tile settings that a model was trained with."""
    config, tissue = model.model_config, Tissue(**facts.get("tissue", {}))
    return TileSettings(config.tile_px, config.mpp, tissue=tissue)


def predict_row(
    model: models.SlideModel,
    row: SlideRow,
    tiles: SlideTiles | JoinedTiles,
    indices: Sequence[TileIndex],
    chunk: int,
    out: Path,
    drawn: str | None,
) -> Prediction:
    """Return a row's prediction; print it and write its slides' tile weights.

    `drawn` names run and model below the pictures of the slides; None draws none.
    """
    whole = predict_bag(model, new_slide_bag(row, tiles, model.task.width, indices), chunk)
    parts = slide_by_slide(whole, row.slides, [*map(len, indices)])
    for slide, part, index in zip(row.slides, parts, indices, strict=True):
        write_weights(out / f"{slide.slide_id}_weights.h5", part, index)
        if drawn is not None:
            draw_slide(out, slide, index, part, model.task, drawn)
    tqdm.write(f"{row.slide_id}: {tiles.count} tiles; {_values(model.task, whole)}")
    return whole


def pool_of(path: Path, facts: Mapping) -> str:
    """Return how a model's cases were made: `union` of tiles, `mean` or `max` of slides' logits.

    Raises:
        CheckpointError: the model was not trained for cases.
    """
    if facts.get("bags") == "case":
        return "union"
    if facts.get("pool", "union") == "union":
        raise models.CheckpointError(
            f"{path}: was trained and tested on single slides and cannot predict a case "
            "of several. Leave --case out, or train with data.bags: case, or data.pool: mean or "
            "max."
        )
    return facts["pool"]


def new_slide_bag(
    row: SlideRow,
    tiles: SlideTiles | JoinedTiles,
    labels: int,
    indices: Sequence[TileIndex],
) -> Bag:
    """Return the bag of a slide, or a case, outside a cohort.

    Args:
        row: the slide or case.
        tiles: tiles of all its slides.
        labels: number of values of its unknown target.
        indices: index of each of its slides.
    """
    unknown_K = torch.full((labels,), torch.nan)
    return Bag(row.slide_id, row.case_id, tiles, places_of(indices), unknown_K, seed=0)


def _values(task: Task, prediction: Prediction) -> str:
    pairs = zip(task.predictions, prediction.probs_K, strict=True)
    return ", ".join(f"{name.removeprefix('p_')} {value:.3f}" for name, value in pairs)


def draw_slide(
    out: Path, row: SlideRow, index: TileIndex, prediction: Prediction, task: Task, made_by: str
) -> None:
    """Write `<slide>.png`, tile weights on the thumbnail, and `<slide>.geojson` for QuPath.

    Predictions of each tile alone are in the GeoJSON by name; `made_by` names run and model.
    """
    with Slide(row.path, mpp=row.mpp, name=row.slide_id) as slide:
        thumbnail, downsample = slide.thumbnail(max_side=1600)
    weights_T = prediction.weights_T
    title = f"{row.slide_id}: {_values(task, prediction)}; {effective_text(weights_T)}"
    path = out / f"{row.slide_id}.png"
    where = index.coords0, index.size0
    measured = {"tile weight": weights_T, "tile weight, percentile": rank_percentile(weights_T)}
    if (probs_TP := prediction.tile_probs_TP) is not None:
        measured |= dict(zip(task.predictions, probs_TP.T, strict=True))
    overlay_png(
        thumbnail, downsample, *where, weights_T, path, title=title,
        opacity_T=weight_opacity(weights_T), mpp0=index.slide_mpp, made_by=made_by,
    )  # fmt: skip
    write_geojson(
        out / f"{row.slide_id}.geojson",
        index.coords0,
        index.size0,
        measured,
        index.bounds0,
        row.slide_id,
    )
