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

from tapfm.reports.plain_table import span
from tapfm.reports.rows import END_TO_END, ResultRow
from tapfm.stats.bootstrap import Interval

if TYPE_CHECKING:
    from tapfm.tasks import Task

FALL = 0.05  # of RI or MaRI, from which robustness is called lost


def verdicts(
    task: Task,
    rows: Sequence[ResultRow],
    difference: Callable[[ResultRow, ResultRow], Interval],
    draws: int,
) -> list[dict[str, Any]]:
    """Return the verdict on each row that has a control, as metrics_<split>.json holds it.

    Args:
        task: names the figure.
        rows: of the table, controls among them.
        difference: gives a row's figure less that of its control, on the table's draws.
        draws: B.

    Returns:
        For each: `run`, `row` and `control` (titles), `figure`, `outcome` (see `outcome_of`),
        `difference` (Interval), `choice` (a, source, reason, curve), `robustness` (None unless it
        was measured), `sites` (of `evaluation.site_leakage`, or None) and `sentence`.
    """
    of_title, found = {row.title: row for row in rows}, []
    for row in rows:
        if row.control is None:
            continue
        gain = difference(row, of_title[row.control])
        name, title = row.title.removeprefix(END_TO_END), figure_name(task)
        outcome = outcome_of(gain, [row.choice["a"]])
        said = sentence(name, title, gain, draws, [row.choice])
        if row.sites:
            said += f" {sites_sentence(row.sites)}"
        if row.robustness:
            said += f" {robustness_sentence(title, outcome, row.robustness)}"
        found.append({
            "run": name,
            "row": row.title,
            "control": row.control,
            "figure": title,
            "outcome": outcome,
            "difference": asdict(gain),
            "choice": dict(row.choice),
            "robustness": row.robustness,
            "sites": row.sites,
            "sentence": said,
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


def robustness_sentence(figure: str, outcome: str, facts: Mapping[str, Any]) -> str:
    """Return what adapting did to robustness, in words.

    It is called lost if stain draws take more of the figure than of the control's, by an interval
    above 0, or if RI or MaRI is below the control's by `FALL` or more.

    Args:
        figure: the task's figure in words.
        outcome: see `outcome_of`.
        facts: of `evaluation.robustness`.
    """
    parts = [f"linear CKA to the frozen encoder's features {facts['cka']:.2f}"]
    lost = False
    if drop := facts.get("drop"):
        run, control, more = (Interval(**drop[kind]) for kind in ("run", "control", "more"))
        lost = more.low > 0
        parts.append(
            f"stain draws take {span(run, sign='+')} of {figure}, {span(control, sign='+')} of the "
            f"frozen encoder's, {span(more, sign='+')} more"
        )
    for kind, name in (("ri", "RI"), ("mari", "MaRI")):
        if index := facts.get(kind):
            lost = lost or index["control"] - index["run"] >= FALL
            parts.append(f"{name} {index['run']:.2f}, frozen {index['control']:.2f}")
    parts += [f"no {what}: {why}" for what, why in facts["left_out"].items()]
    opening = "It lost robustness" if lost else "Robustness"
    if lost and outcome == "gained":
        opening = "It gained and lost robustness"
    return f"{opening}: {'; '.join(parts)}."


def sites_sentence(facts: Mapping[str, Any]) -> str:
    """Return how well embeddings tell sites, in words; `facts` of `evaluation.site_leakage`."""
    run, control, more = (Interval(**facts[kind]) for kind in ("run", "control", "more"))
    opening = "It leaks sites" if more.low > 0 else "Sites"
    return (
        f"{opening}: embeddings tell the site of {span(run)} of the slides, the frozen encoder's "
        f"of {span(control)}, {span(more, sign='+')} more (chance {facts['chance']:.2f}, "
        f"{facts['sites']} sites, {facts['slides']} slides)."
    )
