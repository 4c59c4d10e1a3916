"""Weights from a 16-bit file, about to be trained in bfloat16: off their grid, by less than it.

A float16 number has three bits more than a bfloat16 one, so one weight in eight that was stored as
float16 lies exactly between two bfloat16 numbers, and rounds to the even one. The first update, be
it of 1e-9, moves all of these off the middle, each to the side that its gradient points to: the
encoder that computes in bfloat16 jumps by what a learning rate of 1e-4 would do, whatever the rate.
(On DINOv2 ViT-S/14 stored as float16, a step of 8e-8 moved slide logits from 2 to -10.)

So weights that lie on float16's grid get uniform noise of half its last place, once, before they
are trained: what was lost when they were stored, put back at random. Then as many weights cross a
middle as the size of the update says. fp32 files are not on the grid, and stay as they are.

Price: nothing that bfloat16 would see: the noise is a sixteenth of its last place at most, and of
    weights below 6e-5, which float16 holds coarsely, 3e-8.
Source: none; dither as in quantising signals.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

DIGITS, LEAST = 10, -14  # float16: bits behind the leading one, smallest exponent


@torch.no_grad()
def dither(parameters: Iterable[nn.Parameter], seed: int = 0) -> int:
    """Take parameters off float16's grid. Those on bfloat16's, where nothing is between, stay.

    Returns:
        How many numbers were moved.
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
    """Whether all are float16 numbers, and not all of them bfloat16."""
    return torch.equal(values, values.half().float()) and not torch.equal(
        values, values.bfloat16().float()
    )


def exponent(values: Tensor) -> Tensor:
    """Of the power of two below each; of 0 something small."""
    return torch.frexp(values).exponent - 1.0
