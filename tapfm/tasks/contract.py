"""The contract of a task: its logits, their loss, what is predicted and how it is judged.

A task is a frozen dataclass of plain numbers, names and tuples of them. What it takes from data,
such as class weights or the edges of time bins, comes from the training split alone (`learn`), and
a saved model carries it.

Shapes: N slides, K logits, Y numbers of a target, P predicted numbers, B bootstrap draws.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from torch import Tensor, nn


class Task(ABC):
    """Base of all tasks."""

    labels: tuple[str, ...]
    """Names of the K logits."""
    monitor: ClassVar[str]
    """Figure of the first group of `measure` that chooses the best weights; higher is better."""
    title: ClassVar[str]
    """That figure in words, for tables."""
    report: ClassVar[str]
    """How results are shown: a key of `tapfm.reports.html.task_reports.REPORTS`."""
    chance: ClassVar[float] = 0.5
    """Value of `monitor` for random predictions; nan if there is none."""
    undefined: ClassVar[str] = "undefined"
    """What tables say where `monitor` is undefined."""
    mixes_slides: ClassVar[bool] = False
    """Whether there is a `mixed_loss`."""
    loss_has_memory: bool = False
    """Whether the loss keeps numbers of earlier slides, so that a step may compute it only once."""

    @classmethod
    @abstractmethod
    def learn(
        cls, names: tuple[str, ...], classes: tuple[str, ...], target_NY: np.ndarray, **options
    ) -> Task:
        """Return the task, with what it takes from the training split.

        A subclass declares its options (`data.task: {name: ..., option: value}`) as keyword-only
        arguments. The other arguments are those of `tapfm.tasks.learn_task`.

        Raises:
            SettingsError: an option cannot be, or the training split does not tell enough.
        """

    @property
    @abstractmethod
    def targets(self) -> tuple[str, ...]:
        """Return the names of the table's columns that are predicted, in order."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Return Y."""

    @property
    @abstractmethod
    def predictions(self) -> tuple[str, ...]:
        """Return the names of the P predicted numbers."""

    @abstractmethod
    def loss(self) -> nn.Module:
        """Return the loss: (K,) or (N, K) logits and (Y,) or (N, Y) targets to one number."""

    def mixed_loss(self, logits_K: Tensor, target_NY: Tensor) -> Tensor:
        """Return the loss of a bag with tiles of several slides, of `mixes_slides` tasks alone.

        Args:
            logits_K: of the bag.
            target_NY: of its slides.
        """
        raise NotImplementedError

    @abstractmethod
    def predict(self, logits_NK: Tensor) -> Tensor:
        """Return predictions (N, P), or (P,) of (K,): probabilities, values or risks."""

    @abstractmethod
    def format_target(self, target_Y: np.ndarray) -> list[str]:
        """Return the cells of a target, one a column of `targets`; blank where unknown."""

    @abstractmethod
    def parse(self, texts: Sequence[str]) -> list[float]:
        """Return the target (Y,) that `format_target` wrote; nan where blank."""

    def unweighted(self) -> Task:
        """Return the task with a loss that weights all slides alike; itself without weights."""
        return self

    @abstractmethod
    def strata(self, target_NY: np.ndarray) -> list[tuple[float, list[np.ndarray]]]:
        """Return (weight, groups) pairs; slides are drawn evenly from groups, arrays of numbers n.

        `slides.streaming.balance` draws a pair by its weight, then a group, then a slide.
        """

    @abstractmethod
    def measure(
        self, target_NY: np.ndarray, predicted_NP: np.ndarray, times_BN: np.ndarray
    ) -> dict[str, dict[str, np.ndarray]]:
        """Return group -> figure -> (B,) values, nan where undefined.

        If there are several groups, the first is the mean of the others.

        Args:
            target_NY: targets.
            predicted_NP: predictions.
            times_BN: how often each draw has each slide; a row of ones is the split itself.
        """

    @abstractmethod
    def fold_weights(self, target_NY: np.ndarray, times_BN: np.ndarray) -> dict[str, np.ndarray]:
        """Return the weight (B,) of a fold in the mean of `monitor` over folds, by group.

        Comparable pairs for AUROC and concordance, sum of squares for R². The group that is a mean
        of others has none.
        """

    def notes(self) -> list[str]:
        """Return notes that a reader of the figures needs."""
        return []
