"""The fitter: slide models trained on frozen features by gradient descent, one loop for all.

    fitted = fit(make, train, val, task, Recipe(grid, schedule), seed)
    fitted.model, fitted.chosen, fitted.epoch, fitted.figure

For each candidate of the grid `make` gives a model, which is trained with AdamW for some epochs and
scored on validation after each; the best epoch of the best candidate is kept. Used by the frozen
baselines, the warm start, `tapfm probe` and the baselines of `tapfm pathpt`.

The result depends on the arguments only: random numbers come from `seed`, one thread computes, and
the caller's autocast and inference mode do not apply. So a fit inside a run, at the end of an
epoch, gives the numbers that it gives outside, and the run's own random numbers stay as they were.

Of several processes each gives the slides that it holds, of train and of val. Gradients are
averaged, all score the same validation logits, and all get the same model.

Shapes: T tiles of a slide, D features, K logits, N slides, Y numbers of a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slides.seeds import stable_seed
from tapfm.data.bag import Moment
from tapfm.distributed import average, gather, rank, several, world
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.slide_model.aggregators.contract import Aggregator, SlideOutput, TileSet
from tapfm.tasks import Task, validation_figures

BATCH = 8  # slides an update: steadier than one, still tens of updates an epoch
WEIGHT_DECAY = 1e-2
CPU = torch.device("cpu")


class SeveralSlides(Aggregator):
    """A slide model that takes several slides in one pass; it has one loss for all of them."""

    linear_head = False

    def outputs(self, slides: Sequence[TileSet]) -> list[SlideOutput]:
        """Return the output of each slide."""
        raise NotImplementedError

    def forward(self, tiles: TileSet) -> SlideOutput:
        """Return the output of one slide; see `Aggregator`."""
        return self.outputs([tiles])[0]


@dataclass(frozen=True)
class Candidate:
    """One point of the small grid that validation chooses from."""

    lr: float
    width: int = 0
    """Hidden units, of models that have them."""


@dataclass(frozen=True)
class Schedule:
    """How long a candidate is trained."""

    epochs: int
    patience: int
    """Epochs without a better validation score after which it stops."""


Order = Callable[[Sequence[str], int], Iterator[Iterable[Iterable[int]]]]
"""Slide ids and a seed to the batches of each epoch, as numbers of slides."""


def shuffled(names: Sequence[str], seed: int) -> Iterator[Sequence[Tensor]]:
    """Yield each epoch's batches of `BATCH` slides, drawn from torch's own random numbers.

    They are drawn between those of dropout, so this order is for one process.
    """
    while True:
        yield torch.randperm(len(names)).split(BATCH)


@dataclass(frozen=True)
class Recipe:
    """How models are trained and which of them is kept."""

    grid: Sequence[Candidate]
    schedule: Schedule
    by_loss: bool = False
    """Whether validation loss alone chooses; else the task's figure, and the loss where it ties."""
    order: Order = shuffled


@dataclass(frozen=True)
class Fitted:
    """The model kept, in eval mode."""

    model: Aggregator
    chosen: Candidate
    epoch: int
    """The epoch kept, from 0."""
    figure: float
    """The task's figure on validation at that epoch; nan where it is undefined there."""
    loss: float
    """Loss of all validation slides together at that epoch; infinite if it is not finite."""
    task: Task

    def predict(self, slide: FrozenSlide) -> tuple[Tensor, Tensor | None]:
        """Return the task's prediction (P,), and tile weights (T,) if the model has attention."""
        logits_K, weights_T = self.logits(slide)
        return self.task.predict(logits_K), weights_T

    @torch.no_grad()
    def logits(self, slide: FrozenSlide) -> tuple[Tensor, Tensor | None]:
        """Return logits (K,), and tile weights (T,) if the model has attention."""
        output = self.model(slide.on(self.model.center_D.device))
        return output.logits_K, output.weights_T if self.model.has_attention else None

    def describe(self) -> str:
        """Return one line for the log."""
        return (
            f"chosen on validation: lr {self.chosen.lr:g}, width {self.chosen.width}, "
            f"epoch {self.epoch + 1}, {self.task.title} {self.figure:.3f}"
        )


def fit(
    make: Callable[[Candidate], Aggregator], train: Sequence[FrozenSlide],
    val: Sequence[FrozenSlide], task: Task, recipe: Recipe, seed: int = 0, *,
    loss: nn.Module | None = None, device: torch.device = CPU,
) -> Fitted:  # fmt: skip
    """Return the best epoch of the best candidate.

    Args:
        make: gives a model to train, in place; called with the seed's random numbers.
        train: slides of this process; of a slide that is there several times, each epoch takes the
            next view.
        val: slides of this process; without any, the last epoch is kept.
        task: target, loss and figure.
        recipe: candidates, epochs, order, and what chooses.
        seed: of weights, order and dropout.
        loss: what is minimised; None is the task's, new for each candidate.
        device: where models are trained.
    """
    best, best_score = None, (-math.inf,)
    scored = any(gather(len(val) > 0))
    with undisturbed(device):
        for candidate in recipe.grid:
            stale, own_score = 0, (-math.inf,)
            minimised = (task.loss() if loss is None else loss).to(device)
            epochs = _epochs(make, train, minimised, recipe, candidate, seed, device)
            for epoch, model in epochs:
                figure, score = math.nan, own_score
                if scored:
                    figure, score = _score(model, val, task, minimised, recipe.by_loss)
                stale = 0 if score > own_score else stale + 1
                own_score = max(own_score, score)
                if best is None or score > best_score or not scored:
                    best_score, kept = score, deepcopy(model) if scored else model
                    best = Fitted(kept.eval(), candidate, epoch, figure, -score[-1], task)
                if scored and stale >= recipe.schedule.patience:
                    break
    assert best is not None, "an empty grid, or no epoch"
    return best


