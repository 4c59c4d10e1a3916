"""How much of the encoder's change is kept: a share `a`, chosen on validation.

After the last epoch the encoder is put at W(a) = W0 + a (W - W0), a slide model is fitted to each
a's features (`slide_model_for`), and the calibrated validation loss decides by the rule of one
standard error, toward 0: the smallest a whose loss is no more above the least than the standard
error of that difference, from a paired bootstrap of whole cases, and no more than the loss at 0. So
no saved model is worse on validation than the frozen encoder with a slide model of its own, and
where there is nothing to learn a is 0.

Two things keep few patients from deciding by chance. How strong a solved head is held is chosen
once, on the frozen features, and is the same at every a: training cases flatter an encoder that
has learned from them. And logits are calibrated before their loss is taken (`calibrated`): the mean
of five patients' logits says nothing of an encoder. Of heads at one a the loss is taken as it is.

W is the best epoch or the mean of the weights (`recipe.weight_average`), whichever has the lower
validation loss at a = 1; the best epoch where they tie. A best epoch from before the encoder moved,
such as the warm start, is no W: its head is all that differs from the frozen model. Where a change
has no scale, as with prompts, a is 0 or 1.

Price: a forward pass over training bags and val split for each a, twice for a = 1 where both are
tried, and fits on their features.
Source: Wortsman et al. 2022 (WiSE-FT, arXiv 2109.01903); Breiman et al. 1984 (CART) for the rule.
Differs: a slide model is fitted at each a; the difference's own error is used, since losses at
    neighbouring a rise and fall together.

Shapes: N slides, K logits, Y numbers of a target, P points of the curve, B draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning as L
import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from tapfm.adapt.interpolation import between, put
from tapfm.adapt.strategies import scaled_parts
from tapfm.data.bag import Bag
from tapfm.distributed import gather
from tapfm.encoders import backbones
from tapfm.frozen.cached_features import cache_splits
from tapfm.frozen.fitter import CPU, undisturbed, val_logits
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.frozen.warm_heads import figures, fit_slide_model, solve_head
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.slide_model.aggregators.contract import Aggregator
from tapfm.slide_model.model import SlideModel
from tapfm.stats.bootstrap import with_point
from tapfm.tasks import Task

DRAWS = 500
UNMOVED = "the best epoch is from before the encoder moved"
TIE = 1e-6  # of loss: more than the search for scales and shifts leaves open
STOP = {"gtol": 1e-9, "ftol": 1e-15, "maxiter": 10_000, "maxfun": 20_000}
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Point:
    """One share of the change, and what validation says of it."""

    a: float
    loss: float
    """Loss of all validation slides: calibrated, with the slide model fitted at this a."""
    error: float
    """Standard error of the difference to the least loss of the curve."""
    figure: float
    """The task's figure."""
    head: str
    """How the slide model was fitted."""


