"""`stats.outcomes` equals scikit-learn and scipy, and pairs counted one by one.

A draw is weights; the figure of a draw must be that of the slides repeated as often.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import r2_score

from tapfm.stats.bootstrap import bootstrap_cases
from tapfm.stats.outcomes import (
    concordance,
    pearson,
    r2,
    spearman,
    time_auc,
)

NAN = math.nan
TIGHT = {"rel": 1e-9, "abs": 1e-9}


def once(y):
    return np.ones((1, len(y)))


def outcomes(seed, slides=37):
    """Return times, events, risks and classes with many ties."""
    rng = np.random.default_rng(seed)
    time = rng.integers(0, 12, slides).astype(float)
    event = (rng.random(slides) < 0.6).astype(float)
    risk = np.round(rng.normal(size=slides) - 0.1 * time, 1)
    return time, event, risk


def pairs_by_hand(time, event, risk):
    """Return Harrell's C, counted pair by pair."""
    wins = pairs = 0
    for i in range(len(time)):
        for j in range(len(time)):
            longer = time[j] > time[i] or (time[j] == time[i] and event[j] == 0)
            if event[i] == 1 and longer:
                pairs += 1
                wins += 1.0 if risk[i] > risk[j] else 0.5 * (risk[i] == risk[j])
    return wins / pairs if pairs else NAN


def chance_of_staying(time, event, until):
    """Return Kaplan-Meier of being censored; events at the same time are no longer at risk."""
    chance = 1.0
    for t in sorted(set(time[event == 0])):
        if t <= until:
            at_risk = (time > t).sum() + ((time == t) & (event == 0)).sum()
            chance *= 1 - ((time == t) & (event == 0)).sum() / at_risk
    return chance


def time_auc_by_hand(time, event, risk, horizon):
    wins = total = 0.0
    for i in np.flatnonzero((time <= horizon) & (event == 1)):
        weight = 1 / chance_of_staying(time, event, time[i])
        for j in np.flatnonzero(time > horizon):
            total += weight
            wins += weight * (1.0 if risk[i] > risk[j] else 0.5 * (risk[i] == risk[j]))
    return wins / total if total else NAN


@pytest.mark.parametrize("seed", range(5))
def test_times_by_hand(seed):
    time, event, risk = outcomes(seed)
    ours = concordance(time, event, risk, once(time))[0]
    assert ours == pytest.approx(pairs_by_hand(time, event, risk), **TIGHT)
    for horizon in (2.0, 5.0, 8.5):
        ours = time_auc(time, event, risk, horizon, once(time))[0]
        assert ours == pytest.approx(time_auc_by_hand(time, event, risk, horizon), **TIGHT)


PUBLISHED = {  # seed: concordance_index_censored, cumulative_dynamic_auc at three horizons
    0: (0.5654320987654321, (0.6265432098765433, 0.5709623875978986, 0.6146690452144832)),
    3: (0.6310975609756098, (0.7002244668911336, 0.6865592300238071, 0.8315294927078332)),
    8: (0.6655701754385965, (0.7812812812812813, 0.6456985527831756, 0.6951451147775867)),
}


def test_times_as_scikit_survival_says():
    """The expected values are those of scikit-survival 0.28.0 for the slides of `outcomes`."""
    for seed, (c, aucs) in PUBLISHED.items():
        time, event, risk = outcomes(seed)
        assert concordance(time, event, risk, once(time))[0] == pytest.approx(c, **TIGHT)
        for horizon, auc in zip((2.0, 5.0, 8.5), aucs, strict=True):
            ours = time_auc(time, event, risk, horizon, once(time))[0]
            assert ours == pytest.approx(auc, **TIGHT)


def test_no_events_nothing_to_compare():
    time, _, risk = outcomes(0)
    none = np.zeros(len(time))
    assert np.isnan(concordance(time, none, risk, once(time))[0])
    assert np.isnan(time_auc(time, none, risk, 5.0, once(time))[0])
    assert np.isnan(time_auc(time, none + 1, risk, 99.0, once(time))[0])


@pytest.mark.parametrize("seed", range(4))
def test_values_as_scipy_and_scikit_learn_say(seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 9, 41) / 2 + 1000
    said = np.round(y + rng.normal(size=41), 1)
    known = y.copy()
    known[::7] = NAN  # unknown ones are as if they were not there
    rest = ~np.isnan(known)
    for ours, theirs in [
        (r2, r2_score(y[rest], said[rest])),
        (pearson, pearsonr(y[rest], said[rest]).statistic),
        (spearman, spearmanr(y[rest], said[rest]).statistic),
    ]:
        assert ours(known, said, once(y))[0] == pytest.approx(theirs, **TIGHT)


def figures():
    def both(of):
        return lambda time, event, risk, times: of(time, risk, times)

    yield from (both(of) for of in (r2, pearson, spearman))
    yield concordance
    yield lambda time, event, risk, times: time_auc(time, event, risk, 5.0, times)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_a_draw_is_the_slides_repeated(seed):
    time, event, risk = outcomes(seed, slides=23)
    cases = [str(n // 2) for n in range(23)]
    times = bootstrap_cases(cases, draws=3, seed=seed).astype(float)
    for figure in figures():
        drawn = figure(time, event, risk, times)
        for b in range(3):
            rows = np.repeat(np.arange(23), times[b].astype(int))
            alone = figure(time[rows], event[rows], risk[rows], once(rows))[0]
            assert drawn[b] == pytest.approx(alone, nan_ok=True, rel=1e-9, abs=1e-9)


def test_what_does_not_vary_is_undefined_and_nothing_at_all_too():
    y = np.arange(7.0)
    for flat in (np.ones(7), np.full(7, 0.1), np.full(7, -1e9 / 3)):  # a mean of these may round
        assert np.isnan(pearson(y, flat, once(y))[0])
        assert np.isnan(spearman(flat, y, once(y))[0])
        assert np.isnan(r2(flat, y, once(y))[0])
    nothing = np.empty(0)
    for figure in figures():
        assert np.isnan(figure(nothing, nothing, nothing, np.ones((2, 0)))).all()
