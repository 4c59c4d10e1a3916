"""The contract of every strategy, tested on four kinds of encoder.

The listed parameters are those that learn; the first output is the base encoder's (or the stated
start); the two passes give the one-graph gradient; a checkpoint holds the trained parameters and
restores them; the merged export is the adapted model. A new strategy is a row of `CASES`.
"""

import copy
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tapfm.adapt.parameter_groups import layerwise, parameter_groups
from tapfm.adapt.strategies import (
    STRATEGIES,
    StrategyError,
    make_optimizer,
    make_strategy,
    strategy_spec,
)
from tapfm.adapt.strategies.pathotune import vectors_to_text
from tapfm.encoders import backbones
from tapfm.slide_model import model as models
from tapfm.training.module import StrategyName
from tests.bags import bag_of
from tests.engine.test_chunked import Slide, bytes_of_pass_2, difference, saved_bytes
from tests.tiny import random_tiles, tiny_encoder, tiny_swin

MAKES = {
    "plain": {"make": "1 prefix"},
    "registers, SwiGLU": {"make": "swiglu", "reg_tokens": 4},
    "q/k norm": {"make": "qk norm"},
    "Eva, RoPE": {"make": "rope", "init_values": 0.1},  # a LayerScale through which changes show
}
FUSED_BIAS = {
    **MAKES["Eva, RoPE"],
    "arch": "vit_small_patch16_dinov3_qkvb",
}  # qkv is never called there
TEXT = vectors_to_text(np.random.default_rng(0).standard_normal((2, 7)).astype("float32"))
CASES = {
    "full": {"name": "full"},
    "full, decay": {"name": "full", "layer_decay": 0.5},
    "last_n": {"name": "last_n", "n": 2},
    "bitfit": {"name": "bitfit"},
    "norm_only": {"name": "norm_only"},
    "lora": {"name": "lora", "rank": 2, "dropout": 0.2},
    "lora, q v": {"name": "lora", "rank": 2, "targets": ["q", "v", "proj", "mlp"], "last": 2},
    "dora": {"name": "dora", "rank": 2, "dropout": 0.2},
    "dora, q v": {"name": "dora", "rank": 2, "targets": ["q", "v", "mlp"]},
    "olora": {"name": "olora", "rank": 2, "room": 5},
    "vpt_deep": {"name": "vpt_deep", "n": 3},
    "adaptformer": {"name": "adaptformer", "width": 5},
    "ssf": {"name": "ssf"},
    "hiadapter": {"name": "hiadapter", "stages": 2, "reduction": 8},
    "hiadapter, lean": {"name": "hiadapter", "stages": 3, "width": 16, "stains": ["dab"]},
    "pathotune": {"name": "pathotune", "n": 3},
    "pathotune, text": {"name": "pathotune", "n": 2, "text": TEXT, "renew": ["text", "instance"]},
}
NO_IDENTITY = {"vpt_deep", "pathotune"}  # random prompts are looked at
NO_EXPORT = {"vpt_deep", "adaptformer", "hiadapter", "pathotune"}
each_case = pytest.mark.parametrize("case", CASES)
each_make = pytest.mark.parametrize("make", MAKES)


def adapted(case, make="plain", moved=True, **extra):
    """Return a tiny encoder with a strategy applied, and the strategy; `moved` leaves the start."""
    encoder = tiny_encoder(**{**MAKES.get(make, FUSED_BIAS), **extra})
    strategy = make_strategy(CASES[case])
    strategy.prepare(encoder.vit)
    if moved:
        move(encoder)
    return encoder, strategy


