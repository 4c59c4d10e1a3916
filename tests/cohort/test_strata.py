"""Folds are as even in classes, values and times as they are in binary labels.

The reference counts cases by ranks and plain masks. Like in test_splits, a part may differ from its
target by one known case, or by 3 points.
"""

from statistics import median_low

import numpy as np
import pytest

from slides.cohort.splits import assign_parts, gather_cases
from slides.cohort.strata import stratify
from slides.cohort.targets import COLUMNS

NAMES = {"multiclass": ["grade"], "regression": ["TMB", "age"], "survival": ["months", "dead"]}
CLASSES = ("a", "b", "c", "d")


def random_cohort(task, seed):
    """Return 60 to 400 cases with 1 to 3 equal slides each; a tenth unknown; with ties."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(60, 401))
    if task == "multiclass":
        values = rng.choice(4, (count, 1), p=rng.dirichlet([3] * 4)).astype(float)
        values[:4, 0] = range(4)
    elif task == "regression":
        values = np.stack([rng.lognormal(1, 1, count), rng.integers(30, 90, count)], 1)
    else:
        values = np.stack([rng.weibull(1.3, count) * 40, rng.random(count) < 0.4], 1).astype(float)
    unknown = rng.random(count) < 0.1
    values[unknown, 0] = np.nan
    if task == "survival":
        values[unknown] = np.nan
    return values, rng.permutation(np.repeat(np.arange(count), rng.integers(1, 4, count)))


def groups_of(task, values):
    """Return masks of the groups of cases that are compared, and which cases are known."""
    if task == "multiclass":
        return [(values[:, 0] == k, ~np.isnan(values[:, 0])) for k in range(4)]
    if task == "survival":
        time, dead = values.T
        late = time > median_low(time[dead == 1])
        return [(dead == 1, ~np.isnan(dead)), (late, ~np.isnan(time))]
    found = []
    for y in values.T:
        known = ~np.isnan(y)
        low, high = (min(v for v in y[known] if 3 * (y[known] <= v).sum() > n * (known.sum() - 1))
                     for n in (1, 2))  # fmt: skip
        found += [(y <= low, known), (y > high, known)]
    return found


@pytest.mark.parametrize("task", NAMES)
def test_folds_of_random_cohorts_are_even(task):
    for seed in range(40):
        values, slides = random_cohort(task, seed)
        ids = [f"c{n}" for n in slides]
        strata = stratify(COLUMNS[task], NAMES[task], CLASSES, ids, values[slides])
        cases = gather_cases(ids, [""] * len(ids), list(strata), np.stack(list(strata.values()), 1))
        part_of = dict(zip(cases.ids, assign_parts(cases, [0.2] * 5, seed), strict=True))
        assert len(part_of) == len(values), "each case has one part"
        part_C = np.array([part_of[f"c{n}"] for n in range(len(values))])
        for inside, known in groups_of(task, values):
            for part in range(5):
                here = part_C == part
                n = (known & here).sum()
                away = abs((inside & here).sum() / n - inside.sum() / known.sum())
                assert away <= max(0.03, 1 / n) + 1e-9, (seed, part)


@pytest.mark.parametrize("task", NAMES)
def test_a_plain_shuffle_is_not_that_even(task):
    """Shows that the test above can fail."""
    off = []
    for seed in range(20):
        values, _ = random_cohort(task, seed)
        here = np.random.default_rng(seed).permutation(len(values)) % 5 == 0
        for inside, known in groups_of(task, values):
            n = (known & here).sum()
            away = abs((inside & here).sum() / n - inside.sum() / known.sum())
            off.append(away > max(0.03, 1 / n))
    assert np.mean(off) > 0.2


def test_cuts_are_of_cases_and_a_case_counts_by_its_largest_slide():
    values = np.array([[1.0], [9.0], [2.0], [3.0], [np.nan], [1.0], [1.0], [1.0]])
    ids = ["a", "a", "b", "c", "d", "b", "b", "b"]
    strata = stratify(COLUMNS["regression"], ["TMB"], (), ids, values)
    cases = gather_cases(ids, [""] * 8, list(strata), np.stack(list(strata.values()), 1))
    assert cases.labels == ("TMB above 1/3", "TMB above 2/3")
    np.testing.assert_array_equal(cases.values_CL, [[1, 1], [0, 0], [1, 0], [np.nan] * 2])


def test_times_are_late_by_the_median_of_events_alone():
    values = np.array([[1.0, 1, 7], [3, 1, 8], [5, 1, 9], [50, 0, 10], [np.nan, np.nan, 11]])
    kind, names = COLUMNS["survival"], ["months", "dead"]
    strata = stratify(kind, names, (), list("abcde"), values)
    assert list(strata) == ["dead", "months above 1/2"]
    np.testing.assert_array_equal(strata["months above 1/2"], [0, 0, 1, 1, np.nan])
    none = np.array([[1.0, 0, 7], [3, 0, 8]])
    assert list(stratify(kind, names, (), list("ab"), none)) == ["dead"]


def test_every_task_has_strata():
    assert all(callable(kind.strata) for kind in COLUMNS.values())
