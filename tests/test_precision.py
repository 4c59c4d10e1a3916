"""Traps of mixed precision: what the naive version does wrong, and that ours does not.

Sums of bfloat16 gradients and updates too small for bfloat16 have theirs in test_masters.py.
"""

import pytest
import torch
from cohorts import write_cohort
from tiny import random_tiles, tiny_encoder
from torch import nn

from tapfm.aggregators import make_aggregator
from tapfm.cli import main


def moved(encoder):
    """All weights changed in place, as an optimizer changes them."""
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
    """It is one such region around both passes and the update between them."""
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
    logits_K, weights_T = make_aggregator("tapfm", encoder.dim, 2, None)(z_TD, score_T)
    assert logits_K.dtype == weights_T.dtype == torch.float32
    assert weights_T.sum().item() == pytest.approx(1, abs=1e-6)


def test_the_score_keeps_what_tells_tiles_apart():
    """They differ in the third digit of the prefix mass, where 1 - mass in bfloat16 has none."""
    mass_T = torch.linspace(0.0100, 0.0108, 5)
    score = make_aggregator("tapfm", 4, 1, None)
    z_TD = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    _, weights_T = score(z_TD, -mass_T)
    assert len(weights_T.unique()) == 5
    _, naive_T = score(z_TD, (1 - mass_T).bfloat16().float())
    assert len(naive_T.unique()) < 5


def test_buffers_stay_fp32_where_weights_do_not():
    """RoPE's angles, and the mean and deviation of the pixels."""
    from tapfm.model import Recipe, SlideModel

    recipe = Recipe("demo_vit", "tapfm", ("A",), 32, 0.5, precision="bf16-true")
    model = SlideModel(recipe, tiny_encoder("rope", dtype=torch.float32))
    model.round_weights()
    assert {p.dtype for p in model.encoder.parameters()} == {torch.bfloat16}
    buffers = [b for b in model.encoder.buffers() if b.is_floating_point()]
    assert buffers
    assert {b.dtype for b in buffers} == {torch.float32}
    assert all(p.dtype == torch.float32 for p in model.aggregator.parameters())
    assert isinstance(model.aggregator.head, nn.Linear)