def move(encoder, seed=3):
    """Change every trained number, as if it had learned; frozen ones stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.05 * noise.to(parameter.dtype)


def names(vit):
    return {name for name, p in vit.named_parameters() if p.requires_grad}


def test_every_strategy_has_a_case():
    assert {case["name"] for case in CASES.values()} == STRATEGIES.keys() - {"frozen"}
    assert get_args(StrategyName) == tuple(STRATEGIES)  # what `tapfm fit --help` offers


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_encoder_of_stages_is_adapted_or_refused(name):
    """A Swin has neither one sequence of blocks nor a CLS token."""
    encoder, strategy = tiny_swin(), make_strategy(name)
    if name not in ("full", "bitfit", "norm_only", "frozen"):
        with pytest.raises(StrategyError, match=f"{name} needs a ViT with a CLS.*SwinTransformer"):
            strategy.prepare(encoder.vit)
        return
    strategy.prepare(encoder.vit)
    groups = strategy.parameters(encoder.vit, 1e-2, 0.1)
    assert sum(len(group["params"]) for group in groups) == len(names(encoder.vit))
    tiles = random_tiles(2, side=64)
    before = encoder(tiles)[0]
    if name != "frozen":
        before.square().sum().backward()
        make_optimizer(strategy, groups).step()
        assert difference(encoder(tiles)[0], before) > 1e-3


def test_rates_by_block_need_a_row_of_blocks():
    with pytest.raises(StrategyError, match=r"layer_decay needs a ViT.* or full at one rate"):
        make_strategy({"name": "full", "layer_decay": 0.5}).prepare(tiny_swin().vit)


# the start


@each_make
@each_case
def test_first_output_is_the_base_encoders(case, make):
    # to the bit where blocks are whole; to 1e-12 with the tail, which test_tail.py holds
    tiles, spec = random_tiles(3), {**MAKES[make], "tail": False}
    base = tiny_encoder(**spec)
    encoder, strategy = adapted(case, make, moved=False, tail=False)
    for mode in (False, True):  # no tiny encoder has noise of its own, but a strategy may
        z, score = encoder.train(mode)(tiles)
        if strategy_spec(strategy)["name"] in NO_IDENTITY:
            assert not torch.equal(z, base(tiles)[0])
        else:
            assert torch.equal(z, base(tiles)[0])
            assert torch.equal(score, base(tiles)[1])
    moved_z, moved_score = adapted(case, make)[0].eval()(tiles)
    assert (moved_z - base(tiles)[0]).abs().max() > 1e-3, "the test above can fail"
    assert (moved_score - base(tiles)[1]).abs().max() > 1e-6


@pytest.mark.parametrize("case", ["lora", "dora", "ssf"])
def test_an_attention_that_never_calls_its_qkv_is_adapted_too(case):
    tiles, base = random_tiles(3), tiny_encoder(**FUSED_BIAS)
    with torch.no_grad():
        for block in base.vit.blocks:
            block.attn.q_bias.normal_()
    encoder, _ = adapted(case, "fused bias", moved=False)
    encoder.load_state_dict(base.state_dict(), strict=False)
    torch.testing.assert_close(encoder(tiles)[0], base(tiles)[0], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.requires_grad and "qkv" in name:
                parameter += 0.1
    assert difference(encoder(tiles)[0], base(tiles)[0]) > 1e-3


def test_prompts_start_as_the_paper_says():
    vit = adapted("vpt_deep", moved=False)[0].vit
    bound = (6 / (3 * 8 * 8 + 24)) ** 0.5
    assert vit.prompts.shape == (3, 3, 24)
    assert 0.95 * bound < vit.prompts.abs().max() <= bound
    assert vit.prompts.mean().abs() < 0.2 * bound


# what learns


@each_make
@each_case
def test_it_trains_exactly_what_it_lists(case, make):
    """Listed, wanting a gradient, given one, and moved by a step: the same parameters."""
    encoder, strategy = adapted(case, make)
    vit = encoder.vit
    listed = {id(p) for g in strategy.parameters(vit, 1e-2, 0.1) for p in g["params"]}
    assert {name for name, p in vit.named_parameters() if id(p) in listed} == names(vit)
    before = {name: p.detach().clone() for name, p in vit.named_parameters()}
    z, score = encoder.train()(random_tiles(3))
    (z.square().sum() + score.sum()).backward()
    graded = {name for name, p in vit.named_parameters() if p.grad is not None}
    assert graded == names(vit)
    torch.optim.AdamW(strategy.parameters(vit, 1e-2, 0.1)).step()
    assert {n for n, p in vit.named_parameters() if not torch.equal(p, before[n])} == names(vit)


LISTED = {
    "last_n": {"blocks.1.*", "blocks.2.*", "norm.*"},
    "bitfit": {"*bias"},
    "norm_only": {"*norm*.weight", "*norm*.bias"},
    "lora": {"blocks.*.attn.qkv.lora_?.weight"},
    "dora": {"blocks.*.attn.qkv.lora_*"},
    "olora": {"blocks.*.attn.qkv.lora_?.weight"},
    "vpt_deep": {"prompts"},
    "adaptformer": {"blocks.*.adaptformer.*"},
    "ssf": {"*.ssf_scale", "*.ssf_shift"},
    "hiadapter": {"stain_adapter.*", "morphology_adapter.*"},
    "pathotune": {"pathotune.*"},
}


@each_make
@pytest.mark.parametrize("case", LISTED)
def test_what_learns_is_what_its_name_says(case, make):
    from fnmatch import fnmatch

    vit = adapted(case, make)[0].vit
    said = {n for n, _ in vit.named_parameters() if any(fnmatch(n, p) for p in LISTED[case])}
    assert names(vit) == said != set()


UNI = {  # measured elsewhere, and computed where that rounds
    "full": 303_350_784,
    "bitfit": 272_384,
    "norm_only": 100_352,
    "ssf": 544_768,
    "vpt_deep": 245_760,
    "adaptformer": 3_171_840,
    "lora": 786_432,
    "dora": 860_160,
    "olora": 786_432,
    "last_n": 12_596_224 + 2_048 + 2_048,
    "hiadapter": 11_686_145 + 66_848,
    "pathotune": 245_760 + 1_024 + 371_264 + 526_336,
    "frozen": 0,
}
UNI_OPTIONS = [
    ({"name": "vpt_deep", "n": 50}, 1_228_800),
    ({"name": "lora", "targets": ["q", "k", "v", "proj"]}, 1_179_648),
    ({"name": "lora", "targets": ["q", "k", "v", "proj", "mlp"]}, 3_145_728),
    ({"name": "last_n", "n": 2}, 25.2e6),
    ({"name": "last_n", "n": 4}, 50.4e6),
    ({"name": "hiadapter", "parts": ["stain"]}, 11.69e6),
    ({"name": "hiadapter", "parts": ["stain"], "width": 256}, 2.21e6),
    ({"name": "hiadapter", "parts": ["morphology"]}, 66_848),
    ({"name": "hiadapter", "parts": ["morphology"], "stains": ["eosin"]}, 66_848 - 4 * 1_056),
    ({"name": "pathotune", "parts": ["task"], "renew": []}, 10 * 1_024),
    ({"name": "pathotune", "text": vectors_to_text(np.zeros((1, 768), "float32"))}, 1.93e6),
]


@pytest.fixture(scope="module")
def uni():
    with torch.device("meta"):
        return lambda: backbones.build(backbones.find("uni"))


def count(build, spec):
    with torch.device("meta"):
        vit = build()
        make_strategy(spec).prepare(vit)
    return sum(p.numel() for p in vit.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", STRATEGIES)
def test_counts_at_unis_size(uni, name):
    assert count(uni, name) == UNI[name]


@pytest.mark.parametrize(("spec", "expected"), UNI_OPTIONS, ids=lambda each: str(each)[:60])
def test_counts_of_options_at_unis_size(uni, spec, expected):
    found = count(uni, spec)
    assert found == expected if isinstance(expected, int) else abs(found / expected - 1) < 0.002


@each_make
@each_case
def test_nothing_decays_but_matrices(case, make):
    encoder, strategy = adapted(case, make)
    name_of = {id(p): name for name, p in encoder.vit.named_parameters()}
    for group in strategy.parameters(encoder.vit, 1e-3, 0.1):
        for parameter in group["params"]:
            name = name_of[id(parameter)]
            matrix = name.endswith("weight") and parameter.ndim > 1
            assert group["weight_decay"] == (0.1 if matrix else 0.0), name


@pytest.mark.parametrize(("name", "kind"), [("lora", "AdamW"), ("pathotune", "RAdam")])
def test_optimizer_is_adamw_or_the_strategys_own(name, kind):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1, "weight_decay": 0.5}]
    optimizer = make_optimizer(make_strategy(name), groups)
    assert type(optimizer).__name__ == kind
    (weight,) = groups[0]["params"]
    weight.grad = torch.zeros(2)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.95, 0.95])  # decays apart from the gradient


@pytest.mark.parametrize("name", ["full", "last_n"])
def test_layer_decay(name):
    encoder = tiny_encoder("5 prefix")
    strategy = make_strategy(
        {"name": name, "layer_decay": 0.5, **({"n": 2} if name != "full" else {})}
    )
    strategy.prepare(encoder.vit)
    groups = strategy.parameters(encoder.vit, 1.0, 0.1)
    assert groups[0]["lr"] == 1.0  # the first group is the one that is logged
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    found = {n: rate[id(p)] for n, p in encoder.vit.named_parameters() if id(p) in rate}
    expected = {"norm.weight": 1.0, "blocks.2.mlp.fc1.weight": 0.5, "blocks.1.norm1.bias": 0.25}
    if name == "full":
        expected |= {"blocks.0.norm1.bias": 0.125, "cls_token": 0.0625}
        expected |= {"patch_embed.proj.weight": 0.0625, "pos_embed": 0.0625}
    assert {key: found[key] for key in expected} == expected
    one = parameter_groups(encoder.vit.named_parameters(), 1.0, 0.1, layerwise(3, 1.0))
    assert [group["lr"] for group in one] == [1.0, 1.0]


# the gradient


def slide_with(case, make, **extra):
    spec = {**MAKES[make], **extra}
    slide = Slide(spec.pop("make"), **spec)
    make_strategy(CASES[case]).prepare(slide.encoder.vit)
    move(slide.encoder)
    return slide


@each_make
@each_case
def test_two_passes_give_the_one_graph_gradient(case, make):
    slide = slide_with(case, make)
    expected = slide.gradient("one_graph")
    assert expected.norm() > 0
    assert difference(slide.gradient("two_pass"), expected) <= 1e-10


@each_make
@each_case
def test_recomputing_blocks_changes_nothing(case, make):
    expected = slide_with(case, make).gradient("one_graph")
    recomputed = slide_with(case, make, recompute=True)
    assert difference(recomputed.gradient("one_graph"), expected) <= 1e-10
    assert difference(recomputed.gradient("two_pass"), expected) <= 1e-10


@pytest.mark.parametrize("case", ["lora", "dora", "adaptformer", "hiadapter"])
def test_a_strategys_own_dropout_is_replayed(case):
    """Other noise in pass 2 is another gradient: the parity above had noise to replay."""
    slide = slide_with(case, "plain")
    expected = slide.gradient("one_graph")
    assert difference(slide.gradient("two_pass", seed=6), expected) > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_blocks_are_out_of_the_graph(recompute):
    """Autograd's memory does not grow with the depth in front of the last n blocks."""

    def held(depth, spec):
        slide = Slide("5 prefix", depth=depth, recompute=recompute)
        make_strategy(spec).prepare(slide.encoder.vit)
        return bytes_of_pass_2(slide)

    for spec in ({"name": "last_n"}, {"name": "lora", "last": 1}):
        assert held(2, spec) == held(5, spec) > 0
    assert held(5, {"name": "lora"}) > held(2, {"name": "lora"})

    slide = Slide("5 prefix", recompute=recompute)
    make_strategy({"name": "last_n"}).prepare(slide.encoder.vit)
    boundary = []
    slide.encoder.vit.blocks[-1].register_forward_pre_hook(
        lambda _m, args: boundary.append(args[0])
    )
    slide.encoder(random_tiles(2))
    assert boundary[0].grad_fn is None
    front = slide.encoder.vit.blocks[:-1]
    tokens = torch.randn(2, 21, 24, dtype=torch.float64)
    # recomputation takes hold of a block's input and lets go when nothing in it wants a gradient
    assert saved_bytes(lambda: front(tokens)) == (tokens.nbytes if recompute else 0)


