"""Order and choice of tiles depend only on seed, epoch and slide, and training can resume.

A resumed epoch must equal the rest of the uninterrupted one, whatever was read ahead.
"""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slides.errors import SettingsError
from slides.seeds import stable_seed
from slides.streaming.order import (
    SlideSampler,
    Turn,
    epoch_order,
    sample_tiles,
    spread_tiles,
)

seeds = st.integers(0, 2**63)
epochs = st.integers(0, 10_000)
counts = st.integers(0, 311)
names = st.text(min_size=1, max_size=20)


@given(counts, seeds, epochs)
def test_an_order_is_a_permutation(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, epoch_order(n, seed, epoch))


@given(counts, st.integers(1, 400), seeds, epochs, names)
def test_tiles_are_distinct_sorted_and_as_many_as_asked(n, budget, seed, epoch, name):
    rows = sample_tiles(n, budget, seed, epoch, name)
    assert len(rows) == min(n, budget)
    assert (np.diff(rows) > 0).all()
    assert not len(rows) or (rows[0] >= 0 and rows[-1] < n)
    np.testing.assert_array_equal(rows, sample_tiles(n, budget, seed, epoch, name))


@given(counts, st.integers(1, 300), st.integers(0, 100), seeds, epochs, names)
def test_a_larger_budget_takes_the_same_tiles_and_more(n, budget, more, seed, epoch, name):
    few = sample_tiles(n, budget, seed, epoch, name)
    many = sample_tiles(n, budget + more, seed, epoch, name)
    assert set(few) <= set(many)


@pytest.mark.parametrize("budget", [None, 97, 1000])
def test_all_tiles_come_in_index_order(budget):
    np.testing.assert_array_equal(sample_tiles(97, budget, 1, 2, "a"), np.arange(97))


def test_every_part_of_the_seed_counts():
    base = sample_tiles(997, 31, 1, 2, "a")
    for other in [(2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (2, 1, "a")]:
        assert not np.array_equal(base, sample_tiles(997, 31, *other))
    order = epoch_order(97, 1, 2)
    for other in [(2, 2), (1, 3), (2, 1)]:
        assert not np.array_equal(order, epoch_order(97, *other))


def test_parts_of_a_seed_do_not_run_together():
    assert stable_seed(1, 23) != stable_seed(12, 3)
    assert stable_seed("a", "b") != stable_seed("ab")
    assert stable_seed(1) != stable_seed("1")


def test_draws_are_fair():
    """Each tile is drawn equally often over epochs: 300 of 1000 draws, +- 14.5."""
    hits = np.zeros(50)
    for epoch in range(1000):
        hits[sample_tiles(50, 15, 0, epoch, "a")] += 1
    assert 235 < hits.min() <= hits.max() < 365  # four and a half standard deviations


def test_each_place_of_an_order_is_fair():
    first = np.bincount([epoch_order(7, 0, epoch)[0] for epoch in range(1400)], minlength=7)
    assert 140 < first.min() <= first.max() < 260  # 200 +- 13.1


def test_another_process_draws_the_same():
    """Python's hash of a string differs between processes; the draws must not."""
    code = (
        "from slides.streaming.order import sample_tiles; from slides.seeds import stable_seed; "
        "print(list(sample_tiles(97, 7, 1, 2, 'a')), stable_seed(5))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": salt}, capture_output=True
        ).stdout
        for salt in ("1", "2")
    }
    rows = [int(row) for row in sample_tiles(97, 7, 1, 2, "a")]
    assert runs == {f"{[np.int64(row) for row in rows]} {stable_seed(5)}\n".encode()}


def test_known_values():
    """If these change, old runs cannot be resumed with the same slides and tiles."""
    assert epoch_order(11, 0, 0).tolist() == [3, 4, 10, 1, 0, 2, 6, 5, 7, 8, 9]
    assert sample_tiles(1009, 5, 0, 3, "TCGA-05-4244").tolist() == [261, 505, 775, 887, 929]


