"""The exact gradient of a slide's loss, with the activations of one chunk of tiles.

    encode    z, s = encode(tiles)                          chunk by chunk, no graph
    loss      L(z, s), dL/dz, dL/ds                         on all tiles, a small graph
    adapt     z, s = encode(chunk) again, with a graph;     chunk by chunk, graph freed each time
              backward of sum(z * dL/dz) + lambda * sum(s * dL/ds)

With lambda = 1 this is joint back-propagation of the slide loss, not an estimate of it. Activation
memory does not depend on the number of tiles; the price is one more forward (4 units of work for
3). It is exact only if both passes see the same pixels and the same random numbers, so each chunk
draws dropout and drop-path from its own seed (`chunk_rng`).

The first `keep` chunks may keep their graphs from the first pass and then need no second forward,
at the memory of as many chunks. One kept chunk hardly raises the peak, and a slide that fits in one
chunk then pays nothing extra.

Source: Kumar et al. 2025 (TAPFM, arXiv 2506.05184), the two-graph step; Gao et al. 2021
    (GradCache, arXiv 2101.06983), section 3, the two passes.
Differs: the paper keeps all tiles' graphs at once, so the GPU's memory limits the tiles.

Shapes: T tiles of a slide, C tiles of a chunk, D features, P pixels (3, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Encoded = tuple[Tensor, Tensor]
"""Features (C, D) and raw scores (C,) of a chunk."""
Encode = Callable[[Tensor], Encoded]
"""Maps tiles (C, 3, H, W) to their features and scores."""
Backward = Callable[[Encode, Tensor, Sequence[Tensor], list[Encoded]], None]
"""Adds one chunk's gradient: `backward_chunk`, or a variant such as `training.oom_retry`'s."""


@contextmanager
def chunk_rng(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside the `with` from (seed, index) alone; restore its state afterwards."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(hash((seed, index)) % 2**63)  # ints only: their hash has no salt
        yield


def encode_bag(
    encode: Encode,
    chunks_CP: Iterable[Tensor],
    *,
    seed: int,
    device: torch.device,
    keep: int = 0,
) -> tuple[Tensor, Tensor, list[Encoded]]:
    """Return features and scores of every tile (pass 1); only the first chunks keep a graph.

    Args:
        encode: the encoder.
        chunks_CP: the slide's tiles in order; the last chunk may be short.
        seed: the same value must be given to `adapt_bag`.
        device: where `encode` draws its random numbers.
        keep: chunks whose graphs are kept for `adapt_bag`.

    Returns:
        z_TD and score_T (leaves that require grad, for the slide model), and the kept outputs.

    Raises:
        ValueError: the slide has no tile.
    """
    z_CD, score_C, kept = [], [], []
    for index, tiles_CP in enumerate(chunks_CP):
        with chunk_rng(seed, index, device), torch.set_grad_enabled(index < keep):
            z, score = encode(tiles_CP)
        if index < keep:
            kept.append((z, score))
        z_CD.append(z.detach())
        score_C.append(score.detach())
    if not z_CD:
        raise ValueError("a slide without tiles cannot be encoded: leave it out of the cohort")
    return torch.cat(z_CD).requires_grad_(), torch.cat(score_C).requires_grad_(), kept


def backward_chunk(
    encode: Encode,
    tiles_CP: Tensor,
    grads_C: Sequence[Tensor],
    kept: list[Encoded],
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """Encode a chunk with a graph, or take the kept one; add its gradient; free the graph.

    Args:
        encode: the encoder.
        tiles_CP: the chunk.
        grads_C: dL/dz (C, D) and, unless the score is not used, dL/ds (C,).
        kept: features and scores of this chunk and of those behind it, with the graphs that pass
            1 kept; the first is taken out, so that its memory can be freed.
        inputs: parameters that receive the gradient; None: all that learn.
    """
    outputs = kept.pop(0) if kept else encode(tiles_CP)
    torch.autograd.backward(outputs[: len(grads_C)], grads_C, inputs=inputs)


def adapt_bag(
    encode: Encode,
    chunks_CP: Iterable[Tensor],
    grad_z_TD: Tensor,
    grad_score_T: Tensor | None,
    *,
    seed: int,
    device: torch.device,
    kept: list[Encoded] | None = None,
    score_weight: float = 1.0,
    backward: Backward = backward_chunk,
) -> None:
    """Add the slide loss's gradient to the encoder's `.grad` (pass 2).

    Args:
        encode: as in pass 1, with the same weights.
        chunks_CP: the same tiles, in the same order and the same chunks.
        grad_z_TD: dL/dz, from `z.grad` after the slide loss's backward.
        grad_score_T: dL/ds, or None where the aggregator does not use the score.
        seed: as in pass 1.
        device: as in pass 1.
        kept: outputs that pass 1 kept; emptied, so that each graph is freed after its use.
        score_weight: lambda. 1 is the exact gradient; 0 trains through the features only.
        backward: adds one chunk's gradient; `training.oom_retry` has one that survives running out
            of memory.

    Raises:
        ValueError: the chunks hold more or fewer tiles than `grad_z_TD` has rows.
    """
    grads_T = [grad_z_TD] if grad_score_T is None else [grad_z_TD, score_weight * grad_score_T]
    done, kept = 0, [] if kept is None else kept
    for index, tiles_CP in enumerate(chunks_CP):
        rows = slice(done, done + len(tiles_CP))
        done += len(tiles_CP)
        if done > len(grad_z_TD):
            break
        with chunk_rng(seed, index, device):
            backward(encode, tiles_CP, [g[rows] for g in grads_T], kept)
    if done != len(grad_z_TD):
        raise ValueError(
            f"pass 2 read {done} tiles or more, pass 1 had {len(grad_z_TD)}: both passes must read "
            "the same tiles. Was the slide's tile budget or sampling seed changed between them?"
        )
