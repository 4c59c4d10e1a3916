"""Every row builds, to the digit; weights load strictly or are refused with a reason."""

import re
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from tapfm.encoders import backbones, checkpoints
from tapfm.encoders.attention import NoClsAttentionError
from tapfm.encoders.backbones import BACKBONES, BackboneError, build, find, load
from tapfm.encoders.registry import FEATURES, LEFT_OUT, ROWS
from tapfm.engine.chunked import adapt_bag, encode_bag
from tapfm.planning.doctor import cls_row_error
from tapfm.slide_model.model import ModelConfig, SlideModel, save
from tests.bags import bag_of, tile_set
from tests.tiny import random_tiles, tiny_swin

# Millions of parameters as the publishers and toolkits print them, and the tile side they counted
# at, where it is not the row's. Typed from there, not from the rows.
PUBLISHED = {
    "uni": (303.4, None), "uni2_h": (681.4, None), "virchow": (631.2, None),
    "virchow2": (631.2, None), "gigapath": (1135.0, None), "h_optimus_0": (1134.8, None),
    "h_optimus_1": (1134.8, None), "h0_mini": (85.7, None), "phikon": (85.8, None),
    "phikon_v2": (303.4, None), "hibou_b": (85.7, None), "midnight_12k": (1134.8, None),
    "openmidnight": (1134.8, None), "gpfm": (303.2, None), "mstar": (303.4, None),
    "pathorchestra": (303.4, None), "kaiko_s16": (21.7, None), "kaiko_s8": (21.7, None),
    "kaiko_b16": (85.8, None), "kaiko_b8": (85.8, None), "kaiko_l14": (304.4, 518),
    "lunit_s16": (21.7, None), "lunit_s8": (21.7, None), "stainnet_b": (85.8, None),
    "stainnet_s": (21.7, None), "dinov2_vits14": (22.1, 518), "dinov2_vitb14": (86.6, 518),
    "dinov2_vitl14": (304.4, 518), "dinov2_vitg14": (1136.5, 518),
    "dinov2_vits14_reg": (22.1, 518), "dinov2_vitb14_reg": (86.6, 518),
    "dinov2_vitl14_reg": (304.4, 518), "dinov2_vitg14_reg": (1136.5, 518),
    "dinov3_s": (21.6, None), "dinov3_s_plus": (28.7, None), "dinov3_b": (85.6, None),
    "dinov3_l": (303.1, None), "dinov3_h_plus": (840.5, None), "dinov3_7b": (6716.0, None),
    "swin_t": (27.5, None), "demo_vit": (1.3, None), "hibou_l": (303.7, None),
    "keep": (303 + 2, None), "conch_v1_5": (306, 224),  # in whole millions
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_row_is_the_model(row):
    """Build on the meta device: no memory, no download."""
    if not timm.is_model(row.arch):
        pytest.skip(f"timm {timm.__version__} does not have {row.arch}")
    with torch.device("meta"):
        vit = build(row)
    counted = sum(p.numel() for p in vit.parameters())
    assert counted == row.parameters
    assert getattr(vit, "num_prefix_tokens", 0) == row.prefix_tokens
    assert vit.num_features == row.width
    millions, tile_px = PUBLISHED[row.key]
    if tile_px:
        with torch.device("meta"):
            counted = sum(p.numel() for p in build(row, tile_px).parameters())
    assert counted / 1e6 == pytest.approx(millions, abs=0.51 if type(millions) is int else 0.051)


def test_wrong_kwargs_show_in_the_count():
    """The count tells a row that forgot its MLP, its layer scale or its registers."""
    row = find("virchow2")
    for change in ({"mlp_ratio": 4.0}, {"init_values": None}, {"reg_tokens": 0}):
        with torch.device("meta"):
            vit = build(row, **change)
        assert sum(p.numel() for p in vit.parameters()) != row.parameters


def test_a_timm_that_reads_rates_off_a_tensor_builds_on_the_meta_device(monkeypatch):
    """Like timm 1.0.15 to 1.0.20; under torch 2.15 a tensor on the meta device has no numbers."""
    create, rates = timm.create_model, []

    def create_as_of_old(*args, **kwargs):
        rates.extend(x.item() for x in torch.linspace(0, 0.3, 4))
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_as_of_old)
    with torch.device("meta"):
        vit = build(find("demo_vit"))
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert all(parameter.is_meta for parameter in vit.parameters())


