"""The head as a linear probe of slides' embeddings: a convex problem, no rate and no epochs.

Shapes: D features, K labels, N slides, Y numbers of a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tapfm.distributed import gather
from tapfm.frozen.baselines import FeatureBag, validation_score
from tapfm.frozen.cached_features import CachedFeatures
from tapfm.frozen.linear_probe import LinearProbe, fit_linear_probe
from tapfm.slide_model.aggregators.contract import Aggregator
from tapfm.tasks import Task


@torch.no_grad()
def embed(aggregator: Aggregator, mine: Sequence[CachedFeatures]) -> list[FeatureBag]:
    """The slides of all processes, each as its embedding: bags of one tile."""
    embedded, device = [], aggregator.center_D.device
    for slide in mine:
        b_D = aggregator(slide.to(device)).embedding_E
        embedded.append(FeatureBag(slide.slide_id, slide.case_id, b_D[None].cpu(), slide.y_K))
    return sorted((bag for share in gather(embedded) for bag in share), key=lambda b: b.slide_id)


@torch.no_grad()
def solve_head(
    aggregator: Aggregator, train: Sequence[FeatureBag], val: Sequence[FeatureBag], task: Task
) -> LinearProbe:
    """Put a linear probe of the slides' embeddings in the aggregator's head.

    Args:
        aggregator: is changed.
        train: fitted on.
        val: chooses the strength.
        task: what is learned.

    Raises:
        BaselineError: a label has one value only in `train`.
    """
    with torch.enable_grad():
        probe = fit_linear_probe(train, val, task, surest=True)
    weight_KD = probe.weight_KD / probe.std_D
    aggregator.head.weight.copy_(weight_KD)
    aggregator.head.bias.copy_(probe.bias_K - weight_KD @ probe.mean_D)
    return probe


@torch.no_grad()
def judge(
    aggregator: Aggregator, val: Sequence[FeatureBag], task: Task
) -> tuple[float, float, float]:
    """The task's figure on validation, the mean loss of a slide, and that of all slides together.

    The first two are as a run measures them; the last is what a Cox model has.
    """
    loss = task.loss().eval()
    logits_NK = aggregator.head(torch.cat([slide.z_TD for slide in val]).to(aggregator.head.weight))
    logits_NK = logits_NK.cpu()
    y_NY = torch.stack([slide.y_K for slide in val])
    figure, (_, minus_together) = validation_score(logits_NK, y_NY, task, loss)
    each_N = [loss(logits_K, y_Y) for logits_K, y_Y in zip(logits_NK, y_NY, strict=True)]
    return figure, float(torch.stack(each_N).mean()), -minus_together
