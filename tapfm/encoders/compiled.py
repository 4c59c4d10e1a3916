"""Blocks compiled by torch.compile, and chunks filled up to one shape for them.

A compiled block serves one input shape, and a slide's last chunk is short. So chunks are filled up
to the full number of tiles and the fillers' results are dropped; tiles do not see each other, so
the results of the others stay the same.

    compile_blocks(vit)                 before the first call; no hooks may be added afterwards
    pad_chunks(encode, chunk)(tiles)        features and scores of the given tiles

All blocks but the last are compiled one by one; being alike, they share the compiled code. The
last is cheap (`encoders.tail`), and its q and k are read while it runs. Whatever strategies insert
into a block is compiled with it; recomputed blocks are compiled and then recomputed.

Price: the first slide waits a minute or so for the compiler; the last chunk's fillers are computed.
Condition: a C++ compiler on a CPU; what Triton needs on a GPU.
Differs: dropout draws for the fillers too, and drop-path by a draw of its own, so their noise has
    the same distribution, other values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.layers import DropPath
from torch import Tensor, nn

BACKEND = "inductor"
VARIANTS = 4  # of one block: with and without a graph, of a whole chunk and of a half

Encoded = tuple[Tensor, Tensor]


class CompilerError(RuntimeError):
    """torch.compile does not work on this machine."""


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile each block's forward in place, at its first call.

    The class's forward is compiled and bound by a partial, so keys stay timm's, a copied block
    uses its own weights, and all blocks share the compiled code.
    """
    config = torch._dynamo.config
    for block in blocks:
        for module in block.modules():
            if type(module) is DropPath:
                rate_as_data(module)
    # blocks that a strategy made unlike each other are compiled each
    config.recompile_limit = max(config.recompile_limit, VARIANTS * len(blocks))
    # LoRA may be in some blocks and not in others: one's code must not serve for the other
    config.skip_nnmodule_hook_guards = False
    for kind in {type(block) for block in blocks}:
        forward = torch.compile(kind.forward, backend=BACKEND, dynamic=False)
        for block in blocks:
            if type(block) is kind:
                block.forward = partial(forward, block)


def rate_as_data(path: DropPath) -> None:
    """Turn a drop-path into one whose rate is a buffer."""
    path.__class__ = DropPathAtARate
    path.register_buffer("rate", torch.tensor(path.drop_prob), persistent=False)


class DropPathAtARate(DropPath):
    """Stochastic depth whose rate is data: compiled in, each block's own rate is a graph more."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with each tile's path dropped at the rate, the others scaled up."""
        if not self.training:
            return x
        keep = 1 - self.rate.float()
        drawn = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device)
        return x * ((drawn < keep).float() / keep).to(x.dtype)


def graphs_made() -> int:
    """Return how many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def too_many_graphs(blocks: Sequence[nn.Module], before: int) -> str:
    """Return a warning if far more graphs were made than blocks of one kind need; else "".

    Args:
        blocks: of the encoder.
        before: `graphs_made` before the first slide.
    """
    kinds = len({type(block) for block in blocks})
    if (made := graphs_made() - before) <= 2 * VARIANTS * kinds:
        return ""
    return (
        f"model.compile: {made} graphs were compiled for {len(blocks)} blocks, where {VARIANTS} or "
        "so would do: each costs a wait. Blocks differ, or chunks change their size; without "
        "model.compile nothing is compiled. TORCH_LOGS=recompiles says why."
    )


def need_compiler(device: torch.device) -> None:
    """Compile a small function, to find what is missing before the first slide.

    Raises:
        CompilerError: compilation failed; the message says what is needed.
    """
    try:
        probe = torch.compile(lambda x: (x * 2).sin().sum(), backend=BACKEND)
        probe(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no compiler, one that fails, no Triton
        reason = str(error).strip().partition("\n")[0]
        need = "a C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton and gcc"
        raise CompilerError(
            f"model.compile: torch's {BACKEND} cannot compile for {device.type} here: {reason}. "
            f"It needs {need}. Install that, or leave model.compile out."
        ) from error


def pad_chunks(encode: Callable[[Tensor], Encoded], size: int) -> Callable[[Tensor], Encoded]:
    """Return `encode` with chunks filled up to `size` tiles by repeating the first tile."""

    def encode_full(tiles_CP: Tensor) -> Encoded:
        there = len(tiles_CP)
        if there >= size:
            return encode(tiles_CP)
        fillers = tiles_CP[:1].expand(size - there, *tiles_CP.shape[1:])
        z_CD, score_C = encode(torch.cat([tiles_CP, fillers]))
        return z_CD[:there], score_C[:there]

    return encode_full
