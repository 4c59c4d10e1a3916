"""Retries a chunk in halves when GPU memory runs out, with exactly the same gradient.

Backward adds to `.grad` parameter by parameter, so a chunk that fails half-way leaves some
parameters with its gradient and others without. `OomRetry` notes which, and gives the others theirs
from the chunk's halves: every parameter receives every tile once, and nothing is kept aside for it.

    with OomRetry(parameters) as retry:
        adapt_bag(..., backward=retry)
    retry.fits                             tiles that fitted at once, if memory ran out

Condition: an encoder without noise. Halves would draw other dropout and drop-path than the chunk
did in pass 1, and the gradient would belong to other features.

Cost: a hook a parameter; nothing is kept or copied.

Shapes: C tiles of a chunk, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tapfm.engine.chunked import Encode, Encoded, backward_chunk


class OomRetry:
    """Adds a chunk's gradient as `chunked.backward_chunk` does, in halves where memory runs out.

    Args:
        parameters: the encoder's, those that learn.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.fits: int | None = None
        """Tiles that fitted at once since memory ran out; None while it never did."""
        self.received: set[int] = set()
        self.hooks: list = []

    def __enter__(self) -> OomRetry:
        self.hooks = [p.register_post_accumulate_grad_hook(self._note) for p in self.parameters]
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def _note(self, parameter: nn.Parameter) -> None:
        self.received.add(id(parameter))

    def __call__(
        self,
        encode: Encode,
        tiles_CP: Tensor,
        grads_C: Sequence[Tensor],
        kept: list[Encoded],
        left: Sequence[nn.Parameter] | None = None,
    ) -> None:
        """Add the gradient of one chunk.

        Args:
            encode: the encoder.
            tiles_CP: the chunk.
            grads_C: dL/dz (C, D) and, unless the score is not used, dL/ds (C,).
            kept: the graphs that pass 1 kept, this chunk's first; none is left where memory runs
                out, and their chunks are encoded again.
            left: parameters that lack these tiles' gradient; None is all.

        Raises:
            torch.OutOfMemoryError: not even one tile fits.
        """
        self.received.clear()
        fault = _attempt(encode, tiles_CP, grads_C, kept, left)
        if fault is None:
            return
        if len(tiles_CP) == 1:
            raise fault
        kept.clear()
        left = self.parameters if left is None else left
        left = [p for p in left if id(p) not in self.received]
        half = (len(tiles_CP) + 1) // 2
        self.fits = min(half, self.fits or half)
        for rows in (slice(half), slice(half, None)) if left else ():
            self(encode, tiles_CP[rows], [g[rows] for g in grads_C], kept, left)


def _attempt(encode, tiles_CP, grads_C, kept, left) -> torch.OutOfMemoryError | None:
    """Return the error if memory ran out, without its traceback, which would keep the memory."""
    try:
        backward_chunk(encode, tiles_CP, grads_C, kept, left)
    except torch.OutOfMemoryError as fault:
        return fault.with_traceback(None)
    return None
