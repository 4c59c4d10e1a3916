"""`tapfm.planning.doctor` passes a sound installation, and reports each fault."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tapfm.encoders.backbones import find
from tapfm.planning import doctor
from tapfm.planning.doctor import cls_row_error, run_doctor
from tests.tiny import MAKES, tiny_encoder


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


def test_a_model_without_cls_is_well_without(capsys):
    assert run_doctor("swin_t", "random") == 0
    assert "learned attention only" in capsys.readouterr().out


def test_it_says_licence_gate_and_who_means_something_else(monkeypatch, capsys):
    encoder = tiny_encoder("cls+mean", dtype=torch.float32).eval()
    facts = {k: getattr(find("virchow2"), k) for k in ("source", "licence", "gated", "note")}
    encoder.row = replace(encoder.row, **facts)
    monkeypatch.setattr(doctor, "load", lambda *_: encoder)
    assert run_doctor("tiny") == 0
    said = capsys.readouterr().out
    for text in ("CC-BY-NC-ND-4.0", "huggingface.co/paige-ai/Virchow2", "STAMP", "48 numbers"):
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


def test_a_broken_openslide_is_said(monkeypatch, capsys):
    import openslide

    def broken(_path):
        raise openslide.OpenSlideError("cannot open")

    monkeypatch.setattr(openslide, "OpenSlide", broken)
    assert run_doctor() == 1
    said = capsys.readouterr().out
    assert "FAILED: OpenSlideError: cannot open" in said
    assert "openslide-bin" in said
