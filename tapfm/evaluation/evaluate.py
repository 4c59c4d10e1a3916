"""`tapfm test`: every run of a cohort beside the frozen baselines, on the same tiles and splits.

A run is complete only when it is known whether tuning beat frozen features. So this fits a linear
probe, a mean-pool MLP and gated-attention MIL on the unadapted encoder's features, and gated
attention on six RGB numbers a tile as the lower bound, chooses them on the validation split, and
prints one table with intervals. Thresholds and calibration of every row come from validation, too.
A run that saved its frozen control is compared with it; that verdict is printed first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from slides.errors import CohortError
from slides.tiling.tissue import tile_fraction
from slides.wsi.reader import Slide
from tapfm.config_paths import with_absolute_paths
from tapfm.data.datamodule import SlideData
from tapfm.evaluation.predicted_rows import (
    evaluate_run,
    frozen_rows,
    groups_of,
    slide_feature_rows,
)
from tapfm.evaluation.robustness import with_robustness
from tapfm.evaluation.site_leakage import site_leakage
from tapfm.inference.heatmap import effective_text, overlay_png, weight_opacity
from tapfm.inference.prediction import Prediction
from tapfm.recipe.best_weights import BEST
from tapfm.reports.html.page import write_page
from tapfm.reports.html.task_reports import REPORTS
from tapfm.slide_model import model as models
from tapfm.slide_model.aggregators import TILES, name_of
from tapfm.slide_model.model import CheckpointError
from tapfm.stats.metrics import auroc
from tapfm.training.begun import CONFIG
from tapfm.training.fit import read_config
from tapfm.training.stopping import warn_if_unfinished

GROUPS = ("site", "stain")  # columns of the table for which the report has tables by group
TUMOUR_TILE = 0.5  # share from which a tile counts as tumour; from there to 0 it is not used
# Data settings that define the bags to be fitted and tested; the others say how tiles are read, or
# how a run samples and augments them in training.
COMPARED = "table", "slides_dir", "features_dir", "labels", "task", "bags", "pool", "tiles", "stain"


def run_test(
    run: Path, split: str, overlays: int, features: Path | None = None, robustness: bool = False,
    slide_features: Sequence[Path] = (),
) -> int:  # fmt: skip
    """Evaluate every run below a folder and write `<run>/report_<split>`; return 0.

    Args:
        run: the folder.
        split: the split to report on.
        overlays: number of slides to draw.
        features: folder of frozen features that several folders share; None is `<run>/frozen`.
        robustness: measure what adapting did to it, see `evaluation.robustness`.
        slide_features: folders of `tapfm embed`, a linear probe on each of which is a row.

    Raises:
        CheckpointError: there is no finished run, or runs of one folder have different data.
        CohortError: the cohort's table has no slide of that split, or none that can be read.
    """
    folders = finished_runs(run)
    # the baselines' encoder is the published one, whatever the run's strategy inserts into it
    plain = ["--model.strategy", "full", "--trainer.logger", "false", "--trainer.callbacks", "null"]
    first = read_config(["--config", str(folders[0] / CONFIG), *plain])
    data = first.datamodule
    check_split(data, first.config.data.table, split)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fitted: list[str] = []
    given = first.config.get("features")  # of the run, if several folders share them
    features = features or (Path(given) if given else run / "frozen")
    rows = frozen_rows(first, run / "frozen", split, device, features, fitted.append)
    rows += slide_feature_rows(data, slide_features, run / "frozen", split, fitted.append)
    masks = Path(first.config.data.table).parent / "truth"
    groups = {kind: groups_of(data.cohort.rows, kind) for kind in GROUPS}
    aurocs = {}
    for folder in folders:
        of_run, slides = evaluate_run(first, folder, split, device, features)
        if of_run[-1].control and of_run[-1].choice["a"]:
            leaked = site_leakage(of_run[1], of_run[0], groups["site"])
            of_run[1] = replace(of_run[1], sites=leaked)
        if robustness and of_run[-1].control:
            control, own = of_run
            of_run = [control, with_robustness(first, folder, own, control, split, device)]
        rows += of_run
        if each_slide := tile_auroc(data, slides, masks):
            aurocs[folder.name] = float(np.mean(list(each_slide.values())))
        draw_overlays(data, slides[:overlays], folder / f"overlays_{split}")
    skipped = sorted(data.skipped.items())
    report = run / f"report_{split}"
    write = REPORTS[data.task.report].write
    print(write(report, split, data.task, rows, skipped, groups, slides_of(data, split)))
    print("\n".join(["", *fitted]))
    if aurocs:
        print("Tile weights against the truth masks, AUROC of tumour tiles, mean over slides:")
        print("".join(f"  {name} {value:.3f}\n" for name, value in aurocs.items()))
        (report / f"tile_auroc_{split}.json").write_text(json.dumps(aurocs, indent=1) + "\n")
    print(f"{report}: report.md, metrics_{split}.json, predictions_{split}.csv, pictures")
    print(f"{write_page(run, split)}: all of it, and example slides, on one page")
    return 0


def check_split(data: SlideData, table: str, split: str) -> None:
    """Raise unless the table has slides of a split.

    Raises:
        CohortError: it has none.
    """
    if not data.cohort.split(split):
        there = sorted({row.split for row in data.cohort.rows})
        raise CohortError(
            f"{table}: no slide of split {split}; there are {', '.join(there)}. "
            f"Give one of them, as `--split {there[-1]}`, or a table that has {split}."
        )


def slides_of(data: SlideData, split: str) -> dict[str, int]:
    """Return how many slides each case of a split has, where rows are cases; empty otherwise."""
    by_case = data.bags == "case" or data.pool != "union"
    return dict(Counter(r.case_id for r in data.cohort.split(split)) if by_case else ())


def finished_runs(run: Path) -> list[Path]:
    """Return the folders of finished runs below a folder.

    Raises:
        CheckpointError: there is none, one is on labelled tiles, or their data differ.
    """
    folders = sorted(path.parent for path in run.glob(f"*/{BEST}"))
    if not folders:
        raise CheckpointError(f"{run}: no run with a {BEST} below it. Run `tapfm fit` first.")
    for folder in folders:
        if name_of(models.read_model_config(folder / BEST)[0].aggregator) == TILES:
            raise CheckpointError(
                f"{folder}: a run on labelled tiles: `tapfm fit-tiles` left its report there."
            )
        check_same_data(folder, folders[0])
        warn_if_unfinished(folder)
    return folders


def check_same_data(folder: Path, first: Path) -> None:
    """Raise unless two runs of one folder have the same slides, tiles and labels.

    Raises:
        CheckpointError: their data differ.
    """
    defaults = {key: each.default for key, each in signature(SlideData).parameters.items()}
    one, other = (
        defaults | with_absolute_paths(yaml.safe_load((each / CONFIG).read_text()))["data"]
        for each in (first, folder)
    )
    if changed := [key for key in COMPARED if one[key] != other[key]]:
        raise CheckpointError(
            f"{folder} and {first} have other data ({', '.join(changed)} differ) and cannot be "
            "compared. Move one of them to another folder."
        )


def draw_overlays(data: SlideData, predictions: list[Prediction], folder: Path) -> None:
    """Write tile weights on the thumbnails of a few slides."""
    rows = {row.slide_id: row for row in data.cohort.rows}
    name = models.read_model_config(folder.parent / BEST)[0].model if predictions else ""
    for each in predictions:
        row = rows[each.slide_id]
        index = data.index(row)
        if data.features and (index.coords0 is None or not row.path.is_file()):
            continue  # features may be all that is left of a slide
        with Slide(row.path, mpp=row.mpp, name=row.slide_id) as slide:
            (thumbnail, downsample), mpp0 = slide.thumbnail(max_side=1200), slide.mpp
        path = folder / f"{each.slide_id}.png"
        overlay_png(
            thumbnail, downsample, index.coords0, index.size0, each.weights_T, path,
            title=f"{each.slide_id}: {effective_text(each.weights_T)}",
            opacity_T=weight_opacity(each.weights_T), mpp0=mpp0,
            made_by=f"{folder.parent.name}, {name}",
        )  # fmt: skip


def tile_auroc(data: SlideData, predictions: list[Prediction], truth: Path) -> dict[str, float]:
    """Return the AUROC of tile weights for tumour tiles against tumour-free tissue, by slide.

    Args:
        data: the cohort.
        predictions: tile weights.
        truth: folder with `<slide_id>.png`, class numbers, and `<slide_id>.json`, with their
            downsample and the number of tumour. Slides without both are left out.
    """
    rows, found = {row.slide_id: row for row in data.cohort.rows}, {}
    for each in predictions:
        facts = truth / f"{each.slide_id}.json"
        if not facts.exists():
            continue
        facts = json.loads(facts.read_text())
        tumour = (
            np.asarray(Image.open(truth / f"{each.slide_id}.png")) == facts["classes"]["tumour"]
        )
        index = data.index(rows[each.slide_id])
        if index.coords0 is None:
            continue
        share_T = tile_fraction(tumour, index.coords0, index.size0, facts["downsample"])
        used_T = (share_T >= TUMOUR_TILE) | (share_T == 0)
        value = auroc((share_T[used_T] > 0).astype(float), each.weights_T[used_T])
        if not np.isnan(value):
            found[each.slide_id] = value
    return found
