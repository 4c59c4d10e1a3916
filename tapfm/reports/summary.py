"""report.json: what a report decides, for programs; the whole of it is in metrics_<split>.json.

    format      1; it rises where a key changes its meaning
    tapfm, split, slides, cases, task {name, labels}, figure (the task's, in words)
    verdicts    [{run, outcome, difference INTERVAL, saved (a), sentence}]; outcome is gained, lost,
                nothing, frozen or undefined
    rows        [{title, end_to_end, figures {group: INTERVAL}, difference INTERVAL or null}], the
                figure of the task; the difference is that of macro, or of the only group, to the
                reference
    reference   title of the best row that was not trained end to end, or null
    skipped     [{slide_id, reason}]
    files       name to path beside it, of those that there are

An INTERVAL is {value, low, high, draws}, 95 %; what is undefined is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tapfm import __version__
from tapfm.reports.verdict import figure_name
from tapfm.stats.metrics import MACRO
from tapfm.tasks import Task, task_config

FORMAT = 1
NAME = "report.json"


def summary(task: Task, metrics: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
        task: what was predicted.
        metrics: the content of metrics_<split>.json.
        folder: of the report.
    """
    monitor, split = task.monitor, metrics["split"]
    rows = []
    for title, facts in metrics["arms"].items():
        figures = {name: each.get(monitor) for name, each in (facts.get("figures") or {}).items()}
        gains = facts.get(f"{monitor}_difference") or {}
        rows.append({
            "title": title,
            "end_to_end": bool(facts.get("end_to_end")),
            "figures": figures,
            "difference": gains.get(MACRO, next(iter(gains.values()), None)),
        })  # fmt: skip
    names = ("report.html", "report.md", f"metrics_{split}.json", f"predictions_{split}.csv",
             "slides.csv", "labels.json")  # fmt: skip
    return {
        "format": FORMAT,
        "tapfm": __version__,
        **{key: metrics.get(key) for key in ("split", "slides", "cases")},
        "task": {"name": task_config(task)["name"], "labels": list(task.labels)},
        "figure": figure_name(task),
        "verdicts": [
            {**{key: each[key] for key in ("run", "outcome", "difference", "sentence")},
             "saved": each["choice"]["a"]}
            for each in metrics.get("verdicts") or ()
        ],
        "rows": rows,
        "reference": metrics.get("reference"),
        "skipped": metrics.get("skipped") or [],
        "files": {name: name for name in names if (folder / name).is_file()},
    }  # fmt: skip
