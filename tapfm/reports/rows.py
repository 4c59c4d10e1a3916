"""Result rows: one model's predictions of a split, read back and aligned with other rows.

Shapes: N slides, K labels, Y numbers of a target, P predicted numbers.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tapfm.tasks import Task

# titles of runs' rows, before the run's name
END_TO_END, FROZEN_ENCODER = "end to end, ", "frozen encoder, "
SAME_HEAD = f"{FROZEN_ENCODER}same head, "


class ResultRowError(ValueError):
    """Rows cannot be read back, or cannot be compared."""


@dataclass(frozen=True)
class ResultRow:
    """One row of the table: a model's predictions of a split."""

    title: str
    end_to_end: bool
    """Whether its encoder was trained; such rows are compared with the others."""
    slide_ids: Sequence[str]
    case_ids: Sequence[str]
    y_NK: np.ndarray
    """0, 1, or nan where unknown; for other tasks the target's numbers (N, Y)."""
    p_NK: np.ndarray
    """Probabilities; for other tasks the predicted numbers (N, P)."""
    metrics_csv: Path | None = None
    """Training curves: `step` and any of train/loss, val/loss, val/auroc, train/effective_tiles."""
    validation: tuple[np.ndarray, np.ndarray] | None = None
    """y_NK and p_NK of the validation split, from which thresholds and calibration are taken."""
    control: str | None = None
    """Title of the row of the frozen encoder with which an adapted run is compared, if it has one.
    """
    choice: Mapping[str, Any] | None = None
    """How much of an adapted run's change is saved: a, source, reason, curve; with a control."""
    robustness: Mapping[str, Any] | None = None
    """What adapting did to robustness, as `tapfm test --robustness` measures it."""
    embeddings_NE: np.ndarray | None = None
    """The embedding of each slide, where the row has them."""
    sites: Mapping[str, Any] | None = None
    """How well embeddings tell sites, of a run and its control, see `evaluation.site_leakage`."""


def row_of_run(name: str, strategy: str | Mapping[str, Any]) -> tuple[str, bool]:
    """Return the title of a run's row, and whether its encoder was trained.

    Args:
        name: name of the run.
        strategy: a name, or a name and options, from its config or model_config.
    """
    trained = (strategy if isinstance(strategy, str) else strategy["name"]) != "frozen"
    return f"{END_TO_END if trained else FROZEN_ENCODER}{name}", trained


def row_folder(title: str) -> str:
    """Return the name of a frozen row's folder, below `frozen`."""
    return title.replace(", ", "_").replace(" ", "_").replace("-", "_").lower()


def read_result_row(
    title: str, path: Path, task: Task, *, end_to_end: bool, of: str = ""
) -> ResultRow:
    """Return a row from a predictions_<split>.csv.

    Args:
        title: title of the row.
        path: a CSV with slide_id, case_id, targets (blank if unknown) and predictions.
        task: names those columns.
        end_to_end: whether its encoder was trained.
        of: suffix of the prediction columns, in a file of several rows.

    Raises:
        ResultRowError: the file has no such columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, header = list(reader), reader.fieldnames or []
    predicted = [f"{name}{of}" for name in task.predictions]
    if missing := [name for name in ("slide_id", "case_id", *task.targets, *predicted)
                   if name not in header]:  # fmt: skip
        raise ResultRowError(
            f"{path}: columns are {', '.join(header) or 'missing'}, and {', '.join(missing)} "
            "are needed, too. Give a run's predictions file."
        )
    y_NK = [task.parse([row[name] for name in task.targets]) for row in rows]
    p_NK = [[float(row[name]) for name in predicted] for row in rows]
    curves = path.parent / "metrics.csv"
    return ResultRow(
        title,
        end_to_end,
        [row["slide_id"] for row in rows],
        [row["case_id"] for row in rows],
        np.array(y_NK, float).reshape(-1, task.width),
        np.array(p_NK, float).reshape(-1, len(predicted)),
        curves if curves.exists() else None,
    )


def aligned_rows(
    rows: Sequence[ResultRow], skipped: Sequence[tuple[str, str]] = ()
) -> tuple[list[ResultRow], list[tuple[str, str]]]:
    """Return rows on their shared slides, in one order, and left-out slides with reasons.

    Raises:
        ResultRowError: no rows, a title or slide twice, rows that disagree on a slide's labels or
            case, or no slide that all predicted.
    """
    titles = [row.title for row in rows]
    if not rows or len(set(titles)) < len(titles):
        raise ResultRowError(f"a report needs rows with different titles, got {titles}")
    for row in rows:
        if len(set(row.slide_ids)) < len(row.slide_ids):
            twice = sorted({s for s in row.slide_ids if list(row.slide_ids).count(s) > 1})
            said = f"{row.title}: predicted twice: {', '.join(twice)}"
            raise ResultRowError(f"{said}. Remove one row of each from its predictions.")
    places = [{slide: n for n, slide in enumerate(row.slide_ids)} for row in rows]
    every = sorted(set().union(*places))
    missed = [
        (slide, f"no prediction by {', '.join(without)}")
        for slide in every
        if (without := [t for t, place in zip(titles, places, strict=True) if slide not in place])
    ]
    shared = [slide for slide in every if all(slide in place for place in places)]
    if not shared:
        raise ResultRowError(f"no slide was predicted by all of {', '.join(titles)}")
    found = []
    for row, place in zip(rows, places, strict=True):
        order = [place[slide] for slide in shared]
        cases = [str(row.case_ids[n]) for n in order]
        y_NK, p_NK = np.asarray(row.y_NK, float)[order], np.asarray(row.p_NK, float)[order]
        found.append(replace(row, slide_ids=shared, case_ids=cases, y_NK=y_NK, p_NK=p_NK))
    for row in found[1:]:
        same_N = np.array([a == b for a, b in zip(row.case_ids, found[0].case_ids, strict=True)])
        both_NK = np.isnan(row.y_NK) & np.isnan(found[0].y_NK)
        same_N &= ((row.y_NK == found[0].y_NK) | both_NK).all(1)
        if not same_N.all():
            slide = shared[int(np.argmin(same_N))]
            raise ResultRowError(
                f"{slide}: case or labels differ between {titles[0]!r} and {row.title!r}. Were "
                "they run on different cohort tables? Run the older one again."
            )
    known = {slide for slide, _ in skipped}
    return found, [*skipped, *(each for each in missed if each[0] not in known)]
