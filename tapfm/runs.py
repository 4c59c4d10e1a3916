"""A cohort's folder of runs, read back: settings, figures and predictions of each.

Nothing here needs a slide, a model or a GPU.

Shapes: N slides, K labels.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tapfm.metrics import MACRO
from tapfm.report import END_TO_END, Arm


class RunsError(ValueError):
    """A folder of runs cannot be reported."""


@dataclass(frozen=True)
class Run:
    """One trained model's folder."""

    folder: Path
    config: dict
    title: str
    """Of its row in the table."""

    @property
    def name(self) -> str:
        """The folder's."""
        return self.folder.name


def read_runs(folder: Path) -> list[Run]:
    """The runs below a folder, by name."""
    return [
        Run(path.parent, yaml.safe_load(path.read_text()) or {}, f"{END_TO_END}{path.parent.name}")
        for path in sorted(folder.glob("*/config.yaml"))
    ]


def read_metrics(path: Path, run: Path, split: str) -> dict:
    """The figures of the report.

    Raises:
        RunsError: there are none, or they are damaged.
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


def read_arms(path: Path, metrics: Mapping, runs: Sequence[Run]) -> tuple[list[str], list[Arm]]:
    """Rows of the table with their predictions, of those labels that are 0 or 1.

    Returns:
        Names of the labels; a row for every arm, in the table's order.
    """
    rows: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    told = {name for arm in metrics["arms"].values() for name in arm.get("figures") or {}} - {MACRO}
    labels = [
        name
        for name in (rows[0] if rows else ())
        if name in told
        and {row[name] for row in rows} <= {"0", "1", ""}
        and all(f"p_{name} ({title})" in rows[0] for title in metrics["arms"])
    ]
    logs = {run.title: run.folder / "metrics.csv" for run in runs}
    shape, arms = (len(rows), len(labels)), []
    for title, facts in metrics["arms"].items():
        log = logs.get(title)
        y = [[float(row[name] or "nan") for name in labels] for row in rows]
        p = [[float(row[f"p_{name} ({title})"]) for name in labels] for row in rows]
        arms.append(
            Arm(
                title,
                bool(facts.get("end_to_end")),
                [row["slide_id"] for row in rows],
                [row["case_id"] for row in rows],
                np.array(y).reshape(shape),
                np.array(p).reshape(shape),
                log if log and log.is_file() else None,
            )
        )
    return labels, arms