def test_rows_say_what_they_may():
    for row in ROWS:
        assert row.feature in FEATURES
        assert row.precision in ("fp32", "fp16", "bf16")
        assert row.source == "package" or re.fullmatch(r"hf-hub:[\w-]+/[\w.-]+", row.source)
        assert (row.feature == "mean") == (row.prefix_tokens == 0)
        assert all(0 < value < 1 for triple in row.stats for value in triple)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("H-optimus-0", "h_optimus_0"), ("hoptimus0", "h_optimus_0"), ("UNI", "uni"),
        ("uni_v1", "uni"), ("uni2-h", "uni2_h"), ("uni_v2", "uni2_h"), ("h0-mini", "h0_mini"),
        ("phikon-v2", "phikon_v2"), ("midnight12k", "midnight_12k"),
        ("kaiko-vits16", "kaiko_s16"), ("lunit-vits8", "lunit_s8"), ("lunit-s8", "lunit_s8"),
        ("dinov2-s14", "dinov2_vits14"), ("dinov3-s+".replace("+", "_plus"), "dinov3_s_plus"),
        ("hf-hub:MahmoodLab/UNI", "uni"), ("paige-ai/Virchow2", "virchow2"),
        ("hibou-l", "hibou_l"), ("keep", "keep"), ("conch-v1.5", "conch_v1_5"),
        ("conch_v15", "conch_v1_5"), ("gigapath", "gigapath"), ("midnight-12k", "midnight_12k"),
        ("stainnet-b", "stainnet_b"), ("kaiko-l14", "kaiko_l14"), ("dinov3-b", "dinov3_b"),
    ],
)  # fmt: skip
def test_names_users_know(name, key):
    assert find(name) is BACKBONES[key]


def test_wrong_names_are_listed_and_left_out_ones_explained():
    with pytest.raises(BackboneError, match="'resnet50' is none of demo_vit, "):
        find("resnet50")
    for name in LEFT_OUT:
        with pytest.raises(BackboneError, match=f"{name} is known and left out: .{{20}}"):
            find(name)
    with pytest.raises(BackboneError, match="batch norm"):
        find("CTransPath")


@pytest.mark.parametrize(
    ("name", "dim", "feature"),
    [
        ("midnight-12k", 3072, "cls+mean"),
        ("midnight-12k-cls", 1536, "cls"),
        ("h0-mini", 768, "cls"),
        ("h0-mini-cls-mean", 1536, "cls+mean"),
        ("virchow2", 2560, "cls+mean"),
        ("virchow2-cls", 1280, "cls"),
        ("uni", 1024, "cls"),
        ("uni-cls", 1024, "cls"),
    ],
)
def test_a_name_is_one_feature(name, dim, feature):
    """If toolkits disagree, each meaning has its own name and the row says who differs."""
    row = find(name)
    assert (row.dim, row.feature) == (dim, feature)
    assert row.note
    assert find(row.key) == row  # a saved model finds its row again
    assert row.width == find(name.partition("-cls")[0]).width


@pytest.mark.parametrize("key", ["gigapath", "h_optimus_0", "uni", "gpfm"])
def test_tiles_are_read_and_not_resized(key):
    """Toolkits that resize see other microns per pixel: the row says so and which."""
    row = find(key)
    assert (row.tile_px, row.mpp) == (224, 0.5)
    assert "resize" in row.note or f"{0.5 * 256 / 224:.4f}" in row.note


