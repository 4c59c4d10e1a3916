"""The linear probe: a linear model of a slide's mean frozen feature, by the task's own loss.

It asks whether the answer is a direction of the features. Means are standardised by the training
split, and the probe minimises

    C N loss(x W + b) + |W|^2 / 2

over the N training slides that are known: logistic regression of 0 and 1 and of classes, ridge
regression of values, discrete-time hazards, or Cox's whole partial likelihood. C is chosen on
validation by the task's figure and then by its loss, for each logit that has a column of its own
and else for all together. With `by_loss` it is the loss of all cases that a fit has not seen: those
of validation, and those of training in turn, a fifth at a time. The problem is convex: no seed, no
epochs.

Price: 15 fits, for 300 slides of 1536 features together 0.2 s a value, 0.5 s a label, 1 s for three
    classes, 3 s with Cox and 10 s with four hazards, on one core; `by_loss` takes six times that.
Source: L-BFGS as scipy has it; the strengths are spread as in Kornblith et al. 2019
    (arXiv 1805.08974), log-spaced and chosen on validation.

Shapes: D features, R of them once turned to the N slides' own directions, E with a bias; K logits,
    J of them fitted together; N slides; Y numbers of a target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from tapfm.frozen.fitter import CPU, undisturbed, validation_score
from tapfm.frozen.frozen_slide import (
    FitError,
    FrozenSlide,
    check_slides,
    feature_statistics,
    mean_tiles,
)
from tapfm.tasks import Task

STRENGTHS = tuple(np.logspace(-5, 2, 15).tolist())  # C, as scikit-learn names it
FOLDS = 5
# Logits are then scikit-learn's to 1e-4; a memory of 50 steps halves their number.
STOP = {"gtol": 1e-8, "ftol": 1e-15, "maxcor": 50, "maxiter": 10_000, "maxfun": 20_000}


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe."""

    weight_KD: Tensor
    bias_K: Tensor
    mean_D: Tensor
    std_D: Tensor
    chosen: tuple[float, ...]
    """C of each label, or one for all logits."""
    figure: float
    """The task's figure on validation; nan where it is undefined there."""
    task: Task

    def predict(self, slide: FrozenSlide) -> tuple[Tensor, None]:
        """Return the task's prediction (P,); there are no tile weights."""
        return self.task.predict(self.logits(slide)[0]), None

    def logits(self, slide: FrozenSlide) -> tuple[Tensor, None]:
        """Return logits (K,); there are no tile weights."""
        x_D = (slide.z_TD.mean(0) - self.mean_D) / self.std_D
        return self.weight_KD @ x_D + self.bias_K, None

    def describe(self) -> str:
        """Return one line for the log."""
        strengths = ", ".join(f"{strength:.1g}" for strength in self.chosen)
        return f"chosen on validation: C {strengths}, {self.task.title} {self.figure:.3f}"


@undisturbed(CPU)
def fit_linear_probe(
    train: Sequence[FrozenSlide],
    val: Sequence[FrozenSlide],
    task: Task,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    by_loss: bool = False,
    as_chosen: Sequence[float] = (),
) -> LinearProbe:
    """Return the linear probe.

    Args:
        train: fitted on, and the source of standardisation.
        val: chooses the strengths.
        task: target and loss.
        seed: not used: the problem is convex.
        strengths: candidates for C.
        by_loss: choose them by the loss of cases that a fit has not seen; the figure, which comes
            first otherwise, does not see how confident a wrong prediction is.
        as_chosen: the strengths that another probe of these slides chose; none chooses anew.

    Raises:
        FitError: a label has one value only in `train`, or slides are empty or of unequal width.
    """
    check_slides(train, val, task)
    train, val = mean_tiles(train), mean_tiles(val)
    mean_D, std_D = feature_statistics(train)
    (x_ND, y_NY), (val_x_ND, val_y_NY) = (_arrays(part, mean_D, std_D) for part in (train, val))
    loss = task.loss().double().eval()
    train_cases, val_cases = ([slide.case_id for slide in part] for part in (train, val))
    share = len({*val_cases}) / len({*val_cases, *train_cases})
    chosen = []
    # scipy's vectors are short: a second thread of its own takes six times the processor time
    with threadpool_limits(1, "blas"):
        u_NR, s_R, turn_RD = torch.linalg.svd(x_ND, full_matrices=False)
        x_NR, val_x_NR = u_NR * s_R, val_x_ND @ turn_RD.T
        found_KE = x_NR.new_zeros(len(task.labels), len(s_R) + 1)
        for place, (name, of_J, its_Y) in enumerate(_apart(task)):
            y, val_y = (torch.where(its_Y, each, torch.nan) for each in (y_NY, val_y_NY))
            _check_values(name, y)
            tried = as_chosen[place : place + 1] or strengths
            folds = _folds(train_cases, y) if by_loss and len(tried) > 1 else []
            now_KE, best_score = torch.zeros_like(found_KE), None
            for strength in tried:
                now_KE[of_J] = _solve(x_NR, y, loss, of_J, strength, now_KE)
                _, score = validation_score(_logits(val_x_NR, now_KE), val_y, task, loss)
                if by_loss:
                    figure, minus_loss = score
                    unseen = _unseen_loss(x_NR, y, loss, of_J, strength, folds, now_KE)
                    if math.isfinite(unseen):  # not so without folds, or a fit without an event
                        minus_loss = share * minus_loss - (1 - share) * unseen
                    score = minus_loss, figure
                if best_score is None or score > best_score:
                    best, best_score, found_KE[of_J] = strength, score, now_KE[of_J]
            chosen.append(best)
        figure, _ = validation_score(_logits(val_x_NR, found_KE), val_y_NY, task, loss)
    weight_KD, bias_K = found_KE[:, :-1] @ turn_RD, found_KE[:, -1]
    parts = weight_KD.to(mean_D), bias_K.to(mean_D), mean_D, std_D
    return LinearProbe(*parts, tuple(chosen), figure, task)


