"""The exact gradient of a slide's loss, with the activations of one chunk of tiles.

    encode    z, s = encode(tiles)                          chunk by chunk, no graph
    loss      L(z, s), dL/dz, dL/ds                         on all tiles, a small graph
    adapt     z, s = encode(chunk) again, with a graph;     chunk by chunk, graph freed each time
              backward of sum(z * dL/dz) + lambda * sum(s * dL/ds)

With lambda = 1 this is joint back-propagation of the slide loss, not an estimate of it. Activation
memory does not depend on the number of tiles; the price is one more forward (4 units of work for
3). It is exact only if both passes see the same pixels and the same random numbers, so each chunk
draws dropout and drop-path from a seed of its own: `chunk_rng`.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184), the two-graph step; Gao et al. 2021
    (GradCache, arXiv 2101.06983), section 3, the two passes.
Differs: the paper keeps all tiles' graphs at once, and so is bounded by the card.

Shapes: T tiles of a slide, C tiles of a chunk, D features, P pixels (3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Tiles (C, 3, H, W) to features (C, D) and raw scores (C,)."""


@contextmanager
def chunk_rng(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """Make the random numbers inside a function of (seed, index) alone."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(hash((seed, index)) % 2**63)  # ints only: their hash has no salt
        yield


@torch.no_grad()
def encode_bag(
    encode: Encode, chunks_CP: Iterable[Tensor], *, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pass 1: features and raw scores of every tile, without a graph.

    Args:
        encode: the encoder.
        chunks_CP: the slide's tiles in order; the last chunk may be short.
        seed: the same value must be given to `adapt_bag`.
        device: where `encode` draws its random numbers.

    Returns:
        z_TD and score_T, leaves that require grad, ready for the slide model.

    Raises:
        ValueError: the slide has no tile.
    """
    z_CD, score_C = [], []
    for index, tiles_CP in enumerate(chunks_CP):
        with chunk_rng(seed, index, device):
            z, score = encode(tiles_CP)
        z_CD.append(z)
        score_C.append(score)
    if not z_CD:
        raise ValueError("a slide without tiles cannot be encoded: leave it out of the cohort")
    return torch.cat(z_CD).requires_grad_(), torch.cat(score_C).requires_grad_()


def adapt_bag(
    encode: Encode,
    chunks_CP: Iterable[Tensor],
    grad_z_TD: Tensor,
    grad_score_T: Tensor | None,
    *,
    seed: int,
    device: torch.device,
    score_weight: float = 1.0,
) -> None:
    """Pass 2: add the slide loss's gradient to the encoder's `.grad`.

    Args:
        encode: as in pass 1, with the same weights.
        chunks_CP: the same tiles, in the same order and the same chunks.
        grad_z_TD: dL/dz, from `z.grad` after the slide loss's backward.
        grad_score_T: dL/ds, or None where the aggregator does not use the score.
        seed: as in pass 1.
        device: as in pass 1.
        score_weight: lambda. 1 is the exact gradient; 0 trains through the features only.

    Raises:
        ValueError: the chunks hold more or fewer tiles than `grad_z_TD` has rows.
    """
    done = 0
    for index, tiles_CP in enumerate(chunks_CP):
        rows = slice(done, done + len(tiles_CP))
        done += len(tiles_CP)
        if done > len(grad_z_TD):
            break
        with chunk_rng(seed, index, device):
            z_CD, score_C = encode(tiles_CP)
        if grad_score_T is None:
            torch.autograd.backward(z_CD, grad_z_TD[rows])  # frees this chunk's graph
        else:
            grads = (grad_z_TD[rows], score_weight * grad_score_T[rows])
            torch.autograd.backward((z_CD, score_C), grads)  # frees this chunk's graph
    if done != len(grad_z_TD):
        raise ValueError(
            f"pass 2 read {done} tiles or more, pass 1 had {len(grad_z_TD)}: both passes must read "
            "the same tiles. Was the slide's tile budget or sampling seed changed between them?"
        )