# what they compute, against the papers' formulas


def test_dora_is_the_papers_with_a_constant_norm():
    encoder, strategy = adapted("dora")
    linear = encoder.eval().vit.blocks[1].attn.qkv
    a, b, m = linear.lora_A.weight, linear.lora_B.weight, linear.lora_magnitude_vector
    x = torch.randn(5, 24, dtype=torch.float64)

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), (a, b, m), retain_graph=True)

    changed = linear.weight + strategy.alpha / strategy.rank * b @ a
    constant = changed.detach().norm(dim=1)
    expected = x @ (changed * (m / constant)[:, None]).T + linear.bias
    torch.testing.assert_close(linear(x), expected, rtol=1e-12, atol=1e-12)
    for ours, papers in zip(gradients(linear(x)), gradients(expected), strict=True):
        torch.testing.assert_close(ours, papers, rtol=1e-10, atol=1e-10)
    learned = x @ (changed * (m / changed.norm(dim=1))[:, None]).T + linear.bias
    assert difference(gradients(learned)[1], gradients(expected)[1]) > 1e-3  # not the same thing


@pytest.mark.parametrize("make", ["plain", "registers, SwiGLU", "Eva, RoPE"])
def test_adaptformer_reads_the_residual_stream_as_it_is(make):
    plain = tiny_encoder(**MAKES[make]).eval().vit.blocks[0]
    block = adapted("adaptformer", make)[0].eval().vit.blocks[0]
    branch, x = block.adaptformer, torch.randn(2, 17, 24, dtype=torch.float64)
    middle = []
    plain.norm2.register_forward_pre_hook(lambda _m, args: middle.append(args[0]))
    expected = plain(x)
    down = (middle[0] @ branch.down.weight.T + branch.down.bias).clamp(min=0)
    expected = expected + 0.1 * (down @ branch.up.weight.T + branch.up.bias)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


