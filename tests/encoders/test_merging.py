"""Merged tokens: the published algorithm; exact where patches are equal, in chunks, recomputed."""

import copy

import numpy as np
import pytest
import torch

from slides.errors import SettingsError
from tapfm.adapt.strategies import make_strategy
from tapfm.encoders.merging import TokenMerging, match, merge, merging_block
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.engine.frozen_prefix import find_frozen_prefix
from tapfm.slide_model.aggregators import make_aggregator
from tapfm.tasks.losses import MaskedBCE
from tests.bags import tile_set
from tests.tiny import random_tiles, tiny_encoder, tiny_swin

C, PREFIX, PATCHES, D, R = 3, 5, 11, 6, 4
TILES = 7


def merging_encoder(make="5 prefix", count=3, **how):
    encoder = tiny_encoder(make, **how).train()
    encoder.merging = TokenMerging(encoder, count, how.get("recompute", False))
    return encoder


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x_ND, size_N, key_NE):
    """Return tokens and sizes of one tile in numpy: one pair after the other."""
    patches, size, key = x_ND[PREFIX:], size_N[PREFIX:], key_NE[PREFIX:]
    key = key / np.linalg.norm(key, axis=1, keepdims=True)
    a, b = range(0, PATCHES, 2), range(1, PATCHES, 2)
    best = {i: max(b, key=lambda j: key[i] @ key[j]) for i in a}
    gone = sorted(a, key=lambda i: -(key[i] @ key[best[i]]))[:R]
    merged = {j: (patches[j] * size[j], size[j]) for j in b}
    for i in gone:
        total, weight = merged[best[i]]
        merged[best[i]] = (total + patches[i] * size[i], weight + size[i])
    stay = [i for i in a if i not in gone]
    tokens = [*x_ND[:PREFIX], *patches[stay], *(total / w for total, w in merged.values())]
    return np.stack(tokens), np.array(
        [*size_N[:PREFIX], *size[stay], *(w for _, w in merged.values())]
    )


def test_a_merge_by_hand():
    x, key = drawn(C, PREFIX + PATCHES, D), drawn(C, PREFIX + PATCHES, 4, seed=1)
    size = drawn(C, PREFIX + PATCHES, seed=2).abs() + 1
    tokens, sizes = merge(x, size, key, PREFIX, R)
    assert tokens.shape == (C, PREFIX + PATCHES - R, D)
    for c in range(C):
        expected, weights = by_hand(*(each[c].numpy() for each in (x, size, key)))
        np.testing.assert_allclose(tokens[c], expected, atol=1e-12)
        np.testing.assert_allclose(sizes[c], weights, atol=1e-12)
    assert torch.equal(tokens[:, :PREFIX], x[:, :PREFIX]), "CLS and registers are protected"


def test_sums_are_kept_and_half_the_tokens_is_the_most():
    x, key = drawn(C, PREFIX + PATCHES, D), drawn(C, PREFIX + PATCHES, 4, seed=1)
    size = torch.ones(C, PREFIX + PATCHES, dtype=torch.float64)
    tokens, sizes = merge(x, size, key, PREFIX, 99)
    assert tokens.shape[1] == PREFIX + PATCHES - PATCHES // 2
    torch.testing.assert_close((tokens * sizes[..., None]).sum(1), x.sum(1))
    assert merge(x, size, key, PREFIX, 0)[0] is x


