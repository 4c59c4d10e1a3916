"""What is to be predicted: one file a task, one small contract.

    contract.py    what every task has
    columns.py     base of tasks in which each column is a target by itself
    multilabel.py  labels of 0 and 1, each by itself
    multiclass.py  one of several classes
    ordinal.py     one of several ordered classes
    regression.py  numbers
    expression.py  numbers of many genes, also compared within a slide
    survival.py    times to an event: hazards, or Cox's partial likelihood
    losses.py      losses that mask unknown labels
    cox.py         Cox's partial likelihood at one slide a step

Everything that depends on the task asks the task: the training step calls its loss, reports call
its figures. Adding a task is a file with a subclass of `Task`, a row in `TASKS`, and a row in
`slides.cohort.targets.COLUMNS`, which says how its columns are read. Reports of a new kind are a
row in `tapfm.reports.html.task_reports.REPORTS`.

Shapes: N slides, K logits, Y numbers of a target, P predicted numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from inspect import Parameter, signature
from typing import Any

import numpy as np

from tapfm.settings import SettingsError, did_you_mean, refuse
from tapfm.tasks.contract import Task
from tapfm.tasks.expression import Expression
from tapfm.tasks.multiclass import Multiclass
from tapfm.tasks.multilabel import Multilabel
from tapfm.tasks.ordinal import Ordinal
from tapfm.tasks.regression import Regression
from tapfm.tasks.survival import Survival

__all__ = [
    "TASKS", "Task", "TaskError", "learn_task", "make_task", "task_config", "validation_figures"
]  # fmt: skip

TASKS: dict[str, type[Task]] = {
    "multilabel": Multilabel,
    "multiclass": Multiclass,
    "ordinal": Ordinal,
    "regression": Regression,
    "expression": Expression,
    "survival": Survival,
}


class TaskError(SettingsError):
    """A task has settings that cannot be, or training targets from which it cannot learn."""


def learn_task(
    task: str | Mapping[str, Any],
    names: Sequence[str],
    classes: Sequence[str],
    target_NY: np.ndarray,
) -> Task:
    """Return a task by name, or by name and options, with what it takes from the training split.

    Args:
        task: as in a config.
        names: of the label columns.
        classes: names of the classes, if targets are numbers of classes.
        target_NY: targets of the training slides, nan where unknown.

    Raises:
        TaskError: no such task or option, or the training split does not tell enough.
    """
    options = {"name": task} if isinstance(task, str) else dict(task)
    name = options.pop("name", None)
    kind = _kind(name)
    asked = [
        each for each in signature(kind.learn).parameters.values()
        if each.kind is Parameter.KEYWORD_ONLY
    ]  # fmt: skip
    known = [each.name for each in asked]
    faults = [
        f"unknown {key}; there are {', '.join(known) or 'no options'}.{did_you_mean(key, known)}"
        for key in sorted(options.keys() - set(known))
    ]
    faults += [
        f"{each.name} is missing: add it"
        for each in asked
        if each.default is Parameter.empty and each.name not in options
    ]
    try:
        refuse(faults, "options")
        return kind.learn(tuple(names), tuple(classes), np.asarray(target_NY, float), **options)
    except SettingsError as fault:
        raise TaskError(f"data.task {name}: {fault}") from fault


def make_task(spec: Mapping[str, Any], labels: Sequence[str]) -> Task:
    """Return the task that `task_config` described, for a model with these logits.

    Raises:
        TaskError: no such task.
    """
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in spec.items()}
    return _kind(given.pop("name"))(labels=tuple(labels), **given)


def task_config(task: Task) -> dict[str, Any]:
    """Return name and fields of a task, all but the labels, as a saved model's config has them."""
    name = next(name for name, kind in TASKS.items() if kind is type(task))
    kept = {field.name for field in fields(task)} - {"labels"}
    return {"name": name, **{key: value for key, value in asdict(task).items() if key in kept}}


def validation_figures(
    task: Task, target_NY: np.ndarray | None = None, predicted_NP: np.ndarray | None = None
) -> dict[str, float]:
    """Return figures by name, nan where undefined: `auroc`, then `auroc_<label>` and others.

    All are nan if a prediction is not finite, for it has no rank; without slides, only names count.
    """
    if target_NY is None or not np.isfinite(predicted_NP).all():
        target_NY, predicted_NP = np.empty((0, task.width)), np.empty((0, len(task.predictions)))
    groups = task.measure(target_NY, predicted_NP, np.ones((1, len(target_NY))))
    first = next(iter(groups))
    return {
        figure if group == first else f"{figure}_{group}": float(value_B[0])
        for group, figures in groups.items()
        for figure, value_B in figures.items()
    }


def _kind(name: object) -> type[Task]:
    if name not in tuple(TASKS):
        raise TaskError(
            f"data.task {name!r} is none of {', '.join(TASKS)}.{did_you_mean(name, TASKS)}"
        )
    return TASKS[name]
