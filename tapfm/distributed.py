"""Communication between the processes of one run: a GPU each, a slide each, the same weights.

Gradients are averaged once an update, and not at every backward as torch's DistributedDataParallel
does: pass 2 has a backward for every chunk. So Lightning's wrapper is taken off (`unwrap`) once it
has given all processes the same weights, and its buffers, as large as the gradient, are freed.

In a run of one process these functions do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import lightning as L
import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


def several() -> bool:
    """Return whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if several() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if several() else 1


def unwrap(module: L.LightningModule) -> None:
    """Take DistributedDataParallel off a module that steps its optimizers itself."""
    if several():
        module.trainer.strategy.model = module


def average(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes; a missing one counts as 0.

    A parameter without a gradient in any process has none afterwards.
    """
    parameters = list(parameters)
    if not several() or not parameters:
        return
    has = [p.grad is not None for p in parameters]
    anywhere = torch.tensor(has, dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    waiting = []
    for parameter in (p for p, given in zip(parameters, anywhere.tolist(), strict=True) if given):
        if parameter.grad is None:
            parameter.grad = parameter.new_zeros(parameter.shape)
        parameter.grad /= world()
        waiting.append(dist.all_reduce(parameter.grad, async_op=True))
    for each in waiting:
        each.wait()


def gather(mine: T) -> list[T]:
    """Return the values that all processes give, by their number."""
    if not several():
        return [mine]
    found: list = [None] * world()
    dist.all_gather_object(found, mine)
    return found


def part() -> None:
    """Wait for all processes, then close the connections between them.

    A process that ended while others' connections are open could be aborted by them.
    """
    if several():
        dist.barrier()
        dist.destroy_process_group()
