"""Expression of many genes: regression, measured over slides and over genes, with an FDR.

    pearson, spearman                        of a gene over slides, and their mean over genes
    pearson_over_genes, spearman_over_genes  of a slide over its genes, and their mean over slides
    significant                              share of genes whose Spearman correlation over slides
                                             is above 0 at a false discovery rate of 5 %

The two correlations answer different questions: over the genes of a slide, a model that says every
gene's mean already scores high, since genes differ; over slides it scores nothing. With `log` the
table holds x of 0 or more, and log2(1 + x) is learned and measured; predictions are in x.

hist2RNA is by patient: set `data.bags: case`, or `data.pool: mean` in `tapfm test`.

Source: Mondol et al. 2023 (hist2RNA, arXiv 2304.04507); Benjamini and Hochberg 1995 for the rate.
Differs: any aggregator in place of the mean of tiles. Over draws, `significant` counts each slide
    once, for repeats are no evidence.

Shapes: N slides, K genes, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from tapfm.settings import SettingsError
from tapfm.stats.metrics import MACRO
from tapfm.stats.outcomes import pearson, r2, spearman
from tapfm.tasks.losses import MaskedMSE
from tapfm.tasks.regression import Regression

RATE = 0.05  # of false discoveries


@dataclass(frozen=True)
class Expression(Regression):
    """Numbers of many genes."""

    log: bool = False
    """Whether log2(1 + x) is learned and measured."""

    monitor: ClassVar = "pearson"
    title: ClassVar = "correlation over slides (mean over genes)"
    chance: ClassVar = 0.0
    figures: ClassVar = {"pearson": pearson, "spearman": spearman, "r2": r2}

    @classmethod
    def learn(cls, names, classes, target_NY, *, log=False):
        """Return the task, with means and deviations, of logarithms if so asked."""
        if log and (target_NY < 0).any():
            raise SettingsError(
                "log: true takes values of 0 or more, and some are below: leave it out"
            )
        found = Regression.learn(names, classes, np.log2(1 + target_NY) if log else target_NY)
        return cls(found.labels, found.mean, found.std, log)

    def loss(self) -> nn.Module:
        """Return squared error, in standard deviations."""
        return LogMSE(self.mean, self.std) if self.log else super().loss()

    def predict(self, logits_NK: Tensor) -> Tensor:
        """Return values in the table's own unit."""
        values_NK = super().predict(logits_NK)
        return values_NK.exp2() - 1 if self.log else values_NK

    def measure(self, target_NY, predicted_NP, times_BN):
        """Return every figure of each gene, and first their means and the figures over genes."""
        if self.log:
            target_NY, predicted_NP = np.log2(1 + target_NY), np.log2(1 + predicted_NP)
        found = super().measure(target_NY, predicted_NP, times_BN)
        for name, figure in (("pearson", pearson), ("spearman", spearman)):
            own = over_genes(target_NY, predicted_NP, times_BN, figure)
            found[MACRO][f"{name}_over_genes"] = own
        each = [found[label]["spearman"] for label in self.labels]
        count_BK = (times_BN > 0).astype(float) @ ~np.isnan(target_NY)
        found[MACRO]["significant"] = significant(np.stack(each, 1), count_BK)
        return found

    def notes(self):
        """Return what the figures are of."""
        return [
            "pearson and spearman of a gene are over slides; `over genes` are of a slide's genes, "
            "where a model that says every gene's mean already scores high. significant: share of "
            f"genes with a Spearman correlation above 0 at a false discovery rate of {RATE:.0%}."
        ]


class LogMSE(MaskedMSE):
    """Squared error of standardised log2(1 + x)."""

    def forward(self, logits_NK: Tensor, y_NK: Tensor) -> Tensor:
        """Return the loss, one number; see `MaskedMSE`."""
        return super().forward(logits_NK, torch.log2(1 + y_NK))


def over_genes(target_NK: np.ndarray, said_NK: np.ndarray, times_BN: np.ndarray, figure):
    """Return the mean over slides of a correlation over each slide's genes, (B,)."""
    once = np.ones((1, target_NK.shape[1]))
    own_N = np.array(
        [figure(y_K, p_K, once)[0] for y_K, p_K in zip(target_NK, said_NK, strict=True)]
    )
    defined_N = ~np.isnan(own_N) if len(own_N) else np.zeros(0, bool)
    weight_BN = times_BN[:, defined_N]
    total_B = weight_BN.sum(1)
    nothing_B = np.full(len(times_BN), np.nan)
    return np.divide(weight_BN @ own_N[defined_N], total_B, out=nothing_B, where=total_B > 0)


def significant(r_BK: np.ndarray, count_BK: np.ndarray) -> np.ndarray:
    """Return the share of genes with a correlation above 0 at `RATE`, (B,); nan if none has one.

    Args:
        r_BK: correlations, nan where undefined.
        count_BK: slides that each is of.
    """
    from scipy.special import stdtr

    freedom_BK = np.maximum(count_BK - 2, 1)
    defined_BK = ~np.isnan(r_BK) & (count_BK > 2)
    r_BK = np.where(defined_BK, np.clip(r_BK, -1 + 1e-12, 1 - 1e-12), 0.0)
    t_BK = r_BK * np.sqrt(freedom_BK / (1 - r_BK**2))
    p_BK = np.where(defined_BK, 2 * stdtr(freedom_BK, -np.abs(t_BK)), np.inf)
    rank_K = np.arange(1, p_BK.shape[1] + 1)
    genes_B = defined_BK.sum(1)
    sorted_BK = np.sort(p_BK, 1)
    passes_BK = sorted_BK <= RATE * rank_K / np.maximum(genes_B, 1)[:, None]
    bound_B = np.where(passes_BK, sorted_BK, -1.0).max(1)
    found_B = ((p_BK <= bound_B[:, None]) & (r_BK > 0)).sum(1)
    return np.divide(found_B, genes_B, out=np.full(len(r_BK), np.nan), where=genes_B > 0)
