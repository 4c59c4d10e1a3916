"""Noise for weights that were stored as float16, added once before training in bfloat16.

float16 has three bits more than bfloat16, so one stored weight in eight lies exactly between two
bfloat16 numbers, and rounds to the even one. The first update, even of 1e-9, moves all of these off
the middle, each to the side its gradient points to: the encoder that computes in bfloat16 changes
as much as at a learning rate of 1e-4, whatever the rate. (On DINOv2 ViT-S/14 stored as float16, a
step of 8e-8 moved slide logits from 2 to -10.)

So weights that are all float16 numbers get uniform noise of half a last place, once, before
training. Afterwards the number of weights whose rounding changes follows from the size of the
update. Weights stored as fp32 are left as they are.

Price: nothing that bfloat16 can resolve: the noise is at most a sixteenth of its last place, and
    3e-8 for weights below 6e-5, which float16 holds coarsely.
Source: none; dither as in quantising signals.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

DIGITS, LEAST = 10, -14  # float16: bits behind the leading one, smallest exponent


@torch.no_grad()
def dither(parameters: Iterable[nn.Parameter], seed: int = 0) -> int:
    """Add noise to parameters that hold float16 numbers; those that fit bfloat16 stay.

    Returns:
        The number of weights that were changed.
    """
    moved, drawn = 0, torch.Generator().manual_seed(seed)
    for parameter in parameters:
        if parameter.dtype == torch.float32 and on_grid(parameter):
            last = torch.exp2(exponent(parameter).clamp_min(LEAST) - DIGITS)
            noise = torch.rand(parameter.shape, generator=drawn).to(parameter.device) - 0.5
            parameter += torch.where(parameter == 0, 0, noise * last)
            moved += parameter.numel()
    return moved


def on_grid(values: Tensor) -> bool:
    """Return whether all values are float16 numbers, and not all of them bfloat16."""
    return torch.equal(values, values.half().float()) and not torch.equal(
        values, values.bfloat16().float()
    )


def exponent(values: Tensor) -> Tensor:
    """Return floor(log2 |x|) of each number x; a small number for 0."""
    return torch.frexp(values).exponent - 1.0
