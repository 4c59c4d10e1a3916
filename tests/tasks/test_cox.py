"""One slide a step with a bank of risks learns what Cox's partial likelihood of the cohort says.

Reference: the partial likelihood by a loop over events, differentiated by autograd.
"""

import math

import pytest
import torch

from tapfm.tasks.cox import CoxLoss

N = 29


@pytest.fixture
def cohort():
    """Risks, and times with ties; numbers tell slides apart. In float64."""
    generator = torch.Generator().manual_seed(0)
    risk = torch.randn(N, generator=generator, dtype=torch.float64)
    time = torch.randint(0, 11, (N,), generator=generator).double()
    event = (torch.rand(N, generator=generator) < 0.6).double()
    return risk, torch.stack([time, event, torch.arange(N).double()], 1)


def by_hand(risk, y):
    total, events = 0.0, 0
    for i in range(len(y)):
        if y[i, 1] == 1:
            at_risk = [risk[j] for j in range(len(y)) if y[j, 0] >= y[i, 0]]
            total = total - (risk[i] - torch.stack(at_risk).exp().sum().log())
            events += 1
    return total / events


def gradient(of, risk):
    leaf = risk.clone().requires_grad_()
    value = of(leaf)
    value.backward()
    return value.item(), leaf.grad


def test_a_batch_of_all_is_the_partial_likelihood(cohort):
    risk, y = cohort
    ours, gradient_N = gradient(lambda r: CoxLoss(64).double()(r[:, None], y), risk)
    value, expected_N = gradient(lambda r: by_hand(r, y), risk)
    assert ours == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(gradient_N, expected_N, rtol=1e-12, atol=1e-14)


def test_slide_by_slide_the_gradients_add_up_to_the_cohorts(cohort):
    """At fixed weights, once the bank holds everyone; and again in another order."""
    risk, y = cohort
    _, expected_N = gradient(lambda r: by_hand(r, y), risk)
    loss = CoxLoss(N).double()
    for epoch in range(3):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch))
        found_N = torch.zeros(N, dtype=torch.float64)
        for n in order:
            leaf = risk[n : n + 1].clone().requires_grad_()
            value = loss(leaf, y[n])
            value.backward()
            found_N[n] = leaf.grad
        if epoch:
            torch.testing.assert_close(found_N, expected_N, rtol=1e-10, atol=1e-12)
            assert value.item() == pytest.approx(by_hand(risk, y).item(), rel=1e-12)
        else:
            assert (found_N - expected_N).abs().max() > 0.01, "the bank was still filling"


def test_alone_there_is_nothing_to_learn(cohort):
    risk, y = cohort
    event = int(y[:, 1].argmax())
    value, gradient_N = gradient(lambda r: CoxLoss()(r, y[event]), risk[event : event + 1].float())
    assert value == 0
    assert gradient_N.tolist() == [0]


def test_the_unknown_are_masked_and_not_remembered(cohort):
    risk, y = cohort
    loss = CoxLoss(N).double()
    unknown = torch.tensor([math.nan, math.nan, 5.0], dtype=torch.float64)
    loss(risk[:5, None], y[:5])
    before = loss.bank_M4.clone()
    _, gradient_1 = gradient(lambda r: loss(r, unknown), risk[5:6])
    assert gradient_1.tolist() == [0]
    torch.testing.assert_close(loss.bank_M4, before, equal_nan=True)


def test_the_oldest_drop_out_and_who_comes_again_is_held_once(cohort):
    risk, y = cohort
    loss = CoxLoss(4).double()
    for n in (0, 1, 2, 1, 3, 4):
        loss(risk[n : n + 1], y[n])
    assert loss.bank_M4[:, 2].tolist() == [4, 3, 1, 2]


def test_validation_reads_the_bank_and_leaves_it(cohort):
    risk, y = cohort
    loss = CoxLoss(N).double()
    loss(risk[:20, None], y[:20])
    before = loss.bank_M4.clone()
    value = loss.eval()(risk[20:21], y[20])
    assert value.item() == pytest.approx(by_hand(risk[:21], y[:21]).item(), rel=1e-12)
    torch.testing.assert_close(loss.bank_M4, before, equal_nan=True)
    assert set(loss.state_dict()) == {"bank_M4"}, "resuming needs it"