def test_equal_patches_are_merged_and_nothing_changes():
    """Trap: without log(size) in the attention, a merged token has the weight of one patch."""
    encoder = merging_encoder(count=PATCHES // 2)
    block, tap = encoder.vit.blocks[0], encoder.tap
    del block.forward
    x = drawn(C, PREFIX + PATCHES - 1, 24)
    x[:, PREFIX + 1 :: 2] = x[:, PREFIX::2]  # of each pair both are equal
    size = torch.ones(x.shape[:2], dtype=torch.float64)
    tokens, sizes = merging_block(block, PREFIX, PATCHES // 2, x, size)
    assert sizes[0].tolist() == [1] * PREFIX + [2] * (PATCHES // 2)
    whole = block(x)
    torch.testing.assert_close(tokens[:, :PREFIX], whole[:, :PREFIX], atol=1e-12, rtol=0)
    second, last = encoder.vit.blocks[1], encoder.vit.blocks[-1]
    del second.forward
    mask = sizes.log()[:, None, None]
    expected = second(whole)[:, 0]
    torch.testing.assert_close(second(tokens, attn_mask=mask)[:, 0], expected, atol=1e-12, rtol=0)
    assert (second(tokens)[:, 0] - expected).abs().max() > 1e-3
    found = []
    ways = ((whole, size, False), (tokens, sizes, True), (tokens, sizes, False))
    for tokens_CND, size_CN, on in ways:
        encoder.merging.size_CN, encoder.tail.on = size_CN, on
        last(tokens_CND)
        found.append(tap.take_score())
    for score in found[1:]:
        torch.testing.assert_close(score, found[0], atol=1e-12, rtol=0)


def loss_of(z_TD, score_T):
    torch.manual_seed(7)
    aggregator = make_aggregator("tapfm_gated", z_TD.shape[1], 2).double()
    return MaskedBCE([1.0, 2.0])(
        aggregator(tile_set(z_TD, score_T)).logits_K, torch.tensor([1.0, 0])
    )


def gradients(encoder):
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("make", ["5 prefix", "layerscale", "qk norm", "cls+mean"])
def test_the_gradient_of_two_passes_is_that_of_one_graph(make, recompute):
    tiles, whole = random_tiles(TILES), merging_encoder(make)
    z_TD, score_T = whole(tiles)
    loss_of(z_TD, score_T).backward()
    encoder = merging_encoder(make, recompute=recompute)
    device = torch.device("cpu")
    leaf_z, leaf_score, kept = encode_bag(encoder, tiles.split(3), seed=0, device=device, keep=1)
    torch.testing.assert_close(leaf_z, z_TD, atol=1e-12, rtol=0)
    loss_of(leaf_z, leaf_score).backward()
    adapt_bag(
        encoder, tiles.split(3), leaf_z.grad, leaf_score.grad, seed=0, device=device, kept=kept
    )
    expected = gradients(whole)
    assert ((gradients(encoder) - expected).norm() / expected.norm()).item() < 1e-12


@pytest.mark.parametrize("make", ["5 prefix", "cls+mean"])
def test_features_change_and_a_copy_merges_as_its_original(make):
    tiles, encoder = random_tiles(TILES), merging_encoder(make)
    z_TD, score_T = encoder(tiles)
    plain_z, plain_score = tiny_encoder(make).train()(tiles)
    assert (z_TD - plain_z).abs().max() > 1e-6
    assert (score_T - plain_score).abs().max() > 1e-9
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        encoder.vit.blocks[0].attn.qkv.weight.zero_()
    assert torch.equal(twin(tiles)[0], z_TD)


def test_the_tail_gives_what_the_whole_block_gives():
    tiles = random_tiles(TILES)
    with_tail, without = (merging_encoder(tail=tail)(tiles) for tail in (True, False))
    for one, other in zip(with_tail, without, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_matching_is_of_each_tile_by_itself_and_without_a_graph():
    key = drawn(C, PATCHES, 4).requires_grad_()
    together = match(key, R)
    for c in range(C):
        alone = match(key[c : c + 1], R)
        assert all(
            torch.equal(one[c : c + 1], other) for one, other in zip(together, alone, strict=True)
        )
    assert not any(each.requires_grad for each in together)


def test_where_it_cannot_be_done_it_is_refused():
    for encoder, said in (
        (tiny_encoder("rope"), "needs a plain ViT with a CLS token; tiny is a Eva"),
        (tiny_swin(), "needs a plain ViT with a CLS token"),
        (tiny_encoder(compiled=True), "does not go together with model.compile"),
    ):
        with pytest.raises(SettingsError, match=f"model.merge_tokens 3 {said}"):
            TokenMerging(encoder, 3)
    encoder = merging_encoder()
    make_strategy({"name": "vpt_deep"}).prepare(encoder.vit)
    with pytest.raises(SettingsError, match="strategy vpt_deep adds to tokens by their place"):
        encoder.merging.check("vpt_deep")
    encoder = merging_encoder()
    make_strategy({"name": "last_n", "n": 1}).prepare(encoder.vit)
    encoder.merging.check("last_n")
    assert find_frozen_prefix(encoder) is None
