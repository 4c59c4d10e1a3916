"""Heads of the warm start, fitted to cached features: a solved linear probe, trained attention.

A linear probe sees a slide's embedding before attention has learned. Where two tiles in a hundred
carry the label that is not enough to begin with, and attention that learns inside the run pays the
encoder's forward pass for every look. So attention and head are also trained here, by the fitter:
an epoch is one view of every slide; rate and epoch are chosen by validation loss.

Shapes: T tiles, D features, K labels, N slides, Y numbers of a target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from tapfm.distributed import gather
from tapfm.frozen.fitter import (
    BATCH,
    Candidate,
    Fitted,
    Recipe,
    Schedule,
    evaluating,
    fit,
    val_logits,
    validation_score,
)
from tapfm.frozen.frozen_slide import FrozenSlide, feature_statistics, standardise
from tapfm.frozen.linear_probe import LinearProbe, fit_linear_probe
from tapfm.slide_model.aggregators.contract import Aggregator
from tapfm.tasks import Task

GRID = (Candidate(1e-2), Candidate(3e-3), Candidate(1e-3))
SCHEDULE = Schedule(epochs=50, patience=15)


def fit_slide_model(
    aggregator: Aggregator,
    train: Sequence[FrozenSlide],
    val: Sequence[FrozenSlide],
    task: Task,
    seed: int,
    strengths: Sequence[float] = (),
) -> tuple[list[str], tuple[float, ...]]:
    """Fit a new slide model to features, and leave it on the CPU.

    Features are standardised. The head is a solved linear probe, or attention and head are trained,
    whichever has the lower validation loss.

    Args:
        aggregator: at its start, on the device to train on; it is changed.
        train: slides of this process, one or more views of each.
        val: slides of this process.
        task: target and loss.
        seed: of the order.
        strengths: of the probe; none chooses them.

    Returns:
        Lines for the log, and the probe's strengths; none without a linear head.
    """
    standardise(aggregator, *feature_statistics(train, shared=True))
    fresh = deepcopy(aggregator)
    aggregator.cpu()
    lines, best = [], math.inf
    if aggregator.linear_head:
        probe = solve_head(aggregator, train, val, task, strengths)
        strengths = probe.chosen
        *_, best = figures(aggregator, val, task)
        lines.append(f"a linear probe, {probe.describe()}, validation loss {best:.3f}")
    if aggregator.learns_weights:
        fitted = fit_attention(fresh, train, val, task, seed)
        chosen = f"lr {fitted.chosen.lr:g}, epoch {fitted.epoch + 1}"
        lines.append(f"attention trained on them, {chosen}, validation loss {fitted.loss:.3f}")
        if fitted.loss < best:
            aggregator.load_state_dict(fitted.model.state_dict())
            lines[-1] += ", which is taken"
    state = gather(aggregator.state_dict())[0]  # rounding parts processes
    aggregator.load_state_dict(state)
    return lines, tuple(strengths)


@torch.no_grad()
def embed(aggregator: Aggregator, mine: Sequence[FrozenSlide]) -> list[FrozenSlide]:
    """Return the slides of all processes by id, each as one tile: its embedding, on the CPU."""
    device = aggregator.center_D.device
    with evaluating(aggregator):
        embedded = [
            FrozenSlide.of(s.slide_id, s.case_id, b_E[None].cpu(), s.target_Y)
            for s, b_E in ((s, aggregator(s.on(device)).embedding_E) for s in mine)
        ]
    return sorted((each for share in gather(embedded) for each in share), key=lambda s: s.slide_id)


@torch.no_grad()
def solve_head(
    aggregator: Aggregator, train: Sequence[FrozenSlide], val: Sequence[FrozenSlide], task: Task,
    strengths: Sequence[float] = (),
) -> LinearProbe:  # fmt: skip
    """Put a linear probe of the slides' embeddings in the aggregator's head, and return it.

    Args:
        aggregator: with `linear_head`; it is changed.
        train: slides of this process, fitted on.
        val: slides of this process; they choose the strength, by loss.
        task: target and loss.
        strengths: of the probe; none chooses them.

    Raises:
        FitError: a label has one value only in `train`.
    """
    probe = fit_linear_probe(
        embed(aggregator, train), embed(aggregator, val), task, by_loss=True, as_chosen=strengths
    )
    weight_KD = probe.weight_KD / probe.std_D
    aggregator.head.weight.copy_(weight_KD)
    aggregator.head.bias.copy_(probe.bias_K - weight_KD @ probe.mean_D)
    return probe


def fit_attention(
    fresh: Aggregator,
    train: Sequence[FrozenSlide],
    val: Sequence[FrozenSlide],
    task: Task,
    seed: int,
) -> Fitted:
    """Return the best of copies of a slide model that are trained on slides, on its device.

    Args:
        fresh: the model at its start, features standardised; it is not changed.
        train: slides of this process, one or more views of each.
        val: slides of this process.
        task: target and loss.
        seed: of the order.
    """
    recipe, device = Recipe(GRID, SCHEDULE, by_loss=True, order=by_name), fresh.center_D.device
    return fit(lambda _: deepcopy(fresh), train, val, task, recipe, seed, device=device)


def by_name(names: Sequence[str], seed: int) -> Iterator[Sequence[Tensor]]:
    """Yield each epoch's batches of about `BATCH` slides: the same for any number of processes."""
    rows = torch.tensor(sorted(range(len(names)), key=names.__getitem__))
    drawn, batches = torch.Generator().manual_seed(seed), max(1, len(names) // BATCH)
    while True:
        yield rows[torch.randperm(len(names), generator=drawn)].tensor_split(batches)


@torch.no_grad()
def figures(
    aggregator: Aggregator, val: Sequence[FrozenSlide], task: Task
) -> tuple[float, float, float]:
    """Return the task's figure on validation, a slide's mean loss, and the loss of all together.

    The first two are as a run measures them; the last is what a Cox model has.
    """
    loss = task.loss().eval()
    logits_NK, target_NY = val_logits(aggregator, val)
    figure, (_, minus_together) = validation_score(logits_NK, target_NY, task, loss)
    each_N = [loss(*slide) for slide in zip(logits_NK, target_NY, strict=True)]
    return figure, float(torch.stack(each_N).mean()), -minus_together
