"""A training order in which rare labels, sites and cases come as often as common ones.

Each place of an epoch is drawn from a tree, level by level, all branches with equal chances:

    family    for example a label; its chance is given (larger for a rarer label)
    group     its positives or its negatives; the classes of a label; ...
    site, case, slide

So hospitals with many patients, patients with many slides and common classes do not dominate. Draws
are independent: an epoch has as many places as slides, but some slides come several times and some
never. A slide that comes again in an epoch shows other tiles (`Turn.visit`).

The order depends only on seed, epoch and the tree, like that of `order`.

Source: Pedersen et al. 2022 (H2G-Net, Front Med 9:971873), hierarchical sampling.
Differs: slides are drawn, and then tiles within a slide as usual, where the authors draw patches;
    sites are a level, sections of a slide are none. An epoch has as many places as slides. Rates in
    training are then those of the tree, so that probabilities are of even classes: the report's
    calibration on validation takes that back, and no logit is moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from slides.cohort.table import SlideRow
from slides.errors import SettingsError
from slides.seeds import stable_seed

Family = tuple[float, Sequence[Sequence[int]]]
"""Relative chance of the family, and its groups of slide numbers."""
LEVELS = 5


def balanced_order(
    rows: Sequence[SlideRow], families: Sequence[Family], seed: int
) -> Callable[[int], np.ndarray]:
    """Return a function from an epoch to its order: as many slide numbers as slides.

    Args:
        rows: the slides; their sites and cases are levels of the tree.
        families: the levels above sites; a slide in no group is never drawn.
        seed: seed of the draws.

    Raises:
        SettingsError: no slide has a known label.
    """
    trees = [
        (weight, [_tree(rows, group) for group in groups if len(group)])
        for weight, groups in families
    ]
    trees = [(weight, groups) for weight, groups in trees if groups and weight > 0]
    if not trees:
        raise SettingsError(
            "data.sampler is balanced, but no slide has a known label: label some, or set "
            "data.sampler: shuffled"
        )
    total = sum(weight for weight, _ in trees)
    ends = np.cumsum([weight / total for weight, _ in trees])
    return partial(_draw, trees, ends, len(rows), int(seed))


def _tree(rows: Sequence[SlideRow], group: Sequence[int]) -> list[list[list[int]]]:
    """Return a group's slide numbers as sites of cases of slides, in order of first appearance."""
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
