"""OTSurv's plan is Sinkhorn's with a dustbin; in numpy, without logarithms."""

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.data.bag import Moment
from tapfm.frozen.fitter import Candidate, Recipe, Schedule, fit
from tapfm.frozen.frozen_slide import FrozenSlide
from tapfm.slide_model.aggregators import aggregator_options, make_aggregator
from tapfm.slide_model.aggregators.otsurv import scale, transported
from tapfm.tasks import make_task
from tapfm.tasks.losses import MaskedBCE
from tapfm.training.objective import Objective
from tests.bags import tile_set

T, D, K, PROTOTYPES = 13, 7, 3, 4
SMALL = {"name": "otsurv", "width": 6, "prototypes": PROTOTYPES}
SHARES = pytest.mark.parametrize("rho", [0.107, 0.6, 1.0])


def made(**options):
    torch.manual_seed(1)
    return make_aggregator({**SMALL, **options}, D, K).double()


def tiles():
    drawn = torch.Generator().manual_seed(0)
    z_TD = 3 * torch.randn(T, D, generator=drawn, dtype=torch.float64)
    return tile_set(z_TD, torch.zeros(T).double())


def costs():
    drawn = torch.Generator().manual_seed(2)
    return torch.rand(T, PROTOTYPES, generator=drawn, dtype=torch.float64)


def by_hand(cost, rho, iterations, eps=0.1, gamma=1.0, relaxed_dustbin=False, shifted=True):
    """Return the plan with its dustbin, by scaling the kernel itself.

    Without `shifted`, as published.
    """
    kernel = np.exp(-np.concatenate([cost, np.zeros((len(cost), 1))], 1) / eps)
    wanted = np.append(np.full(PROTOTYPES, rho / PROTOTYPES), 1 - rho)
    power = np.append(np.full(PROTOTYPES, gamma / (gamma + eps)), 1.0)
    if relaxed_dustbin:
        power[-1] = power[0]
    columns, shift = np.ones(PROTOTYPES + 1), 1.0
    for _ in range(iterations):
        rows = 1 / len(cost) / (kernel @ (shift * columns))
        columns = (wanted / (kernel.T @ rows)) ** power
        if shifted:
            shift = np.mean(columns[:-1] ** (-eps / gamma)) ** (gamma / eps)
    return rows[:, None] * kernel * columns


@SHARES
def test_the_plan_is_that_of_scaling_the_kernel(rho):
    found = scale(costs(), torch.tensor(rho, dtype=torch.float64), 0.1, 1.0, 50).numpy()
    expected = by_hand(costs().numpy(), rho, 50)
    np.testing.assert_allclose(found, expected[:, :-1], rtol=0, atol=1e-10)
    if rho < 1:
        other = by_hand(costs().numpy(), rho, 50, relaxed_dustbin=True)
        assert np.abs(found - other[:, :-1]).max() > 1e-5, "so that the above can fail"


@SHARES
def test_fifty_scalings_are_as_good_as_a_thousand(rho):
    """The published code differentiates up to a thousand, in double precision."""
    converged = by_hand(costs().numpy(), rho, 1000, shifted=False)
    assert np.abs(by_hand(costs().numpy(), rho, 50) - converged).max() < 1e-6
    unshifted = by_hand(costs().numpy(), rho, 50, shifted=False)
    assert np.abs(unshifted - converged).max() > 1e-5
    np.testing.assert_allclose(converged.sum(1), 1 / T, rtol=0, atol=1e-7)
    assert converged[:, -1].sum() == pytest.approx(1 - rho, abs=1e-9)


@SHARES
def test_the_whole_by_hand(rho):
    aggregator = made()
    aggregator.rho.fill_(rho)
    p = {name: value.detach().numpy() for name, value in aggregator.named_parameters()}
    x = np.maximum(tiles().z_TD.numpy() @ p["project.weight"].T + p["project.bias"], 0)
    cost = np.linalg.norm(x[:, None] - p["prototypes_KW"], axis=2)
    plan = by_hand(cost / cost.max(), rho, 50)[:, :-1]
    pooled = p["pool.weight"][0] @ (plan.T @ x / rho) + p["pool.bias"]
    output = aggregator(tiles())
    for found, expected in (
        (output.embedding_E, pooled),
        (output.logits_K, p["head.weight"] @ pooled + p["head.bias"]),
        (output.weights_T, plan.sum(1) / plan.sum()),
    ):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-9)


def test_the_surest_tiles_come_first():
    """Near a prototype is sure: with a tenth of the mass, far tiles are in the dustbin."""
    cost = torch.full((T, PROTOTYPES), 1.0, dtype=torch.float64)
    cost[:3] = 0.05
    mass = {rho: scale(cost, torch.tensor(rho, dtype=torch.float64), 0.1, 1.0, 200).sum(1) * T
            for rho in (0.1, 1.0)}  # fmt: skip
    assert mass[0.1][:3].min() > 100 * mass[0.1][3:].max()
    torch.testing.assert_close(mass[1.0], torch.ones(T).double(), rtol=0, atol=1e-6)


def test_rho_is_the_published_schedule():
    options = aggregator_options({"name": "otsurv", "until": 0.2})
    assert transported(0, options) == pytest.approx(0.1 + np.exp(-5))
    assert transported(0.1, options) == pytest.approx(0.1 + np.exp(-5 * 0.25))
    assert [transported(at, options) for at in (0.2, 0.5, 1.0)] == [1, 1, 1]


def test_a_run_tells_how_far_it_is_and_the_model_keeps_it():
    aggregator = made()
    assert aggregator.rho == 1, "outside a run, all tiles"
    objective = Objective(MaskedBCE([1.0] * K).double(), torch.nn.ModuleDict(),
                          torch.nn.ModuleDict())  # fmt: skip
    target = torch.tensor([1.0, 0.0, 1.0])
    losses = {}
    for progress in (0.0, 0.1, 1.0):
        moment = Moment(progress, 0, seed=1)
        losses[progress] = objective(aggregator, tiles(), target, moment).loss.item()
        expected = transported(progress, aggregator.options)
        assert aggregator.state_dict()["rho"].item() == pytest.approx(expected, abs=1e-6)
    assert len(set(losses.values())) == 3


def test_the_fitter_tells_it_too():
    task = make_task({"name": "multilabel"}, ("A", "B", "C"))
    target = torch.tensor([1.0, 0.0, 1.0])
    slide = FrozenSlide.of("s", "c", tiles().z_TD.float(), target)
    for epochs, last in ((1, 0.0), (4, 0.75)):
        recipe = Recipe([Candidate(1e-3)], Schedule(epochs, patience=9))
        fitted = fit(lambda _: made(until=1.0).float(), [slide], [], task, recipe)
        expected = transported(last, fitted.model.options)
        assert fitted.model.rho.item() == pytest.approx(expected, abs=1e-6)


def test_the_number_of_parameters():
    expected = 6 * (D + 1) + PROTOTYPES * 6 + PROTOTYPES + 1 + K * 7
    assert sum(p.numel() for p in made().parameters()) == expected


def test_options_that_cannot_be_are_all_named():
    with pytest.raises(SettingsError, match=r"start must be above 0(.|\n)*eps must be above 0"):
        made(start=0.0, eps=0.0)
