"""Whichever way a slide is computed, its gradient is that of one graph over all its tiles.

The reference is plain autograd: all tiles in one forward, every block whole, nothing compiled,
recomputed, cut off or kept. Bounds are of the norm of the difference: 1e-12 of the gradient's in
float64, 1e-6 in float32. There one graph is itself 6e-6 off the truth, and the tail by another way
off: so in float32 its reference is a graph with the tail, and it must be as near to the truth.

Weights in bfloat16 have another gradient than those they were rounded from, and every chunk rounds
its own; there the reference gives each chunk copies of the weights within one graph, and adds their
gradients up in float64.
"""

import functools

import pytest
import torch
from torch.func import functional_call

from tapfm.adapt.strategies import make_strategy
from tapfm.encoders import compiled
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.engine.frozen_prefix import FrozenPrefixTokens, find_frozen_prefix
from tapfm.engine.master_weights import MasterAdamW
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.tasks.losses import MaskedBCE
from tests.bags import tile_set
from tests.tiny import random_tiles, tiny_encoder

CPU, TILES = torch.device("cpu"), 23
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
LEARNS = {"all": "full", "last 2": {"name": "last_n", "n": 2}}


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Return a traced and padded encode, run as by inductor; no compiler is needed."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def encoder_of(learns, dtype, **how):
    encoder = tiny_encoder("5 prefix", dtype, **how)
    make_strategy(LEARNS[learns]).prepare(encoder.vit)
    return encoder.train()


def loss_of(z_TD, score_T):
    torch.manual_seed(7)
    aggregator = make_aggregator("tapfm_gated", z_TD.shape[1], 3).to(z_TD.dtype)
    labels_K = torch.tensor([1.0, torch.nan, 0.0])
    return MaskedBCE([1.0, 2.0, 3.0])(aggregator(tile_set(z_TD, score_T)).logits_K, labels_K)


def flat(gradients):
    return torch.cat([g.flatten().double() for g in gradients if g is not None])


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@functools.cache
def one_graph(learns, dtype, tail=False):
    encoder = encoder_of(learns, dtype, tail=tail)
    loss_of(*encoder(random_tiles(TILES))).backward()
    return flat(p.grad for p in encoder.parameters())


def two_passes(encoder, chunk, boundary=False, score_weight=1.0):
    """Run both passes as `SlideModule` does."""
    encode, tiles = encoder.encode, random_tiles(TILES)
    if boundary:
        cut = find_frozen_prefix(encoder)
        encode, tiles = cut.encode, FrozenPrefixTokens(cut.tokens, tiles, seed=1)
    encode, same = encoder.sized(encode, chunk), {"seed": 5, "device": CPU}
    z_TD, score_T, kept = encode_bag(encode, tiles.split(chunk), keep=1, **same)
    loss_of(z_TD, score_T).backward()
    grads = z_TD.grad, score_T.grad
    more = {"kept": kept, "score_weight": score_weight}
    adapt_bag(encode, tiles.split(chunk), *grads, **more, **same)


@pytest.mark.parametrize("tail", [True, False], ids=["tail", "whole block"])
@pytest.mark.parametrize("compile_", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("learns", ["all", "last 2", "last 2 behind a boundary"])
@pytest.mark.parametrize("chunk", [4, TILES])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_gradient(dtype, chunk, learns, recompute, compile_, tail):
    learns, _, boundary = learns.partition(" behind ")
    how = {"recompute": recompute, "compiled": compile_, "tail": tail}
    encoder = encoder_of(learns, dtype, **how)
    assert (encoder.tail is not None) == tail
    two_passes(encoder, chunk, bool(boundary))
    found = flat(p.grad for p in encoder.parameters())
    expected = one_graph(learns, dtype, tail=tail and dtype == torch.float32)
    assert expected.norm() > 0
    assert difference(found, expected) <= BOUND[dtype]


def test_in_float32_the_tail_is_as_near_to_the_truth_as_the_whole_block():
    """The same weights, in float64."""
    truth = one_graph("all", torch.float64)
    tail, whole = (one_graph("all", torch.float32, tail) for tail in (True, False))
    assert difference(tail, truth) <= 1.2 * difference(whole, truth) < 1e-5


def graph_of_copies(encoder, chunk):
    """Return the gradient of one graph, each chunk with its copies of the weights, in float64."""
    learn = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
    rows, copies = [], []
    for tiles in random_tiles(TILES).split(chunk):
        copies.append({n: p.detach().clone().requires_grad_() for n, p in learn.items()})
        rows.append(functional_call(encoder, copies[-1], (tiles,)))
    z_CD, score_C = zip(*rows, strict=True)
    loss_of(torch.cat(z_CD), torch.cat(score_C)).backward()
    return flat(sum(copy[name].grad.double() for copy in copies) for name in learn)


@pytest.mark.parametrize("tail", [True, False], ids=["tail", "whole block"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("learns", ["all", "last 2", "last 2 behind a boundary"])
@pytest.mark.parametrize("scheme", ["master", "residual", "offload"])
def test_gradient_of_bfloat16_weights(scheme, learns, recompute, tail):
    learns, _, boundary = learns.partition(" behind ")
    encoder = encoder_of(learns, torch.float32, recompute=recompute, tail=tail)
    weights = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = MasterAdamW([{"params": weights}], scheme)
    for parameter in encoder.parameters():  # frozen ones too
        parameter.data = parameter.data.bfloat16()
    expected = graph_of_copies(encoder, chunk=4)
    two_passes(encoder, 4, bool(boundary))
    found = flat(p.grad for p in optimizer.param_groups[0]["params"])
    assert difference(found, expected) <= BOUND[torch.float32]


def test_it_can_fail():
    """Without the score's share, or with gradients summed in bfloat16."""
    encoder = encoder_of("all", torch.float64)
    two_passes(encoder, 4, score_weight=0.9)
    found = flat(p.grad for p in encoder.parameters())
    assert difference(found, one_graph("all", torch.float64)) > 1e-4
    encoder = encoder_of("all", torch.float32).bfloat16()
    expected = graph_of_copies(encoder, chunk=4)
    two_passes(encoder, 4)
    assert difference(flat(p.grad for p in encoder.parameters()), expected) > 1e-4
