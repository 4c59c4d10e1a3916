"""Models on the meta device are made without filling tensors that have no numbers."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

FILLS = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_"}


class Unfilled(TorchFunctionMode):
    """A torch mode that fills no tensor of the meta device, most of what a model costs there.

    Keeps linspace on the CPU: timm 1.0.20 reads drop-path rates from it, even on meta.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        filled = (*args, kwargs.get("tensor"))[0]  # by name in torch.nn.init
        if getattr(func, "__name__", "") in FILLS and filled.is_meta:
            return filled
        if func is torch.linspace:
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)
