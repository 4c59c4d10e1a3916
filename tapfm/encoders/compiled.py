"""Blocks compiled by torch.compile, and chunks of one shape for them.

A compiled block is made for the shape it first sees, and a slide's last chunk is short. So chunks
are filled up to the full number of tiles, and what is computed of the fillers is dropped: no tile
looks at another, so the others' numbers are what they were.

    compile_blocks(vit)                 before the first call, after that nothing may be hooked on
    padded(encode, chunk)(tiles)        features and scores of the tiles given

All blocks but the last are compiled, each for itself: they are alike, so it is done once for all.
The last is cheap (`encoders.tail`), and its q and k are read while it runs. Whatever strategies put
into a block is compiled with it; recomputed blocks are compiled and then recomputed.

Price: the first slide waits for the compiler, a minute or so; the fillers of the last chunk are
computed. Condition: a C++ compiler on a CPU, Triton's own needs on a GPU.
Differs: dropout draws for the fillers too, so its noise has the same distribution and other values.
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
    """Blocks cannot be compiled here."""


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile each block's forward, in place, at its first call.

    The class's forward, bound by a partial: so keys stay timm's, a copied block computes with its
    own weights, and all blocks share what was compiled.
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
    """Compile something small, so that what is missing is said before the first slide.

    Raises:
        CompilerError: it failed.
    """
    try:
        probe = torch.compile(lambda x: (x * 2).sin().sum(), backend=BACKEND)
        probe(torch.ones(8, device=device))
    except Exception as error:  # of many kinds: no compiler, one that fails, no Triton
        said = str(error).strip().partition("\n")[0]
        need = "a C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton and gcc"
        raise CompilerError(
            f"model.compile: torch's {BACKEND} cannot compile for {device.type} here: {said}. "
            f"It needs {need}. Install that, or leave model.compile out."
        ) from error


def padded(encode: Callable[[Tensor], Encoded], size: int) -> Callable[[Tensor], Encoded]:
    """`encode`, given `size` tiles or more each time: where there are fewer, the first again."""

    def encode_full(tiles_CP: Tensor) -> Encoded:
        there = len(tiles_CP)
        if there >= size:
            return encode(tiles_CP)
        fillers = tiles_CP[:1].expand(size - there, *tiles_CP.shape[1:])
        z_CD, score_C = encode(torch.cat([tiles_CP, fillers]))
        return z_CD[:there], score_C[:there]

    return encode_full
