"""What frozen features say of labelled tiles: a linear probe, and six RGB numbers as the floor.

Both are multinomial logistic regression on standardised features, with the class weights of the
training part; its strength is chosen by macro F1 on the validation part, of equals by the loss. A
convex fit with nothing drawn: the same tiles give the same figures, whatever the seed.

Shapes: N tiles, D features, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from tapfm.encoders.backbones import Encoder
from tapfm.frozen.baselines import RgbStatistics
from tapfm.stats.bootstrap import once
from tapfm.stats.confusions import averages, confusions
from tapfm.tile_training.batch import TileBatch

STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # inverse of the penalty's weight
ITERATIONS = 1000


class ProbeError(ValueError):
    """Frozen features are nan or infinite."""


@dataclass(frozen=True)
class Probe:
    """A fitted classifier of features."""

    model: Pipeline
    strength: float
    val_f1: float

    def predict(self, z_ND: np.ndarray) -> np.ndarray:
        """Probabilities (N, K)."""
        return self.model.predict_proba(z_ND)

    def linear(self) -> tuple[Tensor, Tensor]:
        """Return the classifier of unstandardised features: weight (K, D), bias (K,)."""
        scaler, logistic = (step for _, step in self.model.steps)
        weight_KD, bias_K = logistic.coef_, logistic.intercept_
        if len(weight_KD) == 1:  # two classes: scikit-learn keeps their difference
            weight_KD = np.concatenate([-weight_KD / 2, weight_KD / 2])
            bias_K = np.concatenate([-bias_K / 2, bias_K / 2])
        weight_KD = weight_KD / scaler.scale_
        bias_K = bias_K - weight_KD @ scaler.mean_
        return torch.from_numpy(weight_KD).float(), torch.from_numpy(bias_K).float()

    def describe(self) -> str:
        """What was chosen."""
        return f"C = {self.strength:g}, macro F1 {self.val_f1:.3f} on val"


def fit_probe(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    classes: int,
    class_weight: list[float],
) -> Probe:
    """Return the probe that is best on validation.

    Args:
        train: features (N, D) and classes (N,); every class is among them.
        val: likewise, any classes.
        classes: K.
        class_weight: of each class.

    Raises:
        ProbeError: features that are nan or infinite.
    """
    for z_ND, _ in (train, val):
        if not np.isfinite(z_ND).all():
            raise ProbeError(
                "the frozen features hold nan or infinity: set model.precision: fp32, or give "
                "other weights"
            )
    best, best_score = None, (-np.inf, -np.inf)
    for strength in STRENGTHS:
        model = make_pipeline(
            StandardScaler(),
            LogisticRegression(
                C=strength, max_iter=ITERATIONS, class_weight=dict(enumerate(class_weight))
            ),
        )
        with warnings.catch_warnings():  # weak penalties may not converge: val decides
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(*train)
        p_NK = model.predict_proba(val[0])
        table_1KK = confusions(val[1], p_NK.argmax(1), classes, once(val[1]))
        f1 = float(averages(table_1KK)["f1"][0])
        score = f1, -log_loss(val[1], p_NK, labels=range(classes))
        if score > best_score:
            best, best_score = Probe(model, strength, f1), score
    return best


@torch.no_grad()
def features(
    encoder: Encoder, batches: Iterable[TileBatch], precision: str
) -> tuple[Tensor, Tensor]:
    """Features (N, D) of the encoder and six RGB statistics (N, 6), float32 on the CPU."""
    z_ND, rgb_N6 = [], []
    for batch in batches:
        z_ND.append(encoder.encode(batch.tiles_CP, precision)[0].float().cpu())
        rgb_N6.append(RgbStatistics().encode(batch.tiles_CP)[0])
    return torch.cat(z_ND), torch.cat(rgb_N6)
