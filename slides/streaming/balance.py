"""An order in which what is rare is trained as often as what is not.

Each place of an epoch is drawn down a tree, every branch with the same chance:

    family    a label, say; its chance is given (a rarer label's is larger)
    group     its positives or its negatives; the classes of a label; ...
    site, case, slide

so a hospital that sent many patients, or a patient with many slides, does not outvote the others,
and neither does the common class. Draws are independent: an epoch has as many places as there are
slides, but some slides have several and some none. A slide drawn again in an epoch shows other
tiles, since its turn says so (`Turn.visit`).

The order depends on (seed, epoch) and what is drawn from, and nothing else, like `order`'s.

Source: Pedersen et al. 2022 (H2G-Net, Front Med 9:971873), hierarchical sampling.
Differs: slides are drawn, not tiles, which are drawn within a slide as always; sites are a level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from slides.cohort.table import SlideRow
from slides.seeds import stable_seed

Family = tuple[float, Sequence[Sequence[int]]]
"""Weight of its chance, and its groups: numbers of slides."""
LEVELS = 5


def balanced_order(
    rows: Sequence[SlideRow], families: Sequence[Family], seed: int
) -> Callable[[int], np.ndarray]:
    """The order of each epoch: as many numbers of slides as there are slides.

    Args:
        rows: the slides; their sites and cases are levels of the tree.
        families: what comes before them; a slide in no group is never drawn.
        seed: of the draws.

    Raises:
        ValueError: there is nothing to draw from.
    """
    trees = [
        (weight, [_tree(rows, group) for group in groups if len(group)])
        for weight, groups in families
    ]
    trees = [(weight, groups) for weight, groups in trees if groups and weight > 0]
    if not trees:
        raise ValueError("no slide has a known label: there is nothing to draw from")
    total = sum(weight for weight, _ in trees)
    ends = np.cumsum([weight / total for weight, _ in trees])
    return partial(_draw, trees, ends, len(rows), int(seed))


def _tree(rows: Sequence[SlideRow], group: Sequence[int]) -> list[list[list[int]]]:
    """Sites, their cases, their slides, in order of first appearance."""
    sites: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in group:
        sites[rows[number].site][rows[number].case_id].append(int(number))
    return [list(cases.values()) for cases in sites.values()]


def _draw(trees: list, ends: np.ndarray, places: int, seed: int, epoch: int) -> np.ndarray:
    seed = stable_seed("balanced", seed, int(epoch))
    bits = np.random.PCG64(seed).random_raw(places * LEVELS).reshape(places, LEVELS)
    order = []
    for first, *others in (bits >> np.uint64(11)) * 2.0**-53:  # in [0, 1)
        _, branch = trees[min(int(np.searchsorted(ends, first, side="right")), len(trees) - 1)]
        for chance in others:
            branch = branch[int(chance * len(branch))]
        order.append(branch)
    return np.array(order, np.int64)
