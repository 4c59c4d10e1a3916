"""Weights between the pretrained model and the adapted one: W(a) = W0 + a (W - W0).

`a` is 0 for the model as it came and 1 for the model as it was trained. Where the change is a
product, such as LoRA's B A, only the factor that starts at 0 is scaled, so that the change itself
is a times what was trained.

Source: Wortsman et al. 2022 (WiSE-FT, arXiv 2109.01903).
Differs: low-rank changes and inserted adapters are scaled as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def learning(vit: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that learn, by name."""
    return {name: each for name, each in vit.named_parameters() if each.requires_grad}


def learned(vit: nn.Module) -> dict[str, Tensor]:
    """Return a copy on the CPU of the parameters that learn, by name."""
    return {name: each.detach().cpu().clone() for name, each in learning(vit).items()}


def between(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], a: float, scaled: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return the learned parameters at a share `a` of the way from `start` to `end`.

    Args:
        start: parameters before training, by name.
        end: parameters after training.
        a: exactly `start` at 0 and exactly `end` at 1, for parameters that move.
        scaled: endings of the names of those that move; the others stay as they were trained.
    """
    return {
        name: torch.lerp(start[name].float(), value.float(), a).to(value.dtype)
        if name.endswith(scaled)
        else value
        for name, value in end.items()
    }


@torch.no_grad()
def put(vit: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy parameters into the model, by name."""
    parameters = dict(vit.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)
