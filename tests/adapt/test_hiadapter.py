"""HiAdapter's two parts against their formulas in plain torch; each tile is processed alone.

The contract that every strategy holds (start, gradients, checkpoint, counts) is in test_adapt.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tapfm.adapt.pixels import optical_density
from tapfm.adapt.strategies import StrategyError, make_strategy
from tapfm.encoders import backbones
from tests.tiny import random_tiles, tiny_encoder

SPEC = {"name": "hiadapter", "stages": 2, "reduction": 8}


def adapted(make="5 prefix", moved=True, **options):
    encoder = tiny_encoder(make).eval()
    make_strategy({**SPEC, **options}).prepare(encoder.vit)
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in encoder.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter += 0.1 * noise
    return encoder.eval()


def inputs_of_blocks(encoder, tiles):
    """Return the inputs of every block, behind the strategy's hooks."""
    seen, handles = [], []
    for block in encoder.vit.blocks:
        handles += [block.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))]
    encoder(tiles)
    for handle in handles:
        handle.remove()
    return seen


def attention(part, x, e):
    """The cross-attention by hand, head by head."""
    q, k, v, width = part.q(x), part.k(e), part.v(e), part.out.in_features
    out = []
    for head in range(8):
        at = slice(head * width // 8, (head + 1) * width // 8)
        logits = q[..., at] @ k[..., at].transpose(1, 2) / (width // 8) ** 0.5
        out.append(logits.softmax(-1) @ v[..., at])
    return part.out(torch.cat(out, -1))


@pytest.mark.parametrize("width", [0, 16])
@pytest.mark.parametrize("make", ["1 prefix", "5 prefix", "9 prefix", "rope"])
def test_stain_part_is_the_formula(make, width):
    tiles = random_tiles(3)
    (x, *_) = inputs_of_blocks(tiny_encoder(make).eval(), tiles)
    encoder = adapted(make, parts=["stain"], width=width)
    part, vit = encoder.vit.stain_adapter, encoder.vit

    e = optical_density(tiles.double() / 255)
    for conv, norm in ((0, 1), (3, 4), (6, 7)):
        stride = 4 if conv == 0 else 2
        e = F.conv2d(e, part.stem[conv].weight, stride=stride, padding=1)
        e = F.gelu(F.group_norm(e, part.stem[norm].num_groups, part.stem[norm].weight,
                                part.stem[norm].bias))  # fmt: skip
    e = F.layer_norm(e.flatten(2).mT, e.shape[1:2], part.stem_norm.weight, part.stem_norm.bias)
    assert e.shape == (3, 4, width or 24)  # 32 px in steps of 16

    a = attention(part.attend, part.narrow(x), e)
    a = F.layer_norm(part.widen(a), (24,), part.norm.weight, part.norm.bias)
    w1, _, w2, _ = part.tile_gate
    g = (w2(w1(torch.cat([a.max(1).values, x.mean(1)], 1)).clamp(min=0))).sigmoid()
    u1, _, u2, _ = part.channel_gate
    c = u2(u1(a).clamp(min=0)).sigmoid()
    expected = x + (1 - g)[:, None] * c * a
    found = inputs_of_blocks(encoder, tiles)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # colours are float32
    assert (found - x)[:, : vit.num_prefix_tokens].abs().max() > 1e-2, "CLS and registers look too"


@pytest.mark.parametrize("make", ["1 prefix", "5 prefix", "9 prefix", "rope"])
def test_morphology_part_is_the_formula_and_spares_the_prefix(make):
    tiles = random_tiles(3)
    plain = tiny_encoder(make).eval()
    encoder = adapted(make, parts=["morphology"], stages=3, stains=["haematoxylin", "dab"])
    part, prefix = encoder.vit.morphology_adapter, encoder.vit.num_prefix_tokens
    maps = part.maps(optical_density(tiles.double() / 255))
    outs = []  # what the block in front hands on
    for block in encoder.vit.blocks:
        block.register_forward_hook(lambda _m, _a, out: outs.append(out))
    found = inputs_of_blocks(encoder, tiles)
    before = [inputs_of_blocks(plain, tiles)[0], *outs[:2]]
    for stage in range(3):
        told = 0
        for m in range(2):
            patches = F.unfold(maps[:, m : m + 1].repeat(1, 3, 1, 1), 8, stride=8).mT
            p = patches @ part.embed.weight.flatten(1).T + part.embed.bias
            linear = part.tune[stage][m]
            told = told + F.gelu(p @ linear.weight.T + linear.bias)
        told = told @ part.up.weight.T + part.up.bias
        assert torch.equal(found[stage][:, :prefix], before[stage][:, :prefix])
        expected = before[stage][:, prefix:] + told
        torch.testing.assert_close(found[stage][:, prefix:], expected, rtol=1e-6, atol=1e-7)
        assert told.abs().min() > 0


def test_stages_stand_evenly():
    """The paper's 0, 6, 12 and 18 of 24."""
    with torch.device("meta"):
        vit = backbones.build(backbones.find("uni"))
        make_strategy({"name": "hiadapter", "parts": ["morphology"]}).prepare(vit)
    assert [i for i, b in enumerate(vit.blocks) if b._forward_pre_hooks] == [0, 6, 12, 18]


@pytest.mark.parametrize(("parts", "there"), [(["stain"], (1, 0)), (["morphology"], (0, 1))])
def test_parts_are_switched_apart(parts, there):
    vit = adapted(parts=parts).vit
    assert (hasattr(vit, "stain_adapter"), hasattr(vit, "morphology_adapter")) == there
    plain, both = tiny_encoder().eval()(random_tiles(2))[0], adapted()(random_tiles(2))[0]
    alone = adapted(parts=parts)(random_tiles(2))[0]
    assert (alone - plain).abs().max() > 1e-3 < (alone - both).abs().max()


@pytest.mark.parametrize("make", ["5 prefix", "rope"])
def test_a_tile_never_depends_on_its_neighbours(make):
    encoder, tiles = adapted(make), random_tiles(3)
    together = encoder(tiles)
    alone = [torch.cat(each) for each in zip(*(encoder(t[None]) for t in tiles), strict=True)]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_colour_reaches_the_feature_through_the_adapter():
    """The stain of a tile is seen by both parts, whose frozen encoder is blind to it."""
    for parts in (["stain"], ["morphology"]):
        encoder = adapted(parts=parts)
        with torch.no_grad():
            encoder.vit.patch_embed.proj.weight.zero_()
        tiles = random_tiles(2)
        z = encoder(tiles)[0]
        assert (z[0] - z[1]).abs().max() > 1e-6
        blind = tiny_encoder().eval()
        with torch.no_grad():
            blind.vit.patch_embed.proj.weight.zero_()
        torch.testing.assert_close(*blind(tiles)[0], rtol=0, atol=1e-12)


def test_its_noise_is_found_where_noise_is_looked_for():
    """Chunks are halved when memory runs out only where no module has a dropout of its own."""
    found = [m.p for m in adapted().modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert found == [0.1]
    encoder, tiles = adapted().train(), random_tiles(2)
    assert (encoder(tiles)[0] - encoder(tiles)[0]).abs().max() > 1e-4
    assert torch.equal(encoder.eval()(tiles)[0], encoder(tiles)[0])


def test_nothing_of_the_tile_is_kept():
    encoder = adapted()
    encoder(random_tiles(2))
    assert encoder.vit.stain_adapter.seen_CEW is None
    assert encoder.vit.morphology_adapter.seen_MCnR == ()


@pytest.mark.parametrize(
    ("key", "paper", "lean"), [("virchow2", 18.09e6, 2.61e6), ("uni2_h", 25.88e6, 3.00e6)]
)
def test_counts_at_other_widths(key, paper, lean):
    for width, expected in ((0, paper), (256, lean)):
        with torch.device("meta"):
            vit = backbones.build(backbones.find(key))
            make_strategy({"name": "hiadapter", "parts": ["stain"], "width": width}).prepare(vit)
        found = sum(p.numel() for p in vit.parameters() if p.requires_grad)
        assert found == pytest.approx(expected, rel=2e-3)


def test_what_cannot_carry_it_is_refused():
    with pytest.raises(StrategyError, match=r"4 stages and the model has 3 blocks. Give 3 or"):
        make_strategy("hiadapter").prepare(tiny_encoder().vit)
    vit = tiny_encoder(embed_dim=36).vit
    with pytest.raises(StrategyError, match=r"width 36 cannot be split into 8 heads. Give"):
        make_strategy(SPEC).prepare(vit)
    make_strategy({**SPEC, "width": 16}).prepare(vit)
    swin = nn.Module()
    swin.layers = nn.ModuleList()
    for name in ("hiadapter", "pathotune"):
        with pytest.raises(StrategyError, match=rf"{name} needs a ViT with a CLS token.*Module"):
            make_strategy(name).prepare(swin)
