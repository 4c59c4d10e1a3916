"""Simulates a run on one GPU and on many, from the index's own tile counts.

    epoch = simulate(tiles_N, gpus=8, rates=Rates(...), accumulate=8)
    epoch.seconds, epoch.efficiency
    epoch, hours = simulate_run(Run(...), gpus=8, rates=Rates(...))

Each process takes every n-th slide of the epoch's order (`slides.streaming.order`). At each update
all wait for the slowest twice: after pass 1, where the slide model's gradient is averaged, and
after pass 2, where the encoder's is. A slide waits for its tiles where the readers are slower than
the card. So what is lost is seen apart: waiting for larger slides of others, updates and the
averaging of gradients, reading. `paired` puts slides of like size beside each other
(`paired_order`), so that processes wait less.

Beside the epochs a run passes over all tiles of its validation slides after each, and over training
and validation slides to choose what is saved. These are forward passes, of which each process has
its share of the slides.

Condition: speeds are those of `cards`, assumed; a process's rates may be given where they were
measured (`benchmarks.two_processes` compares such a forecast with a run).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slides.streaming.order import epoch_order, paired_order

READ_TILES_S = 560  # of a reading process: 0.25 microns per pixel scaled to 0.5, the slowest case
ALL_REDUCE_GB_S = 10.0  # between cards of a machine over PCIe, or machines over 100 Gb/s; assumed
GRADIENT = 4  # bytes a parameter that is averaged


@dataclass(frozen=True)
class Rates:
    """The speed of one process."""

    tile_s: float
    """Seconds of both passes, per tile."""
    forward_s: float
    """Seconds of a forward pass, per tile: pass 1, and all that validation needs."""
    update_s: float
    """Seconds of an update of the encoder's weights."""
    slide_s: float = 0.0
    """Seconds of a slide beside its tiles."""
    read_tiles_s: float = math.inf
    """Tiles per second that the process's readers give."""
    average_s: float = 0.0
    """Seconds of averaging the gradient between two processes, data sent both ways."""


@dataclass(frozen=True)
class Epoch:
    """One epoch as simulated."""

    gpus: int
    seconds: float
    efficiency: float
    """Share of the time that a card spends on tiles: 1 is that of one card without updates."""
    waiting: float
    """Share of the time that a card waits for others' larger slides."""
    updating: float
    """Share of the time of updates and averaging."""
    reading: float
    """Share of the time that a card waits for tiles."""


@dataclass(frozen=True)
class Run:
    """The slides that a run passes over, and how often."""

    train_N: Sequence[int]
    """Tiles that an epoch draws of each training slide."""
    val_N: Sequence[int]
    """Tiles of each validation slide."""
    seen_N: Sequence[int]
    """Tiles of each training slide in a pass that chooses what is saved."""
    accumulate: int = 1
    """Slides of an update, all processes together; each takes its share, at least 1."""
    epochs: int = 20
    validations: int = 20
    looks: int = 0
    """Passes over `seen_N` and `val_N`, before the first epoch and after the last."""
    head_first: float = 0.0
    """Share of the epochs in which the slide model learns alone, from pass 1."""


