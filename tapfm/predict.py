"""What a model says of a slide: probabilities (values, risks), and which tiles it looked at.

All tiles, streamed: pixels in memory are those of a few chunks, on the GPU those of one. What grows
with the slide is a feature vector and two numbers a tile, in host memory (6 kB a tile for a ViT-g,
a 25th of its pixels).

Shapes: T tiles of a slide, K labels, D features.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from slides.cohort import SlideRow
from slides.errors import SlideError
from slides.held import SlideTiles
from slides.index import TileIndex
from slides.reader import Slide
from slides.tissue import Tissue
from tapfm import model as models
from tapfm.aggregators import TILES
from tapfm.bag import Bag, SkippedBag
from tapfm.config import TileSettings
from tapfm.files import replacing, write_csv
from tapfm.heatmap import overlay_png, rank_percentile, write_geojson
from tapfm.model import SlideModel
from tapfm.opener import loose
from tapfm.tasks import Task


@dataclass(frozen=True)
class Prediction:
    """One slide's."""

    slide_id: str
    case_id: str
    labels_K: np.ndarray
    """0, 1, or nan where unknown; of other tasks the target's numbers."""
    probs_K: np.ndarray
    """What the task says: one sigmoid a label, or as many numbers as `Task.said` names."""
    weights_T: np.ndarray
    """Tile weights, summing to 1."""
    logits_K: np.ndarray | None = None
    """What `probs_K` was made of, for `pool_cases`."""


def predict_bag(model: SlideModel, bag: Bag, chunk: int) -> Prediction:
    """One slide, by the forward path that training and validation use. `model` is in eval mode."""
    logits_K, weights_T = model(bag.tiles, chunk)
    return Prediction(
        bag.slide_id,
        bag.case_id,
        bag.labels_K.numpy(),
        model.task.predict(logits_K).cpu().numpy(),
        weights_T.cpu().numpy(),
        logits_K.cpu().numpy(),
    )


def predict_all(
    model: SlideModel, bags: Iterable[Bag], chunk: int, title: str = "predict"
) -> list[Prediction]:
    """Slide after slide, with a progress bar in tiles; skipped slides are not among them."""
    predictions = []
    with tqdm(unit=" tiles", desc=title) as bar:
        for bag in bags:
            with suppress(SkippedBag):
                predictions.append(predict_bag(model, bag, chunk))
            bar.update(bag.count)
    return predictions


def pool_cases(
    predictions: Sequence[Prediction], task: Task, pool: str, cases: Sequence[SlideRow]
) -> list[Prediction]:
    """A prediction a case, from the mean or the largest of its slides' logits.

    Args:
        predictions: of slides.
        task: says what the pooled logits mean.
        pool: `mean` or `max`.
        cases: rows of `slides.cases.gather`, for what is known of each; a case of which no slide
            was predicted is left out.
    """
    logits = defaultdict(list)
    for each in predictions:
        logits[each.case_id].append(torch.as_tensor(each.logits_K))
    pooled = []
    for case in cases:
        if each := logits.get(case.case_id):
            slides_SK = torch.stack(each)
            pooled_K = slides_SK.mean(0) if pool == "mean" else slides_SK.amax(0)
            known_K = np.array(case.labels, np.float32)
            said = task.predict(pooled_K).numpy()
            none = np.empty(0)  # a case has no weights of its own
            pooled.append(
                Prediction(case.case_id, case.case_id, known_K, said, none, pooled_K.numpy())
            )
    return pooled


def write_predictions(path: Path, task: Task, predictions: Sequence[Prediction]) -> None:
    """A CSV row a slide: slide_id, case_id, then what is known (blank if not) and what is said.

    These take turns where there is one of each: `<label>`, `p_<label>`.
    """
    turns = len(task.truth) == len(task.said)

    def columns(truth: Sequence[str], said: Sequence[str]) -> list[str]:
        return [each for pair in zip(truth, said, strict=True) for each in pair] if turns else [
            *truth, *said
        ]  # fmt: skip

    header = ["slide_id", "case_id", *columns(task.truth, task.said)]
    rows = [
        [each.slide_id, each.case_id]
        + columns(task.spell(each.labels_K), [f"{value:.6f}" for value in each.probs_K])
        for each in predictions
    ]
    write_csv(path, header, rows)


