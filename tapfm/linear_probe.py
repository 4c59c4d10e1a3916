"""The linear probe: logistic regression on the mean of a slide's frozen features.

The plainest question about an encoder: is the answer a direction of its features? Means are
standardised by the training split, positives weighted as in training, and the L2 strength of each
label is chosen on validation, by AUROC and then by loss. The problem is convex: no seed, no epochs.

Price: 15 fits a label, together 1 s for 300 slides of 1536 features.
Source: scikit-learn's LogisticRegression (L-BFGS); the strengths are spread as in
    Kornblith et al. 2019 (arXiv 1805.08974), log-spaced and chosen on validation.

Shapes: D features, K labels, N slides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from tapfm.baselines import FeatureBag, bag_statistics, check_bags, pooled
from tapfm.metrics import auroc, macro_auroc
from tapfm.tasks.multilabel import Multilabel

STRENGTHS = tuple(np.logspace(-5, 2, 15).tolist())  # C of scikit-learn: 1 over the L2 penalty


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe."""

    weight_KD: Tensor
    bias_K: Tensor
    mean_D: Tensor
    std_D: Tensor
    chosen: tuple[float, ...]
    """C of each label."""
    val_score: float
    """Validation macro AUROC; nan where no label has both classes there."""
    task: Multilabel

    def predict(self, bag: FeatureBag) -> tuple[Tensor, None]:
        """Probabilities (K,); no tile weights."""
        return self.task.predict(self.logits(bag)[0]), None

    def logits(self, bag: FeatureBag) -> tuple[Tensor, None]:
        """Logits (K,); no tile weights."""
        x_D = (bag.z_TD.mean(0) - self.mean_D) / self.std_D
        return self.weight_KD @ x_D + self.bias_K, None

    def describe(self) -> str:
        """One line for the log."""
        strengths = ", ".join(f"{strength:.1g}" for strength in self.chosen)
        return f"chosen on validation: C {strengths}, macro AUROC {self.val_score:.3f}"


def fit_linear_probe(
    train: Sequence[FeatureBag],
    val: Sequence[FeatureBag],
    task: Multilabel,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> LinearProbe:
    """The linear probe.

    Args:
        train: fitted on, and the source of standardisation.
        val: chooses the strength of each label.
        task: what is learned, with the weight of a positive of each label.
        seed: not used: the problem is convex.
        strengths: candidates for C.

    Raises:
        ValueError: a label has one class only in `train`, or bags are empty or of unequal width.
    """
    check_bags(train, val, task)
    train, val = pooled(train), pooled(val)
    mean_D, std_D = bag_statistics(train)
    (x_ND, y_NK), (val_x_ND, val_y_NK) = (_arrays(part, mean_D, std_D) for part in (train, val))
    found = []
    for k, weight in enumerate(task.pos_weight or [1.0] * len(task.labels)):
        known_N = ~np.isnan(y_NK[:, k])
        if len(np.unique(y_NK[known_N, k])) < 2:
            positives, negatives = (int((y_NK[:, k] == side).sum()) for side in (1, 0))
            raise ValueError(
                f"{task.labels[k]}: {positives} known positive and {negatives} known negative "
                "training slides; a probe needs both. Were slides skipped? Add slides, or leave "
                "the label out."
            )
        best = None
        for strength in strengths:
            model = LogisticRegression(C=strength, class_weight={0: 1, 1: weight}, max_iter=10_000)
            model.fit(x_ND[known_N], y_NK[known_N, k].astype(int))
            score = _score(model.decision_function(val_x_ND), val_y_NK[:, k], weight)
            if best is None or score > best[0]:
                best = score, strength, model
        found.append(best)
    _, chosen, models = zip(*found, strict=True)
    logits_NK = np.stack([model.decision_function(val_x_ND) for model in models], axis=1)
    return LinearProbe(
        torch.tensor(np.concatenate([model.coef_ for model in models])).to(mean_D),
        torch.tensor(np.concatenate([model.intercept_ for model in models])).to(mean_D),
        mean_D,
        std_D,
        chosen,
        macro_auroc(val_y_NK, logits_NK),
        task,
    )


def _arrays(bags: Sequence[FeatureBag], mean_D: Tensor, std_D: Tensor) -> list[np.ndarray]:
    x_ND = (torch.cat([bag.z_TD for bag in bags]) - mean_D) / std_D
    y_NK = torch.stack([bag.y_K for bag in bags])
    return [each.double().cpu().numpy() for each in (x_ND, y_NK)]


def _score(logit_N: np.ndarray, y_N: np.ndarray, weight: float) -> tuple[float, float]:
    """What is maximised: AUROC (0 where it is undefined), then minus the weighted loss."""
    known_N = ~np.isnan(y_N)
    value, y_N, p_N = auroc(y_N, logit_N), y_N[known_N], expit(logit_N[known_N])
    share_N = np.clip(np.where(y_N == 1, p_N, 1 - p_N), 1e-12, None)
    loss = -np.mean(np.where(y_N == 1, weight, 1) * np.log(share_N)) if len(y_N) else 0.0
    return (0.0 if math.isnan(value) else value), -float(loss)
