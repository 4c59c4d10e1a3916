"""Pseudo-labels of tiles: zero-shot classes, restricted by the known subtype of the slide.

1. Each class has many prompts: templates times synonyms. A random classifier takes one for each
   class and calls the few training slides by their tiles' vote; of many such classifiers the half
   with the best balanced accuracy is kept, and each class's kept prompts are averaged.
2. A tile whose nearest class is normal or the slide's own gets that label. A tile nearest to
   another subtype cannot be right: it is a candidate, either normal or the slide's own.

Source: PathPT (arXiv 2508.15904): 200 classifiers, 100 kept, averaged, fixed for the run; labels as
    above, without a confidence threshold.
Differs: balanced accuracy counts the classes among the training slides; of equally good
    classifiers the earlier drawn is kept.

Shapes: N tiles, S slides, P prompts of a class, K classes of a tile, d joint width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tapfm.pathpt.vote import vote

DRAWS, KEPT = 200, 100


def select_prompts(
    prompts: Sequence[Tensor],
    slides: Sequence[Tensor],
    subtypes: Sequence[int],
    seed: int = 0,
    draws: int = DRAWS,
    kept: int = KEPT,
) -> Tensor:
    """Return the zero-shot classifier (K, d), chosen on a few slides.

    Args:
        prompts: unit vectors (P, d) of each class's prompts.
        slides: unit vectors (N, d) of each training slide's tiles.
        subtypes: subtype of each training slide, 0 to C - 1.
        seed: seed of the draws.
        draws: number of random classifiers.
        kept: number of classifiers that are averaged.
    """
    generator = torch.Generator().manual_seed(seed)
    choice_RK = torch.stack(
        [torch.randint(len(each), (draws,), generator=generator) for each in prompts], dim=1
    )
    fit = [[z_Nd @ prompts_Pd.T for prompts_Pd in prompts] for z_Nd in slides]
    accuracy = []
    for chosen_K in choice_RK.tolist():
        logits = (
            torch.stack([f_NP[:, p] for f_NP, p in zip(fit_KNP, chosen_K, strict=True)], dim=1)
            for fit_KNP in fit
        )
        accuracy.append(balanced_accuracy(subtypes, [vote(each_NK) for each_NK in logits]))
    best = sorted(range(draws), key=lambda draw: -accuracy[draw])[:kept]
    chosen = zip(prompts, choice_RK[best].unbind(1), strict=True)
    return torch.stack([F.normalize(each_Pd[rows].mean(0), dim=0) for each_Pd, rows in chosen])


def tile_labels(z_Nd: Tensor, classifier_Kd: Tensor, subtype: int) -> Tensor:
    """Return labels (N,): 0 normal, s + 1 subtype s, -(s + 1) either normal or subtype s."""
    own = subtype + 1
    called_N = (z_Nd @ classifier_Kd.T).argmax(1)
    return torch.where((called_N == 0) | (called_N == own), called_N, -own)


def balanced_accuracy(targets: Sequence[int], called: Sequence[int]) -> float:
    """Return the mean, over the classes of `targets`, of the share that is called right."""
    shares = []
    for label in sorted(set(targets)):
        right = [c == label for t, c in zip(targets, called, strict=True) if t == label]
        shares.append(sum(right) / len(right))
    return sum(shares) / len(shares)
