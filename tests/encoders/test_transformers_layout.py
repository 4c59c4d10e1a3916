"""Weights published for `transformers` give timm's model the features that `transformers` has.

Its own models, tiny and with random weights, are the reference; without it these tests are skipped.
"""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

from tapfm.encoders.backbones import BackboneError, Encoder, find, load_state
from tapfm.encoders.transformers_layout import is_transformers, to_timm

SIZE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32}
MAKES = {  # a row of the registry, its model in `transformers`, timm's kwargs of the same size
    "phikon": ("ViT", {"patch_size": 8, "intermediate_size": 96}, {}),
    "phikon_v2": ("Dinov2", {"patch_size": 8}, {}),
    "midnight_12k": ("Dinov2", {"patch_size": 8, "use_swiglu_ffn": True}, {"mlp_ratio": 5.33334}),
    "hibou_b": ("Dinov2WithRegisters", {"patch_size": 8, "num_register_tokens": 4}, {}),
    "hibou_l": (
        "Dinov2WithRegisters",
        {"patch_size": 8, "num_register_tokens": 4, "use_swiglu_ffn": True},
        {"mlp_ratio": 5.33334},
    ),
}


@pytest.mark.parametrize("key", MAKES)
def test_features_are_those_of_transformers(key, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, theirs, ours = MAKES[key]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZE, **theirs)
    more = {"add_pooling_layer": False} if name == "ViT" else {}
    reference = getattr(transformers, f"{name}Model")(config, **more).eval()
    for parameter in reference.parameters():  # or equal tokens and scales would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert is_transformers(state)

    row = replace(find(key), tile_px=32, width=24)
    size = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "img_size": 32}
    vit = timm.create_model(row.arch, num_classes=0, **{**row.kwargs, **size, **ours})
    load_state(vit, row, state)
    encoder = Encoder(vit, row).eval()
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        tokens = reference(pixel_values=encoder.normalise(tiles)).last_hidden_state
        z_CD, _ = encoder(tiles)
    expected = tokens[:, 0]
    if row.feature == "cls+mean":
        expected = torch.cat([expected, tokens[:, row.prefix_tokens :].mean(1)], 1)
    torch.testing.assert_close(z_CD, expected, rtol=1e-5, atol=1e-5)


def test_hibou_l_has_the_size_of_a_swiglu():
    """The width of its MLP is `transformers`' for a ViT-L with SwiGLU."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = transformers.Dinov2WithRegistersConfig(
        **size, image_size=224, patch_size=14, num_register_tokens=4, use_swiglu_ffn=True
    )
    with torch.device("meta"):
        reference = transformers.Dinov2WithRegistersModel(config)
    counted = sum(parameter.numel() for parameter in reference.parameters())
    counted -= reference.embeddings.mask_token.numel() + 1024  # CLS's position, which timm adds in
    assert counted == find("hibou_l").parameters


def state(blocks=2, prefix=""):
    """Names of `transformers`' Dinov2 with tensors that say where they belong."""
    names = {
        "embeddings.cls_token": 1.0,
        "layernorm.weight": 2.0,
    }
    for block in range(blocks):
        for number, part in enumerate(("query", "key", "value")):
            names[f"encoder.layer.{block}.attention.attention.{part}.weight"] = 10 * block + number
        names[f"encoder.layer.{block}.attention.output.dense.bias"] = 10 * block + 3
        names[f"encoder.layer.{block}.layer_scale1.lambda1"] = 10 * block + 4
        names[f"encoder.layer.{block}.mlp.fc2.weight"] = 10 * block + 5
    return {prefix + name: torch.full((2, 2), float(value)) for name, value in names.items()}


@pytest.mark.parametrize("prefix", ["", "dinov2."])
def test_names_by_hand(prefix):
    found = to_timm(state(prefix=prefix))
    assert sorted(found) == sorted(
        ["cls_token", "norm.weight"]
        + [
            f"blocks.{block}.{name}"
            for block in (0, 1)
            for name in ("attn.qkv.weight", "attn.proj.bias", "ls1.gamma", "mlp.fc2.weight")
        ]
    )
    assert found["blocks.1.attn.qkv.weight"][:, 0].tolist() == [10, 10, 11, 11, 12, 12]
    assert not is_transformers(found)


def test_half_an_attention_is_refused():
    torn = state()
    del torn["encoder.layer.1.attention.attention.key.weight"]
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, embed_dim=24)
    with pytest.raises(BackboneError, match=r"layer.1.attention.attention.key.weight"):
        load_state(vit, find("phikon"), torn)
