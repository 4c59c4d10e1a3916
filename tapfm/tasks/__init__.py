"""What is to be predicted: one file a task, one small contract.

    losses.py  BCE and others, unknown labels masked
    cox.py     Cox's partial likelihood at one slide a step
    multilabel.py  labels of 0 and 1, each for itself
    multiclass.py  one of several classes
    regression.py  numbers
    survival.py    times to an event: hazards, or Cox's partial likelihood
    columns.py     what the two share whose columns are each a target

A task says what a cohort's label columns become (`slides.cohort.targets` reads them), how many
logits the model has, by what loss they learn, what is said of a slide, and how well it was said.
The training step knows none of this: it calls the loss. What comes from data, such as class weights
or the edges of bins, comes from the training split alone and is part of the task, so a saved model
carries it.

Adding a task is a file with a frozen dataclass that has what `Task` names, a row in `TASKS`, and
how its columns are read, in `slides.cohort.targets`.

Shapes: N slides, K logits, Y numbers of a target, P predicted numbers, B draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from tapfm.tasks.multiclass import Multiclass
from tapfm.tasks.multilabel import Multilabel
from tapfm.tasks.regression import Regression
from tapfm.tasks.survival import Survival

__all__ = ["TASKS", "Task", "TaskError", "learn_task", "make_task", "task_config", "watched"]

TASKS = {
    "multilabel": Multilabel,
    "multiclass": Multiclass,
    "regression": Regression,
    "survival": Survival,
}


class TaskError(ValueError):
    """A task cannot be as it is asked for."""


class Task(Protocol):
    """What the trainer asks of a task. Its fields are plain numbers, names and tuples of them."""

    labels: tuple[str, ...]
    """Names of the K logits."""
    selects: str
    """The figure of the first group of `measure` by which the best weights are chosen."""
    title: str
    """What that figure is, in words."""

    @property
    def truth(self) -> tuple[str, ...]:
        """Names of the columns of the table, in order."""

    @property
    def width(self) -> int:
        """Y, how many numbers a target has."""

    @property
    def said(self) -> tuple[str, ...]:
        """Names of the P numbers that are predicted."""

    def loss(self) -> nn.Module:
        """(K,) or (N, K) logits and (Y,) or (N, Y) targets to one number."""

    def predict(self, logits_NK: Tensor) -> Tensor:
        """(N, P) or (P,): probabilities, values or risks."""

    def spell(self, target_Y: np.ndarray) -> list[str]:
        """A target as the table has it, blank where unknown."""

    def parse(self, texts: Sequence[str]) -> list[float]:
        """A target from what `spell` wrote."""

    def unweighted(self) -> Task:
        """The same, with a loss that takes every slide as it comes."""

    def strata(self, target_NY: np.ndarray) -> list[tuple[float, list[np.ndarray]]]:
        """Families of groups of slides to be drawn evenly from, see `slides.streaming.balance`."""

    def measure(
        self, target_NY: np.ndarray, said_NP: np.ndarray, times_BN: np.ndarray
    ) -> dict[str, dict[str, np.ndarray]]:
        """How good predictions are: group -> figure -> (B,) values, nan where undefined.

        Args:
            target_NY: what is known.
            said_NP: what was predicted.
            times_BN: how often each slide takes part in each draw; ones are the slides as they are.
        """

    def compared(self, target_NY: np.ndarray, times_BN: np.ndarray) -> dict[str, np.ndarray]:
        """What the figure `selects` is a share of: pairs that can be compared, or a spread, (B,).

        By group of `measure`, but for one that is the mean of the others. Folds of a
        cross-validation are put together by it.
        """


def learn_task(
    task: str | Mapping[str, Any],
    names: Sequence[str],
    classes: Sequence[str],
    target_NY: np.ndarray,
) -> Task:
    """A task by name, or by name and options, with what it takes from the training split.

    Args:
        task: as in a config.
        names: of the label columns.
        classes: of a multi-class label.
        target_NY: of the training slides.

    Raises:
        TaskError: no such task or option, or the training split does not tell enough.
    """
    options = {"name": task} if isinstance(task, str) else dict(task)
    name = options.pop("name", None)
    if name not in TASKS:
        raise TaskError(f"data.task {name!r} is none of {', '.join(TASKS)}")
    kind = TASKS[name]
    unknown = sorted(options.keys() - set(kind.options))
    if unknown:
        raise TaskError(
            f"data.task {name}: unknown {', '.join(unknown)}; there are "
            f"{', '.join(kind.options) or 'no options'}"
        )
    try:
        return kind.learn(tuple(names), tuple(classes), np.asarray(target_NY, float), **options)
    except ValueError as fault:
        raise TaskError(f"data.task {name}: {fault}") from fault


def make_task(spec: Mapping[str, Any], labels: Sequence[str]) -> Task:
    """A task as `task_config` wrote it, in the model_config of a model with these logits."""
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in spec.items()}
    kind = TASKS[given.pop("name")]
    return kind(labels=tuple(labels), **given)


def task_config(task: Task) -> dict[str, Any]:
    """Name and fields, all but the labels: what a model_config says of a task."""
    name = next(name for name, kind in TASKS.items() if isinstance(task, kind))
    told = {field.name for field in fields(task)} - {"labels"}
    return {"name": name, **{key: value for key, value in asdict(task).items() if key in told}}


def watched(
    task: Task, target_NY: np.ndarray | None = None, said_NP: np.ndarray | None = None
) -> dict[str, float]:
    """Figures of validation by name, nan where undefined: `auroc`, then `auroc_<label>` and others.

    All are nan where a prediction is not finite, for it has no rank; without slides, their names.
    """
    if target_NY is None or not np.isfinite(said_NP).all():
        target_NY, said_NP = np.empty((0, task.width)), np.empty((0, len(task.said)))
    groups = task.measure(target_NY, said_NP, np.ones((1, len(target_NY))))
    first = next(iter(groups))
    return {
        figure if group == first else f"{figure}_{group}": float(value_B[0])
        for group, figures in groups.items()
        for figure, value_B in figures.items()
    }
