"""The two passes over a slide as a run makes them, for better and for worse.

    passes = Passes(slide_model, chunk=16)
    seen = passes.encode(bag)             pass 1: seen.z_TD, seen.score_T
    (the slide model's backward)
    passes.adapt(seen)                    pass 2: adds to the encoder's .grad

`engine.chunked` has the algorithm. This adds what a run meets: blocks in front of the first that
learns are computed once (`engine.frozen_prefix`); where memory runs out, it goes on with half the
chunk and the same gradient (`training.oom_retry`); and pass 2 may take a few tiles
(`engine.sampling`).

Shapes: T tiles of a slide, C tiles of a chunk, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from tapfm.data.bag import Bag
from tapfm.engine.chunked import Encoded, adapt_bag, backward_chunk, encode_bag
from tapfm.engine.frozen_prefix import FrozenPrefix, FrozenPrefixTokens, find_frozen_prefix
from tapfm.engine.sampling import chosen, cosine, draw_tiles, give, taken
from tapfm.slide_model.model import SlideModel
from tapfm.training.oom_retry import OomRetry


class ChunkError(RuntimeError):
    """Memory ran out, and fewer tiles at once are no way out."""


@dataclass
class EncodedTiles:
    """A slide after pass 1."""

    bag: Bag
    """Its tiles, or their tokens at the first block that learns."""
    z_TD: Tensor
    """A leaf, whose gradient pass 2 needs."""
    score_T: Tensor
    """A leaf like it."""
    kept: list[Encoded]
    """Chunks with their graphs."""


class Passes:
    """Pass 1 and pass 2 of one slide after another.

    Args:
        model: whose encoder learns.
        chunk: tiles in memory at once; halved where they do not fit.
        keep: chunks whose graphs are kept from pass 1.
        few: tiles of a slide that pass 2 takes; None is all.
    """

    def __init__(self, model: SlideModel, chunk: int, keep: int = 1, few: int | None = None):
        self.model, self.chunk, self.keep, self.few = model, chunk, keep, few
        self.boundary: FrozenPrefix | None = None

    def find_frozen_prefix(self) -> None:
        """Look, once the encoder is where it will be trained, what of it is frozen in front."""
        self.boundary = find_frozen_prefix(self.model.encoder, self.model.model_config.precision)

    def encode(self, bag: Bag, *, adapting: bool = True) -> EncodedTiles:
        """Pass 1; once more, one graph kept or half the chunk, if memory runs out.

        Args:
            bag: the slide.
            adapting: pass 2 will follow.

        Raises:
            ChunkError: not even one tile fits.
        """
        if self.boundary and adapting:
            bag = replace(bag, tiles=FrozenPrefixTokens(self.boundary.tokens, bag.tiles, bag.seed))
        while True:
            keep = self.keep if adapting and self.few is None else 0
            try:
                chunks, device = bag.tiles.split(self.chunk), self.model.device
                return EncodedTiles(
                    bag, *encode_bag(self._chunk, chunks, seed=bag.seed, device=device, keep=keep)
                )
            except torch.OutOfMemoryError as fault:
                if keep <= 1:
                    self._shrink(self.chunk // 2, fault)
            if keep > 1:
                print(f"memory ran out with {keep} graphs kept: going on with 1", flush=True)
                self.keep = 1

    def adapt(self, seen: EncodedTiles) -> None:
        """Pass 2, of all tiles or of a few that are drawn by their gradients.

        Raises:
            ChunkError: not even one tile fits, or halves would not be exact.
        """
        bag, grad_z_TD, grad_score_T = seen.bag, seen.z_TD.grad, seen.score_T.grad
        if self.few is not None:
            weight_T = draw_tiles(grad_z_TD, grad_score_T, self.few, bag.seed)
            rows = weight_T > 0
            grad_z_TD = (grad_z_TD * weight_T[:, None])[rows]
            if grad_score_T is not None:
                grad_score_T = (grad_score_T * weight_T)[rows]
            bag = replace(bag, tiles=chosen(bag.tiles.split(self.chunk), weight_T))
        self._adapt(bag, grad_z_TD, grad_score_T, seen.kept)

    def compare(self, seen: EncodedTiles, parameters: list[nn.Parameter]) -> Tensor:
        """Pass 2 as ever; and of all tiles, for the cosine of the two gradients."""
        before = taken(parameters)
        self.adapt(seen)
        drawn = taken(parameters)
        self._adapt(seen.bag, seen.z_TD.grad, seen.score_T.grad, [])
        near = cosine(drawn, taken(parameters))
        give(parameters, before)
        give(parameters, drawn)
        return near

    @property
    def noisy(self) -> bool:
        """Whether a chunk's features depend on random numbers."""
        modules = self.model.encoder.modules()
        rates = (
            module.p if isinstance(module, nn.Dropout) else module.drop_prob
            for module in modules
            if isinstance(module, nn.Dropout | DropPath)
        )
        return any(rate > 0 for rate in rates)

    def _chunk(self, chunk: Tensor, most: int | None = None) -> Encoded:
        """Features and raw scores of a chunk of tiles, or of their tokens at the boundary.

        `most` tiles fit at once, where that is fewer than a chunk.
        """
        behind = chunk.is_floating_point()
        encode = self.boundary.encode if behind else self.model.encode
        return self.model.encoder.sized(encode, most or self.chunk)(chunk)

    def _adapt(
        self, bag: Bag, grad_z_TD: Tensor, grad_score_T: Tensor | None, kept: list[Encoded]
    ) -> None:
        """`adapt_bag`; in half chunks where memory runs out, unless there is noise."""
        if not len(grad_z_TD):
            return  # no tile was drawn, since none has a gradient
        with OomRetry(p for p in self.model.encoder.parameters() if p.requires_grad) as retry:
            try:
                adapt_bag(
                    lambda chunk: self._chunk(chunk, retry.fits),
                    bag.tiles.split(self.chunk),
                    grad_z_TD,
                    grad_score_T,
                    seed=bag.seed,
                    device=self.model.device,
                    kept=kept,
                    backward=backward_chunk if self.noisy else retry,
                )
            except torch.OutOfMemoryError as fault:
                self._shrink(0, fault)
        if retry.fits:
            self._shrink(retry.fits)

    def _shrink(self, tiles: int, fault: Exception | None = None) -> None:
        """Go on with fewer tiles at once.

        Raises:
            ChunkError: there is no going on.
        """
        if tiles < 1:
            way_out = "Set model.recompute, model.precision: bf16, or a strategy that trains less"
            if self.noisy and self.chunk > 1:
                way_out = f"With dropout, halves are not exact: set model.chunk {self.chunk // 2}"
            raise ChunkError(
                f"memory ran out with {self.chunk} tiles at once. {way_out}; `tapfm plan --model "
                f"{self.model.model_config.model} --gpu N` says what fits a card of N GiB."
            ) from fault
        print(f"memory ran out with {self.chunk} tiles at once: going on with {tiles}", flush=True)
        self.chunk = tiles
