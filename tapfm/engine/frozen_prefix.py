"""Computes the frozen blocks in front of the first block that learns once a slide, not twice.

The tokens behind the frozen blocks are kept from pass 1, and pass 2 starts from them: with the last
n of L blocks learning, a tile costs 1 + 3 n / L forwards instead of 2 + 2 n / L. To the engine
(`engine.chunked`) the tokens are the tiles, and the remaining blocks are the encoder.

    prefix = find_frozen_prefix(encoder)                  None if something in front learns
    tokens = FrozenPrefixTokens(prefix.tokens, tiles)     in place of the tiles, and
    prefix.encode                                         in place of the encoder, in both passes

How: a hook on the first block that learns records the block's input, whatever the model does before
it (patches, positions, RoPE), and ends the forward there.

Price: tokens x width numbers a tile in host memory (ViT-L: 0.4 MB with bfloat16 weights, 0.8 MB
else), up to `BUDGET_GIB`; chunks beyond it are computed again. A chunk waits for its copy.
Condition: blocks in a row, then the final norm, as in timm's VisionTransformer and Eva; one tile is
encoded both ways to check that the result is the same.

Shapes: C tiles of a chunk, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tapfm.data.bag import Tiles
from tapfm.encoders.backbones import Encoder
from tapfm.encoders.pinned import upload
from tapfm.engine.chunked import Encoded, chunk_rng

BUDGET_GIB = 8.0


class _Reached(Exception):
    """Raised by the hook to end the forward at the first block that learns."""


class FrozenPrefix:
    """An encoder split in front of one of its blocks.

    Args:
        encoder: the encoder.
        first: number of the first block behind the split.
        precision: as in `Encoder.encode`.
    """

    def __init__(self, encoder: Encoder, first: int, precision: str = "fp32"):
        self.encoder, self.first, self.precision = encoder, first, precision
        self.given: Mapping[str, Any] = {}
        """Further arguments of the blocks, such as RoPE's angles."""

    @torch.no_grad()
    def tokens(self, tiles_CP: Tensor) -> Tensor:
        """Return the tokens (C, N, D) that enter the first block behind the split."""
        found = []

        def stop(_block: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(args[0])
            self.given = kwargs
            raise _Reached

        encoder = self.encoder
        hook = encoder.vit.blocks[self.first].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with encoder.autocast(self.precision):
                encoder(upload(tiles_CP, encoder.mean.device))
        except _Reached:
            pass
        finally:
            hook.remove()
        return found[0]

    def encode(self, tokens_CND: Tensor) -> Encoded:
        """Return the features and raw scores that the whole encoder would give."""
        encoder = self.encoder
        with encoder.autocast(self.precision):
            x_CND = upload(tokens_CND, encoder.mean.device)
            with encoder.reading():
                for block in encoder.vit.blocks[self.first :]:
                    x_CND = block(x_CND, **self.given)
            return encoder.read(encoder.vit.norm(x_CND))

    def agrees(self) -> bool:
        """Return whether the split encoder gives exactly the whole encoder's result."""
        side = self.encoder.tile_px
        tiles = (torch.arange(3 * side * side) % 251).to(torch.uint8).view(1, 3, side, side)
        training = self.encoder.training
        self.encoder.eval()
        with torch.no_grad():
            whole = self.encoder.encode(tiles, self.precision)
            cut = self.encode(self.tokens(tiles))
        self.encoder.train(training)
        return all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


class FrozenPrefixTokens:
    """A slide's tokens in place of its tiles (`bag.Tiles`): computed once, kept for pass 2.

    Args:
        make: maps a chunk of tiles to its tokens.
        tiles: the slide's tiles.
        seed: seed of dropout and drop-path in the frozen blocks.
        device: where `make` draws random numbers; None is where the tiles are.
        budget_gib: host memory for kept tokens.
    """

    def __init__(
        self,
        make: Callable[[Tensor], Tensor],
        tiles: Tiles,
        seed: int,
        budget_gib: float = BUDGET_GIB,
        device: torch.device | None = None,
    ):
        self.make, self.tiles, self.seed, self.budget = make, tiles, seed, budget_gib * 2**30
        self.device = device
        self.size: int | None = None
        self.kept: list[Tensor] = []

    def split(self, size: int) -> Iterator[Tensor]:
        """Chunks (C, N, D) of `size` tiles in order; the same every time for one size."""
        if size != self.size:
            self.size, self.kept, self.room = size, [], self.budget
        before = list(self.kept)
        for number, tiles_CP in enumerate(self.tiles.split(size)):
            if number < len(before):
                yield before[number]
                continue
            with chunk_rng(~self.seed, number, self.device or tiles_CP.device):
                tokens_CND = self.make(tiles_CP)
            self._keep(number, tokens_CND)
            yield tokens_CND

    def _keep(self, number: int, tokens_CND: Tensor) -> None:
        """Keep a chunk's tokens if all chunks before it are kept and there is room."""
        size = tokens_CND.numel() * tokens_CND.element_size()
        if number != len(self.kept) or size > self.room:
            return
        self.room -= size
        self.kept.append(tokens_CND.cpu())


def first_to_learn(vit: nn.Module) -> int | None:
    """Return the number of the first block that learns; None if it is 0 or earlier layers learn."""
    blocks, norm = getattr(vit, "blocks", None), getattr(vit, "norm", None)
    if blocks is None or norm is None:
        return None
    learns = {id(p) for p in vit.parameters() if p.requires_grad}
    behind = {id(p) for p in norm.parameters()}
    first = len(blocks)
    while first and not learns <= behind:
        first -= 1
        behind |= {id(p) for p in blocks[first].parameters()}
    return first if 0 < first < len(blocks) else None


def find_frozen_prefix(encoder: Encoder, precision: str = "fp32") -> FrozenPrefix | None:
    """Return the encoder split at the first block that learns; None if that saves nothing.

    Where the split encoder does not give the whole one's result, says so: all blocks are then
    computed in both passes.
    """
    first = first_to_learn(encoder.vit)
    if first is None or encoder.merging:  # merged tokens have sizes, which are not kept
        return None
    prefix = FrozenPrefix(encoder, first, precision)
    if prefix.agrees():
        return prefix
    print(
        f"the {first} frozen blocks in front are computed in both passes: this model does not give "
        "the same result when it is split behind them",
        flush=True,
    )
    return None
