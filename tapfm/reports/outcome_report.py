"""Results of a run whose task is not multi-label: files and table, like `reports.report`.

    predictions_<split>.csv   a row a slide: slide_id, case_id, targets, then predictions of each
                              row of the table, `<name> (<row>)`
    metrics_<split>.json      every metric of the task for every row, with intervals
    report.md                 the table, notes and training curves

The metrics are the task's own (`Task.measure`). The first of them chose the weights; rows are
compared by it, and its paired difference to the best frozen row is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from slides.files import write_csv, write_json, write_text
from tapfm.inference.heatmap import save_figure
from tapfm.reports.figures import curves_figure
from tapfm.reports.plain_table import FEW_DRAWS, as_text, span
from tapfm.reports.report import count_slides, left_out, results_page
from tapfm.reports.rows import ResultRow, aligned_rows
from tapfm.reports.verdict import verdicts
from tapfm.stats.bootstrap import Interval, percentiles, with_point
from tapfm.stats.metrics import interval_of
from tapfm.tasks import Task, task_config


def write_outcomes(
    folder: Path,
    split: str,
    task: Task,
    rows: Sequence[ResultRow],
    skipped: Sequence[tuple[str, str]] = (),
    draws: int = 2000,
    seed: int = 0,
    slides_of: Mapping[str, int] | None = None,
) -> str:
    """Evaluate and compare rows, write all files; arguments as in `reports.report.write_results`.

    Returns:
        The table and its notes as text.

    Raises:
        ResultRowError: rows that cannot be compared, as in `aligned_rows`.
    """
    rows, skipped = aligned_rows(rows, skipped)
    cases, target_NY = rows[0].case_ids, rows[0].y_NK
    times_BN = with_point(cases, draws, seed).astype(float)
    drawn = {row.title: task.measure(target_NY, row.p_NK, times_BN) for row in rows}
    reference = _best_frozen(task, rows, drawn)
    gains = {
        row.title: _gains(drawn[row.title], drawn[reference], task.monitor)
        for row in rows
        if row.end_to_end and reference is not None
    }
    found = verdicts(
        task, rows, lambda a, b: _first(_gains(drawn[a.title], drawn[b.title], task.monitor)), draws
    )
    figures = _intervals(drawn)
    result = {
        "split": split,
        "task": {"labels": list(task.labels), **task_config(task)},
        "slides": count_slides(rows[0], slides_of),
        "cases": len(set(cases)),
        "draws": draws,
        "seed": seed,
        "reference": reference,
        "verdicts": found,
        "arms": {
            row.title: {
                "end_to_end": row.end_to_end,
                "figures": figures[row.title],
                f"{task.monitor}_difference": gains.get(row.title),
            }
            for row in rows
        },
        "skipped": [{"slide_id": slide, "reason": reason} for slide, reason in skipped],
    }
    table = _table(task, figures, gains, reference, draws)
    notes = _notes(task, result, figures)
    result["notes"] = notes
    _write_predictions(folder / f"predictions_{split}.csv", task, rows)
    write_json(folder / f"metrics_{split}.json", result)
    notes, said = [*notes, *left_out(result)], [each["sentence"] for each in found]
    page = results_page(split, table, notes, _curves(folder, task, rows), said)
    write_text(folder / "report.md", page)
    return as_text(table, notes, said)


def _intervals(drawn: dict) -> dict[str, dict[str, dict[str, Interval]]]:
    """Return every figure of each row and group with its interval."""
    return {
        title: {
            group: {name: interval_of(name, figure_B) for name, figure_B in each.items()}
            for group, each in groups.items()
        }
        for title, groups in drawn.items()
    }


def _gains(own: dict, reference: dict, figure: str) -> dict[str, Interval]:
    """Return the paired difference of a metric to the reference row, for each group."""
    return {
        group: percentiles(figures[figure] - reference[group][figure])
        for group, figures in own.items()
    }


def _first(gains: dict[str, Interval]) -> Interval:
    return next(iter(gains.values()))


def _curves(folder: Path, task: Task, rows: Sequence[ResultRow]) -> list[Path]:
    """Write training curves if any row has them; return the pictures written."""
    if not any(row.metrics_csv for row in rows):
        return []
    figure = curves_figure(rows, task.monitor, task.title, task.chance)
    return [save_figure(figure, folder / "curves.png")]


def _best_frozen(task: Task, rows: Sequence[ResultRow], drawn: dict) -> str | None:
    """Return the title of the best row not trained end to end on this split; None without one."""
    value = {
        row.title: next(iter(drawn[row.title].values()))[task.monitor][0]
        for row in rows
        if not row.end_to_end
    }
    defined = [title for title in value if not math.isnan(value[title])]
    return max(defined, key=value.get) if defined else None


def _table(task: Task, figures: dict, gains: dict, reference: str | None, draws: int) -> list:
    """Return header and cells: for each group of metrics, a line for each row."""
    groups = next(iter(figures.values()))
    names = list(next(iter(groups.values())))
    header = [f"{name.replace('_', ' ')} [95 %]" for name in names]
    table = [["of", "model", *header, f"{task.monitor} minus *"]]
    for group in groups:
        for n, (title, each) in enumerate(figures.items()):
            mark = " *" if title == reference else ""
            cells = [span(each[group].get(name), draws) for name in names]
            gain = gains.get(title, {}).get(group)
            name = group if n == 0 else ""
            table.append([name, title + mark, *cells, span(gain, draws, "+")])
    return table


def _notes(task: Task, result: dict, figures: dict) -> list[str]:
    """Return the notes needed to read the table."""
    notes = [
        f"{result['split']} split: {result['slides']} slides of {result['cases']} cases. "
        f"Intervals: 95 %, from {result['draws']} bootstrap draws of whole cases; of AUROC "
        "symmetric on the logit scale, of others and of differences percentiles."
    ]
    notes += task.notes()
    if result["reference"]:
        notes.append(
            f"* {result['reference']}: the best {task.title} on this split of the rows not trained "
            "end to end. Chosen on the split it is reported on, which favours it; differences are "
            "paired, on the same draws."
        )
    else:
        notes.append("No row without end-to-end training to compare with: no differences.")
    every = [f for groups in figures.values() for each in groups.values() for f in each.values()]
    fewest = min((f.draws for f in every if not math.isnan(f.value)), default=0)
    if fewest < FEW_DRAWS * result["draws"]:
        notes.append(
            f"† draws that leave the figure undefined are left out; as few as {fewest} of "
            f"{result['draws']} remained. That interval is only approximate."
        )
    return notes


def _write_predictions(path: Path, task: Task, rows: Sequence[ResultRow]) -> None:
    header = [f"{name} ({row.title})" for row in rows for name in task.predictions]
    lines = [
        [slide, case, *task.format_target(y_Y)]
        + [f"{value:.7g}" for row in rows for value in row.p_NK[n]]
        for n, (slide, case, y_Y) in enumerate(
            zip(rows[0].slide_ids, rows[0].case_ids, rows[0].y_NK, strict=True)
        )
    ]
    write_csv(path, ["slide_id", "case_id", *task.targets, *header], lines)
