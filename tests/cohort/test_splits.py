"""No case is in two parts, and labels are as frequent in each part as in the cohort.

Of the n cases of a part whose label is known, the number of positives may differ from its target by
one case. So a part's prevalence is within 3 points of the whole's, or within 1 / n if that is more
(n below 34). It holds for every label at once.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slides.cohort.splits import (
    assign_parts,
    balance,
    fixed_split,
    gather_cases,
    kfold,
    monte_carlo,
)
from slides.cohort.table import SPLITS
from slides.errors import SplitError

COHORTS = 200


def random_cohort(seed):
    """Return 40 to 400 cases of 1 to 4 slides, 1 to 5 labels, 0 to 20 % unknown, many sites."""
    rng = np.random.default_rng(seed)
    count, labels = int(rng.integers(40, 401)), int(rng.integers(1, 6))
    risk = rng.random((count, 1)) + rng.random((count, labels))
    values = (risk < 2 * rng.uniform(0.15, 0.6, labels)).astype(float)
    values[rng.random((count, labels)) < rng.uniform(0, 0.2, labels)] = np.nan
    site = rng.zipf(1.6, count) % 37
    slides = rng.permutation(np.repeat(np.arange(count), rng.integers(1, 5, count)))
    return gather_cases(
        [f"case{number}" for number in slides],
        [f"site{site[number]}" for number in slides],
        [f"gene{number}" for number in range(labels)],
        values[slides],
    )


@pytest.mark.parametrize("tenth", range(10))
def test_random_cohorts_are_stratified_over_all_labels(tenth):
    for seed in range(tenth, COHORTS, 10):
        cases = random_cohort(seed)
        part_C = assign_parts(cases, [0.2] * 5, seed)
        assert part_C.shape == (len(cases),)
        assert np.abs(np.bincount(part_C, minlength=5) - len(cases) / 5).max() < 3
        for part in range(5):
            for values in cases.values_CL.T:
                inside, known = values[part_C == part], values[~np.isnan(values)]
                n = (~np.isnan(inside)).sum()
                away = abs(np.nanmean(inside) - known.mean())
                assert away <= max(0.03, 1 / n) + 1e-9, (seed, part)


def test_a_plain_shuffle_is_not_that_even():
    """Shows that the test above can fail."""
    away = []
    for seed in range(20):
        cases = random_cohort(seed)
        part_C = np.random.default_rng(seed).permutation(len(cases)) % 5
        first = cases.values_CL[part_C == 0]
        limit = np.maximum(0.03, 1 / (~np.isnan(first)).sum(0))
        away += list(abs(np.nanmean(first, 0) - np.nanmean(cases.values_CL, 0)) > limit)
    assert np.mean(away) > 0.3


@pytest.mark.parametrize("seed", range(0, COHORTS, 10))
def test_sites_are_preserved_and_the_imbalance_is_said(seed):
    cases = random_cohort(seed)
    split = fixed_split(cases, seed=seed, preserve_sites=True)
    homes = {}
    for case, site in zip(cases.ids, cases.sites, strict=True):
        assert homes.setdefault(site, split[case]) == split[case]
    even = balance(cases, split)
    assert even.sites_shared == 0
    assert balance(cases, fixed_split(cases, seed=seed)).sites_shared > 0
    away = [
        100 * abs(np.nanmean(v[[split[c] == part for c in cases.ids]]) - np.nanmean(v))
        for v in cases.values_CL.T
        for part in SPLITS
    ]
    assert even.worst_points == pytest.approx(np.nanmax(away))
    assert f"at worst {even.worst_points:.1f} points from the whole ({even.worst})" in str(even)


def test_every_case_is_tested_once_and_validates_once():
    cases = random_cohort(3)
    splits = kfold(cases, 5)
    for part, times in (("test", 1), ("val", 1), ("train", 3)):
        counts = [sum(split[case] == part for split in splits) for case in cases.ids]
        assert counts == [times] * len(cases)
    assert all(set(split.values()) == set(SPLITS) for split in splits)


def test_fractions_are_kept_and_repeats_differ():
    cases = random_cohort(5)
    splits = monte_carlo(cases, 3, (0.5, 0.2, 0.3), seed=1)
    for split in splits:
        for part, share in zip(SPLITS, (0.5, 0.2, 0.3), strict=True):
            assert abs(list(split.values()).count(part) - share * len(cases)) < 3
    assert splits[0] != splits[1] != splits[2]
    assert splits == monte_carlo(cases, 3, (0.5, 0.2, 0.3), seed=1)
    assert splits != monte_carlo(cases, 3, (0.5, 0.2, 0.3), seed=2)


def test_a_rare_label_reaches_every_fold():
    values = np.zeros((97, 2))
    values[:5, 0] = 1
    values[90:, 1] = np.nan
    cases = gather_cases([f"c{n}" for n in range(97)], [""] * 97, ["rare", "none"], values)
    part_C = assign_parts(cases, [0.2] * 5)
    assert sorted(part_C[:5]) == [0, 1, 2, 3, 4]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_cohort_is_dealt_whole(data):
    count = data.draw(st.integers(3, 13))
    labels = data.draw(st.integers(0, 3))
    cell = st.sampled_from([0.0, 1.0, float("nan")])
    values = np.array([[data.draw(cell) for _ in range(labels)] for _ in range(count)])
    ids = [f"c{n}" for n in range(count)]
    cases = gather_cases(ids, [""] * count, ["x"] * labels, values.reshape(count, labels))
    split = fixed_split(cases)
    assert list(split) == ids
    assert set(split.values()) == set(SPLITS)


def test_the_label_of_a_case_is_that_of_any_of_its_slides():
    values = np.array([[0, np.nan], [1, np.nan], [0, 0], [np.nan, 1]])
    cases = gather_cases(["b", "b", "a", "a"], ["x", "", "", ""], ["p", "q"], values)
    assert cases.ids == ("b", "a")
    assert cases.sites == ("x", "")
    np.testing.assert_array_equal(cases.values_CL, [[1, np.nan], [0, 1]])


def test_what_cannot_be_dealt_is_refused():
    cases = random_cohort(1)
    few = gather_cases(["a", "b"], ["", "s"], [], np.zeros((2, 0)))
    for message, run in (
        ("add up to 1", lambda: fixed_split(cases, (0.5, 0.4, 0.2))),
        ("add up to 1", lambda: fixed_split(cases, (0.8, 0.2, 0.0))),
        ("give three", lambda: fixed_split(cases, (0.5, 0.5))),
        ("at least 3", lambda: kfold(cases, 2)),
        ("2 cases cannot make 3 parts", lambda: fixed_split(few)),
        ("1 cases have no site, .*: a", lambda: fixed_split(few, preserve_sites=True)),
        (
            "case a has slides of sites s, t",
            lambda: gather_cases(["a", "a"], ["s", "t"], [], np.zeros((2, 0))),
        ),
    ):
        with pytest.raises(SplitError, match=message):
            run()


def test_the_balance_of_a_split_that_leaves_cases_out():
    values = np.array([[1.0], [0.0], [np.nan], [1.0]])
    cases = gather_cases(list("abcd"), ["s", "s", "t", "t"], ["EGFR"], values)
    even = balance(cases, {"a": "train", "b": "test", "c": "test"})
    assert even.cases == {"all": 3, "train": 1, "test": 2}
    assert even.positive["test"] == {"EGFR": (0, 1)}
    assert even.positive["all"] == {"EGFR": (1, 2)}
    assert (even.worst_points, even.sites_shared) == (50, 1)
