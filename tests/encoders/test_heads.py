"""KEEP's and CONCH v1.5's features are what their publishers' shapes and order say.

The references are torch's own layers; the published weights are not downloaded.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tapfm import cli
from tapfm.encoders.backbones import Encoder, build, find, load_state
from tapfm.encoders.heads import AttentionPool, Projection
from tapfm.slide_model.model import ModelConfig, SlideModel
from tests.bags import tile_set

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}


def tiny(key):
    """A row of the same make, with a small model; its weights spread."""
    row = find(key)
    row = replace(row, tile_px=32, width=24, head=(row.head[0], 16), kwargs={**row.kwargs, **TINY})
    torch.manual_seed(0)
    vit = build(row)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return row, vit


def tiles():
    return torch.randint(0, 256, (5, 3, 32, 32), generator=torch.manual_seed(1)).to(torch.uint8)


def test_the_pool_is_one_querys_attention():
    torch.manual_seed(0)
    pool, tokens_CND = AttentionPool(24, 16).double(), torch.randn(3, 7, 24).double()
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.5)
    reference = nn.MultiheadAttention(
        16, 8, bias=False, kdim=24, vdim=24, batch_first=True, dtype=torch.float64
    )
    with torch.no_grad():
        reference.q_proj_weight.copy_(pool.to_q.weight)
        reference.k_proj_weight.copy_(pool.to_kv.weight[:16])
        reference.v_proj_weight.copy_(pool.to_kv.weight[16:])
        reference.out_proj.weight.copy_(pool.to_out.weight)
    keys = pool.ln_k(tokens_CND)
    found, _ = reference(pool.ln_q(pool.query).expand(3, 1, 16), keys, keys)
    torch.testing.assert_close(pool(tokens_CND), pool.norm(found[:, 0]), rtol=1e-9, atol=1e-12)


def test_the_projection_is_of_cls_and_has_length_one():
    head, tokens_CND = Projection(24, 16).double(), torch.randn(3, 7, 24).double()
    z_CE = head(tokens_CND)
    expected = head[2](nn.functional.gelu(head[0](tokens_CND[:, 0])))
    torch.testing.assert_close(z_CE, expected / expected.norm(dim=1, keepdim=True))
    assert z_CE.norm(dim=1).tolist() == pytest.approx([1, 1, 1])


def published(key, vit):
    """The model's weights as its publisher names them, among those of other networks."""
    trunk = {"keep": "visual.", "conch_v1_5": "trunk."}[key]
    state = {}
    for name, value in vit.state_dict().items():
        if key == "keep":
            name = name.replace(".gamma", ".weight").replace("head.", "visual_head.")
        name = name.replace("head.norm.", "ln_contrast.").replace("head.", "attn_pool_contrast.") \
            if key == "conch_v1_5" else name  # fmt: skip
        named = name if name.startswith(("visual_head", "ln_c", "attn_pool")) else trunk + name
        state[named] = value.clone()
    return state | {"text.encoder.layer.0.weight": torch.ones(2), "logit_scale": torch.ones(1)}


@pytest.mark.parametrize("key", ["keep", "conch_v1_5"])
def test_published_names_are_known_and_features_are_the_heads(key):
    row, vit = tiny(key)
    encoder = Encoder(vit, row).eval()
    state = published(key, vit)
    assert sum(name.startswith("blocks.") for name in state) == 0
    again = build(row)
    load_state(again, row, state)
    z_CE, score_C = Encoder(again, row).eval()(tiles())
    tokens_CND = vit.eval().forward_features(encoder.normalise(tiles()))
    assert encoder.dim == 16
    torch.testing.assert_close(z_CE, vit.head(tokens_CND))
    torch.testing.assert_close(score_C, encoder(tiles())[1])
    own = build(row)
    load_state(own, row, vit.state_dict())  # and ours, as a run saves them
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), vit.parameters(), strict=True))


@pytest.mark.parametrize("key", ["keep", "conch_v1_5"])
def test_a_head_learns_with_all_the_rest(key):
    row, vit = tiny(key)
    model = SlideModel(ModelConfig(key, "tapfm_gated", ("a",), 32, 0.5), Encoder(vit, row))
    z_CE, score_C = model.encode(tiles())
    model.aggregator(tile_set(z_CE, score_C)).logits_K.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in vit.head.parameters())


@pytest.mark.parametrize(("key", "width"), [("keep", 1024), ("conch-v1.5", 1024)])
def test_the_token_is_a_feature_too_and_has_no_head(key, width):
    row = find(f"{key}-cls")
    assert (row.dim, row.feature, row.head) == (width, "cls", None)
    with torch.device("meta"):
        vit = build(row)
    assert sum(p.numel() for p in vit.parameters()) == row.parameters < find(key).parameters


def test_export_says_that_timm_has_no_such_head(monkeypatch, tmp_path, capsys):
    from tapfm.encoders import backbones

    row, vit = tiny("keep")
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(backbones, "find", lambda key: row)
    out = ["--weights", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(["export", "--model", "keep", *out]) == 2
    assert "a head that timm does not have" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
