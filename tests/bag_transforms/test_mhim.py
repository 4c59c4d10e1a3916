"""MHIM leaves out what the teacher finds easy, and its teacher is an exponential mean."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from slides.errors import SettingsError
from tapfm.bag_transforms.contract import Step
from tapfm.bag_transforms.mhim import (
    DROPOUT,
    Mhim,
    Recycler,
    logit_parts,
    parts_add_up,
    survivors,
    votes,
)
from tapfm.data.bag import Moment
from tapfm.slide_model.aggregators import make_aggregator
from tests.bags import tile_set

D, K = 6, 3
MOMENT = Moment(0.25, 1, seed=11)
MASK = {"recycle_tokens": 0, "warm_up": 0.0}


def learner(name="gated"):
    torch.manual_seed(4)
    found = make_aggregator(name, D, K).double()
    for parameter in found.parameters():
        nn.init.normal_(parameter)  # of norms and biases too, that each takes part
    return found


def leaves(count=41):
    drawn = torch.Generator().manual_seed(0)
    z_TD = torch.randn(count, D, generator=drawn, dtype=torch.float64)
    score_T = torch.rand(count, generator=drawn, dtype=torch.float64)
    return tile_set(z_TD.requires_grad_(), score_T.requires_grad_())


def rows_of(changed, tiles):
    """Return the rows of the tiles that are there unchanged."""
    there = {tuple(row): n for n, row in enumerate(tiles.z_TD.tolist())}
    return [there[row] for row in map(tuple, changed.z_TD.tolist()) if row in there]


@pytest.mark.parametrize("name", ["gated", "tapfm", "tapfm_gated", "hierarchical"])
def test_the_parts_of_the_tiles_are_the_logits_by_hand(name):
    """Trap: the authors add one class's bias to every class."""
    model, tiles = learner(name), leaves(7)
    output = model(tiles)
    parts_TK, constant_K = logit_parts(model, tiles, output)
    a, x = output.weights_T.detach().numpy(), tiles.z_TD.detach().numpy()
    b = a @ x
    for t in range(7):
        part = a[t] * (x[t] - x[t].mean()) / np.sqrt(b.var() + model.norm.eps)
        by_hand = model.head.weight.detach().numpy() @ (part * model.norm.weight.detach().numpy())
        np.testing.assert_allclose(parts_TK[t].detach(), by_hand, atol=1e-12)
    torch.testing.assert_close(parts_TK.sum(0) + constant_K, output.logits_K, atol=1e-10, rtol=0)
    one_bias_for_all = parts_TK.sum(0) + constant_K[0]
    assert (one_bias_for_all - output.logits_K).abs().max() > 0.1


@pytest.mark.parametrize("name", ["dsmil", "transmil", "mean"])
def test_class_scores_are_refused_where_parts_do_not_add_up(name):
    assert not parts_add_up(learner(name))
    with pytest.raises(SettingsError, match=r"model.bag_transforms: mhim "):
        Mhim().build(learner(name))


def test_the_easiest_tiles_are_left_out_by_class_and_by_attention():
    model, tiles = learner(), leaves()
    output = model(tiles)
    parts_TK, constant_K = logit_parts(model, tiles, output)
    by_class_T = (parts_TK + constant_K).sigmoid().amax(1)
    for score, easy_T in (("class", by_class_T), ("attention", output.weights_T)):
        transform = Mhim(score=score, high=0.1, **MASK).build(model).double()
        left = rows_of(transform(tiles, replace(MOMENT, progress=0.0)), tiles)
        assert len(left) == 41 - math.ceil(4.1)
        assert easy_T[left].max() < easy_T[sorted(set(range(41)) - set(left))].min()
    assert not torch.equal(by_class_T.argsort(), output.weights_T.argsort()), "the scores differ"


