"""Unknown labels change nothing; known ones are weighted BCE."""

import math

import pytest
import torch

from tapfm.tasks.losses import HazardNLL, MaskedBCE, MaskedCrossEntropy, MaskedMSE

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


class TestClasses:
    WEIGHT = (0.5, 2.0, 1.0)

    def test_by_hand(self):
        loss = MaskedCrossEntropy(self.WEIGHT)
        log_p = LOGITS - LOGITS.exp().sum().log()
        for k in range(3):
            found = loss(LOGITS, torch.tensor([float(k)]))
            assert found.item() == pytest.approx(-self.WEIGHT[k] * log_p[k].item(), rel=1e-6)

    def test_a_weight_counts_in_a_step_of_one_slide_too(self):
        """torch's own divides it away there."""
        plain = MaskedCrossEntropy((1.0, 1.0, 1.0))
        y = torch.tensor([1.0])
        assert MaskedCrossEntropy(self.WEIGHT)(LOGITS, y) == 2 * plain(LOGITS, y)

    def test_a_batch_is_the_mean_of_its_known_slides(self):
        loss = MaskedCrossEntropy(self.WEIGHT)
        logits = torch.stack([LOGITS, LOGITS.flip(0), 2 * LOGITS])
        y = torch.tensor([[1.0], [torch.nan], [0.0]])
        expected = (loss(logits[0], y[0]) + loss(logits[2], y[2])) / 2
        assert loss(logits, y).item() == pytest.approx(expected.item(), rel=1e-6)


class TestValues:
    def test_by_hand_and_masked(self):
        loss = MaskedMSE([10.0, 0.0, -1.0], [2.0, 1.0, 4.0])
        y = torch.tensor([13.0, torch.nan, -1.0])
        logits = LOGITS.clone().requires_grad_()
        found = loss(logits, y)
        assert found.item() == pytest.approx(((0.3 - 1.5) ** 2 + 2.0**2) / 2, rel=1e-6)
        found.backward()
        assert logits.grad[1] == 0


class TestHazards:
    EDGES = (10.0, 20.0)

    def likelihood(self, time, event):
        """Product over bins, by hand; of `LOGITS`."""
        h = [1 / (1 + math.exp(-u)) for u in LOGITS.tolist()]
        k = sum(time >= edge for edge in self.EDGES)
        before = math.prod(1 - h[j] for j in range(k))
        return before * (h[k] if event else 1 - h[k])

    @pytest.mark.parametrize("time", [0.0, 9.9, 10.0, 19.0, 20.0, 400.0])
    @pytest.mark.parametrize("event", [0.0, 1.0])
    def test_by_hand(self, time, event):
        found = HazardNLL(self.EDGES)(LOGITS, torch.tensor([time, event, 7.0]))
        assert found.item() == pytest.approx(-math.log(self.likelihood(time, event)), rel=1e-5)

    def test_what_can_happen_sums_to_one(self):
        """An event in any bin, or none in all of them."""
        total = sum(self.likelihood(time, 1) for time in (5, 15, 25)) + self.likelihood(25, 0)
        assert total == pytest.approx(1)
        nll = HazardNLL(self.EDGES)
        rows = torch.tensor([[5.0, 1, 0], [15.0, 1, 0], [25.0, 1, 0], [25.0, 0, 0]])
        assert sum(math.exp(-nll(LOGITS, y).item()) for y in rows) == pytest.approx(1, rel=1e-5)

    def test_unknown_is_masked_and_a_batch_is_a_mean(self):
        nll = HazardNLL(self.EDGES)
        logits = torch.stack([LOGITS, -LOGITS])
        unknown = torch.tensor([torch.nan, torch.nan, 1.0])
        y = torch.tensor([12.0, 1.0, 2.0])
        both = nll(logits, torch.stack([y, unknown]))
        assert both.item() == pytest.approx(nll(LOGITS, y).item(), rel=1e-6)
        leaf = LOGITS.clone().requires_grad_()
        nll(leaf, unknown).backward()
        assert leaf.grad.tolist() == [0, 0, 0]
