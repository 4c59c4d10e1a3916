"""Measures a step: seconds and peak memory of its named phases, and bytes held by autograd.

    with meter.phase("encode"): ...      in the step
    meter.take()()                       after it: {"encode": {"s": 1.2, "allocated_gib": 9.8, ...}}

On CUDA a phase is two events and a reading of the allocator's own counters, so nothing inside the
step waits for the device. On the CPU it is the wall clock and, on Linux, the process's peak
resident memory.

Price: some tens of microseconds a phase.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30
PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # proc(5): sets the peak resident size back to the present one


def resident_gib() -> float | None:
    """Return peak resident memory in GiB since `reset_resident`; None outside Linux."""
    with suppress(OSError, StopIteration):
        lines = (PROCESS / "status").read_text().splitlines()
        line = next(each for each in lines if each.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / GIB
    return None


def reset_resident() -> None:
    """Start a new peak; where the system refuses, the peak counts from the process's start."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text(RESET_PEAK)


class PhaseMeter:
    """A meter of seconds and peak memory for the phases of a slide.

    Figures of a phase: `s`, and on CUDA `allocated_gib` and `reserved_gib` (peaks of the phase, as
    the caching allocator counts them), on the CPU `rss_gib` (peak of the whole process).

    Args:
        device: where the step runs.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        make = _CudaPhase if self.device.type == "cuda" else _CpuPhase
        self._begin: Callable[[], _CudaPhase | _CpuPhase] = lambda: make(self.device)
        self._done: list[tuple[str, _CudaPhase | _CpuPhase]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the code inside the `with`; times of phases of one name add up."""
        phase = self._begin()
        try:
            yield
        except BaseException:
            self._done.clear()  # a slide that failed half-way has no figures
            raise
        phase.end()
        self._done.append((name, phase))

    def take(self) -> Callable[[], dict[str, dict[str, float]]]:
        """Start anew; return a function that gives the figures of the phases since the last call.

        On CUDA the function waits for the last of these phases, so it is called late, for several
        slides at once.
        """
        done, self._done = self._done, []
        return lambda: _figures(done)


def _figures(done: list[tuple[str, _CudaPhase | _CpuPhase]]) -> dict[str, dict[str, float]]:
    """Return figures by phase; seconds of one name add up, of memory the largest counts."""
    figures: dict[str, dict[str, float]] = {}
    for name, phase in done:
        found = phase.figures()
        before = figures.setdefault(name, {})
        seconds = before.get("s", 0.0) + found.pop("s")
        figures[name] = {
            "s": seconds,
            **{k: max(v, before.get(k, v)) for k, v in found.items()},
        }
    return figures


class _CpuPhase:
    def __init__(self, device: torch.device):
        reset_resident()
        self.began = time.perf_counter()

    def end(self) -> None:
        self.seconds, self.rss_gib = time.perf_counter() - self.began, resident_gib()

    def figures(self) -> dict[str, float]:
        return {"s": self.seconds} | ({} if self.rss_gib is None else {"rss_gib": self.rss_gib})


class _CudaPhase:
    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.current_stream(device)
        torch.cuda.reset_peak_memory_stats(device)  # the host's book-keeping: no wait
        self.began, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.began.record(self.stream)

    def end(self) -> None:
        self.ended.record(self.stream)
        self.allocated = torch.cuda.max_memory_allocated(self.device)
        self.reserved = torch.cuda.max_memory_reserved(self.device)

    def figures(self) -> dict[str, float]:
        self.ended.synchronize()  # of this event only; later work on the device goes on
        return {
            "s": self.began.elapsed_time(self.ended) / 1e3,
            "allocated_gib": self.allocated / GIB,
            "reserved_gib": self.reserved / GIB,
        }


class SavedBytes:
    """A counter of bytes that autograd holds for backward inside a `with`, on any device.

    A storage counts once and whole, however many nodes or views hold it. Fake tensors count too.

    Args:
        but: tensors, such as a model's parameters, whose storages are not counted.
    """

    def __init__(self, but: Iterable[Tensor] = ()):
        self.live = 0
        """Bytes held now."""
        self.peak = 0
        """Most bytes held at once since the start, or since this was last set to `live`."""
        self._holders: dict[int, int] = {}
        self._but = {_key(tensor) for tensor in but}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor)

    def _change(self, tensor: Tensor, by: int) -> None:
        key = _key(tensor)
        if key in self._but:
            return
        before = self._holders.get(key, 0)
        self._holders[key] = before + by
        if not before or not before + by:
            self.live += by * tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.live)
        if not before + by:
            del self._holders[key]  # the address may be another tensor's next


class _Held:
    """A saved tensor; autograd drops it together with its graph."""

    def __init__(self, count: SavedBytes, tensor: Tensor):
        self.count, self.tensor = count, tensor
        count._change(tensor, +1)

    def __del__(self):
        self.count._change(self.tensor, -1)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # data_ptr is 0 for every fake tensor


def saved_bytes(function: Callable[[], object], but: Iterable[Tensor] = ()) -> int:
    """Return the most bytes that autograd holds for backward at once while `function` runs.

    Args:
        function: called once.
        but: tensors, such as a model's parameters, that are not counted.
    """
    with SavedBytes(but) as held:
        function()
    return held.peak
