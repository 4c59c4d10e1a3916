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
Differs: dropout draws for the fillers too, so its noise has the same distribution, other values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
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
    # drop-path's rate differs from block to block, and is compiled in
    config.recompile_limit = max(config.recompile_limit, VARIANTS * len(blocks))
    # LoRA may be in some blocks and not in others: one's code must not serve for the other
    config.skip_nnmodule_hook_guards = False
    for kind in {type(block) for block in blocks}:
        forward = torch.compile(kind.forward, backend=BACKEND, dynamic=False)
        for block in blocks:
            if type(block) is kind:
                block.forward = partial(forward, block)


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
