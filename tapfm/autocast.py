"""A part of a model without autocast, on any device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which no autocast is on; the meta device has none, and torch refuses."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
