"""The tail is work skipped, never another answer: features, scores and all gradients are the whole
block's, to 1e-12 in float64, for every make of encoder and every strategy.

The reference is the same encoder with its last block as timm computes it.
"""

import copy

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tapfm.adapt.strategies import make_strategy
from tapfm.encoders.backbones import Backbone, Encoder, load
from tapfm.encoders.tail import TOLERANCE, ClsTail, disagreement
from tapfm.engine.frozen_prefix import find_frozen_prefix
from tests.adapt.test_adapt import CASES, FUSED_BIAS, MAKES, adapted, move
from tests.tiny import MAKES as ENCODERS
from tests.tiny import random_tiles, tiny_encoder

TILES = 3
RANDOM = {"init_values": 0.1}  # or LayerScale hides the block
EVA = {**RANDOM, **ENCODERS["rope"]}
FURTHER = {
    "SwiGLU unpacked": {"mlp_layer": SwiGLU, "mlp_ratio": 2},
    "norm in attention and MLP": {"scale_attn_norm": True, "scale_mlp_norm": True, **RANDOM},
    "q, k, v apart": {**EVA, "qkv_fused": False, "qkv_bias": True, "scale_attn_inner": True},
    "qkv bias apart": {**FUSED_BIAS, "qkv_bias_separate": True},
    "rope attention": {**EVA, "attn_type": "rope"},
    "gate": {**EVA, "gate": True},
    "SwiGLU in Eva": {**EVA, "swiglu_mlp": True},
    "depthwise rope": {**EVA, "rope_type": "mixed", "rope_rotate_half": False},
}
EVERY = {
    **{name: {"make": name} for name in ENCODERS if name != "cls+mean"},
    **MAKES,
    "Eva, bias": FUSED_BIAS,
    **{name: {"make": "1 prefix", **kwargs} for name, kwargs in FURTHER.items()},
}


def encoders(of, **extra):
    """Return two encoders with the same weights: one with the tail, one with the whole block."""
    kwargs = {**of, **extra}
    separate, gate = kwargs.pop("qkv_bias_separate", None), kwargs.pop("gate", None)
    pair = [tiny_encoder(**kwargs, tail=tail) for tail in (True, False)]
    for encoder in pair:
        if separate:
            encoder.vit.blocks[-1].attn.qkv_bias_separate = True
        if gate and not hasattr(encoder.vit.blocks[-1].attn, "gate"):
            pytest.skip(f"timm {timm.__version__} has none")
        if gate:  # no model of timm's asks for it
            encoder.vit.blocks[-1].attn.gate = nn.Linear(24, 24, dtype=torch.float64)
            nn.init.zeros_(encoder.vit.blocks[-1].attn.gate.weight)
            nn.init.zeros_(encoder.vit.blocks[-1].attn.gate.bias)
        move_all(encoder)
    return pair


def move_all(encoder):
    """Move norms, biases and scales away from 1 and 0."""
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in encoder.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter))


def answer(encoder, seed=None):
    """Return features, scores, and the gradients of the tiles and of all that learns."""
    encoder.zero_grad()
    tiles = random_tiles(TILES).double().requires_grad_()
    torch.manual_seed(seed or 0)
    z, score = encoder(tiles)
    draw = torch.Generator().manual_seed(1)
    weight_z, weight_s = (torch.randn(x.shape, generator=draw).to(x) for x in (z, score))
    ((z * weight_z).sum() + 30 * (score * weight_s).sum()).backward()
    found = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    return {"z": z, "score": score, "tiles": tiles.grad, **found}


def assert_same(found, expected, bound=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp_min(1e-30)
        assert error <= bound or value.norm() < 1e-12, f"{name}: {error:.1e}"


@pytest.mark.parametrize("of", EVERY)
def test_answers_are_the_whole_blocks(of):
    tail, whole = (encoder.eval() for encoder in encoders(EVERY[of]))
    assert tail.tail is not None, tail.no_tail
    assert whole.tail is None
    assert_same(answer(tail), answer(whole))


@pytest.mark.parametrize("make", [*MAKES, "Eva, bias"])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_whole_blocks_for_every_strategy(case, make):
    (tail, _), (whole, _) = (adapted(case, make, tail=tail) for tail in (True, False))
    assert tail.tail is not None
    assert_same(answer(tail.eval()), answer(whole.eval()))


def test_parity_can_fail():
    """Another token, or k of one token only, is another answer."""
    tail, whole = (encoder.eval() for encoder in encoders({"make": "5 prefix"}))
    tail.vit.blocks[-1].attn.attn_drop.register_forward_hook(lambda _m, _a, out: out.roll(1, 2))
    with pytest.raises(AssertionError, match="z:"):
        assert_same(answer(tail), answer(whole))


@pytest.mark.parametrize("make", ["5 prefix", "rope"])
def test_it_is_checked_on_the_cpu_whatever_the_default_device_is(make):
    """A benchmark makes its models under `with torch.device(...)`."""
    encoder = tiny_encoder(make)
    expected = disagreement(encoder.vit, encoder.tail)
    with torch.device("meta"):
        assert disagreement(encoder.vit, encoder.tail) == expected


def test_drop_path_draws_the_same():
    tail, whole = (e.train() for e in encoders({"make": "layerscale"}, drop_path_rate=0.5))
    expected = answer(whole, seed=3)
    assert_same(answer(tail, seed=3), expected)
    assert not torch.equal(answer(whole, seed=4)["z"], expected["z"])


def test_dropout_has_the_same_distribution():
    """Mean and deviation of each feature over many draws, within five standard errors."""
    noise = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "depth": 1, "fc_norm": False}
    pair = (e.train() for e in encoders({"make": "1 prefix"}, **noise))
    draws, rows = random_tiles(1).expand(4000, -1, -1, -1), []
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [encoder(draws)[0] for encoder in pair]
    (mean_a, std_a), (mean_b, std_b) = ((z.mean(0), z.std(0)) for z in rows)
    assert ((mean_a - mean_b).abs() < 5 * std_b * (2 / len(draws)) ** 0.5).all()
    assert ((std_a / std_b - 1).abs() < 0.12).all()
    assert std_b.min() > 0.01


