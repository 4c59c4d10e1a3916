"""The order of slides and the choice of their tiles: pure functions of a seed.

Order and choice of tiles depend only on (seed, epoch, slide): the only state to save is the place
in the epoch, and the number of workers does not matter. Numbers are the raw bits of a PCG64 that is
seeded with a hash, because numpy keeps those bits from version to version, unlike `permutation`.

Worker processes read ahead, so only the training loop knows how many slides were trained: it calls
`SlideSampler.trained`, and resuming starts there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from slides.errors import SettingsError, refuse
from slides.seeds import stable_seed

PAIRED = 16  # turns of each process among which slides are paired by size
SAMPLINGS = ("uniform", "spatial")  # `sample_tiles`, `spread_tiles`


class Turn(NamedTuple):
    """One slide's place in the training order."""

    epoch: int
    position: int
    """Place in the epoch's order, from 0."""
    slide: int
    """Number of the slide in the cohort's split."""
    visit: int = 0
    """Number of times that this epoch had the slide before; other tiles are drawn each time."""

    def drawn_as(self, slide_id: str) -> str:
        """Return the name by which the slide's random numbers are drawn at this visit."""
        return f"{slide_id}#{self.visit}" if self.visit else slide_id


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of n slides in one epoch: a permutation of 0 to n - 1."""
    return _shuffled(n, stable_seed("order", int(seed), int(epoch)))


def paired_order(
    order_N: np.ndarray, sizes_N: np.ndarray, world: int, seed: int, epoch: int
) -> np.ndarray:
    """Return an order in which slides of like size come at once in the processes of a run.

    Processes wait for each other at every update, so one large slide keeps all waiting. Within
    windows of `PAIRED` turns slides are sorted by size and dealt in groups of one a process; the
    groups come in random order, so that sizes do not rise over a window. Which slides share a
    window is as random as before.

    Args:
        order_N: the epoch's order.
        sizes_N: of each slide, for example its number of tiles.
        world: processes.
        seed: of the groups' order.
        epoch: likewise.
    """
    found = []
    for number, start in enumerate(range(0, len(order_N), PAIRED * world)):
        window = order_N[start : start + PAIRED * world]
        window = window[np.argsort(-sizes_N[window], kind="stable")]
        whole = len(window) // world * world  # the smallest are left for the epoch's end
        groups = window[:whole].reshape(-1, world)
        place = _shuffled(len(groups), stable_seed("pairs", int(seed), int(epoch), number))
        found += [groups[place].ravel(), window[whole:]]
    return np.concatenate(found)


def repeated(
    n: int, order: Callable[[int], np.ndarray] | None, seed: int, views: int, world: int
) -> tuple[int, Callable[[int], np.ndarray] | None]:
    """Return number and order of an epoch's turns if each slide comes `views` times in a row.

    Args:
        n: slides.
        order: of an epoch without repetition; None is `epoch_order`.
        seed: of that.
        views: times that a slide comes.
        world: processes.

    Raises:
        SettingsError: several processes, which would each take one of the views.
    """
    if views == 1:
        return n, order
    if world > 1:
        raise SettingsError(
            f"data.views is {views}, and {world} processes train: each would see one view of a "
            "slide. Train with trainer.devices: 1, or set data.views: 1."
        )
    once = order or partial(epoch_order, n, seed)
    return n * views, lambda epoch: np.repeat(once(epoch), views)


def sample_tiles(
    n_tiles: int, budget: int | None, seed: int, epoch: int, slide_id: str
) -> np.ndarray:
    """Return which of a slide's tiles an epoch uses: random, sorted, without replacement.

    A larger budget takes the same tiles and more. None, or a budget of at least `n_tiles`, takes
    all of them.
    """
    if _takes_all(n_tiles, budget):
        return np.arange(n_tiles)
    seed = stable_seed("tiles", int(seed), int(epoch), slide_id)
    return np.sort(_shuffled(n_tiles, seed)[:budget])


def spread_tiles(
    cells_T2: np.ndarray, budget: int | None, seed: int, epoch: int, slide_id: str
) -> np.ndarray:
    """Return which tiles an epoch uses, like `sample_tiles` but spread over the slide.

    All tiles are equally likely; neighbours seldom come together, and no part is missed by chance.
    Tiles are sorted by nested quadrants, the four of each in random order, and taken at equal steps
    from a random start. A larger budget takes other tiles. `cells_T2` are integers, column and row
    of each tile on a lattice.

    Source: Stevens & Olsen 2004, "Spatially balanced sampling of natural resources", section 3.
    """
    tiles = len(cells_T2)
    if _takes_all(tiles, budget):
        return np.arange(tiles)
    random = np.random.PCG64(stable_seed("spread", int(seed), int(epoch), slide_id)).random_raw
    cells_T2 = cells_T2 - cells_T2.min(0)
    address_T = np.zeros(tiles, np.int64)
    for level in reversed(range(int(cells_T2.max()).bit_length())):
        column_T, row_T = cells_T2.T >> level & 1
        quadrants, of_T = np.unique(address_T, return_inverse=True)
        place_Q4 = random(4 * len(quadrants)).reshape(-1, 4).argsort(1).argsort(1)
        address_T = 4 * address_T + place_Q4[of_T, column_T + 2 * row_T]
    order_T = np.lexsort([random(tiles), address_T])  # tiles of one cell in random order
    start = int(random()) % tiles
    return np.sort(order_T[(start + tiles * np.arange(budget)) // budget])


class SlideSampler:
    """Yields the turns of an epoch from `start` on; its length is that of the full epoch.

    Several processes share an epoch: each takes every `world`-th turn, starting at its `rank`. If
    the number is not even, the first slides of the order get a second turn, so that all processes
    have equally many.

    The place in training is (`epoch`, `start`), which is also saved in checkpoints. Iterating does
    not change it, since workers run ahead; `trained` does.

    With Lightning: call `sampler.trained(bag.turn)` at the end of `training_step` (a module's hook
    `on_train_batch_end` runs after the checkpoint callback's), and call `state_dict` and
    `load_state_dict` from those of the LightningDataModule. Lightning calls `set_epoch` itself.
    """

    def __init__(
        self,
        n: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        order: Callable[[int], np.ndarray] | None = None,
    ):
        """Store the settings; `order` is a pure function of the epoch, None is `epoch_order`."""
        self.n, self.seed, self.rank, self.world = n, seed, rank, world
        self.order = order or partial(epoch_order, n, seed)
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return -(-self.n // self.world)

    @property
    def turns(self) -> int:
        """Number of turns of all processes in an epoch."""
        return len(self) * self.world

    def __iter__(self) -> Iterator[Turn]:
        epoch, start = self.epoch, self.start
        order, visits, had = self.order(epoch), [], Counter()
        for slide in order:
            visits.append(had[slide])
            had[slide] += 1
        for position in range(start + self.rank, self.turns, self.world):
            place = position % self.n
            yield Turn(epoch, position, int(order[place]), visits[place])

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; do nothing if it has begun already."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    def seek(self, epoch: int, start: int) -> None:
        """Go to a place in training; an epoch's end is the start of the next."""
        if not 0 <= start <= self.turns or start % self.world or epoch < 0:
            raise ValueError(f"no place ({epoch}, {start}) in epochs of {self.turns} turns")
        self.epoch, self.start = (epoch + 1, 0) if start == self.turns else (epoch, start)

    def trained(self, turn: Turn) -> None:
        """Record that this turn is done in every process: resuming begins after it."""
        self.seek(turn.epoch, (turn.position // self.world + 1) * self.world)

    def state_dict(self) -> dict[str, int]:
        """Return the place in training as integers, safe to load."""
        place = {"epoch": self.epoch, "start": self.start}
        return {**place, "seed": self.seed, "slides": self.n, "processes": self.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Return to the place that was saved.

        Raises:
            SettingsError: slides, seed or processes differ, and with them the order.
        """
        for key, mine in (("slides", self.n), ("seed", self.seed), ("processes", self.world)):
            if state[key] != mine:
                raise SettingsError(
                    f"the checkpoint was trained with {key} = {state[key]}, this run has {mine}: "
                    "the slides would come in another order. Resume with the same cohort, seed and "
                    "devices, or start a new run from its weights."
                )
        self.seek(state["epoch"], state["start"])


def budget_faults(budget: int | None) -> list[str]:
    """Return the fault of a tile budget below 1, if it is."""
    if budget is None or budget >= 1:
        return []
    return [f"data.tiles_per_slide must be at least 1, got {budget}: null takes all tiles"]


def _takes_all(tiles: int, budget: int | None) -> bool:
    refuse(budget_faults(budget))
    return budget is None or budget >= tiles


def _shuffled(n: int, seed: int) -> np.ndarray:
    bits = np.random.PCG64(seed).random_raw(n) if n else np.empty(0, np.uint64)
    return np.argsort(bits, kind="stable")
