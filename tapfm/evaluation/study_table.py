"""A study's table, with every interval and paired difference behind it.

Rows are the frozen ones, then aggregators and strategies, pooled by `reports.pooling`. `summary`
reads the files of finished cells, so it works while others still run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slides.files import write_csv
from tapfm.reports.plain_table import aligned, span, wrapped
from tapfm.reports.pooling import Pool, pool
from tapfm.reports.rows import (
    END_TO_END,
    FROZEN_ENCODER,
    SAME_HEAD,
    ResultRow,
    read_result_row,
    row_folder,
)
from tapfm.reports.runs import read_task
from tapfm.reports.verdict import figure_name, sentence
from tapfm.stats.bootstrap import Interval

if TYPE_CHECKING:
    from tapfm.evaluation.study_cells import Cell, Study
    from tapfm.tasks import Task

FINISHED, RUN = "finished.json", "run"
OF_CELL = {f"{kind}{RUN}" for kind in (END_TO_END, FROZEN_ENCODER)}  # a cell's own row
CONTROL_ROW, CONTROL_OF_CELL = f"{SAME_HEAD}{RUN}", ", frozen, same head"  # in a report; in a study


def summary(
    study: Study, cells: Sequence[Cell], failed: Mapping[str, str]
) -> tuple[str, dict, list[list[str]]]:
    """Return the text to print, all figures behind it for study.json, and the table."""
    return summary_of_runs(study, len({cell.fold for cell in cells}), *collect_runs(cells), failed)


def summary_of_runs(
    study: Study, folds: int, task: Task | None, runs: Mapping, order: Mapping[str, bool],
    choices: Mapping[str, list], failed: Mapping[str, str],
) -> tuple[str, dict, list[list[str]]]:  # fmt: skip
    """Return what `summary` does from predictions, as `collect_runs` returns them."""
    result: dict[str, Any] = {
        "folds": study.folds, "seeds": list(study.seeds), "failed": dict(failed), "arms": {}
    }  # fmt: skip
    why = [f"failed: {cell}: {fault}" for cell, fault in failed.items()]
    try:
        found = pool(task, runs, folds)
    except ValueError as error:
        return "\n".join([f"no table: {error}", *why]), result, []
    frozen = [title for title in found.rows if not order[title]]
    trained = [title for title in found.rows if order[title]]
    value = {title: row.figures["pooled"][found.head].value for title, row in found.rows.items()}
    defined = [title for title in frozen if not math.isnan(value[title])]
    best = max(defined, key=value.get) if defined else None
    first = trained[0] if trained else None
    result |= {"slides": found.slides, "cases": found.cases, "figure": task.monitor,
               "macro": list(found.averaged), "head": found.head, "reference": best,
               "first": first}  # fmt: skip
    for title in order:
        if title not in found.rows:
            result["arms"][title] = {"end_to_end": order[title], "seeds": []}
            continue
        row = found.rows[title]
        result["arms"][title] = {
            "end_to_end": order[title],
            "seeds": list(row.seeds),
            "macro_of_seeds": row.by_seed,
            "deviation_of_seeds": row.deviation,
            "saved": choices.get(title, []),
            "figures": row.figures,
            "differences": {
                other: row.minus(found.rows[other])
                for other in found.rows
                if order[title] and other != title
            },
        }
    result["verdicts"] = study_verdicts(task, found, choices)
    table = _table(task, result, found)
    return _text(study.folds, len(study.seeds), task, result, found, table, why), result, table


def study_verdicts(task: Task, found: Pool, choices: Mapping[str, list]) -> list[str]:
    """Return what each adapted row gained over its frozen controls, in a sentence each."""
    figure, said = figure_name(task), []
    for title, saved in choices.items():
        control = found.rows.get(title + CONTROL_OF_CELL)
        if title in found.rows and control:
            gain = found.rows[title].minus(control)["pooled"][found.head]
            said.append(sentence(title, figure, gain, 0, saved))
    return said


def collect_runs(cells: Sequence[Cell]) -> tuple[Task | None, dict, dict[str, bool], dict]:
    """Return the task, predictions by title, seed and fold, and whether each title is trained.

    The last is what each run of an adapted title saved: a, source, reason and curve.

    A task's facts of its training split differ by fold; the first fold's are used, since the
    figure does not depend on them.
    """
    task: Task | None = None
    runs: dict[str, dict[int, dict[int, ResultRow]]] = {}
    baselines: dict[str, bool] = {}
    choices: dict[str, list] = {}
    trained = {cell.row: True for cell in cells}
    for cell in cells:
        if not (cell.folder / FINISHED).exists():
            continue
        metrics = json.loads((cell.folder / "report_test" / "metrics_test.json").read_text())
        own = read_task(metrics)
        task = task or own
        for title, facts in metrics["arms"].items():
            of_cell = title in OF_CELL
            row, name = (cell.row, RUN) if of_cell else (title, f"frozen/{row_folder(title)}")
            if title == CONTROL_ROW:
                row, name = cell.row + CONTROL_OF_CELL, f"{RUN}/control"
            path = cell.folder / name / "predictions_test.csv"
            result = read_result_row(title, path, own, end_to_end=facts["end_to_end"])
            runs.setdefault(row, {}).setdefault(cell.seed, {}).setdefault(cell.fold, result)
            (trained if of_cell else baselines)[row] = facts["end_to_end"]
        for verdict in metrics.get("verdicts") or ():
            choices.setdefault(cell.row, []).append(verdict["choice"])
    return task, runs, baselines | trained, choices


def _table(task: Task, result: Mapping, found: Pool) -> list[list[str]]:
    """Return header and cells, a line a model."""
    best, first, undefined = result["reference"], result["first"], task.undefined
    head = ["model", f"{task.title} [95 %]", *found.groups, "within folds", "seeds, deviation",
            "minus * [95 %]", "minus ** [95 %]"]  # fmt: skip
    table = [head]
    for title, row in result["arms"].items():
        mark = " *" if title == best else " **" if title == first else ""
        if not row["seeds"]:
            table.append([title, "not finished", *[""] * (len(head) - 2)])
            continue
        pooled, deviation = row["figures"]["pooled"], row["deviation_of_seeds"]
        gains = [row["differences"].get(other) for other in (best, first)]
        table.append([
            title + mark,
            span(pooled[found.head], undefined=undefined),
            *(_number(pooled[name].value) for name in found.groups),
            _number(row["figures"]["within_folds"][found.head].value),
            f"{len(row['seeds'])}" + (f", {deviation:.3f}" if deviation == deviation else ""),
            *(span(gain and gain["pooled"][found.head], sign="+", undefined=undefined)
              for gain in gains),
        ])  # fmt: skip
    return table


def _text(
    folds: int | None, seeds: int, task: Task, result: Mapping, found: Pool, table: list,
    why: list[str],
) -> str:  # fmt: skip
    verdicts = [line for each in result["verdicts"] for line in (*wrapped(each), "")]
    dealt = f"{folds} folds, out-of-fold predictions pooled" if folds else "one split"
    over = f"; macro: {', '.join(found.averaged) or 'none is defined'}" if found.groups else ""
    notes = [
        "",
        f"{result['slides']} slides of {result['cases']} cases; {dealt}; averaged over the "
        f"seeds{over}.",
        "Intervals: 95 %, from bootstrap draws of whole cases; differences paired, on the same "
        "draws. They do not cover training anew: the deviation over seeds does.",
        f"* the frozen row of the highest {task.title}, chosen on the data reported here, "
        "which favours it; ** the first end-to-end row; study.json has every pair.",
    ]
    short = [f"{title}: {len(row['seeds'])} of {seeds} seeds have every fold; the "
             "others are left out" for title, row in result["arms"].items()
             if len(row["seeds"]) < seeds]  # fmt: skip
    return "\n".join([*verdicts, *aligned(table), *notes, *short, *why])


def write_figures(path: Path, result: Mapping) -> None:
    """Write study.csv: a row a model and label."""
    figure = result.get("figure", "figure")
    spans = [f"{name}_{end}" for name in (figure, "minus_frozen", "minus_first")
             for end in ("value", "low", "high")]  # fmt: skip
    rows = []
    for title, row in result["arms"].items():
        for label in row.get("figures", {}).get("pooled", {}):
            cells = _ends(row["figures"]["pooled"][label])
            for other in (result["reference"], result["first"]):
                gain = row["differences"].get(other)
                cells += _ends(gain["pooled"][label]) if gain else [""] * 3
            within = _ends(row["figures"]["within_folds"][label])[0]
            rows.append([title, int(row["end_to_end"]), len(row["seeds"]), label, *cells, within])
    header = ["model", "end_to_end", "seeds", "label", *spans, f"{figure}_within_folds"]
    write_csv(path, header, rows)


def _ends(found: Interval) -> list[str]:
    """Return value, low and high as CSV cells, blank for nan."""
    return ["" if math.isnan(x) else f"{x:.6f}" for x in (found.value, found.low, found.high)]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
