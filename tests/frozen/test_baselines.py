"""The frozen baselines learn what frozen features tell, from the train split, chosen on val alone.

Bags are planted: in a positive slide one tile in five is shifted along the label's own direction.
Attention must find them; what is constant, unknown or unseen must not matter.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tapfm.frozen import fitter
from tapfm.frozen.baselines import RgbStatistics, fit_gated_attention, fit_mean_pool_mlp
from tapfm.frozen.fitter import Candidate, Schedule
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.stats.metrics import macro_auroc
from tapfm.tasks import learn_task, make_task

TASK = make_task({"name": "multilabel"}, ["A", "B"])
FITS = [fit_mean_pool_mlp, fit_gated_attention]
QUICK = {"grid": (Candidate(1e-3, 32),), "schedule": Schedule(epochs=3, patience=3)}


def planted(slides, seed, tiles=31, dim=13, shift=5.0):
    """Slides of two labels, some unknown, and which tiles of each are planted."""
    generator = torch.Generator().manual_seed(seed)
    bags, where = [], []
    for n in range(slides):
        y = torch.tensor([n % 2, (n // 2) % 2], dtype=torch.float32)
        z = torch.randn(tiles + n % 5, dim, generator=generator)
        mask = torch.rand(len(z), generator=generator) < 0.2
        for k in range(2):
            z[mask, k] += shift * y[k]
        where.append(mask)
        if n % 7 == 0:
            y[n % 2] = torch.nan
        bags.append(FrozenSlide.of(f"s{n}", f"c{n // 2}", z, y))
    return bags, where


def with_features(slide, z_TD):
    return FrozenSlide.of(slide.slide_id, slide.case_id, z_TD, slide.target_Y)


def score(baseline, bags):
    probs = np.stack([baseline.predict(bag)[0].numpy() for bag in bags])
    return macro_auroc(np.stack([bag.target_Y.numpy() for bag in bags]), probs)


def same(one, other, bags):
    return all(torch.equal(one.predict(bag)[0], other.predict(bag)[0]) for bag in bags)


@pytest.fixture(scope="module")
def cohort():
    return [planted(slides, seed)[0] for slides, seed in ((48, 1), (19, 2), (29, 3))]


@pytest.mark.parametrize("fit", FITS)
def test_learns_what_the_features_tell_and_describes_itself(fit, cohort):
    train, val, test = cohort
    baseline = fit(train, val, TASK, schedule=Schedule(epochs=25, patience=25))
    assert score(baseline, test) > 0.9
    assert baseline.figure == pytest.approx(score(baseline, val), abs=1e-6)  # the epoch kept
    assert f"{baseline.figure:.3f}" in baseline.describe()
    probs, weights = baseline.predict(test[0])
    assert probs.shape == (2,)
    assert ((probs > 0) & (probs < 1)).all()
    assert (weights is None) == (fit is fit_mean_pool_mlp)


def test_attention_finds_the_planted_tiles(cohort):
    train, val, _ = cohort
    baseline = fit_gated_attention(train, val, TASK, schedule=Schedule(epochs=25, patience=25))
    bags, where = planted(12, seed=5)
    for bag, mask in zip(bags, where, strict=True):
        _, weights = baseline.predict(bag)
        assert weights.shape == (len(bag.z_TD),)
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        if bag.target_Y.nansum() > 0 and mask.any():
            assert weights[mask].mean() > 2 * weights[~mask].mean()


@pytest.mark.parametrize("fit", FITS)
def test_shuffled_labels_teach_nothing(fit, cohort):
    """The learning test can fail: labels dealt out anew give chance on the test split."""
    train, val, test = cohort
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    dealt = [replace(bag, target_Y=train[n].target_Y) for bag, n in zip(train, order, strict=True)]
    assert score(fit(dealt, val[:4], TASK, **QUICK), test) < 0.85


@pytest.mark.parametrize("fit", FITS)
def test_deterministic_by_seed_and_leaves_the_callers_random_numbers_alone(fit, cohort):
    train, val, test = cohort
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    first = fit(train, val, TASK, seed=3, **QUICK)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert same(first, fit(train, val, TASK, seed=3, **QUICK), test)
    assert not same(first, fit(train, val, TASK, seed=4, **QUICK), test)


@pytest.mark.parametrize("fit", FITS)
def test_scale_of_the_features_does_not_matter_and_comes_from_train_alone(fit, cohort):
    train, val, test = cohort

    def moved(bags, scale, shift):
        return [with_features(bag, bag.z_TD * scale + shift) for bag in bags]

    plain = fit(train, val, TASK, **QUICK)
    scaled = fit(moved(train, 1024, 4096), moved(val, 1024, 4096), TASK, **QUICK)
    for bag, other in zip(test, moved(test, 1024, 4096), strict=True):
        torch.testing.assert_close(
            plain.predict(bag)[0], scaled.predict(other)[0], rtol=0.01, atol=0.01
        )
    # with other validation features the standardisation is still the training split's
    other_val = fit(train, moved(val, 3, 1), TASK, **QUICK)
    assert torch.equal(other_val.model.center_D, plain.model.center_D)
    assert torch.equal(other_val.model.scale_D, plain.model.scale_D)


@pytest.mark.parametrize("fit", FITS)
def test_a_constant_feature_is_harmless(fit, cohort):
    def widened(bags, value):
        return [
            with_features(bag, torch.cat([bag.z_TD, torch.full((len(bag.z_TD), 1), value)], 1))
            for bag in bags
        ]

    train, val, test = (widened(bags, 0.1) for bags in cohort)
    probs, _ = fit(train, val, TASK, **QUICK).predict(test[0])
    assert probs.isfinite().all()


@pytest.mark.parametrize("fit", FITS)
def test_unknown_labels_are_masked(fit, cohort):
    """A slide of which nothing is known changes the standardisation, and nothing else."""
    train, val, test = cohort
    unknown = torch.full((2,), torch.nan)
    blank = [replace(bag, target_Y=unknown) if n % 6 == 0 else bag for n, bag in enumerate(val)]
    baseline = fit(train, blank, TASK, **QUICK)
    known = [bag for n, bag in enumerate(val) if n % 6]
    assert baseline.figure == pytest.approx(score(baseline, known))
    train = [replace(bag, target_Y=unknown) if n % 3 == 0 else bag for n, bag in enumerate(train)]
    assert fit(train, val, TASK, **QUICK).predict(test[0])[0].isfinite().all()


def test_validation_chooses_candidate_and_epoch(cohort):
    """A candidate that cannot learn, first in the grid, is not the one kept."""
    train, val, _ = cohort
    grid = (Candidate(1e-9, 8), Candidate(3e-3, 32))
    schedule = Schedule(epochs=8, patience=8)
    baseline = fit_mean_pool_mlp(train, val, TASK, grid=grid, schedule=schedule)
    assert baseline.chosen == grid[1]
    assert 0 <= baseline.epoch < 8


def test_training_stops_when_validation_no_longer_improves(cohort, monkeypatch):
    train, val, _ = cohort
    seen = []
    monkeypatch.setattr(
        fitter,
        "validation_score",
        lambda *_: (seen.append(1), (0.5, (1.0 - (len(seen) > 2), 0)))[1],
    )
    schedule = Schedule(epochs=100, patience=5)
    fit_mean_pool_mlp(train, val, TASK, grid=(Candidate(1e-3, 8),), schedule=schedule)
    assert len(seen) == 1 + 5  # the first is the best; five that are not


def test_the_weights_kept_are_those_of_the_best_epoch_not_of_the_last(cohort, monkeypatch):
    train, val, test = cohort
    grid = (Candidate(1e-2, 8),)
    first = fit_mean_pool_mlp(train, val, TASK, grid=grid, schedule=Schedule(1, 9))
    turns = iter(range(9))
    monkeypatch.setattr(fitter, "validation_score", lambda *_: (0.5, (0.5, -next(turns))))
    kept = fit_mean_pool_mlp(train, val, TASK, grid=grid, schedule=Schedule(9, 9))
    assert kept.epoch == 0
    assert same(kept, first, test)


@pytest.mark.parametrize("fit", FITS)
def test_a_validation_split_of_one_class_falls_back_on_its_loss(fit, cohort):
    train, val, _ = cohort
    positive = [replace(bag, target_Y=torch.ones(2)) for bag in val]
    baseline = fit(train, positive, TASK, **QUICK)
    assert np.isnan(baseline.figure)


@pytest.mark.parametrize("fit", FITS)
def test_bad_bags_are_named(fit, cohort):
    train, val, _ = cohort
    bag = train[0]

    def refused(changed, message):
        with pytest.raises(ValueError, match=message):
            fit([changed, *train[1:]], val, TASK, **QUICK)

    refused(with_features(bag, bag.z_TD[:, :5]), r"s1: .* one tile or more of 5 features")
    refused(with_features(bag, bag.z_TD[:0]), r"s0: features of shape \(0, 13\)")
    refused(with_features(bag, bag.z_TD / 0), "s0: its features hold nan or infinity")
    refused(replace(bag, target_Y=torch.ones(3)), "s0: 3 labels, but 2 are named: A, B")
    with pytest.raises(ValueError, match="got 48 and 0"):
        fit(train, [], TASK, **QUICK)


def test_rgb_statistics_are_six_numbers_a_tile():
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (11, 3, 5, 7), dtype=torch.uint8, generator=generator)
    z_T6, score_T = RgbStatistics().encode(tiles)
    pixels = tiles.numpy().reshape(11, 3, -1) / 255
    expected = np.concatenate([pixels.mean(2), pixels.std(2)], axis=1)
    np.testing.assert_allclose(z_T6.numpy(), expected, atol=1e-6)
    assert z_T6.dtype == torch.float32
    assert score_T.tolist() == [0] * 11


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("loss", ["hazard", "cox"])
def test_times_are_learned_too(fit, loss):
    """The first feature, of one tile in five, brings the event nearer."""

    def bags(slides, seed):
        generator = torch.Generator().manual_seed(seed)
        found = []
        for n in range(slides):
            z = torch.randn(17, 7, generator=generator)
            time = float(torch.rand(1, generator=generator)) * 10
            z[:4, 0] += 8 - time
            y = torch.tensor([time, float(n % 3 > 0), float(n)])
            found.append(FrozenSlide.of(f"s{n}", f"c{n}", z, y))
        return found

    train, val = bags(40, 1), bags(20, 2)
    spec = {"name": "survival", "time": "t", "event": "e", "loss": loss}
    task = learn_task(spec, (), (), torch.stack([bag.target_Y for bag in train]).numpy())
    baseline = fit(train, val, task, grid=(Candidate(1e-3, 32),), schedule=Schedule(20, 20))
    assert baseline.figure > 0.8
    assert "concordance 0." in baseline.describe()
    said, _ = baseline.predict(val[0])
    assert said.shape == (4 if loss == "hazard" else 1,)
