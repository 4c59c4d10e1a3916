"""Copies between host and GPU that do not wait, through a few page-locked buffers used in turn.

    there = upload(tiles_CP, device)            a chunk to the GPU; nothing is copied twice on a CPU
    buffer = RING.take(shape, dtype)            for a copy of another kind, and behind it
    RING.copied(device)

A copy from memory that is not page-locked first waits for all work that the GPU was given. Locking
whole slides costs more than it seems: torch rounds each to a power of two and never gives it back
(20 GiB of tiles took 57). So the tiles of a chunk are copied into a buffer here, a millisecond, and
go on from there.

Price: `SLOTS` buffers of the largest chunk, or of the largest tensor of an offloaded optimizer. A
buffer is reused once its copy is over, so the host is at most so many chunks ahead of the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLOTS = 4  # an offloaded update has two gradients and two weights under way


class PinnedRing:
    """Page-locked buffers of one size, which grows with what is asked for."""

    def __init__(self, slots: int = SLOTS):
        self.slots, self.slab = slots, None
        self.release()

    def release(self) -> None:
        """Give the buffers back, to the system too."""
        if self.slab is not None:
            self.slab = None
            getattr(torch._C, "_host_emptyCache", lambda: None)()  # or torch keeps them
        self.size, self.turn = 0, 0
        self.busy: list[torch.cuda.Event | None] = [None] * self.slots

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the next buffer as a tensor, once the copy that used it last is over."""
        numbers = torch.Size(shape).numel()
        size = numbers * dtype.itemsize
        if size > self.size:
            self.release()
            self.size = (size + 15) // 16 * 16  # so that each is aligned for any dtype
            self.slab = torch.empty(self.slots * self.size, dtype=torch.uint8, pin_memory=True)
        self.turn = (self.turn + 1) % self.slots
        if self.busy[self.turn] is not None:
            self.busy[self.turn].synchronize()
            self.busy[self.turn] = None
        start = self.turn * self.size
        return self.slab[start : start + size].view(dtype).view(shape)

    def copied(self, device: torch.device) -> torch.cuda.Event:
        """Note that a copy from or to the buffer just taken has begun; return its event."""
        self.busy[self.turn] = torch.cuda.current_stream(device).record_event()
        return self.busy[self.turn]

    def upload(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a tensor of host memory on the GPU; the copy is under way."""
        buffer = self.take(tensor.shape, tensor.dtype).copy_(tensor)
        there = buffer.to(device, non_blocking=True)
        self.copied(device)
        return there


RING = PinnedRing()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the host to a GPU by way of the ring."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return RING.upload(tensor, device)
