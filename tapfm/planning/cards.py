"""Cards: what memory a program really has on each, and how fast each is taken to be.

A "24 GB" card has 22.0 to 23.7 GiB, as the driver reports it (`torch.cuda.mem_get_info`): error
correction and the driver take their share. A plan must fit in what is there, so a card is named, or
is asked where it is in this machine; a bare number of GiB counts as the smallest card of that size.

Of that memory CUDA's context and workspaces take a part (`footprint.CONTEXT_GIB`), the allocator
reserves a little more than it gives out (`RESERVED`, with growing segments: `cli.expand_segments`),
and `SPARE_GIB` stays free.

Condition: tiles/s are counted work over a rate that is assumed, not measured.
Source: memory as PyTorch reports it for these cards; no card of them was measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slides.errors import SettingsError
from tapfm.planning.footprint import CONTEXT_GIB, GIB
from tapfm.settings import did_you_mean, plain

RESERVED = 1.01  # reserved over allocated memory
SPARE_GIB = 0.5
LEAST_SHARE = 0.91  # of a nominal size that no card of the list has: a T4 has 14.6 of 16


@dataclass(frozen=True)
class Card:
    """One kind of GPU."""

    name: str
    nominal: int
    """GiB by which it is sold."""
    total_gib: float
    """What the driver reports."""
    tflops: float
    """Sustained rate in bfloat16, assumed."""
    gb_s: float
    """Rate of its memory, as published."""


CARDS = (
    Card("L4", 24, 22.03, 55, 300),
    Card("A10G", 24, 22.20, 40, 600),
    Card("RTX 3090", 24, 23.69, 42, 936),
    Card("RTX 4090", 24, 23.65, 105, 1008),
    Card("RTX A5000", 24, 23.68, 60, 768),
    Card("A100 40", 40, 39.39, 190, 1555),
    Card("A100 80", 80, 79.15, 190, 2039),
    Card("H100", 80, 79.11, 400, 3350),
    Card("H200", 141, 139.81, 420, 4800),
)


def card_memory(asked: str | float | None) -> tuple[str, float]:
    """Return a card's description and memory in GiB.

    Args:
        asked: a card's name, or its nominal size in GiB; None is the card of this machine, or 24.

    Raises:
        SettingsError: no such card, or a size that cannot be.
    """
    if asked is None:
        if torch.cuda.is_available():
            total = torch.cuda.mem_get_info()[1] / GIB
            return f"this machine's {torch.cuda.get_device_name()}", total
        asked = 24
    by_name = {_short(card.name): card for card in CARDS}
    if found := by_name.get(_short(str(asked))):
        return f"a card like {found.name}", found.total_gib
    try:
        nominal = float(asked)
    except ValueError:
        names = [card.name for card in CARDS]
        near = did_you_mean(str(asked), names)
        raise SettingsError(
            f"plan: --gpu {asked}: neither a size in GiB nor one of {', '.join(names)}.{near}"
        ) from None
    if not 0 < nominal < float("inf"):
        raise SettingsError(f"plan: --gpu is its memory in GiB, such as 24; got {nominal:g}")
    same = [card for card in CARDS if card.nominal == nominal]
    if same:
        least = min(same, key=lambda card: card.total_gib)
        return f"a {nominal:g} GiB card ({least.name}, the smallest)", least.total_gib
    return f"a {nominal:g} GiB card", LEAST_SHARE * nominal


def card_named(asked: str | float | None) -> Card:
    """Return the card of the list that is meant, or that is the most like it in memory.

    Raises:
        SettingsError: as `card_memory`.
    """
    _, total = card_memory(asked)
    by_name = {_short(card.name): card for card in CARDS}
    return by_name.get(_short(str(asked))) or min(
        CARDS, key=lambda card: abs(card.total_gib - total)
    )


def _short(name: str) -> str:
    """Return a card's name as it is compared, without NVIDIA and RTX."""
    return plain(name).removeprefix("nvidia").removeprefix("rtx")


def usable(total_gib: float) -> float:
    """Return the highest peak that fits: allocated memory and context, in GiB."""
    return max(0.0, (total_gib - SPARE_GIB - CONTEXT_GIB) / RESERVED + CONTEXT_GIB)


def card_for(peak_gib: float) -> str:
    """Return the smallest card of the list on which a peak fits, or the memory that it takes."""
    total = (peak_gib - CONTEXT_GIB) * RESERVED + CONTEXT_GIB + SPARE_GIB
    large = [card for card in CARDS if card.total_gib >= total]
    if not large:
        return f"more than {max(card.total_gib for card in CARDS):.0f} GiB"
    least = min(large, key=lambda card: card.total_gib)
    return f"{total:.1f} GiB ({least.name})"