def write_weights(path: Path, prediction: Prediction, index: TileIndex) -> None:
    """Tile weights beside their corners, h5: `weights` (T,), `coords` (T, 2) level-0 pixels."""
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        file["weights"] = prediction.weights_T
        coords = file.create_dataset("coords", data=index.coords0)
        coords.attrs["patch_size_level0"] = index.size0


def predict_slides(
    path: Path,
    rows: Sequence[SlideRow],
    out: Path,
    *,
    mpp: float | None = None,
    masks: str | None = None,
    chunk: int = 16,
    workers: int = 2,
    device: str | None = None,
    draw: bool = False,
) -> int:
    """Predict slides that are in no cohort; a bad one is reported and the others go on.

    Args:
        path: a saved model.
        rows: the slides.
        out: folder for `predictions.csv`, `<slide>_weights.h5` and, drawn, `<slide>.png` and
            `<slide>.geojson`.
        mpp: microns per tile pixel, where it is not to be the model's own.
        masks: folder of masks to take for the tissue; those of the training cohort are not.
        chunk: tiles on the device at once.
        workers: reading processes.
        device: where to; None is CUDA where there is one.
        draw: write pictures and GeoJSON as well.

    Returns:
        0, or 2 if any slide failed.
    """
    model = models.load(path)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe = model.recipe
    if recipe.aggregator == TILES:
        raise models.CheckpointError(
            f"{path}: was trained on labelled tiles and says nothing of a slide. Its encoder is "
            "for `tapfm features` and `tapfm export`."
        )
    if mpp is not None and mpp != recipe.mpp:
        print(f"tiles at {mpp:g} microns per pixel; the model was trained at {recipe.mpp:g}")
    facts = models.read_recipe(path)[1]
    tissue = Tissue(
        **{**facts.get("tissue", {}), "masks": masks, "coords": None}
    )  # otherwise as in training, and so are the stains
    tiles = TileSettings(recipe.tile_px, mpp or recipe.mpp, tissue=tissue)
    predictions = []
    with loose(rows, tiles, workers, facts.get("stain")) as (opener, left, failed):
        for row, each in tqdm(opener.streamed(left, workers), total=len(left), unit=" slides"):
            try:
                prediction = predict_bag(model, loose_bag(row, each, model.task.width), chunk)
                index = opener.index(row)
                write_weights(out / f"{row.slide_id}_weights.h5", prediction, index)
                if draw:
                    draw_slide(out, row, index, prediction, recipe.labels)
            except SlideError as fault:
                tqdm.write(f"tapfm: {fault}", file=sys.stderr)
                failed[row.slide_id] = str(fault)
                continue
            predictions.append(prediction)
            said = ", ".join(
                f"{name.removeprefix('p_')} {value:.3f}"
                for name, value in zip(model.task.said, prediction.probs_K, strict=True)
            )
            tqdm.write(f"{row.slide_id}: {each.count} tiles; {said}")
    write_predictions(out / "predictions.csv", model.task, predictions)
    return 2 if failed else 0


def loose_bag(row: SlideRow, tiles: SlideTiles, labels: int) -> Bag:
    """A slide that belongs to no cohort: `labels` unknown numbers are its target."""
    unknown_K = torch.full((labels,), torch.nan)
    return Bag(row.slide_id, row.case_id, tiles, tiles.count, unknown_K, seed=0)


def draw_slide(
    out: Path, row: SlideRow, index: TileIndex, prediction: Prediction, labels: Sequence[str]
) -> None:
    """`<slide>.png`, the tile weights on the thumbnail, and `<slide>.geojson` for QuPath."""
    with Slide(row.path, mpp=row.mpp, name=row.slide_id) as slide:
        thumbnail, downsample = slide.thumbnail(max_side=1600)
    weights_T = prediction.weights_T
    said = (f"{k} {p:.3f}" for k, p in zip(labels, prediction.probs_K, strict=True))
    effective = 1 / np.square(weights_T, dtype=float).sum()
    title = f"{row.slide_id}: {', '.join(said)}; {effective:.1f} effective of {len(index)} tiles"
    path = out / f"{row.slide_id}.png"
    where = index.coords0, index.size0
    overlay_png(thumbnail, downsample, *where, weights_T, path, title=title)
    write_geojson(
        out / f"{row.slide_id}.geojson",
        index.coords0,
        index.size0,
        {"tile weight": weights_T, "tile weight, percentile": rank_percentile(weights_T)},
        index.bounds0,
        row.slide_id,
    )
