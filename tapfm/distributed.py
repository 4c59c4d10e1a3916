"""Communication between the processes of one run: a GPU each, a slide each, the same weights.

Gradients are averaged once an update, and not at every backward as torch's DistributedDataParallel
does: pass 2 has a backward for every chunk. So Lightning's wrapper is taken off (`unwrap`) once it
has given all processes the same weights, and its buffers, as large as the gradient, are freed.

In a run of one process these functions do nothing.

If a process ends, the others would wait for it, some for minutes, some for ever. Those that were
started by the first one (`trainer.devices`) watch each other and end soon, and the reason is said;
torchrun and Slurm watch theirs themselves.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import subprocess_script
from torch import nn

T = TypeVar("T")
POLL_S, GRACE_S = 0.5, 15.0  # a process whose partner has ended may still end by itself
BROKEN = re.compile(
    r"Connection (closed|reset)|Broken pipe|gloo|NCCL|peer|socket|Socket|store", re.I
)  # in what torch raises where a connection breaks
_ended: list[str] = []  # processes that have ended, in words


class ProcessLost(RuntimeError):
    """Another process of this run has ended, so this one cannot go on."""

    exit_code = 1


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


def watch_others(trainer: L.Trainer) -> None:
    """End this process soon after another one of its run that `trainer.devices` has started."""
    subprocess_script._launch_process_observer = _watch_children  # theirs kills without a word
    environment = getattr(trainer.strategy.launcher, "cluster_environment", None)
    if type(environment).__name__ == "LightningEnvironment" and environment.local_rank() > 0:
        first = os.getppid()
        _watch(lambda: "" if os.getppid() == first else "the first process has ended")


def _watch_children(children: Sequence[subprocess.Popen]) -> None:
    def ended() -> str:
        codes = {number: child.poll() for number, child in enumerate(children, 1)}
        bad = [how_it_ended(f"process {number}", code) for number, code in codes.items() if code]
        return "; ".join(bad)

    _watch(ended, children)


def how_it_ended(name: str, code: int) -> str:
    """Return how a process ended, by its exit code, in words."""
    if code >= 0:
        return f"{name} has ended with exit code {code}, see its message"
    more = ": perhaps out of memory" if code == -signal.SIGKILL else ""
    return f"{name} was ended by {signal.Signals(-code).name}{more}"


def _watch(ended: Callable[[], str], children: Sequence[subprocess.Popen] = ()) -> None:
    """Look for an end in a thread; `ended` returns how, or ""."""

    def look() -> None:
        while not (how := ended()):
            time.sleep(POLL_S)
        _ended.append(how)
        time.sleep(GRACE_S)
        print(f"tapfm: {how}: this run stops. Its last resume point stands.", file=sys.stderr)
        for child in children:
            child.kill()
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


@contextmanager
def named_loss(processes: int) -> Iterator[None]:
    """Turn what torch raises where a connection breaks into what has happened.

    Raises:
        ProcessLost: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or type(error).__module__.partition(".")[0] in ("slides", "tapfm"):
            raise
        if not BROKEN.search(str(error)):
            raise
        time.sleep(4 * POLL_S)  # the watching thread may know more
        how = "; ".join(_ended) or "another process of this run has ended, see its message"
        raise ProcessLost(
            f"{how}: this run stops. Its last resume point stands: the same command goes on there."
        ) from error
