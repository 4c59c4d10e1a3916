"""Seconds of a tile and of an update on each card, from counted work and assumed rates.

A tile's passes are counted operations over the card's sustained rate. An update moves bytes: on the
card at its memory's rate; with `offload` the gradient goes to the host, AdamW runs there while the
next gradient arrives, and the weight comes back.

Condition: nothing here was measured on a card.
"""

from __future__ import annotations

import math

from tapfm.planning.cards import CARDS, Card
from tapfm.planning.epoch import READ_TILES_S, Rates, average_seconds
from tapfm.planning.footprint import BAG_TILES, Cost, Setup

# bytes that an update reads and writes on the card, per parameter that learns: gradient, exact
# weight, two moments, the rounded weight. `residual`, compiled, decodes, updates and encodes, and
# draws the numbers by which it rounds.
MOVED = {"adamw": 28, "master": 30, "residual": 96, "offload": 6}
HOST_MOVED, HOST_GB_S = 28, 15.0  # AdamW in host memory; a few cores of a server
COPIED, PCIE_GB_S = 6, 12.0  # gradient to the host, weight back


def tile_seconds(cost: Cost, card: Card) -> float:
    """Return seconds of both passes of a tile."""
    return cost.flop / (card.tflops * 1e12)


def update_seconds(setup: Setup, cost: Cost, card: Card) -> float:
    """Return seconds of an update of the encoder."""
    seconds = MOVED[setup.optimizer] * cost.trained / (card.gb_s * 1e9)
    if setup.optimizer == "offload":
        host = HOST_MOVED * cost.trained / (HOST_GB_S * 1e9)
        seconds += max(host, COPIED * cost.trained / (PCIE_GB_S * 1e9))
    return seconds


def tiles_per_second(setup: Setup, cost: Cost, card: Card, bag: int = BAG_TILES) -> float:
    """Return tiles per second of training, an update after each bag."""
    return bag / (bag * tile_seconds(cost, card) + update_seconds(setup, cost, card))


def rates(setup: Setup, cost: Cost, card: Card, workers: int) -> Rates:
    """Return what `epoch.simulate` takes for one process with so many readers."""
    return Rates(
        tile_s=tile_seconds(cost, card),
        forward_s=cost.forward_flop / (card.tflops * 1e12),
        update_s=update_seconds(setup, cost, card),
        read_tiles_s=READ_TILES_S * max(1, workers),
        average_s=average_seconds(cost.trained),
    )


def speed_lines(setup: Setup, cost: Cost) -> list[str]:
    """Return what each card would do with a setup, and what its readers must give, as text."""
    speeds = {card.name: tiles_per_second(setup, cost, card) for card in CARDS}
    listed = ", ".join(f"{speed:.0f} {name}" for name, speed in speeds.items())
    most = max(speeds, key=speeds.get)
    need = math.ceil(speeds[most] / READ_TILES_S)
    return [
        f"Tiles/s with an update after every {BAG_TILES} tiles, at rates that are assumed: "
        f"{listed}",
        f"Each must be read: a reading process gives {READ_TILES_S} at the slowest (scaled from "
        f"0.25 microns per pixel), so data.workers {need} feeds the fastest, {most}.",
    ]
