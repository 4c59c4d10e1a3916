"""What a model says of a slide or a case: probabilities (values, risks), and where it looked.

All tiles, streamed: pixels in memory are those of a few chunks, on the GPU those of one. What grows
with the slide is a feature vector and two numbers a tile, in host memory (6 kB a tile for a ViT-g,
a 25th of its pixels).

Shapes: T tiles of a slide, S slides of a case, K labels, D features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from slides.cohort.table import SlideRow
from slides.files import join_csv, replacing, write_csv
from slides.tiling.index import TileIndex
from tapfm.data.bag import Bag, SkippedBag
from tapfm.slide_model.model import SlideModel
from tapfm.tasks import Task


@dataclass(frozen=True)
class Prediction:
    """One slide's, or one case's."""

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
    logits_K, weights_T = model(bag.tiles, chunk, bag.counts)
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
        cases: rows of `slides.cohort.cases.gather`, for what is known of each; a case of which no
        slide
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


def slide_by_slide(
    prediction: Prediction, slides: Sequence[SlideRow], counts: Sequence[int]
) -> list[Prediction]:
    """What is said of a case as of its slides, with the tile weights of each.

    Args:
        prediction: of the case.
        slides: its slides, in the order of its tiles.
        counts: tiles of each; the weights of all of them together sum to 1.
    """
    weights_S = np.split(prediction.weights_T, np.cumsum(counts)[:-1])
    return [
        replace(prediction, slide_id=row.slide_id, weights_T=weights_T)
        for row, weights_T in zip(slides, weights_S, strict=True)
    ]


def columns(truth: Sequence[str], said: Sequence[str]) -> list[str]:
    """What is known, then what is said; in turns where there is one of each."""
    if len(truth) != len(said):
        return [*truth, *said]
    return [each for pair in zip(truth, said, strict=True) for each in pair]


def header_of(task: Task) -> list[str]:
    """Columns of `write_predictions`: `<label>` and `p_<label>` take turns."""
    return ["slide_id", "case_id", *columns(task.truth, task.said)]


def write_predictions(
    path: Path, task: Task, predictions: Sequence[Prediction], model: str | None = None
) -> None:
    """A CSV row a slide: slide_id, case_id, then what is known (blank if not) and what is said.

    Of a named `model`, which is then the last column, rows of other slides that are there stay.

    Raises:
        WriteError: it cannot be written, or rows of other columns are there to join.
    """
    rows = [
        [each.slide_id, each.case_id]
        + columns(task.spell(each.labels_K), [f"{value:.7g}" for value in each.probs_K])
        for each in predictions
    ]
    if model is None:
        write_csv(path, header_of(task), rows)
    else:
        join_csv(path, [*header_of(task), "model"], [[*row, model] for row in rows])


def write_weights(path: Path, prediction: Prediction, index: TileIndex) -> None:
    """Tile weights beside their corners, h5: `weights` (T,), `coords` (T, 2) level-0 pixels."""
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        file["weights"] = prediction.weights_T
        coords = file.create_dataset("coords", data=index.coords0)
        coords.attrs["patch_size_level0"] = index.size0
