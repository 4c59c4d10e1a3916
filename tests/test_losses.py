"""Unknown labels change nothing; known ones are weighted BCE."""

import math

import pytest
import torch

from tapfm.losses import MaskedBCE

LOGITS = torch.tensor([0.3, -1.2, 2.0])


def by_hand(logit, label, weight):
    p = 1 / (1 + math.exp(-logit))
    return -weight * math.log(p) if label else -math.log(1 - p)


def test_by_hand():
    loss = MaskedBCE([2.0, 3.0, 0.5])(LOGITS, torch.tensor([1.0, 0.0, 1.0]))
    expected = (by_hand(0.3, 1, 2) + by_hand(-1.2, 0, 3) + by_hand(2.0, 1, 0.5)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_unknown_is_masked_not_zero():
    loss = MaskedBCE([2.0, 3.0, 0.5])
    logits = LOGITS.clone().requires_grad_()
    masked = loss(logits, torch.tensor([1.0, torch.nan, torch.nan]))
    assert masked.item() == pytest.approx(by_hand(0.3, 1, 2), rel=1e-6)
    masked.backward()
    assert logits.grad[1:].tolist() == [0, 0]
    assert masked.item() != pytest.approx(loss(LOGITS, torch.tensor([1.0, 0, 0])).item())


def test_all_unknown_is_zero_with_a_graph():
    logits = LOGITS.clone().requires_grad_()
    loss = MaskedBCE([1.0] * 3)(logits, torch.full((3,), torch.nan))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.tolist() == [0, 0, 0]
