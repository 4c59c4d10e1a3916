"""In which order slides are trained, and which tiles of each: pure functions of a seed.

Order and choice of tiles depend on (seed, epoch, slide) and nothing else: no state to save but a
place in the epoch, no dependence on the number of workers. Numbers come from the raw bits of a
PCG64 that is seeded with a hash, because numpy promises those bits from version to version, and
does not promise `permutation`.

Worker processes read ahead, so only the training loop knows how many slides were trained: it says
so with `SlideSampler.trained`, and resuming starts there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from slides.seeds import stable_seed

SAMPLINGS = ("uniform", "spatial")  # `sample_tiles`, `spread_tiles`


class Turn(NamedTuple):
    """One slide's turn in training."""

    epoch: int
    position: int
    """Place in the epoch's order, from 0."""
    slide: int
    """Number of the slide in the cohort's split."""
    visit: int = 0
    """How often this epoch's order had the slide before: other tiles are drawn each time."""


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n slides in one epoch: a permutation of 0 to n - 1."""
    return _shuffled(n, stable_seed("order", int(seed), int(epoch)))


def sample_tiles(
    n_tiles: int, budget: int | None, seed: int, epoch: int, slide_id: str
) -> np.ndarray:
    """Which of a slide's tiles an epoch uses: drawn without replacement, in rising order.

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
    """As `sample_tiles`, but spread over the slide: no part of it is missed by chance.

    Each tile is as likely as any other; two neighbours seldom come together. Tiles are ordered by
    quadrants within quadrants, the four of each in an order of their own, and every so many-th is
    taken from a random start. A larger budget takes others. `cells_T2` are integers, column and row
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
    order_T = np.lexsort([random(tiles), address_T])  # tiles of one cell: by lot
    start = int(random()) % tiles
    return np.sort(order_T[(start + tiles * np.arange(budget)) // budget])


class SlideSampler:
    """The turns of an epoch from `start` on; its length is always that of the full epoch.

    Several processes share an epoch: each takes every `world`-th turn from its `rank` on. Where
    that does not come out even, the first slides of the order have a second turn, so that all
    processes take as many.

    The place in training is (`epoch`, `start`). Iterating does not move it, since workers run
    ahead; `trained` does. It is also what a checkpoint holds.

    With Lightning: call `sampler.trained(bag.turn)` at the end of `training_step` (the hook
    `on_train_batch_end` of a module comes after that of the checkpoint callback), and hand
    `state_dict` and `load_state_dict` through from the LightningDataModule. Lightning calls
    `set_epoch` itself.
    """

    def __init__(
        self,
        n: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        order: Callable[[int], np.ndarray] | None = None,
    ):
        """`order` gives the n slides of an epoch, a pure function; None is `epoch_order`."""
        self.n, self.seed, self.rank, self.world = n, seed, rank, world
        self.order = order or partial(epoch_order, n, seed)
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return -(-self.n // self.world)

    @property
    def turns(self) -> int:
        """Of all processes, in an epoch."""
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
        """Go to the start of an epoch; the epoch that is under way already is left where it is."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    def seek(self, epoch: int, start: int) -> None:
        """Go to a place in training. The end of an epoch is the start of the next."""
        if not 0 <= start <= self.turns or start % self.world or epoch < 0:
            raise ValueError(f"no place ({epoch}, {start}) in epochs of {self.turns} turns")
        self.epoch, self.start = (epoch + 1, 0) if start == self.turns else (epoch, start)

    def trained(self, turn: Turn) -> None:
        """This turn has been trained (or skipped), in every process: resuming begins after it."""
        self.seek(turn.epoch, (turn.position // self.world + 1) * self.world)

    def state_dict(self) -> dict[str, int]:
        """Plain integers, safe to load without executing code."""
        place = {"epoch": self.epoch, "start": self.start}
        return {**place, "seed": self.seed, "slides": self.n, "processes": self.world}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Return to the place that was saved.

        Raises:
            ValueError: the order of the slides would not be the one the checkpoint was in.
        """
        for key, mine in (("slides", self.n), ("seed", self.seed), ("processes", self.world)):
            if state[key] != mine:
                raise ValueError(
                    f"the checkpoint was training with {key} = {state[key]}, this run has {mine}: "
                    "the slides would come in another order. Resume with the same cohort, seed and "
                    "devices, or start anew from its weights."
                )
        self.seek(state["epoch"], state["start"])


def _takes_all(tiles: int, budget: int | None) -> bool:
    if budget is not None and budget < 1:
        raise ValueError(f"a slide's tile budget must be at least 1, or None for all; got {budget}")
    return budget is None or budget >= tiles


def _shuffled(n: int, seed: int) -> np.ndarray:
    bits = np.random.PCG64(seed).random_raw(n) if n else np.empty(0, np.uint64)
    return np.argsort(bits, kind="stable")