@dataclass(frozen=True)
class Interpolation:
    """The share of the change that is saved, and why."""

    a: float
    source: str
    """What W is: `best epoch` or `mean of the weights`."""
    reason: str
    curve: tuple[Point, ...]

    def facts(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


def one_standard_error(losses_PB: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the place of the chosen point, and the error of each one's difference to the least.

    Args:
        losses_PB: losses of the points, from the smallest change to the largest; column 0 is of the
            slides as they are, the others of bootstrap draws, the same for all points.
    """
    loss_P, drawn_PB = losses_PB[:, 0], np.nan_to_num(losses_PB[:, 1:])
    best = int(np.argmin(loss_P))
    says_B = (drawn_PB != 0).any(axis=0)  # a draw without an event does not
    above_PB = (drawn_PB - drawn_PB[best])[:, says_B]
    error_P = above_PB.std(axis=1, ddof=1) if says_B.sum() > 1 else np.zeros(len(loss_P))
    within_P = (loss_P <= loss_P[best] + error_P + TIE) & (loss_P <= loss_P[0] + TIE)
    return int(np.argmax(within_P)), error_P


class Candidates:
    """The models of a run at several shares of its change, one after the other.

    Args:
        module: the run, its encoder and aggregator as they are to be judged.
        train: gives the training bags, anew at each call.
        val: gives the validation bags, likewise.
        task: target and loss, with class weights.
        start: the encoder's learned parameters before training.
        seed: of fits and draws.
    """

    def __init__(
        self, module: L.LightningModule, train: Callable[[], Iterable[Bag]],
        val: Callable[[], Iterable[Bag]], task: Task, start: Weights, seed: int,
    ):  # fmt: skip
        self.module, self.train, self.val, self.task = module, train, val, task
        self.start, self.seed = start, seed
        self.scaled = scaled_parts(module.slide_model.strategy)
        self.trained = deepcopy(module.slide_model.aggregator).cpu()

    def measure(
        self, end: Weights, a: float, strengths: Sequence[float] = ()
    ) -> tuple[Point, Aggregator, np.ndarray, tuple[float, ...]]:
        """Return a share's point, its slide model, and its losses (B,) on the cases' draws.

        Comes with the strengths of its solved head: those given, or chosen where none are.
        """
        model = self.module.slide_model
        if a == 0 and not self.scaled:
            model = frozen_model(model, self.start).to(model.device)
        else:
            put(model.encoder.vit, between(self.start, end, a, self.scaled))
        chunk, bags = self.module.chunk, (self.train(), self.val())
        train, val = cache_splits(model, chunk, *bags, f"a {a:g}")
        trained = self.trained if a > 0 else None
        with undisturbed(CPU):
            aggregator, head, strengths = slide_model_for(
                trained, model, train, val, self.task, self.seed, strengths
            )
        figure, *_ = figures(aggregator, val, self.task)
        losses_B = drawn_losses(aggregator, val, self.task, self.seed)
        return Point(a, float(losses_B[0]), 0.0, figure, head), aggregator, losses_B, strengths


def interpolate(
    candidates: Candidates, ends: Mapping[str, Weights], shares: Sequence[float]
) -> tuple[Interpolation, dict[float, Aggregator], Weights]:
    """Return the choice, the slide model of each share, and W.

    Args:
        candidates: measures a share.
        ends: what W may be, by name; without any, a is 0.
        shares: a's to try, from 0 to 1, both included.
    """
    *frozen, strengths = candidates.measure(candidates.start, 0.0)
    if not ends:
        point, aggregator, _ = frozen
        choice = Interpolation(0.0, "best epoch", UNMOVED, (point,))
        return choice, {0.0: aggregator}, candidates.start
    full = {name: candidates.measure(end, 1.0, strengths)[:3] for name, end in ends.items()}
    least = min(point.loss for point, *_ in full.values())
    source = next(name for name, (point, *_) in full.items() if point.loss <= least + TIE)
    between_a = sorted(a for a in shares if 0 < a < 1) if candidates.scaled else []
    partly = [candidates.measure(ends[source], a, strengths)[:3] for a in between_a]
    points, aggregators, losses = zip(frozen, *partly, full[source], strict=True)
    chosen, error_P = one_standard_error(np.stack(losses))
    curve = tuple(replace(point, error=float(e)) for point, e in zip(points, error_P, strict=True))
    reason = why(curve, curve[chosen])
    if not candidates.scaled:
        reason += "; this strategy's change has no scale, so a is 0 or 1"
    heads = {point.a: aggregator for point, aggregator in zip(points, aggregators, strict=True)}
    return Interpolation(curve[chosen].a, source, reason, curve), heads, ends[source]


def why(curve: Sequence[Point], taken: Point) -> str:
    """Return why a point of the curve is the one that is saved."""
    least = min(curve, key=lambda point: point.loss)
    if taken is least:
        return f"validation loss {taken.loss:.3f} is the least"
    if taken.loss - least.loss <= TIE:
        return f"validation loss {taken.loss:.3f} is no more than at a = {least.a:g}"
    return (
        f"validation loss {taken.loss:.3f} is above the least ({least.loss:.3f} at a = "
        f"{least.a:g}) by less than its standard error, {taken.error:.3f}"
    )


def slide_model_for(
    trained: Aggregator | None, model: SlideModel, train: Sequence[FrozenSlide],
    val: Sequence[FrozenSlide], task: Task, seed: int, strengths: Sequence[float],
) -> tuple[Aggregator, str, tuple[float, ...]]:  # fmt: skip
    """Return the slide model with the lowest validation loss on features, on the CPU.

    Tried are a new one, and the one that the run trained with its head solved anew. The frozen
    encoder is given a new one alone (`trained` None): attention that learned together with an
    encoder has seen through it what the frozen one does not show. Comes with the lines that say how
    it was fitted, and the strengths of its solved head.
    """
    torch.manual_seed(seed)
    config = model.model_config
    anew = make_aggregator(config.aggregator, model.encoder.dim, len(config.labels))
    lines, strengths = fit_slide_model(anew.to(model.device), train, val, task, seed, strengths)
    anew, found = anew.cpu(), "; ".join(lines)
    if trained is None or not trained.learns_weights:
        return anew, found, strengths
    kept = deepcopy(trained)
    if kept.linear_head:
        solve_head(kept, train, val, task, strengths)
    *_, loss = figures(kept, val, task)
    *_, best = figures(anew, val, task)
    if loss < best:
        found = f"attention as the run trained it, validation loss {loss:.3f}"
        return kept, found, strengths
    return anew, found, strengths


def drawn_losses(
    aggregator: Aggregator, val: Sequence[FrozenSlide], task: Task, seed: int
) -> np.ndarray:
    """Return the calibrated loss of all validation slides (first), and of draws of whole cases."""
    cases = sorted(
        each for share in gather([(s.slide_id, s.case_id) for s in val]) for each in share
    )
    logits_NK, target_NY = val_logits(aggregator, val)
    loss = task.loss().eval()
    logits_NK = calibrated(logits_NK, target_NY, loss)
    times_BN = torch.from_numpy(with_point([case for _, case in cases], DRAWS, seed).astype(int))
    drawn = (
        (x.repeat_interleave(times_N, 0) for x in (logits_NK, target_NY)) for times_N in times_BN
    )
    return np.array([float(loss(*each)) for each in drawn])


def calibrated(logits_NK: Tensor, target_NY: Tensor, loss: nn.Module) -> Tensor:
    """Return logits, each scaled and shifted so that their loss is least; no scale is below 0.

    Source: vector scaling, Guo et al. 2017 (arXiv 1706.04599).
    """
    logits_NK, target_NY = logits_NK.double(), target_NY.double()
    count = logits_NK.shape[1]

    def moved(flat: np.ndarray) -> tuple[Tensor, Tensor]:
        both_2K = torch.from_numpy(flat).view(2, count).requires_grad_()
        return both_2K, both_2K[0] * logits_NK + both_2K[1]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        both_2K, moved_NK = moved(flat)
        total = loss(moved_NK, target_NY)
        (slope_2K,) = torch.autograd.grad(total, both_2K)
        return total.item(), slope_2K.flatten().numpy()

    start = np.repeat([1.0, 0.0], count)
    bounds = [(0, None)] * count + [(None, None)] * count
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=STOP).x
    return moved(found)[1].detach()


def frozen_model(model: SlideModel, start: Weights) -> SlideModel:
    """Return the model with the encoder as it came, strategy frozen, on the CPU."""
    config, encoder = model.model_config, model.encoder
    vit = backbones.build(encoder.row, config.tile_px)
    there = {**encoder.vit.state_dict(), **start}
    vit.load_state_dict({name: there[name] for name in vit.state_dict()})
    frozen = SlideModel(
        replace(config, strategy={"name": "frozen"}),
        backbones.Encoder(vit, encoder.row, merge=config.merge_tokens),
    )
    frozen.round_weights()
    return frozen.eval()