@pytest.mark.parametrize("count", [1, 2, 10, 41])
@pytest.mark.parametrize(
    ("high", "high_drop", "low", "random"),
    [
        (0.03, 1, 0, 0),
        (0.02, 0.5, 0.2, 0.5),
        (0.9, 0.5, 0.8, 0.9),
        (0.0, 1, 0.5, 0),
        (0.1, 1, 0, 0.7),
    ],
)
def test_the_number_that_stays_is_that_of_the_formula(count, high, high_drop, low, random):
    options = Mhim(high=high, high_drop=high_drop, low=low, random=random, **MASK)
    easy_T = torch.arange(count).double()
    rows_T = survivors(easy_T, options, torch.Generator().manual_seed(0))
    dropped_high = min(math.ceil(round(high * count, 6)), count - 1)
    top = min(math.ceil(dropped_high / high_drop), count)
    dropped_low = min(int(low * count), count - top, count - dropped_high - 1)
    rest = count - dropped_high - dropped_low
    assert len(rows_T) == rest - min(int(round(random * rest, 6)), rest - 1) >= 1
    assert len(set(rows_T.tolist())) == len(rows_T)
    assert not set(rows_T.tolist()) & set(range(dropped_low)), "the lowest are out"
    if high_drop == 1 and dropped_high:
        assert rows_T.max() < count - dropped_high
    elif count == 41 and high == 0.02:
        many = [survivors(easy_T, replace(options, random=0.0), torch.Generator().manual_seed(n))
                for n in range(9)]  # fmt: skip
        assert {tuple(sorted({39, 40} & set(each.tolist()))) for each in many} == {(39,), (40,)}


def test_masked_tiles_have_gradient_0_and_the_others_have_one():
    for name in ("gated", "tapfm_gated", "tapfm"):
        model, tiles = learner(name), leaves()
        transform = Mhim(high=0.2, random=0.5, **MASK).build(model).double()
        changed = transform(tiles, MOMENT)
        left = rows_of(changed, tiles)
        model(changed).logits_K.square().sum().backward()
        assert tiles.z_TD.grad.any(1).nonzero().flatten().tolist() == left
        if model.uses_score:
            assert not tiles.score_T.grad[sorted(set(range(41)) - set(left))].any()


@pytest.mark.parametrize("detach", [False, True])
def test_merged_tiles_have_a_gradient_unless_they_are_detached(detach):
    model, tiles = learner(), leaves()
    options = Mhim(high=0.05, recycle_keep=0.5, recycle_tokens=4, recycle_detach=detach)
    transform = options.build(model).double()
    changed = transform(tiles, MOMENT)
    kept = rows_of(changed, tiles)
    assert len(kept) == round((41 - 3) * 0.5), "`recycle_keep` is the share that is kept"
    assert len(changed) == len(kept) + 4
    model(changed).logits_K.square().sum().backward()
    assert tiles.z_TD.grad.any(1).sum() == (len(kept) if detach else 38)


def test_tokens_by_hand():
    torch.manual_seed(1)
    recycler = Recycler(D, 3).double()
    nn.init.normal_(recycler.out.weight)
    z_TD = leaves(7).z_TD.detach()
    drawn = torch.Generator().manual_seed(5)
    found = recycler(z_TD, 2, drawn).detach().numpy()
    stays = torch.rand(8, 2, 7, generator=torch.Generator().manual_seed(5)).numpy() >= DROPOUT

    def normed(x):
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)

    weight = {name: p.detach().numpy() for name, p in recycler.named_parameters()}
    q = normed(recycler.queries_MD[:2].numpy()) @ weight["query.weight"].T
    k, v = (normed(z_TD.numpy()) @ weight[f"{part}.weight"].T for part in ("key", "value"))
    mean, heads = np.zeros((2, D)), []
    for h in range(8):
        own = slice(64 * h, 64 * h + 64)
        near = np.exp(q[:, own] @ k[:, own].T / 8)
        share = near / near.sum(1, keepdims=True)
        mean += share @ z_TD.numpy() / 8
        heads.append((share * stays[h] / (1 - DROPOUT)) @ v[:, own])
    by_hand = mean + np.concatenate(heads, 1) @ weight["out.weight"].T
    np.testing.assert_allclose(found, by_hand, atol=1e-10)