def _apart(task: Task) -> Iterator[tuple[str, list[int], Tensor]]:
    """Yield what is fitted alone: its name, its logits' numbers, and a mask (Y,) of its target."""
    place_Y = torch.arange(task.width)
    if task.targets == task.labels:
        for k, name in enumerate(task.labels):
            yield name, [k], place_Y == k
    else:  # classes, or bins of time, that share a target; a slide's number says nothing here
        yield ", ".join(task.targets), [*range(len(task.labels))], place_Y < len(task.targets)


def _folds(cases: Sequence[str], y_NY: Tensor) -> list[Tensor]:
    """Return masks (N,) of whole cases, a fold each; none where a fit would lack a value."""
    turn = {case: n % FOLDS for n, case in enumerate(sorted(set(cases)))}
    of_N = torch.tensor([turn[case] for case in cases])
    folds = [of_N == fold for fold in range(min(FOLDS, len(turn)))]
    kept = (y_NY[~fold_N] for fold_N in folds)
    enough = all(len(each[~each.isnan()].unique()) > 1 for each in kept)
    return folds if len(folds) > 1 and enough else []


def _unseen_loss(
    x_NR: Tensor, y_NY: Tensor, loss: nn.Module, of_J: list[int], strength: float,
    folds: Sequence[Tensor], start_KE: Tensor,
) -> float:  # fmt: skip
    """Return the loss of training slides, each under the fit to the other folds; or nan."""
    logits_NK = x_NR.new_zeros(len(x_NR), len(start_KE))
    for fold_N in folds:
        fit_KE = torch.zeros_like(start_KE)
        rest_N = ~fold_N
        fit_KE[of_J] = _solve(x_NR[rest_N], y_NY[rest_N], loss, of_J, strength, start_KE)
        logits_NK[fold_N] = _logits(x_NR[fold_N], fit_KE)
    return float(loss(logits_NK, y_NY)) if folds else math.nan


def _logits(x_NR: Tensor, found_KE: Tensor) -> Tensor:
    """Return logits (N, K); the last column of `found_KE` is the bias."""
    return x_NR @ found_KE[:, :-1].T + found_KE[:, -1]


def _solve(
    x_NR: Tensor, y_NY: Tensor, loss: nn.Module, of_J: list[int], strength: float, start_KE: Tensor
) -> Tensor:
    """Return weights and biases (J, E) at the minimum; where the search starts only saves time.

    It searches in units in which ridge regression's valley is round, and others' nearly so:
    without them it takes several times as long.
    """
    known = int((~y_NY.isnan()).any(1).sum())
    unit_R = ((x_NR.square().sum(0) + 1 / strength) / known).rsqrt()
    unit_E = torch.cat([unit_R, unit_R.new_ones(1)])
    of_J = torch.tensor(of_J)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        now_JE = torch.from_numpy(flat).view(len(of_J), -1).requires_grad_()
        weight_JE = now_JE * unit_E
        penalty = weight_JE[:, :-1].square().sum() / (2 * strength * known)
        logits_NK = _logits(x_NR, torch.zeros_like(start_KE).index_copy(0, of_J, weight_JE))
        total = loss(logits_NK, y_NY) + penalty
        (slope_JE,) = torch.autograd.grad(total, now_JE)
        return total.item(), slope_JE.flatten().numpy()

    start = (start_KE[of_J] / unit_E).flatten().numpy()
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=STOP).x
    return torch.from_numpy(found).view(len(of_J), -1) * unit_E


def _arrays(slides: Sequence[FrozenSlide], mean_D: Tensor, std_D: Tensor) -> tuple[Tensor, Tensor]:
    """Return standardised features (N, D) and targets (N, Y), float64."""
    x_ND = (torch.cat([slide.z_TD for slide in slides]) - mean_D) / std_D
    return x_ND.double().cpu(), torch.stack([slide.target_Y for slide in slides]).double().cpu()


def _check_values(name: str, y_NY: Tensor) -> None:
    """Raise a FitError if a target has fewer than two values."""
    known = y_NY[~y_NY.isnan()]
    if len(known.unique()) < 2:
        found = f"all {known[0].item():g}" if len(known) else "none"
        raise FitError(
            f"{name}: {len(known)} known training slides, {found}; a probe needs two values. Were "
            "slides skipped? Add slides, or leave the label out."
        )