@pytest.mark.parametrize("feature", ["cls", "cls+mean"])
def test_features_are_the_tokens_they_say(feature):
    key = {"cls": "demo_vit", "cls+mean": "demo-vit-cls-mean"}[feature]
    torch.manual_seed(0)
    encoder = load(key, "random", tile_px=32).eval()
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = encoder.vit.forward_features((tiles / 255 - 0.5) / 0.5)
    expected = tokens[:, 0]
    if feature == "cls+mean":  # 1 CLS, 4 registers, 4 patches
        assert tokens.shape[1] == 9
        expected = torch.cat([expected, tokens[:, 5:].mean(1)], 1)
    torch.testing.assert_close(encoder(tiles)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_cls_takes_learned_attention_only():
    torch.manual_seed(0)
    encoder = load("swin_t", "random", recompute=True).eval()
    tiles = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    z_CD, score_C = encoder(tiles)
    plain = encoder.vit((tiles / 255 - encoder.mean / 255) / (encoder.std / 255))
    torch.testing.assert_close(z_CD, plain, rtol=1e-4, atol=1e-5)
    assert score_C.tolist() == [0, 0]
    for aggregator in ("tapfm", "tapfm_gated"):
        with pytest.raises(NoClsAttentionError, match=rf"{aggregator} .*swin_t.*`gated`"):
            SlideModel(ModelConfig("swin_t", aggregator, ("KRAS",), 224, 0.5), encoder)
    model = SlideModel(ModelConfig("swin_t", "gated", ("KRAS",), 224, 0.5), encoder).eval()
    output = model(bag_of(tiles), chunk=1)
    logits_K, weights_T = output.logits_K, output.weights_T
    assert weights_T.sum() == pytest.approx(1)
    assert logits_K.isfinite().all()


def test_a_model_without_cls_learns_through_the_two_passes():
    """Every parameter of the encoder gets the one-graph gradient, though no score exists."""
    encoder = tiny_swin()
    model = SlideModel(ModelConfig("swin_t", "gated", ("a",), 64, 0.5), encoder).double()
    vit, tiles = encoder.vit, random_tiles(5, side=64)

    z_TD, score_T = model.encode(tiles)
    model.aggregator(tile_set(z_TD, score_T)).logits_K.sum().backward()
    expected = [p.grad.clone() for p in vit.parameters()]
    model.zero_grad()
    same = {"seed": 0, "device": torch.device("cpu")}
    z_TD, score_T, kept = encode_bag(model.encode, tiles.split(2), keep=1, **same)
    model.aggregator(tile_set(z_TD, score_T)).logits_K.sum().backward()
    adapt_bag(model.encode, tiles.split(2), z_TD.grad, score_T.grad, kept=kept, **same)
    for ours, theirs in zip((p.grad for p in vit.parameters()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert sum(grad.abs().sum() for grad in expected) > 0


def test_an_architecture_timm_lacks_is_said():
    row = replace(find("dinov3_s"), arch="vit_of_tomorrow")
    with pytest.raises(BackboneError, match=r"dinov3_s: timm .* does not have vit_of_tomorrow"):
        build(row)


def test_demo_weights_ship_and_are_small():
    from tapfm.encoders.checkpoints import PACKAGED

    file = PACKAGED / "demo_vit.safetensors"
    assert file.stat().st_size <= 6_000_000
    encoder = load("demo_vit").eval()
    z_CD, score_C = encoder(torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8))
    assert z_CD.shape == (2, encoder.dim)
    assert score_C.shape == (2,)
    random = load("demo_vit", "random")
    assert not torch.equal(random.vit.pos_embed, encoder.vit.pos_embed)


def test_tile_must_be_a_multiple_of_the_patch():
    with pytest.raises(
        BackboneError, match=r"225 px is not a multiple of .* 14 px patch. Use 224 or"
    ):
        load("dinov2_vits14", "random", tile_px=225)


def test_missing_weights_say_where_to_get_them():
    with pytest.raises(
        BackboneError, match=r"(?s)nothing is downloaded unasked.*MahmoodLab/UNI.*Accept"
    ):
        load("uni")
    with pytest.raises(BackboneError, match=r"neither a checkpoint .* nor a folder with one"):
        load("demo_vit", "no/such/file.safetensors")


def test_weights_of_another_model_are_refused(tmp_path):
    wide = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=112, depth=2)
    short = build(find("demo_vit"), depth=2)
    for other, said in ((wide, ""), (short, "missing 48")):
        save_file(other.state_dict(), tmp_path / "other.safetensors")
        with pytest.raises(BackboneError, match=f"demo_vit: .* of another model: {said}"):
            load("demo_vit", str(tmp_path / "other.safetensors"))


def test_damaged_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(BackboneError, match="cannot be read"):
        load("demo_vit", str(tmp_path))


def test_folder_round_trip_and_other_tile_sizes(tmp_path):
    encoder = load("demo_vit")
    save_file(encoder.vit.state_dict(), tmp_path / "model.safetensors")
    again = load("demo_vit", str(tmp_path))
    for ours, theirs in zip(encoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    larger = load("demo_vit", tile_px=160)  # position embeddings are resampled
    assert larger(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))[0].shape == (1, encoder.dim)


def test_pickle_free_checkpoints_of_every_wrapping(tmp_path):
    """A trainer's wrapping of a state dict does not matter; files that can run code are refused."""
    encoder = load("demo_vit")
    state = encoder.vit.state_dict()
    head = {"head.weight": torch.zeros(7, 128), "head.bias": torch.zeros(7)}
    wrapped = {
        "plain.pth": state,
        "classifier.bin": {**state, **head},
        "lightning.ckpt": {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        "dino.pt": {
            "student": {k: v + 1 for k, v in state.items()},
            "teacher": {
                **{f"backbone.{k}": v for k, v in state.items()},
                "dino_head.mlp.weight": torch.zeros(3),
            },
        },
    }
    for name, checkpoint in wrapped.items():
        torch.save(checkpoint, tmp_path / name)
        again = load("demo_vit", str(tmp_path / name))
        for key, value in again.vit.state_dict().items():
            assert torch.equal(value, state[key]), (name, key)
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    with pytest.raises(BackboneError, match=r"pickled.pt cannot be read.*can run code: convert"):
        load("demo_vit", str(tmp_path / "pickled.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BackboneError, match=r"list.pt holds a list, not a state dict"):
        load("demo_vit", str(tmp_path / "list.pt"))


def test_a_runs_own_weights_are_weights(tmp_path):
    """best.safetensors of a run: its encoder, without its aggregator."""
    torch.manual_seed(0)
    encoder = load("demo_vit", "random")
    model = SlideModel(ModelConfig("demo_vit", "tapfm", ("a",), 112, 0.5), encoder)
    save(model, tmp_path / "best.safetensors")
    again = load("demo_vit", str(tmp_path / "best.safetensors"))
    assert torch.equal(again.vit.pos_embed, encoder.vit.pos_embed)


def test_folders_are_read_when_it_is_clear_what_is_meant(tmp_path):
    state = load("demo_vit").vit.state_dict()
    with pytest.raises(BackboneError, match="has no checkpoint"):
        load("demo_vit", str(tmp_path))
    for name in ("b.safetensors", "a.safetensors"):
        save_file(state, tmp_path / name)
    with pytest.raises(BackboneError, match=r"has 2 checkpoints: a.safetensors, b.safetensors"):
        load("demo_vit", str(tmp_path))
    torch.save(state, tmp_path / "pytorch_model.bin")  # as the hub's tools lay out a snapshot
    (tmp_path / "config.json").write_text("{}")
    load("demo_vit", str(tmp_path))


def test_another_patch_size_is_refused_though_timm_would_resize(tmp_path):
    row = find("demo_vit")
    other = build(row, patch_size=8)
    save_file(other.state_dict(), tmp_path / "p8.safetensors")
    with pytest.raises(BackboneError, match=r"of another model: its patches are of 8 px"):
        load("demo_vit", str(tmp_path / "p8.safetensors"))


class Hub:
    """A stand-in for the hub: records requests, and returns the files it was made with."""

    def __init__(self, monkeypatch, token=None, **files):
        self.asked, self.files = [], files
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def download(self, repo, name):
        self.asked.append(f"{repo}/{name}")
        found = self.files.get(name.replace(".", "_"))
        if found is None:
            raise huggingface_hub.errors.EntryNotFoundError(f"404: {name}")
        if isinstance(found, Exception):
            raise found
        return str(found)


@pytest.fixture
def tiny_row(monkeypatch):
    """A gated model of demo_vit's make, as the registry would have it."""
    row = replace(
        find("demo_vit"), key="tiny", source="hf-hub:lab/Tiny", gated=True, licence="CC", file=None
    )
    monkeypatch.setattr(backbones, "NAMES", {"tiny": row})
    return row


def test_a_gated_model_without_a_token_stops_before_asking_anyone(tiny_row, monkeypatch, capsys):
    hub = Hub(monkeypatch, token=None)
    with pytest.raises(
        BackboneError, match=r"gated and there is no token. Accept .*co/lab/Tiny, run `hf auth"
    ):
        load("tiny", "hub")
    assert hub.asked == []
    assert (
        "licence CC, gated: accept it at https://huggingface.co/lab/Tiny" in capsys.readouterr().err
    )


def test_hub_weights_are_fetched_when_asked_and_read_as_local_ones(tiny_row, monkeypatch, tmp_path):
    state = load_file(checkpoints.PACKAGED / "demo_vit.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    hub = Hub(monkeypatch, token="t", pytorch_model_bin=tmp_path / "pytorch_model.bin")
    encoder = load("tiny", "hub")
    assert hub.asked == ["lab/Tiny/model.safetensors", "lab/Tiny/pytorch_model.bin"]
    assert torch.equal(encoder.vit.pos_embed, state["pos_embed"].float())
    load("tiny", "hf-hub:me/my-copy")
    assert hub.asked[-1] == "me/my-copy/pytorch_model.bin"
    hub.files.clear()
    with pytest.raises(BackboneError, match=r"has none of model.safetensors, pytorch_model.bin"):
        load("tiny", "hub")
    with pytest.raises(BackboneError, match="nothing is downloaded unasked"):
        load("tiny")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (huggingface_hub.errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (ConnectionError("no route\nto host"), r"cannot be fetched \(ConnectionError: no route\)"),
    ],
)
def test_a_hub_that_fails_is_said_with_the_way_out(tiny_row, monkeypatch, fault, said):
    Hub(monkeypatch, token="t", model_safetensors=fault)
    with pytest.raises(BackboneError, match=rf"hf-hub:lab/Tiny {said}.*give a local file"):
        load("tiny", "hub")


def test_real_weights_give_plain_timms_features(shared_data):
    """The ViT-S/14 by its row against timm alone, on ten real tiles."""
    from PIL import Image

    file = shared_data / "weights" / "dinov2_vits14_timm_fp16.safetensors"
    state = {k: v.float() for k, v in load_file(file).items()}
    images = sorted((shared_data / "tiles").rglob("*.[pj][np]g"))[::33][:10]
    tiles = torch.stack(
        [torch.from_numpy(np.array(Image.open(image).convert("RGB"))) for image in images]
    ).permute(0, 3, 1, 2)
    assert tiles.shape == (10, 3, 224, 224)

    plain = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    plain.load_state_dict(checkpoint_filter_fn(state, plain))
    mean, std = (torch.tensor(plain.default_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    encoder = load("dinov2-s14", str(file)).eval()
    with torch.no_grad():
        expected = plain((tiles / 255 - mean) / std)
        torch.testing.assert_close(encoder(tiles)[0], expected, rtol=1e-5, atol=1e-5)
        wrong_stats = plain(tiles[:1] / 255)
    assert not torch.allclose(wrong_stats, expected[:1], rtol=1e-2, atol=1e-2)
    assert cls_row_error(encoder) <= 1e-6