def test_the_teacher_is_the_exponential_mean_after_3_updates_and_buffers_follow():
    """Trap: the authors' EMA skips buffers."""
    model = learner()
    transform = Mhim(momentum=0.9, **MASK).build(model).double()
    started = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
            model.center_D += 1
        transform.after_update()
    expected = 0.1 * (3 + 0.9 * 2 + 0.81 * 1)
    for own, start in zip(transform.teacher.parameters(), started, strict=True):
        torch.testing.assert_close(own - start, torch.full_like(own, expected))
        assert not own.requires_grad
    assert torch.equal(transform.teacher.center_D, model.center_D)


def test_the_teacher_is_the_aggregator_while_nothing_is_left_out():
    model, tiles = learner(), leaves()
    transform = Mhim(warm_up=0.5).build(model).double()
    nn.init.normal_(model.head.weight)  # a warm start, say
    assert transform(tiles, MOMENT) is tiles
    assert torch.equal(transform.teacher.head.weight, model.head.weight)
    nn.init.normal_(model.head.weight)
    assert len(transform(tiles, replace(MOMENT, progress=0.6))) < 41
    assert not torch.equal(transform.teacher.head.weight, model.head.weight)


def test_queries_change_in_after_update_alone_and_are_not_trained():
    model, tiles = learner(), leaves()
    transform = Mhim().build(model).double()
    before = transform.recycler.queries_MD.clone()
    transform(tiles, MOMENT)
    assert torch.equal(transform.recycler.queries_MD, before)
    tokens_MD = transform.tokens_MD
    transform.after_update()
    torch.testing.assert_close(
        transform.recycler.queries_MD, before + 1e-4 * (tokens_MD - before), atol=1e-12, rtol=0
    )
    assert "recycler.queries_MD" not in dict(transform.named_parameters())


def test_the_teachers_dropout_is_off_and_a_tokens_is_on():
    """Trap: the authors' teacher stays in training mode."""
    model = learner()
    model.gate.tanh = nn.Sequential(model.gate.tanh, nn.Dropout(0.5))
    transform = Mhim().build(model).double().train()
    assert transform.recycler.training
    assert not any(each.training for each in transform.teacher.modules())


def test_the_distance_to_the_teacher_by_hand_and_at_weight_0_none():
    model, tiles = learner(), leaves()
    for weight in (0.5, 0.0):
        transform = Mhim(consistency=weight).build(model).double()
        output = model(transform(tiles, MOMENT))
        target_K = torch.tensor([1.0, 0.0, 1.0])
        term, figures = transform.term(Step(model, output, target_K, None, None, MOMENT))
        wanted, own = (each.detach().numpy() for each in (transform.teacher(tiles).embedding_E,
                                                          output.embedding_E))  # fmt: skip
        wanted = np.exp(wanted / 0.1) / np.exp(wanted / 0.1).sum()
        by_hand = -(wanted * np.log(np.exp(own) / np.exp(own).sum())).sum()
        assert figures["mhim_consistency"].item() == pytest.approx(by_hand, abs=1e-10)
        assert term is None if weight == 0 else term.item() == pytest.approx(by_hand / 2, abs=1e-10)


def test_high_decays_on_a_cosine_and_heads_vote():
    model, tiles = learner(), leaves()
    transform = Mhim(high=0.2, decay=True, **MASK).build(model).double()
    kept = [len(transform(tiles, replace(MOMENT, progress=p))) for p in (0.0, 0.5, 1.0)]
    assert kept == [41 - 9, 41 - 5, 41]
    log_KT = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.3, 0.25, 0.4]]).log()
    found_T = votes(log_KT, 0.5, log_KT.exp().mean(0))
    assert found_T.argsort(descending=True).tolist() == [1, 0, 3, 2]
    assert log_KT.exp().mean(0).argmax() == 1


def test_numbers_that_cannot_be_are_refused_together():
    with pytest.raises(SettingsError, match=r"high must be in \[0, 1\), got 1.0(.|\n)*score must"):
        Mhim(high=1.0, score="size")
