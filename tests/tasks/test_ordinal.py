"""Ordered classes: CORN's probabilities are a distribution, and its loss is their likelihood."""

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from slides.cohort.targets import Cells, make_columns
from tapfm.tasks import TaskError, learn_task
from tapfm.tasks.ordinal import StepLoss, class_distance, quadratic_kappa

CLASSES = ("low", "middle", "high", "top")
TARGETS = np.array([[0.0], [0], [1], [2], [3], [3], [np.nan]])
N, J = len(TARGETS), len(CLASSES) - 1


def task_of(loss):
    return learn_task({"name": "ordinal", "loss": loss}, ["grade"], CLASSES, TARGETS)


def logits(seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(N, J, generator=drawn, dtype=torch.float64)


def by_hand(logits_NJ, loss):
    """Return P(y = k) in numpy, from chances of each step."""
    step = 1 / (1 + np.exp(-logits_NJ.numpy()))
    above = np.cumprod(step, 1) if loss == "corn" else np.minimum.accumulate(step, 1)
    above = np.concatenate([np.ones((N, 1)), above, np.zeros((N, 1))], 1)
    return above[:, :-1] - above[:, 1:]


@pytest.mark.parametrize("loss", ["corn", "cumulative"])
def test_probabilities_by_hand(loss):
    found = task_of(loss).predict(logits())
    np.testing.assert_allclose(found, by_hand(logits(), loss), atol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert (found >= 0).all()


def test_the_loss_of_corn_is_the_likelihood_of_the_class_and_not_of_the_pairs():
    """Trap: divided by conditional pairs, a step of one slide is another loss."""
    task, weight = task_of("corn"), np.array([6 / 8, 6 / 4, 6 / 4, 6 / 8])
    assert task.weight == pytest.approx(tuple(weight))
    known = TARGETS[:-1, 0].astype(int)
    chance = by_hand(logits(), "corn")[np.arange(N - 1), known]
    expected = -(weight[known] * np.log(chance)).mean()
    found = task.loss().double()(logits(), torch.tensor(TARGETS)).item()
    assert found == pytest.approx(expected, abs=1e-7)  # weights are float32
    pairs = np.minimum(known + 1, J).sum()
    assert abs(-(weight[known] * np.log(chance)).sum() / pairs - found) > 0.1


def test_the_cumulative_loss_by_hand():
    loss = StepLoss((1.0,) * 4, conditional=False).double()
    step = 1 / (1 + np.exp(-logits().numpy()[:-1]))
    above = TARGETS[:-1] > np.arange(J)
    expected = -np.where(above, np.log(step), np.log(1 - step)).sum(1).mean()
    assert loss(logits(), torch.tensor(TARGETS)).item() == pytest.approx(expected, abs=1e-10)


def test_kappa_is_that_of_scikit_learn_in_every_draw():
    task = task_of("corn")
    rng = np.random.default_rng(0)
    y_N, said_NP = rng.integers(0, 4, 40).astype(float), rng.dirichlet(np.ones(4), 40)
    times_BN = rng.integers(0, 3, (5, 40)).astype(float)
    found = task.measure(y_N[:, None], said_NP, times_BN)["macro"]
    called_N = (1 - said_NP.cumsum(1)[:, :-1] > 0.5).sum(1)
    assert (called_N != said_NP.argmax(1)).any(), "the median class, not the most probable"
    for b, times_N in enumerate(times_BN.astype(int)):
        y, called = y_N.repeat(times_N), called_N.repeat(times_N)
        expected = cohen_kappa_score(y, called, weights="quadratic")
        assert found["kappa"][b] == pytest.approx(expected, abs=1e-12)
        assert found["class_distance"][b] == pytest.approx(np.abs(y - called).mean())
    one_class = np.zeros((1, 4, 4))
    one_class[0, 1] = 3
    assert np.isnan(quadratic_kappa(one_class)).all()
    assert np.isnan(class_distance(0 * one_class)).all()


def read(texts, **options):
    cells = Cells(["grade"], dict(enumerate([text] for text in texts)), {})
    return make_columns({"name": "ordinal", **options}).read(cells, [])


def test_classes_are_numbered_in_their_order():
    values = read(["low", "top", "middle"], order=["low", "middle", "top"])
    assert values.classes == ("low", "middle", "top")
    assert values.rows == {0: (0.0,), 1: (2.0,), 2: (1.0,)}
    assert read(["10", "9", "2"]).classes == ("2", "9", "10"), "without an order, by size"
    said = read(["low", "top", "middle"], order=["low", "top"]).faults
    assert "data.task.order lacks middle: list every class, low to high" in said
    with pytest.raises(TaskError, match="loss 'coral' is none of corn, cumulative"):
        task_of("coral")
