"""The result of a run whose task is not multi-label: the files and the table of `reports.report`.

    predictions_<split>.csv   a row a slide: slide_id, case_id, what is known, then what each row of
                              the table said, `<name> (<row>)`
    metrics_<split>.json      every figure of the task for every row, with intervals
    report.md                 the table, notes and training curves

The figures are the task's own (`Task.measure`); the first of them chose the weights, is the one
that rows are compared by, and whose paired difference to the best frozen row is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from slides.files import write_csv, write_json, write_text
from tapfm.inference.heatmap import save_figure
from tapfm.reports.figures import curves_figure
from tapfm.reports.plain_table import FEW_DRAWS, ruled, span
from tapfm.reports.report import results_page
from tapfm.reports.rows import ResultRow, aligned_rows
from tapfm.stats.bootstrap import percentiles, with_point
from tapfm.stats.metrics import interval_of
from tapfm.tasks import Task, task_config


def write_outcomes(
    folder: Path,
    split: str,
    task: Task,
    arms: Sequence[ResultRow],
    skipped: Sequence[tuple[str, str]] = (),
    draws: int = 2000,
    seed: int = 0,
) -> str:
    """Evaluate, compare, write all files. See `reports.report.write_results` for the arguments.

    Returns:
        The table and its notes as text.

    Raises:
        ResultRowError: as there.
    """
    arms, skipped = aligned_rows(arms, skipped)
    cases, target_NY = arms[0].case_ids, arms[0].y_NK
    times_BN = with_point(cases, draws, seed).astype(float)
    drawn = {arm.title: task.measure(target_NY, arm.p_NK, times_BN) for arm in arms}
    reference = _best_frozen(task, arms, drawn)
    gains = {
        arm.title: {
            group: percentiles(figures[task.monitor] - drawn[reference][group][task.monitor])
            for group, figures in drawn[arm.title].items()
        }
        for arm in arms
        if arm.end_to_end and reference is not None
    }
    figures = {
        title: {
            group: {name: interval_of(name, figure_B) for name, figure_B in each.items()}
            for group, each in groups.items()
        }
        for title, groups in drawn.items()
    }
    result = {
        "split": split,
        "task": {"labels": list(task.labels), **task_config(task)},
        "slides": len(cases),
        "cases": len(set(cases)),
        "draws": draws,
        "seed": seed,
        "reference": reference,
        "arms": {
            arm.title: {
                "end_to_end": arm.end_to_end,
                "figures": figures[arm.title],
                f"{task.monitor}_difference": gains.get(arm.title),
            }
            for arm in arms
        },
        "skipped": [{"slide_id": slide, "reason": reason} for slide, reason in skipped],
    }
    table = _table(task, figures, gains, reference, draws)
    notes = _notes(task, result, figures)
    _write_said(folder / f"predictions_{split}.csv", task, arms)
    write_json(folder / f"metrics_{split}.json", result)
    pictures = []
    if any(arm.metrics_csv for arm in arms):
        figure = curves_figure(arms, task.monitor, task.title, task.chance)
        pictures.append(save_figure(figure, folder / "curves.png"))
    write_text(folder / "report.md", results_page(split, table, notes, pictures))
    wrapped = [line for note in notes for line in wrap(note, 100, subsequent_indent="  ")]
    return "\n".join([*ruled(table), "", *wrapped])


def _best_frozen(task: Task, arms: Sequence[ResultRow], drawn: dict) -> str | None:
    """Title of the row not trained end to end that is best on this split; None without one."""
    value = {
        arm.title: next(iter(drawn[arm.title].values()))[task.monitor][0]
        for arm in arms
        if not arm.end_to_end
    }
    defined = [title for title in value if not math.isnan(value[title])]
    return max(defined, key=value.get) if defined else None


def _table(task: Task, figures: dict, gains: dict, reference: str | None, draws: int) -> list:
    """Header and cells: for each group of figures, a row an arm."""
    groups = next(iter(figures.values()))
    names = list(next(iter(groups.values())))
    header = [f"{name.replace('_', ' ')} [95 %]" for name in names]
    table = [["of", "model", *header, f"{task.monitor} minus *"]]
    for group in groups:
        for row, (title, each) in enumerate(figures.items()):
            mark = " *" if title == reference else ""
            cells = [span(each[group].get(name), draws) for name in names]
            gain = gains.get(title, {}).get(group)
            name = group if row == 0 else ""
            table.append([name, title + mark, *cells, span(gain, draws, "+")])
    return table


def _notes(task: Task, result: dict, figures: dict) -> list[str]:
    """What a reader must know to read the table."""
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
            f"{result['draws']} remained. Take that interval as a rough one."
        )
    if result["skipped"]:
        notes.append(f"{len(result['skipped'])} slides left out:")
        notes += [f"  {each['slide_id']}: {each['reason']}" for each in result["skipped"]]
    return notes


def _write_said(path: Path, task: Task, arms: Sequence[ResultRow]) -> None:
    header = [f"{name} ({arm.title})" for arm in arms for name in task.predictions]
    rows = [
        [slide, case, *task.format_target(y_Y)]
        + [f"{value:.7g}" for arm in arms for value in arm.p_NK[n]]
        for n, (slide, case, y_Y) in enumerate(
            zip(arms[0].slide_ids, arms[0].case_ids, arms[0].y_NK, strict=True)
        )
    ]
    write_csv(path, ["slide_id", "case_id", *task.targets, *header], rows)
