"""Frozen blocks in front of the first that learns are computed once; nothing else changes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tapfm.adapt.strategies import make_strategy
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.engine.frozen_prefix import FrozenPrefix, FrozenPrefixTokens, find_frozen_prefix
from tests.tiny import MAKES, random_tiles, tiny_encoder

CPU = torch.device("cpu")
TILES, CHUNK = 7, 3


def encoder_of(make, n=1, **extra):
    encoder = tiny_encoder(make, **extra)
    make_strategy({"name": "last_n", "n": n}).prepare(encoder.vit)
    return encoder


def two_passes(encode, tiles, seed=5):
    """Gradients of a slide, features and scores, with one chunk's graph kept."""
    z, score, kept = encode_bag(encode, tiles.split(CHUNK), seed=seed, device=CPU, keep=1)
    draw = torch.Generator().manual_seed(0)
    grads = [torch.randn(each.shape, dtype=each.dtype, generator=draw) for each in (z, score)]
    adapt_bag(encode, tiles.split(CHUNK), *grads, seed=seed, device=CPU, kept=kept)
    return z, score


def gradients(encoder):
    return {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("make", MAKES)
def test_features_scores_and_gradients_are_those_of_the_whole_encoder(make, n, recompute):
    whole, cut = (encoder_of(make, n, recompute=recompute) for _ in range(2))
    tiles = random_tiles(TILES)
    expected = two_passes(whole.encode, tiles)
    boundary = find_frozen_prefix(cut)
    assert boundary.first == 3 - n
    found = two_passes(boundary.encode, FrozenPrefixTokens(boundary.tokens, tiles, seed=1))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    assert gradients(whole).keys() == gradients(cut).keys()
    for name, gradient in gradients(whole).items():
        assert torch.equal(gradient, gradients(cut)[name]), name


def test_a_tile_costs_one_forward_of_the_frozen_part():
    """(1 + 3 n / L) forwards of blocks; the whole encoder twice without the boundary."""
    tiles, flops = random_tiles(TILES), {}
    encoder = encoder_of("5 prefix", depth=6, n=2, tail=False)  # all blocks alike
    boundary = find_frozen_prefix(encoder)

    def count(work):
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    with torch.no_grad():
        flops["whole"] = count(lambda: encoder.encode(tiles))
        tokens = boundary.tokens(tiles)
        flops["front"] = count(lambda: boundary.tokens(tiles))
        flops["behind"] = count(lambda: boundary.encode(tokens))
    assert flops["front"] + flops["behind"] == flops["whole"]
    assert flops["behind"] / flops["whole"] == pytest.approx(
        2 / 6, rel=0.08
    )  # patches are in front

    def passes(encode, tiles):
        z, score, _ = encode_bag(encode, tiles.split(CHUNK), seed=0, device=CPU)
        ones = torch.ones_like(z), torch.ones_like(score)
        return lambda: adapt_bag(encode, tiles.split(CHUNK), *ones, seed=0, device=CPU)

    kept = FrozenPrefixTokens(boundary.tokens, tiles, seed=0)
    again = count(passes(boundary.encode, kept))
    assert flops["behind"] < again < 3.07 * flops["behind"]
    assert count(passes(encoder.encode, tiles)) == flops["front"] + again
    assert count(passes(boundary.encode, FrozenPrefixTokens(boundary.tokens, tiles, 0, 0.0))) == (
        flops["front"] + again
    ), "without room nothing is kept, and it is computed again"


def test_noise_in_front_of_the_boundary_is_the_same_in_both_passes():
    """Drop-path in the frozen blocks draws the same with no room and with room for one chunk."""
    results = []
    for budget in (8.0, 0.0, 1.5e-5):
        encoder = encoder_of("5 prefix", drop_path_rate=0.5).train()
        boundary = find_frozen_prefix(encoder)
        torch.manual_seed(len(results))  # the global generator has no part in it
        tokens = FrozenPrefixTokens(boundary.tokens, random_tiles(TILES), seed=1, budget_gib=budget)
        z, _ = two_passes(boundary.encode, tokens)
        results.append((len(tokens.kept), z, gradients(encoder)))
    assert [kept for kept, _, _ in results] == [3, 0, 1]
    for _, z, grads in results[1:]:
        assert torch.equal(z, results[0][1])
        assert all(torch.equal(grads[name], results[0][2][name]) for name in grads)


def test_an_encoder_that_cannot_be_split_is_said_to_be_computed_twice(monkeypatch, capsys):
    monkeypatch.setattr(FrozenPrefix, "agrees", lambda self: False)
    assert find_frozen_prefix(encoder_of("5 prefix")) is None
    assert "the 2 frozen blocks in front are computed in both passes" in capsys.readouterr().out


def test_random_numbers_of_the_device_that_computes_are_put_back(monkeypatch):
    """Tiles lie on the host; what `make` draws, it draws where the encoder is."""
    from tapfm.engine import frozen_prefix

    seeded, real = [], frozen_prefix.chunk_rng

    def noting(seed, number, device):
        seeded.append(device)
        return real(seed, number, CPU)

    monkeypatch.setattr(frozen_prefix, "chunk_rng", noting)
    there = torch.device("cuda", 0)
    tokens = FrozenPrefixTokens(lambda tiles: tiles.float(), random_tiles(4), 1, device=there)
    list(tokens.split(2))
    assert seeded == [there, there]


def test_smaller_chunks_start_anew():
    encoder = encoder_of("5 prefix")
    boundary = find_frozen_prefix(encoder)
    tokens = FrozenPrefixTokens(boundary.tokens, random_tiles(TILES), seed=1)
    assert [len(each) for each in tokens.split(4)] == [4, 3]
    assert [len(each) for each in tokens.split(2)] == [2, 2, 2, 1]
    assert len(tokens.kept) == 4


@pytest.mark.parametrize("strategy", ["full", "lora", "bitfit", "norm_only", "vpt_deep"])
def test_there_is_none_where_the_first_block_learns(strategy):
    encoder = tiny_encoder()
    make_strategy(strategy).prepare(encoder.vit)
    assert find_frozen_prefix(encoder) is None


def test_an_encoder_of_another_shape_is_left_whole(monkeypatch):
    """The check that decides it is of the features themselves."""
    encoder = encoder_of("5 prefix")
    assert find_frozen_prefix(encoder)
    encoder.vit.norm.register_forward_pre_hook(lambda _norm, args: (args[0] * 2,))
    assert find_frozen_prefix(encoder), "hooks of modules run in both"
    monkeypatch.setattr(FrozenPrefix, "tokens", lambda self, tiles: torch.zeros(1, 21, 24).double())
    assert find_frozen_prefix(encoder) is None
