"""The rows of `tapfm test`: runs, their controls and the frozen baselines, predicted.

A run that saved the frozen encoder beside its model (`tapfm.recipe.saved_model`) has two rows: that
control, and its own, which stays end to end where the frozen encoder is what was saved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from slides.cohort.cases import group_by_case
from slides.cohort.table import SlideRow
from slides.progress import progress_bar
from tapfm.data.bag import Bag, SkippedBag
from tapfm.data.datamodule import SlideData
from tapfm.data.feature_source import FeatureSource, KnownBags
from tapfm.frozen.baselines import FROZEN_ROWS, RgbStatistics
from tapfm.frozen.features import Extraction, frozen_extraction, read_features
from tapfm.frozen.fitter import Fitted
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.frozen.linear_probe import LinearProbe, fit_linear_probe
from tapfm.inference.prediction import (
    Prediction,
    pool_cases,
    predict_all,
    slide_by_slide,
    write_predictions,
    write_weights,
)
from tapfm.recipe.best_weights import BEST
from tapfm.recipe.saved_model import CONTROL
from tapfm.reports.rows import SAME_HEAD, ResultRow, row_folder, row_of_run
from tapfm.slide_model import model as models
from tapfm.training.fit import Cli

MIXED = "mixed"


def evaluate_run(
    cli: Cli, folder: Path, split: str, device: str, features: Path
) -> tuple[list[ResultRow], list[Prediction]]:
    """Predict validation and `split` with a run's models; write predictions and tile weights.

    `features` is the folder of frozen features; where a model's encoder is that of them, they are
    used and no tile is encoded again.

    Returns:
        Its row of the report, before it that of its control if it saved one, and a prediction for
        each slide of the split.
    """
    data, path = cli.datamodule, folder / BEST
    model_config, facts = models.read_model_config(path)
    of, slides = predict_splits(cli, path, folder, split, device, features)
    cohort = {row.slide_id: row for row in data.cohort.rows}
    for each in slides:
        index = data.index(cohort[each.slide_id])
        write_weights(folder / f"weights_{split}" / f"{each.slide_id}.h5", each, index)
    # of a run that saved the frozen encoder, too, the row says what was trained
    title, trained = row_of_run(folder.name, facts.get("trained", model_config.strategy))
    row = result_row(title, folder, of, split, end_to_end=trained)
    choice, path, below = facts.get("interpolation"), folder / CONTROL, folder / "control"
    if choice is None or not path.is_file():
        return [row], slides
    if choice["a"] == 0:  # the same model
        for part, predictions in of.items():
            write_predictions(below / f"predictions_{part}.csv", data.task, predictions)
    else:
        of, _ = predict_splits(cli, path, below, split, device, features)
    control = result_row(f"{SAME_HEAD}{folder.name}", below, of, split, end_to_end=False)
    return [control, replace(row, control=control.title, choice=choice)], slides


def predict_splits(
    cli: Cli, path: Path, out: Path, split: str, device: str, features: Path
) -> tuple[dict[str, list[Prediction]], list[Prediction]]:
    """Predict validation and `split` with a saved model; write predictions_<part>.csv.

    Returns:
        The predictions of each part, pooled as `data.pool` says, and one for each slide of `split`.
    """
    data, of, slides = cli.datamodule, {}, []
    model, name = models.load(path).to(device), f"{path.parent.name} {path.stem}"
    for part in dict.fromkeys(("val", split)):
        rows = data.rows(part)
        parts = known_bags(model, data, rows, cli.model.chunk, features) or data.streamed(rows)
        predictions = predict_all(model, parts, cli.model.chunk, f"{name} {part}")
        if part == split:
            bags = {bag.slide_id: bag.slides for bag in rows}
            for each in predictions:
                counts = [len(data.index(row)) for row in bags[each.slide_id]]
                slides += slide_by_slide(each, bags[each.slide_id], counts)
        of[part] = by_case(data, part, predictions)
        write_predictions(out / f"predictions_{part}.csv", model.task, of[part])
    return of, slides


def known_bags(
    model: models.SlideModel, data: SlideData, rows: Sequence[SlideRow], chunk: int, folder: Path
) -> KnownBags | None:
    """Return bags of the features that a model's encoder made before; None if any is missing.

    Args:
        model: saved by a run, on its device.
        data: the cohort.
        rows: the bags.
        chunk: tiles at once; it names nothing and changes nothing.
        folder: of the frozen features of a cohort's runs.
    """
    learns = any(each.requires_grad for each in model.encoder.parameters())
    rounded = model.model_config.precision == "bf16-true"  # after features are made
    if learns or rounded or data.features or model.model_config.features:
        return None
    extraction = frozen_extraction(model, chunk, data.tile_source.stain)
    folder = folder / data.tiles.grid.tag / f"features_{extraction.name}"
    slides = [slide for row in rows for slide in row.slides]
    if not slides or not folder.is_dir():
        return None
    for slide in slides:
        if extraction.fault(folder / f"{slide.slide_id}.h5", data.index(slide)):
            return None
    return KnownBags(rows, FeatureSource([folder], slides, data.tiles.mpp, data.budget))


def frozen_rows(
    cli: Cli, folder: Path, split: str, device: str, shared: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[ResultRow]:  # fmt: skip
    """Return rows of the baselines, fitted on the train split and chosen on val.

    Args:
        cli: the cohort and an untrained model.
        folder: of features and predictions.
        split: to predict, beside val.
        device: of the encoder.
        shared: folder of features that several folders share; None is `folder`.
        say: takes a line on each fit.
    """
    data, model = cli.datamodule, cli.model.slide_model.eval().to(device)
    tile_source, how = data.tile_source, (cli.model.chunk, data.tile_source.stain)
    extractions = {"frozen": None}  # features that are there already, and no pixels
    if not data.features:
        rgb = Extraction(RgbStatistics(), "rgb", "rgb", chunk=how[0], stain=how[1])
        extractions = {"frozen": frozen_extraction(model, *how), "rgb": rgb}
    parts = dict.fromkeys(("train", "val", split))
    bags_of = {row.slide_id: row for part in parts for row in data.rows(part)}

    def features_of(extraction: Extraction | None, bag: Bag) -> FrozenSlide:
        if extraction is None:
            z_TD, score_T = bag.features.z_TD, bag.features.score_T
            slide = bag.slide_id, bag.case_id, z_TD, bag.labels_K
            return FrozenSlide.of(*slide, score_T, bag.places)
        z_TD, parts = [], getattr(bag.tiles, "parts", [bag.tiles])
        features = (shared or folder) / tile_source.grid.tag / f"features_{extraction.name}"
        for row, tiles in zip(bags_of[bag.slide_id].slides, parts, strict=True):
            path, index = features / f"{row.slide_id}.h5", tile_source.index(row)
            if extraction.fault(path, index, scores=False):
                extraction.write(path, tiles, index, tile_source.tissue)
            z_TD.append(read_features(path))
        return FrozenSlide.of(
            bag.slide_id, bag.case_id, torch.cat(z_TD), bag.labels_K, places=bag.places
        )

    rows, made = [], {}
    for title, kind, fit in FROZEN_ROWS:
        if kind not in extractions:
            continue
        if kind not in made:
            read = partial(features_of, extractions[kind])
            made[kind] = {part: feature_bags(data, part, kind, read) for part in parts}
        bags = made[kind]
        baseline = fit(bags["train"], bags["val"], data.weighted_task, seed=data.seed)
        say(f"{title}: {baseline.describe()}")
        rows.append(row_of_baseline(data, title, baseline, bags, folder, split))
    return rows


def slide_feature_rows(
    data: SlideData, folders: Sequence[Path], folder: Path, split: str, say: Callable[[str], None]
) -> list[ResultRow]:
    """Return a row for each folder of slides' vectors: a linear probe on them.

    Args:
        data: the cohort.
        folders: of `tapfm embed`; of a case the mean of its slides' vectors is taken.
        folder: of predictions.
        split: to predict, beside val.
        say: takes a line on each fit.

    Raises:
        FeatureFileError: a slide of the cohort has no vector, or a damaged one.
    """
    rows = []
    read = {
        part: [row for row in data.rows(part) if row.slide_id not in data.skipped]
        for part in dict.fromkeys(("train", "val", split))
    }
    slides = [slide for part in read.values() for row in part for slide in row.slides]
    for each in folders:
        source, bags = FeatureSource([each], slides, data.tiles.mpp, data.budget), {}
        for part, of_part in read.items():
            bags[part] = [
                FrozenSlide.of(bag.slide_id, bag.case_id, bag.features.z_TD, bag.labels_K)
                for bag in KnownBags(of_part, source)
            ]
        name = source.spec["encoder"] or each.name
        taken = any(row.title == f"{name}, linear probe" for row in rows)
        title = f"{name}{f' of {each}' * taken}, linear probe"
        baseline = fit_linear_probe(bags["train"], bags["val"], data.weighted_task)
        say(f"{title}: {baseline.describe()}")
        rows.append(row_of_baseline(data, title, baseline, bags, folder, split))
    return rows


def row_of_baseline(
    data: SlideData, title: str, baseline: Fitted | LinearProbe,
    bags: Mapping[str, Sequence[FrozenSlide]], folder: Path, split: str,
) -> ResultRow:  # fmt: skip
    """Return a fitted baseline's row; write its predictions of validation and `split`."""
    name, of = row_folder(title), {}
    for part in dict.fromkeys(("val", split)):
        of[part] = by_case(data, part, [predict_features(baseline, bag) for bag in bags[part]])
        write_predictions(folder / name / f"predictions_{part}.csv", data.task, of[part])
    return result_row(title, folder / name, of, split, end_to_end=False)


