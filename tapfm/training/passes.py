"""The two passes over a slide as a run makes them.

    passes = Passes(slide_model, chunk=16)
    encoded = passes.encode(bag)          pass 1: encoded.tiles, leaves of a graph
    (the slide model's backward)
    passes.adapt(encoded)                 pass 2: adds to the encoder's .grad

`engine.chunked` has the algorithm. This adds what a run meets: blocks in front of the first that
learns are computed once (`engine.frozen_prefix`); where memory runs out, it goes on with a
smaller chunk and the same gradient (`training.oom_retry`); pass 2 may take a few tiles
(`engine.sampling`); and small slides may share a chunk: given the slides `behind` it, `encode`
encodes those that fit with the first, and `adapt` waits for the last of them. The weights must be
the same from the first to the last.

Source: Fang et al. 2025 (PackMIL, arXiv 2509.20923), packing small bags in order.
Differs: it packs features into sequences for the aggregator; here tiles share the encoder's chunk,
    and each slide has its own loss.

Shapes: T tiles of a slide, C tiles of a chunk, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from tapfm.data.bag import Bag, Tiles
from tapfm.encoders.pinned import upload
from tapfm.engine.chunked import Encoded, adapt_bag, backward_chunk, encode_bag
from tapfm.engine.frozen_prefix import FrozenPrefix, FrozenPrefixTokens, find_frozen_prefix
from tapfm.engine.sampling import ChosenTiles, cosine, draw_tiles, give, has_gradient, taken
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.slide_model.model import SlideModel
from tapfm.training.oom_retry import OomRetry

BATCH = nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm


class ChunkError(RuntimeError):
    """Memory ran out, and fewer tiles at once do not help."""


@dataclass
class EncodedTiles:
    """A slide after pass 1."""

    bag: Bag
    tiles: TileSet
    """Features and scores, leaves whose gradients pass 2 needs."""
    chunks: Tiles
    """Its tiles, or their tokens at the first block that learns; those of all slides that share a
    chunk with it."""
    kept: list[Encoded]
    """Chunks with their graphs."""
    weight_T: Tensor | None = None
    """Factors of the tiles' gradients, 0 where pass 2 leaves a tile out; None takes all."""
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
        self.ahead: list[EncodedTiles] = []
        """Slides encoded in the chunk of the last one, whose turn is to come."""
        self.waiting: list[EncodedTiles] = []
        """Slides whose pass 2 comes with the last one of their chunk."""

    def find_frozen_prefix(self) -> None:
        """Find the encoder's frozen prefix, once the encoder is on its final device."""
        self.boundary = find_frozen_prefix(self.model.encoder, self.model.model_config.precision)

    def encode(
        self, bag: Bag, *, adapting: bool = True, behind: Sequence[Bag] = ()
    ) -> EncodedTiles:
        """Return a slide encoded by pass 1; if memory runs out, repeat with less at once.

        Args:
            bag: the slide.
            adapting: pass 2 will follow.
            behind: slides that come next, in order, before the weights change.

        Raises:
            ChunkError: not even one tile fits.
        """
        if bag.features is not None:
            return EncodedTiles(bag, self.model.tiles(bag, self.chunk), bag.tiles, [])
        if not self.ahead:
            self.ahead = self._encode(packed([bag, *behind], self.chunk), adapting)
        encoded = self.ahead.pop(0)
        assert encoded.bag.turn == bag.turn, "slides that share a chunk come one after the other"
        return encoded

    def _encode(self, pack: Sequence[Bag], adapting: bool) -> list[EncodedTiles]:
        """Return slides encoded together."""
        tiles, seed, device = joined_tiles(pack), pack[0].seed, self.model.device
        if self.boundary and adapting:
            tiles = FrozenPrefixTokens(self.boundary.tokens, tiles, seed, device=device)
        while True:
            keep = self.keep if adapting and self.few is None else 0
            try:
                z_TD, score_T, kept = encode_bag(
                    self._chunk, tiles.split(self.chunk), seed=seed, device=device, keep=keep
                )
                counts = [bag.count for bag in pack]
                own = zip(pack, *(leaves(each, counts) for each in (z_TD, score_T)), strict=True)
                return [
                    EncodedTiles(bag, TileSet.of(bag.places, z_TD, score_T), tiles, kept)
                    for bag, z_TD, score_T in own
                ]
            except torch.OutOfMemoryError as fault:
                if keep <= 1:
                    self._shrink(fewer(self.chunk), fault)
            if keep > 1:
                print(f"memory ran out with {keep} graphs kept: going on with 1", flush=True)
                self.keep = 1

    def adapt(self, encoded: EncodedTiles) -> None:
        """Run pass 2 for all tiles with a gradient, or for a few drawn by its size.

        Of slides that share a chunk, it comes with the last one.

        Raises:
            ChunkError: not even one tile fits, or halves would not be exact.
        """
        grads = encoded.tiles.z_TD.grad, encoded.tiles.score_T.grad
        if self.few is not None:
            encoded.weight_T = draw_tiles(*grads, self.few, encoded.bag.seed)
        elif self.skip and not self.noisy:
            encoded.weight_T = has_gradient(*grads)
            encoded.skipped = len(encoded.weight_T) - int(encoded.weight_T.sum())
        self.waiting.append(encoded)
        if self.ahead:
            return
        pack, self.waiting = self.waiting, []
        seed, chunks, kept = pack[0].bag.seed, encoded.chunks, encoded.kept
        grad_z_TD = joined([each.tiles.z_TD.grad for each in pack])
        grad_score_T = joined([each.tiles.score_T.grad for each in pack])
        weight_T = joined([each.weight_T for each in pack])
        if weight_T is not None:
            (rows,) = weight_T.nonzero(as_tuple=True)  # on the CPU, which waits for nothing
            weight, rows = (upload(each, grad_z_TD.device) for each in (weight_T[rows], rows))
            grad_z_TD = grad_z_TD[rows] * weight[:, None]
            if grad_score_T is not None:
                grad_score_T = grad_score_T[rows] * weight
            chunks = ChosenTiles(chunks, self.chunk, weight_T)
        self._adapt(chunks, seed, grad_z_TD, grad_score_T, kept)

    def compare(self, encoded: EncodedTiles, parameters: list[nn.Parameter]) -> Tensor:
        """Run pass 2; return the cosine of its gradient and that of all tiles."""
        before = taken(parameters)
        self.adapt(encoded)
        drawn = taken(parameters)
        grads = encoded.tiles.z_TD.grad, encoded.tiles.score_T.grad
        self._adapt(encoded.chunks, encoded.bag.seed, *grads, [])
        near = cosine(drawn, taken(parameters))
        give(parameters, before)
        give(parameters, drawn)
        return near

    @property
    def noisy(self) -> bool:
        """Return whether features depend on the chunk: random numbers, batch statistics."""
        modules = list(self.model.encoder.modules())
        rates = (
            module.p if isinstance(module, nn.Dropout) else module.drop_prob
            for module in modules
            if isinstance(module, nn.Dropout | DropPath)
        )
        return any(rate > 0 for rate in rates) or any(isinstance(each, BATCH) for each in modules)

    def _chunk(self, chunk: Tensor, most: int | None = None) -> Encoded:
        """Return features and raw scores of a chunk of tiles, or of tokens of the frozen prefix.

        `most` tiles fit at once, where that is fewer than a chunk.
        """
        behind = chunk.is_floating_point()
        encode = self.boundary.encode if behind else self.model.encode
        return self.model.encoder.sized(encode, most or self.chunk)(chunk)

    def _adapt(
        self,
        chunks: Tiles,
        seed: int,
        grad_z_TD: Tensor,
        grad_score_T: Tensor | None,
        kept: list[Encoded],
    ) -> None:
        """Run `adapt_bag`, in half chunks where memory runs out, unless there is noise."""
        if not len(grad_z_TD):
            return  # no tile was drawn, since none has a gradient
        with OomRetry(p for p in self.model.encoder.parameters() if p.requires_grad) as retry:
            try:
                adapt_bag(
                    lambda chunk: self._chunk(chunk, retry.fits),
                    chunks.split(self.chunk),
                    grad_z_TD,
                    grad_score_T,
                    seed=seed,
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


def packed(bags: Sequence[Bag], chunk: int) -> list[Bag]:
    """Return the first slide, and those behind it that fit into one chunk with it."""
    room, pack = chunk - bags[0].count, list(bags[:1])
    for bag in bags[1:]:
        room -= bag.count
        if room < 0 or not all(isinstance(each.tiles, Tensor) for each in (bags[0], bag)):
            break
        pack.append(bag)
    return pack


def joined_tiles(pack: Sequence[Bag]) -> Tiles:
    """Return the tiles of slides, of several in memory as one tensor."""
    return pack[0].tiles if len(pack) == 1 else torch.cat([bag.tiles for bag in pack])


def leaves(each_T: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return each slide's rows as a leaf of its own."""
    return [part.requires_grad_() for part in each_T.detach().split(list(counts))]


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return rows of slides one after the other; None where there are none."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts))


def fewer(chunk: int) -> int:
    """Return an eighth fewer tiles, at least one fewer: the chunk to go on with; of 1 it is 0."""
    return chunk - max(1, chunk // 8)


def check_counts(
    chunk: int | None,
    keep_chunks: int,
    backward_tiles: int | None,
    cosine_every: int | None,
    pack_chunks: bool,
) -> list[str]:
    """Return what is wrong with a run's numbers, each with its key."""
    faults = []
    if chunk is not None and chunk < 1:
        faults.append(f"model.chunk must be 1 or more, got {chunk}")
    if keep_chunks < 0:
        faults.append(f"model.keep_chunks must be 0 or more, got {keep_chunks}")
    if backward_tiles is not None and backward_tiles < 1:
        faults.append(f"model.backward_tiles must be 1 or more, got {backward_tiles}")
    if cosine_every is not None and (cosine_every < 1 or backward_tiles is None):
        faults.append(
            f"model.cosine_every must be 1 or more, and takes model.backward_tiles, whose "
            f"gradient it is of; got {cosine_every} with backward_tiles {backward_tiles}"
        )
    elif cosine_every and pack_chunks:
        faults.append(
            f"model.cosine_every {cosine_every} compares gradients of one slide, and "
            "model.pack_chunks makes those of several at once: leave one out"
        )
    return faults


def check_packs(pack_chunks: bool, accumulate: int) -> list[str]:
    """Return what is wrong with slides of an update that share a chunk, where it has but one."""
    if pack_chunks and accumulate == 1:
        return [
            "model.pack_chunks lets small slides of an update share a chunk, and an update has one "
            "slide: set model.steps.accumulate, or leave pack_chunks out"
        ]
    return []
