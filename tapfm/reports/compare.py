"""`tapfm compare RUN RUN ...`: runs against each other on the slides that all of them predicted.

The first run is the one that the others are measured against. Differences are paired, on the same
bootstrap draws of whole cases, in the figure of the task by which weights are chosen.

    compare.json   runs, task, figure; `rows` with intervals and differences; `verdicts`
    compare.html   the same as a page: verdicts, table, pictures, slides that runs differ on most

Shapes: N slides, R runs, P predicted numbers, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slides.errors import SettingsError
from tapfm.reports.plain_table import span
from tapfm.reports.rows import ResultRow, aligned_rows, read_result_row
from tapfm.reports.runs import read_metrics, read_task
from tapfm.reports.verdict import figure_name
from tapfm.stats.bootstrap import Interval, percentiles, with_point
from tapfm.stats.metrics import interval_of
from tapfm.tasks import Task, task_config

DRAWS = 2000
LISTED = 10  # slides that runs differ on most


def read_rows(runs: Sequence[Path], split: str) -> tuple[Task, list[ResultRow]]:
    """Return the task of runs, and the predictions of each.

    Raises:
        SettingsError: fewer than two runs, or runs of different tasks.
        RunsError, ResultRowError: a run was not tested, or its files are damaged.
    """
    folders = [each for run in runs for each in runs_in(run, split)]
    folders = list({each.resolve(): each for each in folders}.values())
    if len(folders) < 2:
        raise SettingsError(
            f"compare: {', '.join(map(str, runs))}: {len(folders)} tested run(s) in all, and two "
            f"at least are needed. Give folders with a predictions_{split}.csv (`tapfm test`)."
        )
    names = [each.resolve().name for each in folders]
    if len(set(names)) < len(names):
        names = ["/".join(each.resolve().parts[-2:]) for each in folders]
    if len(set(names)) < len(names):
        names = [str(each) for each in folders]
    tasks, rows = [], []
    for name, folder in zip(names, folders, strict=True):
        metrics = folder.parent / f"report_{split}" / f"metrics_{split}.json"
        tasks.append(read_task(read_metrics(metrics, folder.parent, split)))
        path = folder / f"predictions_{split}.csv"
        rows.append(read_result_row(name, path, tasks[-1], end_to_end=True))
    told = [(task_config(task)["name"], task.targets, task.predictions) for task in tasks]
    for name, each in zip(names, told, strict=True):
        if each != told[0]:
            raise SettingsError(
                f"compare: {names[0]} predicts {', '.join(told[0][2])} and {name} "
                f"{', '.join(each[2])}. Compare runs of one task and the same labels."
            )
    return tasks[0], rows


def runs_in(run: Path, split: str) -> list[Path]:
    """Return a run's folder, or those of all tested runs of a cohort's folder."""
    name = f"predictions_{split}.csv"
    if (run / name).is_file():
        return [run]
    return sorted(path.parent for path in run.glob(f"*/{name}") if
                  (path.parent / "config.yaml").is_file())  # fmt: skip


def compare(
    task: Task, rows: Sequence[ResultRow], split: str, draws: int = DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Return the comparison, as compare.json holds it.

    Args:
        task: what was predicted.
        rows: predictions of each run, the first to be measured against.
        split: name of the split.
        draws: bootstrap draws of whole cases.
        seed: seed of the draws.

    Raises:
        ResultRowError: the runs cannot be compared, as in `aligned_rows`.
    """
    rows, skipped = aligned_rows(rows)
    times_BN = with_point(rows[0].case_ids, draws, seed).astype(float)
    drawn = [task.measure(row.y_NK, row.p_NK, times_BN) for row in rows]
    head, monitor = next(iter(drawn[0])), task.monitor
    first, listed, verdicts = drawn[0], [], []
    for row, groups in zip(rows, drawn, strict=True):
        own = groups is first
        gains = {} if own else {
            name: percentiles(each[monitor] - first[name][monitor]) for name, each in groups.items()
        }  # fmt: skip
        listed.append({
            "run": row.title,
            "figures": {name: interval_of(monitor, each[monitor]) for name, each in groups.items()},
            "differences": gains,
        })  # fmt: skip
        if not own:
            outcome = outcome_of(gains[head])
            said = sentence(row.title, rows[0].title, figure_name(task), gains[head], outcome)
            verdicts.append({"run": row.title, "outcome": outcome, "sentence": said})
    slides, cases = len(rows[0].slide_ids), len(set(rows[0].case_ids))
    note = (
        f"{split} split: {slides} slides of {cases} cases that all runs predicted; intervals of "
        f"95 % from {draws} draws of whole cases, differences paired with {rows[0].title}."
    )
    if len(rows) > 2:
        note += f" {len(rows) - 1} comparisons: of 20 equal runs one seems to differ by chance."
    return {
        "split": split, "task": task_config(task)["name"], "figure": figure_name(task),
        "monitor": monitor, "head": head, "first": rows[0].title, "slides": slides,
        "cases": cases, "draws": draws, "seed": seed, "verdicts": verdicts, "rows": listed,
        "note": note,
        "skipped": [{"slide_id": slide, "reason": why} for slide, why in skipped],
        "apart": furthest_apart(task, rows),
    }  # fmt: skip


def outcome_of(gain: Interval) -> str:
    """Return `better`, `worse`, `undecided` or, without a value, `undefined`."""
    if math.isnan(gain.value):
        return "undefined"
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "undecided"


def sentence(run: str, first: str, figure: str, gain: Interval, outcome: str) -> str:
    """Return the verdict on a run against the first, in words."""
    by = f"{span(gain, sign='+')} {figure}"
    return {
        "better": f"{run} is better than {first}: {by}. Take {run}.",
        "worse": f"{run} is worse than {first}: {by}. Take {first}.",
        "undecided": f"{run} and {first} cannot be told apart here: {by}. Take the cheaper one.",
        "undefined": f"{run} and {first} cannot be compared: {figure} is undefined on this split.",
    }[outcome]


def furthest_apart(task: Task, rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Return the slides whose predictions differ most between runs, with all predictions."""
    p_RNP = np.stack([row.p_NK for row in rows])
    spread_N = np.ptp(p_RNP, axis=0).mean(1)
    order = np.argsort(-spread_N, kind="stable")[:LISTED]
    return {
        "targets": list(task.targets),
        "predictions": list(task.predictions),
        "slides": [
            {
                "slide_id": rows[0].slide_ids[n],
                "targets": task.format_target(rows[0].y_NK[n]),
                "predicted": {row.title: [float(p) for p in row.p_NK[n]] for row in rows},
            }
            for n in order.tolist()
            if spread_N[n] > 0
        ],
    }


def table(found: dict[str, Any]) -> list[list[str]]:
    """Return header and cells: for each group of the figure, a line for each run."""
    lines = [["of", "run", f"{found['figure']} [95 %]", f"minus {found['first']}"]]
    for group in found["rows"][0]["figures"]:
        for n, row in enumerate(found["rows"]):
            gain = row["differences"].get(group)
            lines.append([
                "" if n else group, row["run"],
                span(row["figures"][group], found["draws"]), span(gain, found["draws"], "+"),
            ])  # fmt: skip
    return lines
