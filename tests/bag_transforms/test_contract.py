"""What every bag transform keeps: a new one is in BAG_TRANSFORMS, and all of this is asked of it.

That pass 2 leaves out what it leaves out, exactly: tests/training/test_objective.py.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch

from slides.errors import SettingsError
from tapfm.bag_transforms import BAG_TRANSFORMS, make_bag_transforms
from tapfm.data.bag import Moment, Places
from tapfm.slide_model.aggregators import AGGREGATORS, make_aggregator
from tapfm.slide_model.aggregators.contract import TileSet
from tests.bag_transforms.examples import example
from tests.bags import tile_set

T, D, K, CASE = 9, 5, 3, (5, 4)
MOMENT = Moment(0.25, 1, seed=11)
LEAVES_TILES = {"replay"}  # adds a term alone
every = pytest.mark.parametrize("name", BAG_TRANSFORMS)
with_each = pytest.mark.parametrize("aggregator", AGGREGATORS)
SUMS = {"tapfm", "gated", "tapfm_gated", "hierarchical"}  # attention, and logits that are sums
REFUSED = [("mhim", aggregator) for aggregator in AGGREGATORS if aggregator not in SUMS]
TAKEN = sorted({*product(BAG_TRANSFORMS, AGGREGATORS)} - {*REFUSED})


def made(name, aggregator="gated", **options):
    torch.manual_seed(2)
    learner = make_aggregator(aggregator, D, K).double()
    return learner, make_bag_transforms([example(name, D, **options)], learner)[name].double()


def leaves(count=T, counts=()):
    drawn = torch.Generator().manual_seed(0)
    z_TD = torch.randn(count, D, generator=drawn, dtype=torch.float64)
    score_T = torch.rand(count, generator=drawn, dtype=torch.float64)
    return tile_set(z_TD.requires_grad_(), score_T.requires_grad_(), counts)


@with_each
@pytest.mark.parametrize("counts", [(), CASE], ids=["slide", "case"])
def test_tiles_that_are_not_taken_get_no_gradient(aggregator, counts):
    torch.manual_seed(2)
    learner, tiles = make_aggregator(aggregator, D, K).double(), leaves(counts=counts)
    kept_T = torch.tensor([True, False, True, True, False, False, True, True, True])
    learner(tiles.take(kept_T)).logits_K.square().sum().backward()
    assert torch.equal(tiles.z_TD.grad.any(1), kept_T)
    if learner.uses_score:
        assert not tiles.score_T.grad[~kept_T].any()


@every
@pytest.mark.parametrize("counts", [(), CASE], ids=["slide", "case"])
def test_features_scores_and_places_stay_together(name, counts):
    """Rows say which tile they are of, and a transform may mix features but no tiles' places."""
    tiles = leaves(counts=counts)
    own = {tuple(place.tolist()): n for n, place in enumerate(places_of(tiles))}
    changed = made(name)[1](replace(tiles, score_T=torch.arange(T).double()), MOMENT)
    assert 1 <= len(changed) <= T
    assert len(changed) == len(changed.z_TD) == len(changed.score_T) == len(changed.coords0_T2)
    assert [own[tuple(place.tolist())] for place in places_of(changed)] == changed.score_T.tolist()
    assert (changed.slide_of_T.diff() >= 0).all()


def places_of(tiles):
    return torch.cat([tiles.slide_of_T[:, None], tiles.coords0_T2], 1)


@every
def test_it_needs_no_places_and_no_second_tile(name):
    tiles = leaves()
    unknown = TileSet.of(Places.unknown(T), tiles.z_TD, tiles.score_T)
    changed = made(name)[1](unknown, MOMENT)
    assert changed.coords0_T2 is None
    assert torch.equal(changed.z_TD, made(name)[1](tiles, MOMENT).z_TD)
    assert len(made(name)[1](leaves(1), MOMENT)) == 1


@every
def test_random_numbers_are_those_of_the_moment(name):
    tiles, drawn = leaves(), []
    for seed in (0, 1):
        transform = made(name)[1]
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        drawn.append(transform(tiles, MOMENT).z_TD)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*drawn)
    others = [transform(tiles, replace(MOMENT, seed=seed)).z_TD for seed in range(5)]
    assert all(torch.equal(other, drawn[0]) for other in others) == (name in LEAVES_TILES)


@pytest.mark.parametrize(("name", "aggregator"), REFUSED)
def test_an_aggregator_that_it_cannot_follow_is_refused(name, aggregator):
    with pytest.raises(SettingsError, match=f"{name} .*{aggregator}"):
        made(name, aggregator)


@pytest.mark.parametrize(("name", "aggregator"), TAKEN)
def test_the_gradient_is_that_of_finite_differences(name, aggregator):
    learner, transform = made(name, aggregator)
    tiles = leaves(6)

    def logits(z_TD, score_T):
        return learner(transform(tile_set(z_TD, score_T), MOMENT)).logits_K

    assert torch.autograd.gradcheck(logits, (tiles.z_TD, tiles.score_T), fast_mode=True)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 9), (0.3, 6), (0.5, 4), (0.99, 1)])
def test_tile_dropout_keeps_its_share_in_order(share, kept):
    tiles = leaves()
    changed = made("tile_dropout", share=share)[1](tiles, MOMENT)
    assert len(changed) == kept
    rows = [tiles.z_TD.tolist().index(row) for row in changed.z_TD.tolist()]
    assert rows == sorted(set(rows))
    assert (changed is tiles) == (share == 0)
