"""Gate and head trained on remembered features, as frozen gated attention is.

A linear probe knows the mean tile. Where two tiles in a hundred carry the label that is nothing to
begin from, and a gate that learns inside the run pays the encoder's forward for every look. An
epoch is one view of every slide; rate and epoch are chosen on validation by the loss.

Shapes: D features, K labels, N slides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch

from tapfm.distributed import average, gather, rank, world
from tapfm.frozen.baselines import undisturbed
from tapfm.frozen.cached_features import CachedFeatures
from tapfm.frozen.solved_head import embed, judge
from tapfm.slide_model.aggregators.contract import Aggregator
from tapfm.tasks import Task

RATES = (1e-2, 3e-3, 1e-3)
WEIGHT_DECAY = 1e-2
BATCH = 8  # slides an update
EPOCHS, PATIENCE = 50, 15


@dataclass(frozen=True)
class Taught:
    """The best slide model that was met."""

    aggregator: Aggregator
    loss: float
    """Of all validation slides together."""
    lr: float
    epoch: int
    """From 0."""

    def describe(self) -> str:
        """One line for the log."""
        return f"lr {self.lr:g}, epoch {self.epoch + 1}, validation loss {self.loss:.3f}"


def teach(
    fresh: Aggregator,
    train: Sequence[CachedFeatures],
    val: Sequence[CachedFeatures],
    task: Task,
    seed: int,
) -> Taught:
    """Train copies of a slide model on remembered slides, where it is, and take the best.

    Args:
        fresh: as it begins, features standardised; it is not changed.
        train: this process's, one or more views of each slide.
        val: this process's; those of all choose.
        task: what is learned.
        seed: of the order.
    """
    best = Taught(fresh, math.inf, 0.0, -1)
    for lr in RATES:
        stale, own = 0, math.inf
        for epoch, aggregator in enumerate(_epochs(fresh, train, task, lr, seed)):
            *_, loss = judge(aggregator, embed(aggregator, val), task)
            loss = gather(loss)[0]  # all processes stop together
            stale, own = (0, loss) if loss < own else (stale + 1, own)
            if loss < best.loss:
                best = Taught(deepcopy(aggregator), loss, lr, epoch)
            if stale >= PATIENCE:
                break
    return best


def _epochs(
    fresh: Aggregator, train: Sequence[CachedFeatures], task: Task, lr: float, seed: int
) -> Iterator[Aggregator]:
    """The slide model after each epoch.

    Every process knows the order of all slides, and adds the gradients of those that it holds.
    """
    device, held = fresh.center_D.device, views(gather([slide.slide_id for slide in train]))
    aggregator, loss = deepcopy(fresh), task.loss().to(device).train()
    optimizer = torch.optim.AdamW(aggregator.parameters(), lr, weight_decay=WEIGHT_DECAY)
    order = torch.Generator().manual_seed(seed)
    steps = max(1, len(held) // BATCH)
    for epoch in range(EPOCHS):
        turns = [held[name][epoch % len(held[name])] for name in sorted(held)]
        with undisturbed(device):
            for chosen in torch.randperm(len(turns), generator=order).tensor_split(steps):
                for parameter in aggregator.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                for holder, n in (turns[at] for at in chosen):
                    if holder == rank():
                        y_K, seen = train[n].y_K.to(device), train[n].to(device)
                        share = world() / len(chosen)  # of which the mean over processes is taken
                        (share * aggregator.loss(seen, y_K, loss)).backward()
                average(aggregator.parameters())
                optimizer.step()
        yield aggregator


def views(slides: Sequence[Sequence[str]]) -> dict[str, list[tuple[int, int]]]:
    """Slide -> its views in the order of the first epochs: process, and which of its slides.

    Args:
        slides: of each process, as it remembers them; the processes took turns.
    """
    turns = [(n, process) for process, own in enumerate(slides) for n in range(len(own))]
    found: dict[str, list[tuple[int, int]]] = {}
    for n, process in sorted(turns):
        found.setdefault(slides[process][n], []).append((process, n))
    return found