# prompts


@pytest.mark.parametrize("make", ["1 prefix", "5 prefix", "9 prefix", "cls+mean", "rope"])
def test_prompts_stay_behind_the_prefix_and_leave_before_pooling(make):
    encoder = tiny_encoder(make)
    prefix, tiles = encoder.vit.num_prefix_tokens, random_tiles(2)
    seen = []
    for block in encoder.vit.blocks:
        block.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    plain = encoder.vit.forward_features(encoder.normalise(tiles))
    first = seen[0]
    seen.clear()
    make_strategy({"name": "vpt_deep", "n": 3}).prepare(encoder.vit)
    inside = []
    for block in encoder.vit.blocks:  # behind the strategy's own hooks
        block.register_forward_pre_hook(lambda _m, args: inside.append(args[0]))
    assert encoder.vit.forward_features(encoder.normalise(tiles)).shape == plain.shape
    assert torch.equal(inside[0][:, :prefix], first[:, :prefix])
    assert torch.equal(inside[0][:, prefix + 3 :], first[:, prefix:])
    for depth, x in enumerate(inside):
        assert torch.equal(x[:, prefix : prefix + 3], encoder.vit.prompts[depth].expand(2, -1, -1))
    z, _ = encoder(tiles)
    assert z.shape == (2, encoder.dim)


