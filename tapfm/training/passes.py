"""The two passes over a slide as a run makes them.

    passes = Passes(slide_model, chunk=16)
    encoded = passes.encode(bag)          pass 1: encoded.tiles, leaves of a graph
    (the slide model's backward)
    passes.adapt(encoded)                 pass 2: adds to the encoder's .grad

`engine.chunked` has the algorithm. This adds what a run meets: blocks in front of the first that
learns are computed once (`engine.frozen_prefix`); where memory runs out, it goes on with a
smaller chunk and the same gradient (`training.oom_retry`); and pass 2 may take a few tiles
(`engine.sampling`).

Shapes: T tiles of a slide, C tiles of a chunk, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from tapfm.data.bag import Bag
from tapfm.encoders.pinned import upload
from tapfm.engine.chunked import Encoded, adapt_bag, backward_chunk, encode_bag
from tapfm.engine.frozen_prefix import FrozenPrefix, FrozenPrefixTokens, find_frozen_prefix
from tapfm.engine.sampling import ChosenTiles, cosine, draw_tiles, give, has_gradient, taken
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.slide_model.model import SlideModel
from tapfm.training.oom_retry import OomRetry


class ChunkError(RuntimeError):
    """Memory ran out, and fewer tiles at once do not help."""


@dataclass
class EncodedTiles:
    """A slide after pass 1."""

    bag: Bag
    """Its tiles, or their tokens at the first block that learns."""
    tiles: TileSet
    """Features and scores, leaves whose gradients pass 2 needs."""
    kept: list[Encoded]
    """Chunks with their graphs."""
    skipped: int = 0
    """Tiles without a gradient, which pass 2 did not encode again."""


class Passes:
    """Pass 1 and pass 2 of one slide after another.

    Args:
        model: whose encoder learns.
        chunk: tiles in memory at once; an eighth fewer where they do not fit.
        keep: chunks whose graphs are kept from pass 1.
        few: tiles of a slide that pass 2 takes; None is all.
        skip: whether tiles are looked for that get no gradient at all, and left out of pass 2.
    """

    def __init__(
        self,
        model: SlideModel,
        chunk: int,
        keep: int = 1,
        few: int | None = None,
        skip: bool = False,
    ):
        self.model, self.chunk, self.few, self.skip = model, chunk, few, skip
        self.keep = 0 if skip else keep
        self.boundary: FrozenPrefix | None = None

    def find_frozen_prefix(self) -> None:
        """Find the encoder's frozen prefix, once the encoder is on its final device."""
        self.boundary = find_frozen_prefix(self.model.encoder, self.model.model_config.precision)

    def encode(self, bag: Bag, *, adapting: bool = True) -> EncodedTiles:
        """Return a slide encoded by pass 1; if memory runs out, repeat with less at once.

        Args:
            bag: the slide.
            adapting: pass 2 will follow.

        Raises:
            ChunkError: not even one tile fits.
        """
        if bag.features is not None:
            return EncodedTiles(bag, self.model.tiles(bag, self.chunk), [])
        if self.boundary and adapting:
            tokens = FrozenPrefixTokens(
                self.boundary.tokens, bag.tiles, bag.seed, device=self.model.device
            )
            bag = replace(bag, tiles=tokens)
        while True:
            keep = self.keep if adapting and self.few is None else 0
            try:
                chunks, device = bag.tiles.split(self.chunk), self.model.device
                z_TD, score_T, kept = encode_bag(
                    self._chunk, chunks, seed=bag.seed, device=device, keep=keep
                )
                return EncodedTiles(bag, TileSet.of(bag.places, z_TD, score_T), kept)
            except torch.OutOfMemoryError as fault:
                if keep <= 1:
                    self._shrink(fewer(self.chunk), fault)
            if keep > 1:
                print(f"memory ran out with {keep} graphs kept: going on with 1", flush=True)
                self.keep = 1

    def adapt(self, encoded: EncodedTiles) -> None:
        """Run pass 2 for all tiles with a gradient, or for a few drawn by its size.

        Raises:
            ChunkError: not even one tile fits, or halves would not be exact.
        """
        bag, tiles = encoded.bag, encoded.tiles
        grad_z_TD, grad_score_T, weight_T = tiles.z_TD.grad, tiles.score_T.grad, None
        if self.few is not None:
            weight_T = draw_tiles(grad_z_TD, grad_score_T, self.few, bag.seed)
        elif self.skip and not self.noisy:
            weight_T = has_gradient(grad_z_TD, grad_score_T)
            encoded.skipped = len(weight_T) - int(weight_T.sum())
        if weight_T is not None:
            (rows,) = weight_T.nonzero(as_tuple=True)  # on the CPU, which waits for nothing
            weight, rows = (upload(each, grad_z_TD.device) for each in (weight_T[rows], rows))
            grad_z_TD = grad_z_TD[rows] * weight[:, None]
            if grad_score_T is not None:
                grad_score_T = grad_score_T[rows] * weight
            bag = replace(bag, tiles=ChosenTiles(bag.tiles, self.chunk, weight_T))
        self._adapt(bag, grad_z_TD, grad_score_T, encoded.kept)

    def compare(self, encoded: EncodedTiles, parameters: list[nn.Parameter]) -> Tensor:
        """Run pass 2; return the cosine of its gradient and that of all tiles."""
        before = taken(parameters)
        self.adapt(encoded)
        drawn = taken(parameters)
        grads = encoded.tiles.z_TD.grad, encoded.tiles.score_T.grad
        self._adapt(encoded.bag, *grads, [])
        near = cosine(drawn, taken(parameters))
        give(parameters, before)
        give(parameters, drawn)
        return near

    @property
    def noisy(self) -> bool:
        """Return whether a chunk's features depend on random numbers."""
        modules = self.model.encoder.modules()
        rates = (
            module.p if isinstance(module, nn.Dropout) else module.drop_prob
            for module in modules
            if isinstance(module, nn.Dropout | DropPath)
        )
        return any(rate > 0 for rate in rates)

    def _chunk(self, chunk: Tensor, most: int | None = None) -> Encoded:
        """Return features and raw scores of a chunk of tiles, or of tokens of the frozen prefix.

        `most` tiles fit at once, where that is fewer than a chunk.
        """
        behind = chunk.is_floating_point()
        encode = self.boundary.encode if behind else self.model.encode
        return self.model.encoder.sized(encode, most or self.chunk)(chunk)

    def _adapt(
        self, bag: Bag, grad_z_TD: Tensor, grad_score_T: Tensor | None, kept: list[Encoded]
    ) -> None:
        """Run `adapt_bag`, in half chunks where memory runs out, unless there is noise."""
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
        if retry.fits:  # halves served for this slide; the next ones need not be so small
            self._shrink(fewer(self.chunk))

    def shrink(self, fault: Exception) -> None:
        """Continue with a smaller chunk, as memory ran out elsewhere.

        Raises:
            ChunkError: not even one tile fits.
        """
        self._shrink(fewer(self.chunk), fault)

    def _shrink(self, tiles: int, fault: Exception | None = None) -> None:
        """Continue with fewer tiles at once.

        Raises:
            ChunkError: not even one tile fits, or halves would not be exact.
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


def fewer(chunk: int) -> int:
    """Return an eighth fewer tiles, at least one fewer: the chunk to go on with; of 1 it is 0."""
    return chunk - max(1, chunk // 8)
