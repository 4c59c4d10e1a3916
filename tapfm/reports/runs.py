"""A cohort's folder of runs, read back: settings, metrics and predictions of each run.

Nothing here needs a slide, a model or a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from tapfm.reports.rows import ResultRow, read_result_row, row_of_run
from tapfm.stats.metrics import MACRO
from tapfm.tasks import Task, make_task


class RunsError(ValueError):
    """A folder of runs cannot be reported."""


@dataclass(frozen=True)
class Run:
    """One trained model's folder."""

    folder: Path
    config: dict
    title: str
    """Title of its row in the table."""

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.folder.name


def read_runs(folder: Path) -> list[Run]:
    """Return the runs below a folder, sorted by name."""
    runs = []
    for path in sorted(folder.glob("*/config.yaml")):
        config = yaml.safe_load(path.read_text()) or {}
        strategy = config.get("model", {}).get("strategy", "full")
        runs.append(Run(path.parent, config, row_of_run(path.parent.name, strategy)[0]))
    return runs


def read_metrics(path: Path, run: Path, split: str) -> dict:
    """Return the content of metrics_<split>.json.

    Raises:
        RunsError: the file is missing or damaged.
    """
    if not path.is_file():
        raise RunsError(
            f"{path}: there is no such file. Run `tapfm test --run {run} --split {split}` first."
        )
    try:
        found = json.loads(path.read_text())
        dict(found["arms"])
    except (ValueError, TypeError, KeyError) as error:
        raise RunsError(
            f"{path}: not the figures of a report ({type(error).__name__}: {error}). "
            "Run `tapfm test` again."
        ) from error
    return found


def read_task(metrics: Mapping) -> Task:
    """Return the task; multi-label for a report that does not name it."""
    facts_of_task = metrics.get("task")
    if isinstance(facts_of_task, Mapping):
        return make_task(
            {k: v for k, v in facts_of_task.items() if k != "labels"}, facts_of_task["labels"]
        )
    names = {name: None for row in metrics["arms"].values() for name in row.get("figures") or {}}
    return make_task({"name": "multilabel"}, [name for name in names if name != MACRO])


def read_result_rows(
    path: Path, metrics: Mapping, task: Task, runs: Sequence[Run]
) -> list[ResultRow]:
    """Return the table's rows with their predictions, or without slides if there is no file.

    Raises:
        ResultRowError: the predictions file has other columns.
    """
    logs = {run.title: run.folder / "metrics.csv" for run in runs}
    rows = []
    for title, facts in metrics["arms"].items():
        trained, log = bool(facts.get("end_to_end")), logs.get(title)
        if path.is_file():
            row = read_result_row(title, path, task, end_to_end=trained, of=f" ({title})")
        else:
            nothing = np.empty((0, task.width)), np.empty((0, len(task.predictions)))
            row = ResultRow(title, trained, [], [], *nothing)
        rows.append(replace(row, metrics_csv=log if log and log.is_file() else None))
    return rows
