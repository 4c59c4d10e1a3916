"""Traps of mixed precision: what the naive version does wrong, and that ours does not.

Sums of bfloat16 gradients and updates too small for bfloat16 have theirs in test_master_weights.py.
"""

import pytest
import torch
from torch import nn

from tapfm.cli import main
from tapfm.engine.dither import dither
from tapfm.slide_model.aggregators import make_aggregator
from tests.bags import tile_set
from tests.cohorts import write_cohort
from tests.tiny import random_tiles, tiny_encoder


def moved(encoder):
    """Change all weights in place, as an optimizer does."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.ones_like(parameter))


def test_casts_do_not_outlive_an_update():
    """Autocast keeps the casts of a region's weights, also when the weights have changed."""
    tiles = random_tiles(2)
    encoder, fresh = (tiny_encoder(dtype=torch.float32) for _ in range(2))
    moved(fresh)
    after, _ = fresh.encode(tiles, "bf16")

    before, _ = encoder.encode(tiles, "bf16")
    moved(encoder)
    ours, _ = encoder.encode(tiles, "bf16")
    assert torch.equal(ours, after)
    assert not torch.equal(ours, before)

    naive = tiny_encoder(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        naive(tiles)
        moved(naive)
        stale, _ = naive(tiles)
    assert not torch.equal(stale, after), "torch would have mended it, and this were needless"


def test_the_trainers_own_mixed_precision_is_refused(tmp_path, capsys):
    """It would be one autocast region around both passes and the update between them."""
    fit = ["fit", "--config", str(write_cohort(tmp_path)), "--trainer.precision", "bf16-mixed"]
    assert main(fit) == 2
    assert "set model.precision: bf16" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
def test_score_head_and_loss_are_fp32(precision):
    encoder = tiny_encoder(dtype=torch.float32)
    if precision == "bf16-true":
        for parameter in encoder.parameters():
            parameter.data = parameter.data.bfloat16()
    z_TD, score_T = encoder.encode(random_tiles(6), precision)
    assert z_TD.dtype == score_T.dtype == torch.float32
    output = make_aggregator("tapfm", encoder.dim, 2)(tile_set(z_TD, score_T))
    logits_K, weights_T = output.logits_K, output.weights_T
    assert logits_K.dtype == weights_T.dtype == torch.float32
    assert weights_T.sum().item() == pytest.approx(1, abs=1e-6)


def test_the_score_keeps_what_tells_tiles_apart():
    """They differ in the third digit of the prefix mass, where 1 - mass in bfloat16 has none."""
    mass_T = torch.linspace(0.0100, 0.0108, 5)
    score = make_aggregator("tapfm", 4, 1)
    z_TD = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    weights_T = score(tile_set(z_TD, -mass_T)).weights_T
    assert len(weights_T.unique()) == 5
    naive_T = score(tile_set(z_TD, (1 - mass_T).bfloat16().float())).weights_T
    assert len(naive_T.unique()) < 5


def test_buffers_stay_fp32_where_weights_do_not():
    """RoPE's angles, and the mean and deviation of the pixels."""
    from tapfm.slide_model.model import ModelConfig, SlideModel

    model_config = ModelConfig("demo_vit", "tapfm", ("A",), 32, 0.5, precision="bf16-true")
    model = SlideModel(model_config, tiny_encoder("rope", dtype=torch.float32))
    model.round_weights()
    assert {p.dtype for p in model.encoder.parameters()} == {torch.bfloat16}
    buffers = [b for b in model.encoder.buffers() if b.is_floating_point()]
    assert buffers
    assert {b.dtype for b in buffers} == {torch.float32}
    assert all(p.dtype == torch.float32 for p in model.aggregator.parameters())
    assert isinstance(model.aggregator.head, nn.Linear)


def jump(encoder, size):
    """Return how far features move if every weight moves by `size`, each in its gradient's
    direction.
    """
    tiles, signs = random_tiles(4), torch.Generator().manual_seed(1)
    with torch.no_grad():
        before, _ = encoder.encode(tiles, "bf16")
        for parameter in encoder.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=signs).sign())
        after, _ = encoder.encode(tiles, "bf16")
    return float((after - before).norm())


def stored_as(dtype):
    encoder = tiny_encoder(dtype=torch.float32)
    for parameter in encoder.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return encoder


def test_weights_stored_in_float16_do_not_jump_at_the_first_update():
    """A weight in eight lies between two bfloat16 numbers, and any update rounds it anew."""
    naive = jump(stored_as(torch.float16), 1e-8)
    assert naive > 0.3 * jump(stored_as(torch.float16), 1e-5), "else this file were needless"
    ours = stored_as(torch.float16)
    assert dither(ours.parameters()) > 10_000
    assert jump(ours, 1e-8) < 0.4 * naive, "a weight or two cross, and bfloat16's own noise"
    assert jump(ours, 1e-5) > 0.2 * naive


def test_dither_stays_within_what_was_stored_and_leaves_the_rest():
    half, ours = stored_as(torch.float16), stored_as(torch.float16)
    dither(ours.parameters())
    for before, after in zip(half.parameters(), ours.parameters(), strict=True):
        assert torch.equal(after == 0, before == 0)
        if not torch.equal(before, before.bfloat16().float()):
            assert torch.isclose(after.half().float(), before, rtol=2**-10, atol=2**-24).all()
            assert (after.half().float() == before).float().mean() > 0.99
            assert not torch.equal(after, before)
    again = stored_as(torch.float16)
    dither(again.parameters())
    for one, other in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), "the same every time, in every process"
    for untouched in (tiny_encoder(dtype=torch.float32), stored_as(torch.bfloat16)):
        assert dither(untouched.parameters()) == 0