@pytest.mark.parametrize("make", ["5 prefix", "qk norm", "rope"])
def test_the_score_leaves_prompts_out(make):
    """Reference: the block's own attention matrix, prompt columns dropped, renormalised."""
    encoder = tiny_encoder(make)
    prefix, tiles = encoder.vit.num_prefix_tokens, random_tiles(3)
    make_strategy({"name": "vpt_deep", "n": 3}).prepare(encoder.vit)
    attn, caught = encoder.vit.blocks[-1].attn, []
    attn.fused_attn = False
    hook = attn.attn_drop.register_forward_hook(lambda _m, _a, matrix: caught.append(matrix))
    encoder.vit.forward_features(encoder.pixels(tiles))  # the whole block
    hook.remove()
    _, score = encoder(tiles)
    row = caught[0][:, :, 0]
    on_prefix, on_patches = row[..., :prefix].sum(-1), row[..., prefix + 3 :].sum(-1)
    expected = -(on_prefix / (on_prefix + on_patches)).mean(1)
    torch.testing.assert_close(score, expected, rtol=1e-12, atol=0)
    assert (score + row[..., : prefix + 3].sum(-1).mean(1)).abs().min() > 1e-3  # not the same thing


# export


@each_make
@each_case
def test_merged_export_is_the_adapted_model(case, make):
    """Loaded strictly into a plain timm model: float32, 1e-5."""
    encoder, strategy = adapted(case, make, dtype=torch.float32)
    encoder.eval()
    if strategy_spec(strategy)["name"] in NO_EXPORT:
        with pytest.raises(StrategyError, match=r"cannot be merged.*best.safetensors"):
            strategy.export(encoder.vit)
        return
    plain = tiny_encoder(**MAKES[make], dtype=torch.float32, seed=9).eval()
    plain.vit.load_state_dict(strategy.export(encoder.vit), strict=True)
    tiles = random_tiles(5)
    with torch.no_grad():
        for ours, theirs in zip(encoder(tiles), plain(tiles), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        base = tiny_encoder(**MAKES[make], dtype=torch.float32)
        assert not torch.allclose(base(tiles)[0], plain(tiles)[0], rtol=1e-3, atol=1e-3)


# the small checkpoint

TILE = 32


def demo_model(case, weights=None):
    model_config = models.ModelConfig(
        "demo_vit", "tapfm_gated", ("A", "B"), TILE, 0.5, strategy=CASES[case], weights=weights
    )
    torch.manual_seed(1)
    return models.SlideModel(model_config, backbones.load("demo_vit", weights, tile_px=TILE))


@each_case
def test_checkpoint_holds_what_was_trained_and_gives_it_back(case, tmp_path):
    model = demo_model(case)
    move(model.encoder)
    path, tiles = tmp_path / "best.safetensors", random_tiles(5)
    models.save(model, path, epoch=3)
    with safe_open(path, "pt") as file:
        held = set(file.keys())
    buffers = {n for n, _ in model.encoder.vit.named_buffers() if n.endswith("lora_apart")}
    trained = {f"encoder.vit.{name}" for name in names(model.encoder.vit) | buffers}
    assert held == trained | {f"aggregator.{key}" for key in model.aggregator.state_dict()}
    again = models.load(path)
    assert again.model_config == replace(model.model_config, strategy=strategy_spec(model.strategy))
    assert not again.training
    outputs = model.eval()(bag_of(tiles), 2), again(bag_of(tiles), 2)
    for ours, theirs in zip(*((o.logits_K, o.weights_T) for o in outputs), strict=True):
        assert torch.equal(ours, theirs)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_a_small_checkpoint_is_small(tmp_path):
    for case in ("full", "lora"):
        models.save(demo_model(case), tmp_path / case)
    assert (tmp_path / "lora").stat().st_size < 0.1 * (tmp_path / "full").stat().st_size


@pytest.fixture
def local_base(tmp_path):
    """Write weights to a local file, and a LoRA trained from them."""
    torch.manual_seed(4)
    weights = tmp_path / "mine" / "base.safetensors"
    weights.parent.mkdir()
    from safetensors.torch import save_file

    save_file(backbones.load("demo_vit", "random", tile_px=112).vit.state_dict(), weights)
    model = demo_model("lora", str(weights))
    move(model.encoder)
    path = tmp_path / "best.safetensors"
    models.save(model, path)
    return weights, model.eval(), path


def test_base_is_found_where_it_was_or_beside_the_checkpoint(local_base, tmp_path):
    weights, model, path = local_base
    expected = model(bag_of(random_tiles(3)), 2).logits_K
    assert torch.equal(models.load(path)(bag_of(random_tiles(3)), 2).logits_K, expected)
    weights.rename(tmp_path / "base.safetensors")
    assert torch.equal(models.load(path)(bag_of(random_tiles(3)), 2).logits_K, expected)


def test_missing_base_is_named(local_base):
    weights, _, path = local_base
    weights.unlink()
    said = (
        rf"{path}: holds only what lora trained and needs the base encoder demo_vit, and {weights} "
        r"is not there. Put it back, or put base.safetensors beside best.safetensors"
    )
    with pytest.raises(models.CheckpointError, match=said):
        models.load(path)


def test_another_base_is_refused(local_base):
    from safetensors.torch import save_file

    weights, _, path = local_base
    other = backbones.load("demo_vit", "random", tile_px=112).vit.state_dict()
    save_file(other, weights)
    with pytest.raises(models.CheckpointError, match=r"holds another one. Give the weights"):
        models.load(path)
    weights.write_bytes(b"nothing")
    with pytest.raises(models.CheckpointError, match=r"needs the base encoder.*cannot be read"):
        models.load(path)


def test_a_base_of_random_weights_is_saved_whole(tmp_path):
    """Random weights cannot be loaded from anywhere else."""
    model = demo_model("lora", "random").eval()
    models.save(model, tmp_path / "best.safetensors")
    again = models.load(tmp_path / "best.safetensors")
    assert torch.equal(
        again(bag_of(random_tiles(3)), 2).logits_K, model(bag_of(random_tiles(3)), 2).logits_K
    )


# options


def test_spelled_out_it_is_the_same():
    for spec in [*STRATEGIES, *CASES.values()]:
        strategy = make_strategy(spec)
        assert make_strategy(strategy_spec(strategy)) == strategy
    assert strategy_spec(make_strategy("last_n")) == {"name": "last_n", "n": 1, "layer_decay": 1.0}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lorra", "'lorra' is none of full, last_n, bitfit"),
        ({"rank": 8}, "None is none of full"),
        ({"name": "lora", "ranks": 8}, r"lora has no option ranks; there are rank \(8\), alpha"),
        ({"name": "full", "rank": 8}, r"full has no option rank; there are layer_decay \(1.0\)"),
        ({"name": "bitfit", "n": 8}, r"bitfit has no option n; there is none"),
        ({"name": "lora", "rank": 8.5}, "lora: rank must be a whole number, got 8.5"),
        ({"name": "lora", "rank": True}, "lora: rank must be a whole number, got True"),
        ({"name": "lora", "targets": "q"}, "lora: targets must be a list, got 'q'"),
        ({"name": "lora", "targets": ["w"], "rank": 0}, r"rank must be 1.*targets must be some of"),
        ({"name": "dora", "dropout": 1}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"name": "last_n", "n": 0}, "n must be 1 or more"),
        ({"name": "full", "layer_decay": 0}, r"layer_decay must be in \(0, 1\], got 0"),
        ({"name": "vpt_deep", "n": 0}, "n must be 1 or more"),
        ({"name": "adaptformer", "width": 0}, "width must be 1 or more"),
        ({"name": "hiadapter", "parts": []}, r"parts must be some of stain, morphology, got \[\]"),
        (
            {"name": "hiadapter", "parts": ["s"], "width": 20},
            r"parts.*width must be 0.*of 8, got 20",
        ),
        (
            {"name": "hiadapter", "stains": ["blue"]},
            "stains must be some of haematoxylin, eosin, d",
        ),
        (
            {"name": "hiadapter", "dropout": 1.0, "stages": 0},
            r"\[0, 1\), got 1.0; stages must be 1",
        ),
        ({"name": "hiadapter", "reduction": 0}, "reduction must be 1 or more, got 0"),
        ({"name": "pathotune", "parts": ["image"]}, r"parts must be some of task, text, instance"),
        (
            {"name": "pathotune", "renew": ["all"], "n": 0},
            "n must be 1 .*renew must be none or some",
        ),
        ({"name": "pathotune", "text": 3}, "pathotune: text must be text, got 3"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(spec, said):
    with pytest.raises(StrategyError, match=said):
        make_strategy(spec)


def test_more_blocks_than_there_are_is_refused():
    for spec in ({"name": "last_n", "n": 4}, {"name": "lora", "last": 4}):
        with pytest.raises(StrategyError, match=r"last 4 blocks and the model has 3\. Give 3"):
            make_strategy(spec).prepare(tiny_encoder().vit)


def test_a_model_of_another_make_is_refused():
    vit = tiny_encoder().vit
    vit.blocks[1].attn.qkv = nn.Identity()
    for name in ("lora", "dora", "ssf"):
        with pytest.raises(StrategyError, match=rf"{name} finds no qkv in Attention"):
            make_strategy(name).prepare(vit)
    vit.blocks[1] = nn.Identity()
    with pytest.raises(
        StrategyError, match=r"knows Block and EvaBlock, and this model has Identity"
    ):
        make_strategy("adaptformer").prepare(vit)


@each_case
def test_description_counts(case):
    encoder, strategy = adapted(case)
    learn = sum(p.numel() for p in encoder.vit.parameters() if p.requires_grad)
    assert f"{learn:,}" in strategy.describe(encoder.vit)


def test_autocast_keeps_small_changes():
    """A scale of 1.001 is 1 in bf16: strategies must not round it away."""
    how = {"dtype": torch.float32, "tail": False}  # a tail with hooks rounds elsewhere
    encoder, _ = adapted("ssf", moved=False, **how)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("norm.ssf_scale"):
                parameter += 0.001
        with torch.autocast("cpu", torch.bfloat16):
            changed = encoder(random_tiles(2))[0]
            base = tiny_encoder("1 prefix", **how)(random_tiles(2))[0]
    torch.testing.assert_close(changed / base, torch.full_like(base, 1.001), rtol=1e-5, atol=0)


@each_case
def test_bfloat16_weights_run_and_train(case):
    """With `model.precision: bf16-true` every parameter is bfloat16, and no buffer."""
    encoder = tiny_encoder("rope", dtype=torch.float32)
    make_strategy(CASES[case]).prepare(encoder.vit)
    for parameter in encoder.parameters():
        parameter.data = parameter.data.bfloat16()
    z_CD, score_C = encoder(random_tiles(3))
    assert z_CD.dtype == score_C.dtype == torch.float32
    (z_CD.square().sum() + score_C.sum()).backward()
    learns = [p for p in encoder.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learns)


@each_case
def test_bf16_autocast_runs_and_trains(case):
    encoder, _ = adapted(case, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, score = encoder(random_tiles(2))
    assert z.dtype == score.dtype == torch.float32
    (z.sum() + score.sum()).backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.requires_grad)


@each_case
@pytest.mark.parametrize("recompute", [False, True])
def test_a_copy_is_a_model_of_its_own(case, recompute):
    encoder, fresh = tiny_encoder(recompute=recompute), tiny_encoder()
    for each in (encoder, fresh):
        make_strategy(CASES[case]).prepare(each.vit)
        each.eval()
    twin = copy.deepcopy(encoder)
    before, tiles = encoder(random_tiles(2)), random_tiles(2)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.1
    for now, then in zip(encoder(tiles), before, strict=True):
        assert torch.equal(now, then)
    z, score = twin(tiles)
    assert (z - before[0]).abs().max() > 1e-3
    fresh.load_state_dict(twin.state_dict())
    torch.testing.assert_close(z, fresh(tiles)[0], rtol=1e-12, atol=1e-12)
    (z.sum() + score.sum()).backward()
    assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    assert all(p.grad is None for p in encoder.parameters())


# frozen, the control of all others


@each_make
def test_frozen_is_the_base_encoder_and_stays_it(make):
    encoder, base, tiles = tiny_encoder(**MAKES[make]), tiny_encoder(**MAKES[make]), random_tiles(3)
    strategy = make_strategy("frozen")
    strategy.prepare(encoder.vit)
    assert names(encoder.vit) == set()
    assert encoder.train()(tiles)[0].grad_fn is None, "no graph"
    torch.testing.assert_close(encoder(tiles), base(tiles), rtol=1e-12, atol=1e-12)
    make_optimizer(strategy, strategy.parameters(encoder.vit, 1e-2, 0.1)).step()
    exported = strategy.export(encoder.vit)
    assert all(torch.equal(exported[key], value) for key, value in base.vit.state_dict().items())
    total = sum(p.numel() for p in base.vit.parameters())
    assert strategy.describe(encoder.vit) == f"frozen: 0 of {total:,} parameters learn"


def test_frozen_saves_the_slide_model_alone(tmp_path):
    model = models.SlideModel(
        models.ModelConfig("demo_vit", "gated", ("A",), TILE, 0.5, strategy={"name": "frozen"}),
        backbones.load("demo_vit", tile_px=TILE),
    )
    models.save(model, tmp_path / "best.safetensors")
    saved = load_file(tmp_path / "best.safetensors")
    assert {key.partition(".")[0] for key in saved} == {"aggregator"}
    tiles = random_tiles(3)
    again = models.load(tmp_path / "best.safetensors")
    assert torch.equal(again(bag_of(tiles), 2).logits_K, model.eval()(bag_of(tiles), 2).logits_K)