def predict_features(baseline: Fitted | LinearProbe, slide: FrozenSlide) -> Prediction:
    """Return a baseline's prediction of a slide."""
    logits_K, weights_T = baseline.logits(slide)
    weights = np.empty(0) if weights_T is None else weights_T.numpy()
    predicted_P = baseline.task.predict(logits_K).numpy()
    target_Y = slide.target_Y.numpy()
    return Prediction(
        slide.slide_id, slide.case_id, target_Y, predicted_P, weights, logits_K.numpy()
    )


def feature_bags(
    data: SlideData, split: str, kind: str, features: Callable[[Bag], FrozenSlide]
) -> list[FrozenSlide]:
    """Return the features of every slide of a split that can be read."""
    bags = []
    for bag in progress_bar(data.streamed(data.rows(split)), desc=f"{kind} {split}", unit="slide"):
        with suppress(SkippedBag):
            bags.append(features(bag))
    return bags


def by_case(data: SlideData, split: str, predictions: list[Prediction]) -> list[Prediction]:
    """Return predictions, pooled over cases if `data.pool` asks for it."""
    if data.pool == "union":
        return predictions
    cases = group_by_case(data.cohort.split(split), data.cohort.labels)
    return pool_cases(predictions, data.task, data.pool, cases)


def result_row(
    title: str, folder: Path, of: dict[str, list[Prediction]], split: str, *, end_to_end: bool
) -> ResultRow:
    """Return a row of the report from predictions of its split and of validation."""
    # None for the val split itself: thresholds are not judged on the split they were chosen on
    metrics, predictions, val = folder / "metrics.csv", of[split], of["val"]
    embeddings = [each.embedding_E for each in predictions]
    return ResultRow(
        title,
        end_to_end=end_to_end,
        slide_ids=[each.slide_id for each in predictions],
        case_ids=[each.case_id for each in predictions],
        y_NK=np.stack([each.labels_K for each in predictions]),
        p_NK=np.stack([each.probs_K for each in predictions]),
        metrics_csv=metrics if metrics.exists() else None,
        validation=None
        if split == "val" or not val
        else (np.stack([each.labels_K for each in val]), np.stack([each.probs_K for each in val])),
        embeddings_NE=None if any(e is None for e in embeddings) else np.stack(embeddings),
    )


def groups_of(rows: Sequence[SlideRow], kind: str) -> dict[str, str]:
    """Return the site or stain of each slide and case; `mixed` for a case with several."""
    known = defaultdict(set)
    for row in rows:
        for name in (row.case_id, row.slide_id):
            known[name] |= {getattr(row, kind)} - {""}
    return {
        name: next(iter(values), "") if len(values) < 2 else MIXED for name, values in known.items()
    }