@pytest.mark.parametrize("make", ["5 prefix", "swiglu", "rope"])
def test_recomputation_boundary_and_copies(make):
    tail, whole = encoders({"make": make}, recompute=True)
    for encoder in (tail, whole):
        make_strategy({"name": "last_n", "n": 2}).prepare(encoder.vit)
    expected = answer(whole)
    assert_same(answer(tail), expected)
    boundary, tiles = find_frozen_prefix(tail), random_tiles(TILES)
    z, score = boundary.encode(boundary.tokens(tiles))
    torch.testing.assert_close(z, expected["z"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(score, expected["score"], rtol=1e-12, atol=0)
    other = copy.deepcopy(tail)
    move(other, seed=9)
    assert_same(answer(tail), expected)
    assert not torch.allclose(answer(other)["z"], expected["z"])


def test_outside_the_encoder_the_model_is_timms_own():
    tail, whole = encoders({"make": "5 prefix"})
    tiles = random_tiles(TILES).double()
    for encoder in (tail, whole):
        encoder(tiles)
    assert torch.equal(tail.vit.forward_features(tiles), whole.vit.forward_features(tiles))
    assert tail.vit.state_dict().keys() == whole.vit.state_dict().keys()


@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
def test_in_bfloat16_it_is_as_near_to_the_truth_as_the_whole_block(precision):
    pair = encoders({"make": "5 prefix"})
    with torch.no_grad():
        truth = pair[1](random_tiles(8))
        for encoder in pair:
            encoder.float()
            if precision == "bf16-true":
                for parameter in encoder.parameters():
                    parameter.data = parameter.data.bfloat16()
        tail, whole = (encoder.encode(random_tiles(8), precision) for encoder in pair)
    assert tail[0].dtype == tail[1].dtype == torch.float32
    for ours, theirs, right in zip(tail, whole, truth, strict=True):
        assert (ours - right).norm() <= 1.2 * (theirs - right).norm()


def flops(work):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def test_work_that_is_left_counted_by_hand():
    """k, v of N tokens, one row of attention, and one token of everything else."""
    tail, whole = encoders({"make": "5 prefix"})
    tiles, n, d, hidden = random_tiles(1), 21, 24, 96
    kv, row, one = 2 * d * d * n, 2 * n * d, d * d + d * d + 2 * d * hidden  # multiply-adds
    every = 3 * d * d * n + 2 * n * n * d + d * d * n + 2 * d * hidden * n + n * d  # and the tap
    saved = flops(lambda: whole(tiles)) - flops(lambda: tail(tiles))
    assert saved == 2 * (every - kv - row - one)


class Other(Block):
    """A block with timm's interface that is not timm's."""


def test_another_make_takes_the_whole_block_and_says_why(monkeypatch, capsys):
    encoder = tiny_encoder()
    vit, row = timm.create_model("vit_tiny_patch16_224", num_classes=0), encoder.row
    vit.blocks[-1].__class__ = Other
    found = Encoder(vit, row)
    assert found.tail is None
    assert "Other is none of Block, EvaBlock" in found.no_tail
    found(torch.zeros(1, 3, 224, 224))
    assert tiny_encoder("cls+mean").no_tail == "the feature is cls+mean"
    assert load("demo_vit", "random").tail is not None
    assert "last block" not in capsys.readouterr().err
    monkeypatch.setattr("tapfm.encoders.tail.BLOCKS", ("EvaBlock",))
    assert load("demo_vit", "random").tail is None
    said = capsys.readouterr().err
    assert "demo_vit: the last block is computed for every token: Block is none of EvaBlo" in said


@pytest.mark.parametrize("fault", ["_scaled", "_project", "nan"])
def test_what_does_not_agree_is_refused_at_load(fault, monkeypatch):
    right = getattr(ClsTail, fault, None)

    def wrong_head(self, h):
        q, k, v = right(self, h)
        return q, k.roll(1, 1), v

    if fault == "_scaled":
        monkeypatch.setattr(ClsTail, fault, lambda self, n, x: 1.01 * right(self, n, x))
    elif fault == "_project":
        monkeypatch.setattr(ClsTail, fault, wrong_head)
    encoder = tiny_encoder("5 prefix", tail=False)
    if fault == "nan":
        nn.init.constant_(encoder.vit.norm.weight, torch.nan)
    found = Encoder(encoder.vit, encoder.row)
    assert found.tail is None
    assert f"more than {TOLERANCE:.0e}" in found.no_tail
    assert "forward" not in vars(found.vit.blocks[-1])


def test_loading_draws_no_random_numbers():
    vit = tiny_encoder(tail=False).vit
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    encoder = Encoder(vit, Backbone("tiny", "package", "", 24, 5, 0, "", tile_px=32))
    assert encoder.tail is not None
    assert encoder.training
    assert torch.equal(torch.rand(3), expected)
