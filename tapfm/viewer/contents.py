"""What a run has to show: its slides, the worst predicted first, and the tiles of each.

Read from the run's folder alone, after `tapfm test`: predictions_<split>.csv, weights_<split>/, and
the slides' files from the report's slides.csv. Numbers are cut to what a reader can use.

Shapes: N slides, T tiles of a slide, P predicted numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import rankdata

from slides.errors import SettingsError
from slides.hdf5 import open_h5
from tapfm.inference.heatmap import effective_tiles
from tapfm.reports.rows import ResultRow, read_result_row
from tapfm.reports.runs import read_metrics, read_task
from tapfm.reports.slide_table import slide_table
from tapfm.tasks import Task

FLAT = 0.9  # share of effective tiles from which attention is called flat
PROBABILITIES = "labels", "classes"  # kinds of reports whose predictions are from 0 to 1


@dataclass(frozen=True)
class Shown:
    """One slide of the viewer."""

    slide_id: str
    path: Path | None
    """Its file; None if unknown."""
    weights: Path
    facts: Mapping[str, Any]
    """What the page lists: case, targets, predictions, error."""


@dataclass(frozen=True)
class Contents:
    """A run as the viewer shows it."""

    title: str
    split: str
    slides: list[Shown]
    predictions: tuple[str, ...]
    probabilities: bool
    """Whether predictions are from 0 to 1."""

    def page(self) -> dict[str, Any]:
        """Return the run as the page's script reads it."""
        return {
            "title": self.title,
            "split": self.split,
            "predictions": self.predictions,
            "probabilities": self.probabilities,
            "slides": [{"id": each.slide_id, **each.facts} for each in self.slides],
        }


def read_contents(run: Path, split: str) -> Contents:
    """Return what a run has to show, slides with the largest error first, unknown ones last.

    Args:
        run: folder of one run, or of a cohort with a single run.
        split: `val` or `test`.

    Raises:
        SettingsError: no such run, several, or no tile weights of that split.
        RunsError: `tapfm test` has not been run.
    """
    folder = one_run(run, split)
    report = folder.parent / f"report_{split}"
    metrics = read_metrics(report / f"metrics_{split}.json", folder.parent, split)
    task = read_task(metrics)
    path = folder / f"predictions_{split}.csv"
    row = read_result_row(folder.name, path, task, end_to_end=True)
    config = yaml.safe_load((folder / "config.yaml").read_text()) or {}
    table = slide_table(report / "slides.csv", config.get("data") or {})
    files = {each["slide_id"]: each for each in table}
    place, errors_N = {name: n for n, name in enumerate(row.slide_ids)}, errors(task, row)
    slides = []
    for weights in sorted((folder / f"weights_{split}").glob("*.h5")):
        name = weights.stem
        known = files.get(name, {})
        n = place.get(name, place.get(known.get("case_id", name)))
        where = known.get("path")
        slides.append(Shown(name, Path(where) if where else None, weights,
                            _facts(task, row, n, errors_N, known)))  # fmt: skip
    slides.sort(key=lambda each: (each.facts["error"] is None, -(each.facts["error"] or 0)))
    title = f"{folder.parent.resolve().name} / {folder.name}"
    return Contents(title, split, slides, task.predictions, task.report in PROBABILITIES)


def one_run(run: Path, split: str) -> Path:
    """Return the folder of the one run that has tile weights of a split.

    Raises:
        SettingsError: there is none, or there are several.
    """
    candidates = [run] if (run / "config.yaml").is_file() else sorted(run.glob("*/config.yaml"))
    folders = [each if each == run else each.parent for each in candidates]
    found = [each for each in folders if any((each / f"weights_{split}").glob("*.h5"))]
    if not found:
        raise SettingsError(
            f"{run}: no run with tile weights of split {split}. Run `tapfm test --run "
            f"{run.parent if folders == [run] else run} --split {split}` first."
        )
    if len(found) > 1:
        raise SettingsError(
            f"{run}: holds {len(found)} runs. Give one: {', '.join(str(each) for each in found)}"
        )
    return found[0]