class TestSpread:
    """Spatial sampling: as fair as the uniform draw, and never clustered."""

    def lattice(self, columns, rows, left=0):
        return np.stack(np.meshgrid(np.arange(columns) + left, np.arange(rows)), -1).reshape(-1, 2)

    @given(counts, st.integers(1, 400), seeds, epochs, names)
    def test_tiles_are_distinct_sorted_and_as_many_as_asked(self, n, budget, seed, epoch, name):
        cells = np.random.default_rng(n).integers(-9, 30, (n, 2))  # some in one cell
        rows = spread_tiles(cells, budget, seed, epoch, name)
        assert len(rows) == min(n, budget)
        assert (np.diff(rows) > 0).all()
        assert not len(rows) or (rows[0] >= 0 and rows[-1] < n)
        np.testing.assert_array_equal(rows, spread_tiles(cells, budget, seed, epoch, name))

    @pytest.mark.parametrize("budget", [1, 4, 16, 64, 256])
    def test_each_block_of_a_full_lattice_has_its_one(self, budget):
        cells = self.lattice(32, 32, left=7)
        side = 32 // int(budget**0.5)
        for epoch in range(5):
            column, row = (cells[spread_tiles(cells, budget, 0, epoch, "a")] - (7, 0)).T // side
            assert sorted(row * (32 // side) + column) == list(range(budget))

    def test_two_islands_get_what_they_are_worth(self):
        """Two biopsy cores of 300 and 100 tiles get 12 and 4 of 16, within one, every time."""
        cells = np.concatenate([self.lattice(20, 15), self.lattice(10, 10, left=100)])
        draws = [spread_tiles(cells, 16, 0, epoch, "a") for epoch in range(200)]
        small = np.array([(rows >= 300).sum() for rows in draws])
        assert set(small) <= {3, 4, 5}
        uniform = [(sample_tiles(400, 16, 0, epoch, "a") >= 300).sum() for epoch in range(200)]
        assert np.var(uniform) > 4 * np.var(small)

    def test_draws_are_fair_whatever_the_shape(self):
        """An isolated tile is drawn as often as one among many: 300 of 1000 draws, +- 14.5."""
        cells = np.concatenate([self.lattice(7, 7), [[90, 41]]])
        hits = np.zeros(50)
        for epoch in range(1000):
            hits[spread_tiles(cells, 15, 0, epoch, "a")] += 1
        assert 235 < hits.min() <= hits.max() < 365

    def test_every_part_of_the_seed_counts_and_the_corner_does_not(self):
        cells = self.lattice(31, 29)
        base = spread_tiles(cells, 31, 1, 2, "a")
        for other in [(2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (2, 1, "a")]:
            assert not np.array_equal(base, spread_tiles(cells, 31, *other))
        np.testing.assert_array_equal(base, spread_tiles(cells + (100, 3), 31, 1, 2, "a"))

    def test_known_values(self):
        rows = spread_tiles(self.lattice(31, 29), 5, 0, 3, "TCGA-05-4244")
        assert rows.tolist() == [222, 328, 443, 745, 866]

    def test_a_slide_of_many_tiles_and_one_of_none(self):
        assert len(spread_tiles(self.lattice(500, 400), 1000, 0, 0, "a")) == 1000
        assert len(spread_tiles(np.empty((0, 2), int), 3, 0, 0, "a")) == 0


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(SettingsError, match="at least 1"):
        sample_tiles(5, budget, 0, 0, "a")
    with pytest.raises(SettingsError, match="at least 1"):
        spread_tiles(np.zeros((5, 2), int), budget, 0, 0, "a")


class TestSampler:
    N, SEED = 11, 5

    def turns(self, epochs):
        """Return what an uninterrupted run trains."""
        sampler = SlideSampler(self.N, self.SEED)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            yield from sampler

    def test_an_epoch_is_its_order(self):
        sampler = SlideSampler(self.N, self.SEED)
        sampler.set_epoch(3)
        order = epoch_order(self.N, self.SEED, 3)
        assert list(sampler) == [Turn(3, place, slide) for place, slide in enumerate(order)]

    @given(trained=st.integers(0, 3 * 11 - 1), ahead=st.integers(0, 20))
    def test_resuming_goes_on_where_training_stood(self, trained, ahead):
        """`ahead` turns were read but not trained: resuming starts before them."""
        unbroken = list(self.turns(3))
        sampler = SlideSampler(self.N, self.SEED)
        for turn in unbroken[:trained]:
            sampler.trained(turn)
        for _ in zip(range(ahead), sampler, strict=False):
            pass
        resumed = SlideSampler(self.N, self.SEED)
        resumed.load_state_dict(sampler.state_dict())
        rest = []
        for epoch in range(resumed.epoch, 3):
            resumed.set_epoch(epoch)
            assert len(resumed) == self.N
            rest += resumed
        assert unbroken[:trained] + rest == unbroken

    def test_an_iterator_under_way_is_not_moved(self):
        sampler = SlideSampler(self.N, self.SEED)
        seen = []
        for turn in sampler:
            sampler.trained(turn)
            seen.append(turn)
        assert seen == list(self.turns(1))

    def test_setting_the_epoch_under_way_keeps_its_place(self):
        sampler = SlideSampler(self.N, self.SEED)
        sampler.seek(2, 7)
        sampler.set_epoch(2)
        assert [turn.position for turn in sampler] == [7, 8, 9, 10]
        sampler.set_epoch(3)
        assert [turn.position for turn in sampler] == list(range(11))

    def test_the_end_of_an_epoch_is_the_start_of_the_next(self):
        sampler = SlideSampler(self.N, self.SEED)
        sampler.seek(2, self.N)
        assert (sampler.epoch, sampler.start) == (3, 0)

    @pytest.mark.parametrize(("key", "other"), [("slides", 13), ("seed", 6)])
    def test_a_checkpoint_of_another_order_is_refused(self, key, other):
        state = SlideSampler(self.N, self.SEED).state_dict() | {key: other}
        with pytest.raises(SettingsError, match=rf"{key} = {other}.*same cohort, seed and"):
            SlideSampler(self.N, self.SEED).load_state_dict(state)

    def test_no_place_outside_the_epoch(self):
        with pytest.raises(ValueError, match=r"no place \(0, 12\)"):
            SlideSampler(self.N, self.SEED).seek(0, 12)
