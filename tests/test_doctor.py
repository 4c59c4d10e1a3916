"""`tapfm.doctor` finds a sound installation sound, and each fault it is for a fault."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import MAKES, tiny_encoder

from tapfm import doctor
from tapfm.backbones import build, find
from tapfm.doctor import cls_row_error, fingerprint, known_tiles, run_doctor


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_this_installation(capsys):
    assert run_doctor() == 0
    said = capsys.readouterr().out
    for text in ("torch ", "openslide library", "cores", "the pixels written", "All is well."):
        assert text in said


def test_a_model(capsys):
    assert run_doctor("demo_vit", "random") == 0
    said = capsys.readouterr().out
    for text in ("1,295,872", "CLS row", "at most 1e-05 is right", "fingerprint"):
        assert text in said


def test_weights_of_another_model(capsys, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"norm.weight": torch.zeros(3)}, path)
    assert run_doctor("demo_vit", str(path)) == 2
    assert "weights are of another model" in capsys.readouterr().err
    assert run_doctor("no_such_model") == 2
    assert "'no_such_model' is none of" in capsys.readouterr().err


@pytest.mark.parametrize("make", MAKES)
def test_cls_row_is_right_for_every_make(make):
    encoder = tiny_encoder(make, dtype=torch.float32).eval()
    fused = encoder.vit.blocks[-1].attn.fused_attn
    assert cls_row_error(encoder) <= doctor.CLS_TOLERANCE
    assert encoder.vit.blocks[-1].attn.fused_attn == fused


@pytest.mark.parametrize("fault", ["scale", "row", "nan"])
def test_a_wrong_cls_row_is_found(fault, monkeypatch, capsys):
    encoder = tiny_encoder(dtype=torch.float32).eval()
    take = encoder.tap.take_row
    if fault == "scale":
        encoder.tap.scale *= 1.01
    elif fault == "row":
        monkeypatch.setattr(encoder.tap, "take_row", lambda: take().roll(1, -1))
    else:
        torch.nn.init.constant_(encoder.vit.blocks[-1].norm1.weight, float("nan"))
    assert cls_row_error(encoder) > doctor.CLS_TOLERANCE
    monkeypatch.setattr(doctor, "load", lambda *_: encoder)
    assert run_doctor("tiny") == 1
    assert "FAILED" in capsys.readouterr().out


def test_fingerprint_is_of_the_weights_and_not_of_the_arithmetic():
    first = fingerprint(tiny_encoder(seed=0).eval())
    assert first == fingerprint(tiny_encoder(seed=0).eval())
    assert first != fingerprint(tiny_encoder(seed=1).eval())
    unfused = tiny_encoder(seed=0).eval()
    for block in unfused.vit.blocks:
        block.attn.fused_attn = False
    assert first == fingerprint(unfused)
    changed = tiny_encoder(seed=0).eval()
    with torch.no_grad():
        changed.vit.blocks[1].mlp.fc1.weight *= 1.01
    assert first != fingerprint(changed)


def test_fingerprint_is_taken_in_float64():
    """In float32 a number near the edge of its rounding would differ between machines."""
    encoder = tiny_encoder(dtype=torch.float32).eval()
    fingerprint(encoder)
    assert {p.dtype for p in encoder.parameters()} == {torch.float64}


def test_fingerprint_tells_normalisation():
    """Another mean must show."""
    from tapfm.backbones import Encoder

    row = find("demo_vit")
    torch.manual_seed(0)
    vit = build(row).eval()
    encoder = Encoder(vit, row)
    first = fingerprint(encoder)
    encoder.mean += 1
    assert fingerprint(encoder) != first


def test_known_tiles_are_the_same_everywhere():
    tiles = known_tiles(2, 113)
    assert tiles.shape == (2, 3, 113, 113)
    assert tiles.dtype == torch.uint8
    assert not torch.equal(tiles[0], tiles[1])
    assert tiles[0, 0, 0, :3].tolist() == [64, 64, 64]
    x, y = 50, 31  # by hand: (2500 + 3 * 961 + 2 * 1550) // 61 + 37 = 176, 176 % 128 = 48
    assert tiles[0, 1, y, x] == 48 + 64 + 64 * ((50 // 16 + 31 // 16) % 2)


def test_a_broken_openslide_is_said(monkeypatch, capsys):
    import openslide

    def broken(_path):
        raise openslide.OpenSlideError("cannot open")

    monkeypatch.setattr(openslide, "OpenSlide", broken)
    assert run_doctor() == 1
    said = capsys.readouterr().out
    assert "FAILED: OpenSlideError: cannot open" in said
    assert "openslide-bin" in said
