"""The verdict on an adapted run: what it gained over the frozen encoder with the same head.

A run that adapts its encoder saves two models, chosen in the same way on validation: its own, and
the frozen encoder with a slide model of its own (`tapfm.recipe.saved_model`). The difference of the
task's figure between the two, paired and on the same draws of whole cases, is what adapting gained.

Shapes: B bootstrap draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from tapfm.reports.plain_table import span
from tapfm.reports.rows import END_TO_END, ResultRow
from tapfm.stats.bootstrap import Interval, percentiles

if TYPE_CHECKING:
    from tapfm.tasks import Task


def verdicts(
    task: Task, rows: Sequence[ResultRow], figure: Callable[[ResultRow], np.ndarray], draws: int
) -> list[dict[str, Any]]:
    """Return the verdict on each row that has a control, as metrics_<split>.json holds it.

    Args:
        task: names the figure.
        rows: of the table, controls among them.
        figure: gives a row's figure (1 + B,), the value and then every draw.
        draws: B.

    Returns:
        For each: `run`, `row` and `control` (titles), `figure`, `outcome` (see `outcome_of`),
        `difference` (Interval), `choice` (a, source, reason, curve) and `sentence`.
    """
    of_title, found = {row.title: row for row in rows}, []
    for row in rows:
        if row.control is None:
            continue
        gain = percentiles(figure(row) - figure(of_title[row.control]))
        name, title = row.title.removeprefix(END_TO_END), figure_name(task)
        found.append({
            "run": name,
            "row": row.title,
            "control": row.control,
            "figure": title,
            "outcome": outcome_of(gain, [row.choice["a"]]),
            "difference": asdict(gain),
            "choice": dict(row.choice),
            "sentence": sentence(name, title, gain, draws, [row.choice]),
        })  # fmt: skip
    return found


def figure_name(task: Task) -> str:
    """Return the task's figure in as few words as a sentence needs: `macro AUROC`."""
    return re.split(r",| \(", task.title)[0]


def outcome_of(gain: Interval, shares: Sequence[float]) -> str:
    """Return `frozen` (no change was kept), `undefined`, `gained`, `lost` or `nothing`."""
    if not any(shares):
        return "frozen"
    if math.isnan(gain.value):
        return "undefined"
    return "gained" if gain.low > 0 else "lost" if gain.high < 0 else "nothing"


def sentence(
    run: str, figure: str, gain: Interval, draws: int, choices: Sequence[Mapping[str, Any]]
) -> str:
    """Return the verdict in words.

    Args:
        run: name of the run, or of a study's row.
        figure: the task's figure in words.
        gain: its paired difference to the control.
        draws: bootstrap draws.
        choices: `a` and `source` of the run, or of each run of a study's row.
    """
    shares = [choice["a"] for choice in choices]
    saved = f"saved: a = {', '.join(f'{a:g}' for a in shares)}"
    saved += f" in its {len(shares)} runs" if len(shares) > 1 else f" of the {choices[0]['source']}"
    than = f"{span(gain, draws, '+')} {figure} over the frozen encoder with the same head"
    return (
        f"{run}: "
        + {
            "frozen": "nothing was kept (a = 0): the frozen encoder is what was saved; use it.",
            "undefined": f"what adapting gained is unknown: {figure} is undefined here; {saved}.",
            "gained": f"adapting gained {than}; {saved}.",
            "lost": f"adapting lost: {than}; {saved}. Use control.safetensors, the frozen encoder.",
            "nothing": f"adapting gained nothing that this cohort can show: {than}; {saved}.",
        }[outcome_of(gain, shares)]
    )
