"""Adapters to and from peft's files: same file, same features.

The parity tests need the peft library (`pip install peft`), and are skipped without it.
"""

import json

import pytest
import torch

from tapfm.adapt.peft_layout import peft_spec, read_peft, write_peft
from tapfm.adapt.strategies import StrategyError, make_strategy, strategy_spec
from tests.tiny import random_tiles, tiny_encoder

SPECS = {
    "lora": {"name": "lora", "rank": 2, "alpha": 3.0},
    "lora, q v mlp": {"name": "lora", "rank": 2, "targets": ["q", "v", "mlp"]},
    "dora": {"name": "dora", "rank": 2, "targets": ["q", "k", "v", "proj"], "last": 2},
    "dora, q v": {"name": "dora", "rank": 2, "targets": ["q", "v"]},
}
each_spec = pytest.mark.parametrize("spec", SPECS)
each_make = pytest.mark.parametrize("make", ["1 prefix", "qk norm", "rope"])


def base(make="1 prefix"):
    extra = {"init_values": 0.1} if make == "rope" else {}
    return tiny_encoder(make, dtype=torch.float32, **extra).eval()


def trained(spec, make="1 prefix"):
    encoder, strategy = base(make), make_strategy(spec)
    strategy.prepare(encoder.vit)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder, strategy


@torch.no_grad()
def features(encoder):
    return encoder(random_tiles(3))[0]


@each_make
@each_spec
def test_round_trip(spec, make, tmp_path):
    ours, strategy = trained(SPECS[spec], make)
    write_peft(ours.vit, strategy, tmp_path)
    found = peft_spec(tmp_path)
    if "q v" not in spec:  # of those, k comes back too, with rows of 0
        assert make_strategy(found) == make_strategy(
            {**strategy_spec(strategy), "last": strategy.last or 3}
        )
    again = base(make)
    make_strategy(found).prepare(again.vit)
    read_peft(again.vit, tmp_path)
    torch.testing.assert_close(features(again), features(ours), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(features(base(make)), features(ours), rtol=1e-2, atol=1e-2)


@each_make
@each_spec
def test_peft_reads_ours(spec, make, tmp_path):
    peft = pytest.importorskip("peft", reason="parity with peft needs `pip install peft`")
    ours, strategy = trained(SPECS[spec], make)
    write_peft(ours.vit, strategy, tmp_path)
    theirs = base(make)
    wrapped = peft.PeftModel.from_pretrained(theirs.vit, tmp_path)
    assert not [k for k, p in wrapped.named_parameters() if "lora_B" in k and not p.any()]
    torch.testing.assert_close(features(theirs), features(ours), rtol=1e-5, atol=1e-5)


@each_make
@pytest.mark.parametrize("dora", [False, True])
def test_we_read_pefts(dora, make, tmp_path):
    peft = pytest.importorskip("peft", reason="parity with peft needs `pip install peft`")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=5,
        use_rslora=not dora,
        target_modules=r"blocks\.[12]\.attn\.(qkv|proj)",
        use_dora=dora,
        init_lora_weights=False,  # random, so that there is something to compare
    )
    theirs = base(make)
    wrapped = peft.get_peft_model(theirs.vit, config)
    wrapped.save_pretrained(tmp_path)
    found = peft_spec(tmp_path)
    assert found["targets"] == ["q", "k", "v", "proj"]
    assert found["last"] == 2
    ours, strategy = base(make), make_strategy(found)
    strategy.prepare(ours.vit)
    read_peft(ours.vit, tmp_path)
    expected = features(theirs)
    torch.testing.assert_close(features(ours), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(features(base(make)), expected, rtol=1e-2, atol=1e-2)
    merged = base(make)
    merged.vit.load_state_dict(strategy.export(ours.vit))
    torch.testing.assert_close(features(merged), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_refused(tmp_path):
    encoder, strategy = trained(SPECS["lora"])
    with pytest.raises(StrategyError, match=r"no peft adapter.*Give a folder with adapter_config"):
        peft_spec(tmp_path)
    with pytest.raises(StrategyError, match="no LoRA or DoRA to write"):
        write_peft(base().vit, strategy, tmp_path)
    write_peft(encoder.vit, strategy, tmp_path)
    other = base()
    make_strategy({"name": "lora", "rank": 3}).prepare(other.vit)
    with pytest.raises(StrategyError, match=r"6 tensors .* first blocks.0.attn.qkv.lora_A"):
        read_peft(other.vit, tmp_path)
    wide = tiny_encoder(embed_dim=48)
    make_strategy(SPECS["lora"]).prepare(wide.vit)
    with pytest.raises(StrategyError, match=r"6 tensors .* of this model"):
        read_peft(wide.vit, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value in (("rank_pattern", {"qkv": 4}), ("bias", "all"), ("peft_type", "IA3")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(StrategyError, match="only LoRA and DoRA"):
            peft_spec(tmp_path)
    bias = tiny_encoder("rope", arch="vit_small_patch16_dinov3_qkvb")
    strategy.prepare(bias.vit)
    with pytest.raises(StrategyError, match="never calls its qkv"):
        write_peft(bias.vit, strategy, tmp_path)
