"""A row of a report: what one model said of a split, and how rows are set side by side.

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

# how runs' rows are called, before the run's name
END_TO_END, FROZEN_ENCODER = "end to end, ", "frozen encoder, "


class ResultRowError(ValueError):
    """Rows cannot be read back, or not be set side by side."""


@dataclass(frozen=True)
class ResultRow:
    """One row of the table: a model's predictions of a split."""

    title: str
    end_to_end: bool
    """Whether its encoder was trained. Those that were not are what it is measured against."""
    slide_ids: Sequence[str]
    case_ids: Sequence[str]
    y_NK: np.ndarray
    """0, 1, or nan where unknown; of other tasks the target's numbers (N, Y)."""
    p_NK: np.ndarray
    """Probabilities; of other tasks what they say (N, P)."""
    metrics_csv: Path | None = None
    """Training curves: `step` and any of train/loss, val/loss, val/auroc, train/effective_tiles."""
    validation: tuple[np.ndarray, np.ndarray] | None = None
    """y_NK and p_NK of the validation split, from which thresholds and calibration are taken."""


def row_of_run(name: str, strategy: str | Mapping[str, Any]) -> tuple[str, bool]:
    """Title of a run's row, and whether its encoder was trained.

    Args:
        name: the run's.
        strategy: as its config or its model's model_config has it: a name, or a name and options.
    """
    trained = (strategy if isinstance(strategy, str) else strategy["name"]) != "frozen"
    return f"{END_TO_END if trained else FROZEN_ENCODER}{name}", trained


def row_folder(title: str) -> str:
    """Where a frozen row's predictions lie, below `frozen`."""
    return title.replace(", ", "_").replace(" ", "_").replace("-", "_").lower()


def read_result_row(
    title: str, path: Path, task: Task, *, end_to_end: bool, of: str = ""
) -> ResultRow:
    """An arm from a predictions_<split>.csv.

    Args:
        title: of the row.
        path: a CSV with slide_id, case_id, what is known (blank if unknown) and what was said.
        task: names those columns.
        end_to_end: see `ResultRow`.
        of: what follows the names of the columns that were said, in a file of several rows.

    Raises:
        ResultRowError: the file has no such columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, header = list(reader), reader.fieldnames or []
    said = [f"{name}{of}" for name in task.predictions]
    if missing := [name for name in ("slide_id", "case_id", *task.targets, *said)
                   if name not in header]:  # fmt: skip
        raise ResultRowError(
            f"{path}: columns are {', '.join(header) or 'missing'}, and {', '.join(missing)} "
            "are needed, too. Is this a run's predictions file?"
        )
    y_NK = [task.parse([row[name] for name in task.targets]) for row in rows]
    p_NK = [[float(row[name]) for name in said] for row in rows]
    curves = path.parent / "metrics.csv"
    return ResultRow(
        title,
        end_to_end,
        [row["slide_id"] for row in rows],
        [row["case_id"] for row in rows],
        np.array(y_NK, float).reshape(-1, task.width),
        np.array(p_NK, float).reshape(-1, len(said)),
        curves if curves.exists() else None,
    )


def aligned_rows(
    arms: Sequence[ResultRow], skipped: Sequence[tuple[str, str]] = ()
) -> tuple[list[ResultRow], list[tuple[str, str]]]:
    """The arms on the slides they share, in one order; skipped slides and the others, with reasons.

    Raises:
        ResultRowError: no arms, titles or slides twice, arms that disagree on a slide's labels or
        case,
            or no slide that all predicted.
    """
    titles = [arm.title for arm in arms]
    if not arms or len(set(titles)) < len(titles):
        raise ResultRowError(f"a report needs rows with different titles, got {titles}")
    for arm in arms:
        if len(set(arm.slide_ids)) < len(arm.slide_ids):
            twice = sorted({s for s in arm.slide_ids if list(arm.slide_ids).count(s) > 1})
            raise ResultRowError(f"{arm.title}: predicted twice: {', '.join(twice)}")
    rows = [{slide: row for row, slide in enumerate(arm.slide_ids)} for arm in arms]
    every = sorted(set().union(*rows))
    missed = [
        (slide, f"no prediction by {', '.join(without)}")
        for slide in every
        if (without := [t for t, row in zip(titles, rows, strict=True) if slide not in row])
    ]
    shared = [slide for slide in every if all(slide in row for row in rows)]
    if not shared:
        raise ResultRowError(f"no slide was predicted by all of {', '.join(titles)}")
    found = []
    for arm, row in zip(arms, rows, strict=True):
        order = [row[slide] for slide in shared]
        cases = [str(arm.case_ids[n]) for n in order]
        y_NK, p_NK = np.asarray(arm.y_NK, float)[order], np.asarray(arm.p_NK, float)[order]
        found.append(replace(arm, slide_ids=shared, case_ids=cases, y_NK=y_NK, p_NK=p_NK))
    for arm in found[1:]:
        same_N = np.array([a == b for a, b in zip(arm.case_ids, found[0].case_ids, strict=True)])
        same_N &= ((arm.y_NK == found[0].y_NK) | np.isnan(arm.y_NK) & np.isnan(found[0].y_NK)).all(
            1
        )
        if not same_N.all():
            slide = shared[int(np.argmin(same_N))]
            raise ResultRowError(
                f"{slide}: case or labels differ between {titles[0]!r} and {arm.title!r}. Were "
                "they run on different cohort tables? Run the older one again."
            )
    told = {slide for slide, _ in skipped}
    return found, [*skipped, *(each for each in missed if each[0] not in told)]
