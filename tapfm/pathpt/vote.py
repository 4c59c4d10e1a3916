"""A slide's class, voted by its tiles' classes.

Tiles vote for their most probable class; votes for normal tissue (class 0) do not count, and the
class with most votes wins. If no tile is tumour, or two classes share the most votes, all tiles
vote again among the tumour classes only.

Source: PathPT (arXiv 2508.15904), its rule for slides.
Differs: if the second vote is tied too, which the source leaves open, the tied class with the
    larger mean probability among tumour classes wins.

Shapes: N tiles, K classes of a tile, C = K - 1 subtypes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def vote(logits_NK: Tensor) -> int:
    """Return the slide's subtype, 0 to C - 1 (tile class minus 1)."""
    return ballot(logits_NK)[0]


def ballot(logits_NK: Tensor) -> tuple[int, Tensor]:
    """Return the slide's subtype, and each subtype's share (C,) of the deciding votes."""
    tumour_NC = logits_NK[:, 1:]
    subtypes = tumour_NC.shape[1]
    votes_C = torch.bincount(logits_NK.argmax(1), minlength=subtypes + 1)[1:]
    if len(_leaders(votes_C)) > 1:  # also if no class has a vote
        votes_C = torch.bincount(tumour_NC.argmax(1), minlength=subtypes)
    first = _leaders(votes_C)
    mean_C = tumour_NC.float().softmax(1).mean(0)
    return int(first[mean_C[first].argmax()]), votes_C / votes_C.sum()


def _leaders(votes_C: Tensor) -> Tensor:
    """Return the classes with the most votes."""
    return torch.nonzero(votes_C == votes_C.max()).flatten()
