"""What every regulariser keeps: a new one is in REGULARISERS, and all of this is asked of it.

That its gradient reaches the encoder exactly: tests/training/test_objective.py.
"""

import pytest
import torch

from slides.errors import SettingsError
from tapfm.bag_transforms import make_bag_transforms
from tapfm.data.bag import Moment
from tapfm.regularisers import REGULARISERS, make_regularisers
from tapfm.slide_model.aggregators import AGGREGATORS, make_aggregator
from tapfm.tasks.losses import MaskedBCE
from tapfm.training.objective import Objective
from tests.bags import tile_set

T, D, K = 9, 5, 3
MOMENT = Moment(0.25, 1, seed=11, slide_id="s")


def pairs():
    """Return each regulariser with each aggregator that it serves with."""
    for name in REGULARISERS:
        for aggregator in AGGREGATORS:
            try:
                made(name, aggregator)
            except SettingsError:
                continue
            yield name, aggregator


def made(name, aggregator, **options):
    torch.manual_seed(2)
    learner = make_aggregator(aggregator, D, K).double()
    for key, parameter in learner.named_parameters():
        if "gate.last" in key:
            torch.nn.init.normal_(parameter)
    terms = make_regularisers([{"name": name, **options}], learner).double()
    terms[name].see_frozen(["s"], [torch.zeros(D).double()], torch.ones(D).double())
    terms[name].before = FirstView(s=torch.ones(K).double())
    return learner, terms


class FirstView(dict):
    """The first of two views, for as many second ones as are asked for."""

    def pop(self, key, default=None):
        return self.get(key, default)

    def clear(self):
        pass


def leaves(count=T, size=1.0):
    drawn = torch.Generator().manual_seed(0)
    z_TD = size * torch.randn(count, D, generator=drawn, dtype=torch.float64)
    score_T = torch.rand(count, generator=drawn, dtype=torch.float64)
    return tile_set(z_TD.requires_grad_(), score_T.requires_grad_())


PAIRS = list(pairs())
every = pytest.mark.parametrize(("name", "aggregator"), PAIRS, ids=map("-".join, PAIRS))


def test_a_regulariser_serves_or_says_with_what_it_cannot():
    assert {name for name, _ in PAIRS} == set(REGULARISERS)
    for name in REGULARISERS:
        for aggregator in {*AGGREGATORS} - {other for own, other in PAIRS if own == name}:
            with pytest.raises(SettingsError, match=rf"model.regularisers: {name} .*{aggregator} "):
                made(name, aggregator)


@every
def test_the_figures_are_the_columns(name, aggregator):
    learner, terms = made(name, aggregator)
    for count in (T, 1):
        tiles = leaves(count)
        term, figures = terms[name](tiles, learner(tiles), MOMENT)
        assert term.shape == ()
        assert term.isfinite()
        assert tuple(figures) == terms[name].columns
        assert all(each.shape == () and each.isfinite() for each in figures.values())


def gradients(name, aggregator, terms):
    learner, tiles = made(name, aggregator)[0], leaves()
    objective = Objective(MaskedBCE([1.0] * K).double(), torch.nn.ModuleDict(), terms)
    outcome = objective(learner, tiles, torch.tensor([1.0, 0.0, 1.0]), MOMENT)
    outcome.loss.backward()
    grads = [tiles.z_TD.grad, *(p.grad for p in learner.parameters() if p.grad is not None)]
    return torch.cat([each.flatten() for each in [outcome.loss.detach(), *grads]]), outcome


@every
def test_weight_0_is_absent_to_the_bit_and_still_logged(name, aggregator):
    without, _ = gradients(name, aggregator, torch.nn.ModuleDict())
    on, _ = gradients(name, aggregator, made(name, aggregator, weight=0.5)[1])
    off, outcome = gradients(name, aggregator, made(name, aggregator, weight=0.0)[1])
    assert torch.equal(off, without)
    assert not torch.equal(on, without)
    columns = {f"train/{each}" for each in made(name, aggregator)[1][name].columns}
    assert columns <= set(outcome.figures)


@every
def test_random_numbers_are_those_of_the_moment(name, aggregator):
    learner, terms = made(name, aggregator)
    tiles, said = leaves(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        said.append(terms[name](tiles, learner(tiles), MOMENT)[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*said)


@every
def test_the_gradient_is_that_of_finite_differences(name, aggregator):
    learner, terms = made(name, aggregator)

    def term(z_TD, score_T):
        tiles = tile_set(z_TD, score_T)
        return terms[name](tiles, learner(tiles), MOMENT)[0]

    tiles = leaves(5)
    assert torch.autograd.gradcheck(term, (tiles.z_TD, tiles.score_T))


@every
def test_sharp_attention_gives_finite_gradients(name, aggregator):
    learner, terms = made(name, aggregator)
    tiles = leaves(size=100.0)
    term, _ = terms[name](tiles, learner(tiles), MOMENT)
    term.backward()
    assert term.isfinite()
    grads = [each.grad for each in (tiles.z_TD, tiles.score_T) if each.grad is not None]
    assert grads
    assert all(each.isfinite().all() for each in grads)


def test_a_name_given_twice_is_refused():
    aggregator = make_aggregator("gated", 8, 1)
    with pytest.raises(SettingsError, match=r"model\.regularisers: aem is given twice"):
        make_regularisers([{"name": "aem", "top": 5}, "aem"], aggregator)
    with pytest.raises(SettingsError, match=r"model\.bag_transforms: tile_dropout is given twice"):
        make_bag_transforms(["tile_dropout", "tile_dropout"], aggregator)
