"""Fp32 values in few bits: a bfloat16 with the 16 bits behind it, and moments of 8 bits.

    make_coder(weights)         encode and decode, compiled where that pays
    pack(values, kind, chance)  8-bit codes, and a scale for each block

The steps below are some thirty passes over the numbers, which torch.compile makes a few. Compiled
or not, the results are the same to the bit, so a run may be resumed where there is no compiler. The
caller takes roots and squares, since compiled roots differ in the last bit.

Price: ten seconds or so of compiling before the first slide, for models of `COMPILED_FROM` or more.
Condition: a C++ compiler on a CPU; what Triton needs on a GPU. The same bits were seen on a CPU.
Source: Dettmers et al. 2022 (arXiv 2110.02861), moments in 8 bits by blocks.
Differs: the residual loses nothing: weights are rounded half up in magnitude, which can be undone.
    The second moment is never rounded to 0, where the update would divide by almost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # neighbouring values of a moment that share a scale
CODES, OCTAVES = {torch.int8: 127, torch.uint8: 255}, 18  # magnitudes from 2 ** -18 to 1
COMPILED_FROM = 20_000_000  # numbers; below, compiling takes longer than it saves


def encode(master: Tensor, first: Tensor, root: Tensor, chance: Tensor) -> tuple[Tensor, ...]:
    """Return flat fp32 values packed: weight, low bits, and codes and scale of each moment."""
    kinds = ((first, torch.int8), (root, torch.uint8))
    moments = (pack(values, kind, chance) for values, kind in kinds)
    return *split_bits(master), *(each for moment in moments for each in moment)


def decode(
    weight: Tensor,
    low: Tensor,
    first: Tensor,
    first_scale: Tensor,
    root: Tensor,
    root_scale: Tensor,
) -> tuple[Tensor, ...]:
    """Return master, first moment and the second's root, flat, from what `encode` returned."""
    master, size = join_bits(weight, low), weight.shape
    return master, unpack(first, first_scale, size), unpack(root, root_scale, size)


class Coder(NamedTuple):
    """Packs and unpacks values."""

    encode: Callable[..., tuple[Tensor, ...]]
    decode: Callable[..., tuple[Tensor, ...]]


EAGER = Coder(encode, decode)


@torch.no_grad()
def make_coder(weights: Sequence[Tensor]) -> Coder:
    """Return encode and decode for weights on one device, compiled if that pays and works."""
    if sum(weight.numel() for weight in weights) < COMPILED_FROM:
        return EAGER
    try:
        compiled = Coder(*(torch.compile(each, dynamic=True) for each in EAGER))
        for size in (3 * BLOCK + 1, 4 * BLOCK):  # a graph each: with and without a short block
            few = torch.linspace(0, 1, size, device=weights[0].device)
            values = few, few.clone(), few.clone()  # one tensor thrice would be a graph of its own
            compiled.decode(*compiled.encode(*values, chances(few, 0)))
    except Exception as error:  # of many kinds: no compiler, one that fails, no Triton
        why = str(error).strip().partition("\n")[0]
        print(f"model.optimizer residual: updates are not compiled, which takes longer: {why}")
        return EAGER
    return compiled


def split_bits(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return an fp32 tensor's nearest bfloat16 and its low 16 bits (int16).

    Halves are rounded away from 0, not to even, so that `join_bits` can undo the rounding.
    """
    bits = master.view(torch.int32)
    rounded = (bits + 0x8000) >> 16
    return rounded.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_bits(weight: Tensor, low: Tensor) -> Tensor:
    """Return the fp32 tensor that `split_bits` took apart, bit for bit."""
    behind = low.to(torch.int32) & 0xFFFF
    front = weight.view(torch.int16).to(torch.int32) - (behind >= 0x8000).to(torch.int32)
    return ((front << 16) | behind).view(torch.float32)


def chances(values: Tensor, seed: int) -> Tensor:
    """Return the numbers in [0, 1) that decide how values are rounded, (blocks, BLOCK).

    They depend on `seed` alone, so a resumed run draws the same.
    """
    draw = torch.Generator(values.device).manual_seed(seed)
    blocks = -(-values.numel() // BLOCK)
    return torch.rand(blocks, BLOCK, device=values.device, generator=draw)


def pack(values: Tensor, kind: torch.dtype, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 values as logarithmic 8-bit codes (blocks, BLOCK), and each block's maximum.

    AdamW divides one moment by the root of the other, so relative error counts: neighbouring codes
    have the same ratio everywhere, and only 0 becomes 0. A moment may change by 0.1 % a step,
    so values are rounded up or down at random, right on average.

    Args:
        values: fp32 tensor of any shape.
        kind: int8, with signed codes, or uint8, with twice as many codes.
        chance: of rounding, from `chances`.
    """
    flat = values.flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    part, codes = blocks.abs().div_(largest), CODES[kind]
    below = part.log2().mul_(codes / OCTAVES).add_(codes).floor_().clamp_(1, codes - 1)
    low, high = _magnitude(below, codes), _magnitude(below + 1, codes)
    code = below + (part - low > chance * (high - low))
    return (code * blocks.sign()).to(kind), largest


def unpack(code: Tensor, largest: Tensor, shape: torch.Size) -> Tensor:
    """Decode packed values to float32; the error is at most one quantisation step."""
    magnitude = _magnitude(code.to(torch.float32).abs_(), CODES[code.dtype])
    return magnitude.mul_(code.sign()).mul_(largest).flatten()[: shape.numel()].view(shape)


def _magnitude(code: Tensor, codes: int) -> Tensor:
    """Return 0 for code 0, else a power of 2 up to 1."""
    return torch.where(code > 0, ((code - codes) * (OCTAVES / codes)).exp2_(), 0.0)
