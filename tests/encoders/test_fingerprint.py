"""A fingerprint depends on what an encoder computes, and on nothing else."""

import torch

from tapfm.encoders.backbones import Encoder, build, find, load
from tapfm.encoders.fingerprint import fingerprint, known_tiles, state_fingerprint
from tapfm.slide_model.plain_encoder import load_encoder
from tests.tiny import tiny_encoder


def test_fingerprint_is_of_the_weights_and_not_of_the_arithmetic():
    first = fingerprint(tiny_encoder(seed=0).eval())
    assert first == fingerprint(tiny_encoder(seed=0).eval())
    assert first != fingerprint(tiny_encoder(seed=1).eval())
    unfused = tiny_encoder(seed=0).eval()
    for block in unfused.vit.blocks:
        block.attn.fused_attn = False
    assert first == fingerprint(unfused)
    changed = tiny_encoder(seed=0).eval()
    with torch.no_grad():
        changed.vit.blocks[1].mlp.fc1.weight *= 1.01
    assert first != fingerprint(changed)


def test_fingerprint_is_taken_in_float64():
    """In float32, a number near the edge of rounding would differ between machines."""
    encoder = tiny_encoder(dtype=torch.float32).eval()
    fingerprint(encoder)
    assert {p.dtype for p in encoder.parameters()} == {torch.float64}


def test_fingerprint_tells_normalisation():
    """Another mean must show."""
    row = find("demo_vit")
    torch.manual_seed(0)
    vit = build(row).eval()
    encoder = Encoder(vit, row)
    first = fingerprint(encoder)
    encoder.mean += 1
    assert fingerprint(encoder) != first


def test_known_tiles_are_the_same_everywhere():
    tiles = known_tiles(2, 113)
    assert tiles.shape == (2, 3, 113, 113)
    assert tiles.dtype == torch.uint8
    assert not torch.equal(tiles[0], tiles[1])
    assert tiles[0, 0, 0, :3].tolist() == [64, 64, 64]
    x, y = 50, 31  # by hand: (2500 + 3 * 961 + 2 * 1550) // 61 + 37 = 176, 176 % 128 = 48
    assert tiles[0, 1, y, x] == 48 + 64 + 64 * ((50 // 16 + 31 // 16) % 2)


def test_of_plain_weights_at_the_tile_size_they_are_for():
    """It equals the loaded model's; weights and random state do not change."""
    row, vit = find("demo_vit"), load("demo_vit", tile_px=48).vit
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    found = state_fingerprint(row, vit.state_dict(), 48)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    assert found == fingerprint(load("demo_vit", tile_px=48).eval())
    assert found != fingerprint(load("demo_vit").eval())


def test_the_feature_shows():
    joined = fingerprint(load("demo-vit-cls-mean").eval())
    assert joined != fingerprint(load("demo-vit").eval())


def test_an_encoder_that_was_named_is_as_it_was():
    """The encoder is turned to float64 and back; its weights come back bit for bit."""
    encoder, _, name = load_encoder("demo_vit")
    plain = load("demo_vit").eval()
    assert name == fingerprint(load("demo_vit").eval())
    for (key, ours), theirs in zip(
        encoder.state_dict(keep_vars=True).items(), plain.state_dict().values(), strict=True
    ):
        assert ours.dtype == theirs.dtype, key
        assert torch.equal(ours, theirs), key
    assert encoder.mean.dtype == torch.float32
    assert torch.equal(encoder.mean, plain.mean)