def errors(task: Task, row: ResultRow) -> np.ndarray:
    """Return the error (N,) of each slide, by which they are put in order; nan where unknown.

    Labels: mean distance of probabilities from 0 or 1. Classes: 1 less the true class's. Values:
    mean distance, in standard deviations of the targets. Times: distance of the rank of the risk
    from that of the time, of slides with the event.
    """
    y_NY, p_NP = np.asarray(row.y_NK, float), np.asarray(row.p_NK, float)
    if task.report == "classes":
        known_N = ~np.isnan(y_NY[:, 0])
        right_N = np.where(known_N, np.nan_to_num(y_NY[:, 0]), 0).astype(int)
        return np.where(known_N, 1 - p_NP[np.arange(len(p_NP)), right_N], np.nan)
    if task.report == "times":
        early_N = rankdata(-y_NY[:, 0], nan_policy="omit")
        away_N = np.abs(rankdata(p_NP[:, 0]) - early_N) / max(1, len(p_NP) - 1)
        return np.where(y_NY[:, 1] == 1, away_N, np.nan)
    scale_K = 1.0
    if task.report == "values":
        spread_K = np.array([np.nanstd(y_N) if (~np.isnan(y_N)).any() else 0 for y_N in y_NY.T])
        scale_K = np.where(spread_K > 0, spread_K, 1)
    away_NK = np.abs(p_NP - y_NY) / scale_K
    counts_N = (~np.isnan(away_NK)).sum(1)
    return np.where(counts_N > 0, np.nansum(away_NK, 1) / np.maximum(counts_N, 1), np.nan)


def _facts(
    task: Task, row: ResultRow, n: int | None, errors_N: np.ndarray, known: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the page lists of a slide."""
    if n is None:
        return {"case": known.get("case_id", ""), "targets": {}, "predicted": {}, "error": None}
    targets = dict(zip(task.targets, task.format_target(row.y_NK[n]), strict=True))
    predicted = {k: short(v) for k, v in zip(task.predictions, row.p_NK[n], strict=True)}
    error = None if np.isnan(errors_N[n]) else short(errors_N[n])
    return {"case": row.case_ids[n], "targets": targets, "predicted": predicted, "error": error}


def tiles_of(shown: Shown, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the tiles of a slide: corners x, y, side, weights and predictions by name.

    Raises:
        SettingsError: the file of tile weights is damaged, or does not say where tiles lie.
    """
    try:
        with open_h5(shown.weights) as file:
            weights_T, coords0 = file["weights"][:], file["coords"][:]
            size0 = int(file["coords"].attrs["patch_size_level0"])
            predicted_TP = file["predictions"][:] if "predictions" in file else None
    except (OSError, KeyError) as error:
        raise SettingsError(
            f"{shown.weights}: no tile weights with corners ({error}). Run `tapfm test` again."
        ) from error
    effective = effective_tiles(weights_T)
    by_name = {}
    if predicted_TP is not None:
        by_name = {k: shortened(predicted_TP[:, n]) for n, k in enumerate(names)}
    return {
        "x": coords0[:, 0].tolist(),
        "y": coords0[:, 1].tolist(),
        "side": size0,
        "weights": shortened(weights_T),
        "predictions": by_name,
        "effective": short(effective),
        "flat": bool(effective > FLAT * len(weights_T)) and len(weights_T) > 1,
    }


def short(value: float) -> float:
    """Return a number to four digits, as JSON writes it shortest."""
    return float(f"{value:.4g}")


def shortened(values_T: np.ndarray) -> list[float]:
    """Return numbers to four digits."""
    return np.char.mod("%.4g", values_T).astype(float).tolist()


def as_script(call: str, *values: Any) -> str:
    """Return a line of JavaScript that gives values to the page; a file may load it, as a server.

    JSON is JavaScript but for `</`, which would end a script.
    """
    given = ", ".join(json.dumps(each, separators=(",", ":"), allow_nan=False) for each in values)
    safe = given.replace("</", r"<\/")
    return f"{call}({safe});\n"
