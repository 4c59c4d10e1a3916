"""Predictions of a slide or a case (probabilities, values or risks) and its tile weights.

All tiles, streamed: a few chunks of pixels are in memory, one on the GPU. Only features and two
numbers a tile grow with the slide, in host memory (6 kB a tile for a ViT-g, a 25th of its pixels).

Shapes: T tiles of a slide, S slides of a case, K labels, D features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from slides.cohort.table import SlideRow
from slides.files import join_csv, write_csv
from slides.hdf5 import writing_h5
from slides.progress import progress_bar
from slides.tiling.index import TileIndex
from tapfm.data.bag import Bag, SkippedBag
from tapfm.data.feature_files import SlideFeatures
from tapfm.slide_model.model import SlideModel
from tapfm.tasks import Task

FEW = 32  # predicted numbers up to which each tile's are kept: of 1000 genes 20 MB a slide


@dataclass(frozen=True)
class Prediction:
    """The prediction of one slide or one case."""

    slide_id: str
    case_id: str
    labels_K: np.ndarray
    """0, 1, or nan where unknown; for other tasks the target's numbers."""
    probs_K: np.ndarray
    """Predicted numbers: one sigmoid a label, or as many as `Task.predictions` names."""
    weights_T: np.ndarray
    """Tile weights, summing to 1."""
    logits_K: np.ndarray | None = None
    """The logits behind `probs_K`, for `pool_cases`."""
    tile_probs_TP: np.ndarray | None = None
    """Predicted numbers of each tile, as if the slide were that tile alone, where there are any."""
    embedding_E: np.ndarray | None = None
    """The bag's embedding; of a pooled case the mean of its slides'."""


def predict_bag(model: SlideModel, bag: Bag, chunk: int) -> Prediction:
    """Return the prediction of one bag, by the forward path of training; `model` in eval mode."""
    with torch.no_grad():
        tiles = model.tiles(bag, chunk)
        output = model.aggregator(tiles)
        few = len(model.task.predictions) <= FEW
        alone_TK = model.aggregator.alone(tiles) if few else None
    return Prediction(
        bag.slide_id,
        bag.case_id,
        bag.labels_K.numpy(),
        model.task.predict(output.logits_K).cpu().numpy(),
        output.weights_T.cpu().numpy(),
        output.logits_K.cpu().numpy(),
        None if alone_TK is None else model.task.predict(alone_TK).cpu().numpy(),
        output.embedding_E.detach().float().flatten().cpu().numpy(),
    )


def predict_all(
    model: SlideModel, bags: Iterable[Bag], chunk: int, title: str = "predict"
) -> list[Prediction]:
    """Return the predictions of all bags but skipped ones; show a progress bar in tiles."""
    predictions = []
    with progress_bar(unit="tile", desc=title) as bar:
        for bag in bags:
            with suppress(SkippedBag):
                predictions.append(predict_bag(model, bag, chunk))
            bar.update(bag.count)
    return predictions


def pool_cases(
    predictions: Sequence[Prediction], task: Task, pool: str, cases: Sequence[SlideRow]
) -> list[Prediction]:
    """Return a prediction a case, from the mean or maximum of its slides' logits.

    Args:
        predictions: predictions of slides.
        task: turns the pooled logits into predictions.
        pool: `mean` or `max`.
        cases: rows of `slides.cohort.cases.group_by_case` with each case's targets; a case without
            a predicted slide is left out.
    """
    logits, embeddings = defaultdict(list), defaultdict(list)
    for each in predictions:
        logits[each.case_id].append(torch.as_tensor(each.logits_K))
        if each.embedding_E is not None:
            embeddings[each.case_id].append(each.embedding_E)
    pooled = []
    for case in cases:
        if each := logits.get(case.case_id):
            slides_SK = torch.stack(each)
            pooled_K = slides_SK.mean(0) if pool == "mean" else slides_SK.amax(0)
            known_K = np.array(case.labels, np.float32)
            predicted_K = task.predict(pooled_K).numpy()
            none = np.empty(0)  # a pooled case has no tile weights
            own = embeddings[case.case_id]
            mean_E = np.mean(own, 0) if own else None
            name = case.case_id
            pooled.append(
                Prediction(
                    name, name, known_K, predicted_K, none, pooled_K.numpy(), embedding_E=mean_E
                )
            )
    return pooled


def slide_by_slide(
    prediction: Prediction, slides: Sequence[SlideRow], counts: Sequence[int]
) -> list[Prediction]:
    """Return a case's prediction once for each slide, with that slide's tile weights.

    Args:
        prediction: the case's.
        slides: its slides, in the order of its tiles.
        counts: tiles of each slide; the weights of all slides together sum to 1.
    """
    ends, tiles_TP = np.cumsum(counts)[:-1], prediction.tile_probs_TP
    weights_S = np.split(prediction.weights_T, ends)
    probs_S = [None] * len(slides) if tiles_TP is None else np.split(tiles_TP, ends)
    return [
        replace(prediction, slide_id=row.slide_id, weights_T=weights_T, tile_probs_TP=probs_TP)
        for row, weights_T, probs_TP in zip(slides, weights_S, probs_S, strict=True)
    ]


def columns(targets: Sequence[str], predicted: Sequence[str]) -> list[str]:
    """Return targets, then predictions; alternating if there is one prediction a target."""
    if len(targets) != len(predicted):
        return [*targets, *predicted]
    return [each for pair in zip(targets, predicted, strict=True) for each in pair]


def header_of(task: Task) -> list[str]:
    """Return the columns of `write_predictions`: `<label>` and `p_<label>` alternate."""
    return ["slide_id", "case_id", *columns(task.targets, task.predictions)]


def write_predictions(
    path: Path, task: Task, predictions: Sequence[Prediction], model: str | None = None
) -> None:
    """Write a CSV row a slide: slide_id, case_id, targets (blank if unknown), predictions.

    With a `model`, written as the last column, existing rows of other slides are kept.

    Raises:
        WriteError: it cannot be written, or it exists with other columns.
    """
    rows = [
        [each.slide_id, each.case_id]
        + columns(task.format_target(each.labels_K), [f"{value:.7g}" for value in each.probs_K])
        for each in predictions
    ]
    if model is None:
        write_csv(path, header_of(task), rows)
    else:
        join_csv(path, [*header_of(task), "model"], [[*row, model] for row in rows])


def write_weights(path: Path, prediction: Prediction, index: TileIndex | SlideFeatures) -> None:
    """Write tile weights (T,), predictions (T, P) and corners (T, 2), where known, as h5.

    Corners are level-0 pixels; predictions those of each tile alone, see `Aggregator.alone`.
    """
    with writing_h5(path) as file:
        file["weights"] = prediction.weights_T
        if prediction.tile_probs_TP is not None:
            file["predictions"] = prediction.tile_probs_TP.astype(np.float32)
        if index.coords0 is None:
            return
        coords = file.create_dataset("coords", data=index.coords0)
        coords.attrs["patch_size_level0"] = index.size0
