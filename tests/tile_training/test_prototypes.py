"""The prototype loss is the formula, prototypes move as said, and nothing else moves them."""

import math

import pytest
import torch

from tapfm.tile_training.prototypes import PrototypeLoss


def example(**options):
    torch.manual_seed(0)
    loss = PrototypeLoss(3, 5, **options).double()
    features = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    return loss, features, torch.tensor([0, 1, 2, 2, 1, 0, 2])


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_by_hand():
    loss, features, labels = example(alpha=3.0, margin=0.2, pull=2.0, push=0.5)
    pull = push = 0.0
    for f, y in zip(features, labels.tolist(), strict=True):
        near = [cosine(f, p) for p in loss.prototypes_KD]
        pull += math.log(1 + math.exp(-3 * (near[y] - 0.2))) / 7
        others = [math.exp(3 * (s + 0.2)) for c, s in enumerate(near) if c != y]
        push += math.log(1 + max(others)) / 7
    assert loss(features, labels).item() == pytest.approx(2 * pull + 0.5 * push, rel=1e-12)


def test_features_learn_and_prototypes_are_a_buffer():
    loss, features, labels = example()
    loss(features, labels).backward()
    assert features.grad.abs().sum() > 0
    assert not list(loss.parameters())
    assert list(loss.state_dict()) == ["prototypes_KD"]  # kept with the model


def test_a_step_down_the_loss_gathers_a_class():
    loss, features, labels = example()
    before = [cosine(f, loss.prototypes_KD[y]) for f, y in zip(features, labels, strict=True)]
    (grad,) = torch.autograd.grad(loss(features, labels), features)
    stepped = features - grad / grad.norm()
    after = [cosine(f, loss.prototypes_KD[y]) for f, y in zip(stepped, labels, strict=True)]
    assert sum(after) > sum(before) + 0.01


def test_prototypes_move_by_their_sure_tiles_alone():
    loss, features, labels = example(sure=0.8)
    old = loss.prototypes_KD.clone()
    # sure of tiles 0 (class 0), 2 and 3 (class 2); unsure of 1, 4, 5; sure of 6, and wrong
    logits = torch.zeros(7, 3, dtype=torch.float64)
    logits[0, 0], logits[2, 2], logits[3, 2], logits[6, 0] = 5, 3, 9, 9
    p = logits.softmax(1)
    loss.update(features, logits, labels)

    def unit(vector):
        return vector / vector.norm()

    both = p[2, 2] * features[2] + p[3, 2] * features[3]
    expected = [old[0] + unit(features[0]), old[1], old[2] + unit(both)]
    for found, wanted in zip(loss.prototypes_KD, expected, strict=True):
        torch.testing.assert_close(found, unit(wanted.detach()), rtol=1e-12, atol=1e-12)
    assert not loss.prototypes_KD.requires_grad


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="classes must be 2 or more, got 1"):
        PrototypeLoss(1, 5)