def _epochs(
    make: Callable[[Candidate], Aggregator], train: Sequence[FrozenSlide], loss: nn.Module,
    recipe: Recipe, candidate: Candidate, seed: int, device: torch.device,
) -> Iterator[tuple[int, Aggregator]]:  # fmt: skip
    """Yield each epoch's number and the model after it.

    Every process knows the order of all slides, and adds the gradients of those that it holds.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    model = make(candidate).to(device)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, candidate.lr, weight_decay=WEIGHT_DECAY)
    turns = views(gather([slide.slide_id for slide in train]))
    orders = recipe.order([*turns], seed)
    turns = [*turns.values()]
    for epoch in range(recipe.schedule.epochs):
        model.train()
        loss.train()
        for batch in next(orders):
            for parameter in learning:
                parameter.grad = torch.zeros_like(parameter)
            drawn = [turns[n][epoch % len(turns[n])] for n in batch]
            held = [train[n] for process, n in drawn if process == rank()]
            groups = [held] if isinstance(model, SeveralSlides) else [[slide] for slide in held]
            for group in filter(None, groups):
                model.set_moment(_moment(epoch, recipe.schedule.epochs, seed, group[0].slide_id))
                share = world() * len(group) / len(drawn)  # the mean over processes is taken
                (share * _loss(model, group, loss, device)).backward()
            average(learning)
            optimizer.step()
        yield epoch, model


def _moment(epoch: int, epochs: int, seed: int, slide_id: str) -> Moment:
    """Return the moment of a slide's step, whose seed is another in each epoch."""
    own = stable_seed("fitter", seed, epoch, slide_id) % 2**63
    return Moment(epoch / epochs, epoch, own, slide_id)


def _loss(
    model: Aggregator, group: Sequence[FrozenSlide], loss: nn.Module, device: torch.device
) -> Tensor:
    """Return the loss of one slide, or of all of a group if the model takes them together."""
    tiles = [slide.on(device) for slide in group]
    target_NY = torch.stack([slide.target_Y for slide in group]).to(device)
    if isinstance(model, SeveralSlides):
        return loss(torch.stack([each.logits_K for each in model.outputs(tiles)]), target_NY)
    return model.loss(tiles[0], target_NY[0], loss)


def _score(
    model: Aggregator, val: Sequence[FrozenSlide], task: Task, loss: nn.Module, by_loss: bool
) -> tuple[float, tuple[float, ...]]:
    """Return the task's figure and the score to maximise, the same in all processes."""
    logits_NK, target_NY = val_logits(model, val)
    if by_loss:
        loss = task.loss()  # a Cox loss that trained remembers other slides
    else:
        logits_NK, target_NY = (x.to(model.center_D.device) for x in (logits_NK, target_NY))
    with evaluating(loss):
        figure, score = validation_score(logits_NK, target_NY, task, loss)
    return gather((figure, score[1:] if by_loss else score))[0]


@torch.no_grad()
def val_logits(model: Aggregator, mine: Sequence[FrozenSlide]) -> tuple[Tensor, Tensor]:
    """Return logits (N, K) and targets (N, Y) of all processes' slides, on the CPU.

    One process keeps its order; several sort by slide id.
    """
    with evaluating(model):
        tiles = (slide.on(model.center_D.device) for slide in mine)
        several_slides = isinstance(model, SeveralSlides) and mine
        outputs = model.outputs([*tiles]) if several_slides else map(model, tiles)
        if model.linear_head and mine:
            logits = model.head(torch.stack([each.embedding_E for each in outputs]))
        else:
            logits = [each.logits_K for each in outputs]
    pairs = zip(mine, logits, strict=True)
    rows = [(slide.slide_id, logits_K.cpu(), slide.target_Y.cpu()) for slide, logits_K in pairs]
    rows = [row for share in gather(rows) for row in share]
    if several():
        rows.sort(key=lambda row: row[0])
    _, logits, targets = zip(*rows, strict=True)
    return torch.stack(logits), torch.stack(targets)


@torch.no_grad()
def validation_score(
    logits_NK: Tensor, target_NY: Tensor, task: Task, loss: nn.Module
) -> tuple[float, tuple[float, float]]:
    """Return the task's figure, and what is maximised: the figure, then minus the loss."""
    predicted_NP = task.predict(logits_NK.double()).cpu().numpy()
    value = validation_figures(task, target_NY.cpu().numpy(), predicted_NP)[task.monitor]
    minus_loss = -float(loss(logits_NK, target_NY))
    finite = minus_loss if math.isfinite(minus_loss) else -math.inf
    return value, (0.0 if math.isnan(value) else value, finite)


def views(slides: Sequence[Sequence[str]]) -> dict[str, list[tuple[int, int]]]:
    """Return each slide's views in the order of the first epochs: process, and its number there.

    Args:
        slides: ids of the slides that each process holds; the processes took turns.
    """
    turns = [(n, process) for process, own in enumerate(slides) for n in range(len(own))]
    found: dict[str, list[tuple[int, int]]] = {}
    for n, process in sorted(turns):
        found.setdefault(slides[process][n], []).append((process, n))
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and back in the mode it was in."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Compute in one thread with gradients and without autocast; restore random numbers after.

    The matrices are small: a second thread saves half the time on an idle machine; on a busy one
    waiting for it can cost ten times as much. And sums keep their order whatever the machine has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_num_threads(threads)
