"""How long an epoch takes on one GPU and on many: simulated from the index's own tile counts.

    epoch = simulate(tiles_N, gpus=8, rates=Rates(...), accumulate=8)
    epoch.seconds, epoch.efficiency

Each process takes every n-th slide of the epoch's order (`slides.streaming.order`), and all wait
for the slowest at every update. A slide waits for its tiles where the readers are slower than the
card. So what is lost is seen apart: waiting for larger slides of others, updates and the averaging
of gradients, reading. `paired` puts slides of like size beside each other (`paired_order`), so that
processes wait less.

Condition: speeds are those of `cards`, assumed; a process's rates may be given where they were
measured. Validation is not in it.
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


def simulate(
    tiles_N: Sequence[int],
    gpus: int,
    rates: Rates,
    accumulate: int = 1,
    *,
    paired: bool = False,
    seed: int = 0,
) -> Epoch:
    """Return an epoch over slides of so many tiles.

    Args:
        tiles_N: tiles that each slide gives to training.
        gpus: processes, a card each.
        rates: of each.
        accumulate: slides of a process per update.
        paired: slides of like size beside each other.
        seed: of the order.
    """
    sizes_N = np.asarray(tiles_N, dtype=float)
    order_N = epoch_order(len(sizes_N), seed, 0)
    if paired:
        order_N = paired_order(order_N, sizes_N, gpus, seed, 0)
    turns = -(-len(order_N) // gpus)
    sizes_TG = sizes_N[order_N[np.arange(turns * gpus) % len(order_N)]].reshape(turns, gpus)
    work_TG = sizes_TG * rates.tile_s + rates.slide_s
    ready_TG = np.cumsum(sizes_TG / rates.read_tiles_s, axis=0)  # readers never stop
    update_s = rates.update_s + 2 * rates.average_s * (gpus - 1) / gpus
    clock, now_G, starved_G, waited = 0.0, np.zeros(gpus), np.zeros(gpus), 0.0
    for turn in range(turns):
        begin_G = np.maximum(now_G, ready_TG[turn])
        starved_G += begin_G - now_G
        now_G = begin_G + work_TG[turn]
        if (turn + 1) % accumulate == 0 or turn == turns - 1:
            waited += float((now_G.max() - now_G).mean())
            clock = float(now_G.max()) + update_s
            now_G = np.full(gpus, clock)
    updates = -(-turns // accumulate)
    ideal = (sizes_N.sum() * rates.tile_s + len(sizes_N) * rates.slide_s) / gpus
    return Epoch(
        gpus, clock, ideal / clock, waited / clock, updates * update_s / clock,
        float(starved_G.mean()) / clock,
    )  # fmt: skip


def average_seconds(trained: int) -> float:
    """Return seconds in which a gradient of so many parameters is sent once between cards."""
    return trained * GRADIENT / (ALL_REDUCE_GB_S * 1e9)


def epoch_table(
    tiles_N: Sequence[int], gpus: Sequence[int], rates: Rates, accumulate: int, epochs: int
) -> str:
    """Return hours and efficiency of a run on so many GPUs, as text.

    Args:
        tiles_N: tiles that each training slide gives.
        gpus: numbers of cards.
        rates: of one card.
        accumulate: slides of an update, all cards together; each card takes its share, at least 1.
        epochs: of the run.
    """
    lines = [
        f"{len(tiles_N)} training slides, {sum(tiles_N):,} tiles an epoch "
        f"({min(tiles_N)} to {max(tiles_N)} a slide), {epochs} epochs",
        "",
        f"  {'GPUs':>4}{'hours':>9}{'efficiency':>12}{'larger slides':>15}{'updates':>9}"
        f"{'reading':>9}   {'paired by size':>14}",
    ]
    for count in gpus:
        each = max(1, accumulate // count)
        plain, pairs = (
            simulate(tiles_N, count, rates, each, paired=paired) for paired in (False, True)
        )
        hours = plain.seconds * epochs / 3600
        gain = f"{pairs.seconds * epochs / 3600:.1f} h" if count > 1 else ""
        lines.append(
            f"  {count:>4}{hours:>9.1f}{plain.efficiency:>12.0%}{plain.waiting:>15.0%}"
            f"{plain.updating:>9.0%}{plain.reading:>9.0%}   {gain:>14}"
        )
    return "\n".join(lines)
