"""Every row builds, to the digit; weights load strictly or are refused with a reason."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from tapfm.backbones import BACKBONES, ROWS, BackboneError, build, find, load


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_row_is_the_model(row):
    """On the meta device: no memory, no download."""
    with torch.device("meta"):
        vit = build(row)
    assert sum(p.numel() for p in vit.parameters()) == row.parameters
    assert vit.num_prefix_tokens == row.prefix_tokens
    assert vit.embed_dim == row.width


def test_names_are_forgiving_and_wrong_ones_listed():
    assert find("H-optimus-0") is BACKBONES["h_optimus_0"]
    with pytest.raises(BackboneError, match="'resnet50' is none of demo_vit, "):
        find("resnet50")


def test_demo_weights_ship_and_are_small():
    from tapfm.backbones import PACKAGED

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
    with pytest.raises(BackboneError, match=r"neither a .safetensors file nor a folder"):
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


def test_real_weights_give_plain_timms_features(shared_data):
    """Registry, normalisation and tap against timm alone, on a real tile."""
    from PIL import Image

    file = shared_data / "weights" / "dinov2_vits14_timm_fp16.safetensors"
    state = {k: v.float() for k, v in load_file(file).items()}
    image = next((shared_data / "tiles").rglob("*.png"), None) or next(
        (shared_data / "tiles").rglob("*.jpg")
    )
    tile = torch.frombuffer(
        bytearray(Image.open(image).convert("RGB").tobytes()), dtype=torch.uint8
    )
    tile = tile.view(1, 224, 224, 3).permute(0, 3, 1, 2)

    plain = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224).eval()
    plain.load_state_dict(checkpoint_filter_fn(state, plain))
    mean, std = (torch.tensor(plain.default_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    encoder = load("dinov2_vits14", str(file)).eval()
    with torch.no_grad():
        expected = plain((tile / 255 - mean) / std)
        torch.testing.assert_close(encoder(tile)[0], expected, rtol=1e-4, atol=1e-4)
        wrong_stats = plain(tile / 255)
    assert not torch.allclose(wrong_stats, expected, rtol=1e-2, atol=1e-2)