def simulate(
    tiles_N: Sequence[int],
    gpus: int,
    rates: Rates,
    accumulate: int = 1,
    *,
    paired: bool = False,
    seed: int = 0,
    epoch: int = 0,
) -> Epoch:
    """Return an epoch over slides of so many tiles.

    Args:
        tiles_N: tiles that each slide gives to training.
        gpus: processes, a card each.
        rates: of each.
        accumulate: slides of a process per update.
        paired: slides of like size beside each other.
        seed: of the order.
        epoch: likewise.
    """
    sizes_N = np.asarray(tiles_N, dtype=float)
    order_N = epoch_order(len(sizes_N), seed, epoch)
    if paired:
        order_N = paired_order(order_N, sizes_N, gpus, seed, epoch)
    turns = -(-len(order_N) // gpus)
    sizes_TG = sizes_N[order_N[np.arange(turns * gpus) % len(order_N)]].reshape(turns, gpus)
    first_TG = sizes_TG * rates.forward_s + rates.slide_s
    second_TG = sizes_TG * (rates.tile_s - rates.forward_s)
    ready_TG = np.cumsum(sizes_TG / rates.read_tiles_s, axis=0)  # readers never stop
    update_s = rates.update_s + 2 * rates.average_s * (gpus - 1) / gpus
    now_G, starved_G, waited = np.zeros(gpus), np.zeros(gpus), 0.0
    for turn in range(turns):
        begin_G = np.maximum(now_G, ready_TG[turn])
        starved_G += begin_G - now_G
        updates_now = (turn + 1) % accumulate == 0 or turn == turns - 1
        now_G = begin_G + first_TG[turn]
        if updates_now:  # the slide model's
            waited += float((now_G.max() - now_G).mean())
            now_G = np.full(gpus, now_G.max())
        now_G = now_G + second_TG[turn]
        if updates_now:  # the encoder's
            waited += float((now_G.max() - now_G).mean())
            now_G = np.full(gpus, now_G.max() + update_s)
    clock = float(now_G[0])
    updates = -(-turns // accumulate)
    ideal = (sizes_N.sum() * rates.tile_s + len(sizes_N) * rates.slide_s) / gpus
    return Epoch(
        gpus, clock, ideal / clock, waited / clock, updates * update_s / clock,
        float(starved_G.mean()) / clock,
    )  # fmt: skip


def pass_seconds(tiles_N: Sequence[int], gpus: int, rates: Rates) -> float:
    """Return seconds of a forward pass over slides, each process every n-th of them."""
    tile_s = max(rates.forward_s, 1 / rates.read_tiles_s)
    shares = (tiles_N[rank::gpus] for rank in range(gpus))
    return max(sum(share) * tile_s + len(share) * rates.slide_s for share in shares)


def simulate_run(
    run: Run, gpus: int, rates: Rates, *, paired: bool = False
) -> tuple[Epoch, dict[str, float]]:
    """Return an epoch, and hours of a run's parts: training, validation, choosing what is saved."""
    each = max(1, run.accumulate // gpus)
    epoch = simulate(run.train_N, gpus, rates, each, paired=paired)
    validation = pass_seconds(run.val_N, gpus, rates)
    look = pass_seconds(run.seen_N, gpus, rates) + validation
    alone = run.head_first * pass_seconds(run.train_N, gpus, rates)
    seconds = {
        "training": run.epochs * (alone + (1 - run.head_first) * epoch.seconds),
        "validation": run.validations * validation,
        "choice": run.looks * look,
    }
    return epoch, {part: value / 3600 for part, value in seconds.items()}


def average_seconds(trained: int) -> float:
    """Return seconds in which a gradient of so many parameters is sent once between cards."""
    return trained * GRADIENT / (ALL_REDUCE_GB_S * 1e9)


def run_table(run: Run, gpus: Sequence[int], rates: Rates) -> str:
    """Return hours and efficiency of a run on so many GPUs, as text."""
    tiles_N = run.train_N
    lines = [
        f"{len(tiles_N)} training slides, {sum(tiles_N):,} tiles an epoch "
        f"({min(tiles_N)} to {max(tiles_N)} a slide), {run.epochs} epochs",
        f"{len(run.val_N)} validation slides, {sum(run.val_N):,} tiles, all of them "
        f"{run.validations} times; {run.looks} passes to choose what is saved, of "
        f"{sum(run.seen_N) + sum(run.val_N):,} tiles",
        "",
        f"  {'GPUs':>4}{'hours':>9}{'training':>10}{'validation':>12}{'choice':>8}   "
        f"{'efficiency':>10}{'larger slides':>15}{'updates':>9}{'reading':>9}   "
        f"{'paired by size':>14}",
    ]
    for count in gpus:
        found, hours = simulate_run(run, count, rates)
        _, pairs = simulate_run(run, count, rates, paired=True)
        gain = f"{sum(pairs.values()):.1f} h" if count > 1 else ""
        lines.append(
            f"  {count:>4}{sum(hours.values()):>9.1f}{hours['training']:>10.1f}"
            f"{hours['validation']:>12.1f}{hours['choice']:>8.1f}   {found.efficiency:>10.0%}"
            f"{found.waiting:>15.0%}{found.updating:>9.0%}{found.reading:>9.0%}   {gain:>14}"
        )
    return "\n".join(lines)
