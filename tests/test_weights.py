"""Weights are those that were written, or are refused: no damaged number predicts."""

import json
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from slides.errors import SettingsError
from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.slide_model import model as models
from tapfm.slide_model.plain_encoder import load_encoder
from tapfm.weights import CheckpointError, read_tensors, write_weights

STATE = {
    "b": torch.arange(6.0).reshape(2, 3).bfloat16(),
    "a": torch.tensor(7),
    "mask": torch.tensor(-torch.inf),
}


@pytest.fixture
def saved(tmp_path):
    """A saved model, all of whose encoder is in the file."""
    torch.manual_seed(0)
    config = models.ModelConfig("demo_vit", "tapfm_gated", ("x",), 32, 0.25)
    model = models.SlideModel(config, backbones.load("demo_vit", tile_px=32))
    path = tmp_path / "best.safetensors"
    models.save(model, path, fingerprint=models.adapted_fingerprint(model), epoch=3)
    return path


def without_hash(path, **changed):
    """Rewrite a file as version 0.1 did."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["tapfm"])
    del header["sha256"]
    save_file(load_file(path), path, {"tapfm": json.dumps({**header, **changed})})


def test_what_is_written_is_read_and_the_bytes_are_the_same_each_time(tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(6)]
    for path in files:
        write_weights(path, STATE, "tapfm", {"who": "é", "share": 0.1}, format="pt", z="1")
        for key, value in read_tensors(path).items():
            assert torch.equal(value, STATE[key])
            assert value.dtype == STATE[key].dtype
    assert len({path.read_bytes() for path in files}) == 1


@pytest.mark.parametrize("seed", range(8))
def test_any_changed_byte_is_noticed(tmp_path, seed):
    path, draw = tmp_path / "a.safetensors", random.Random(seed)
    write_weights(path, {"w": torch.randn(500)}, "tapfm", {"mpp": 0.25})
    read_tensors(path)  # is remembered, but not for other bytes
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    with pytest.raises((CheckpointError, SafetensorError)):
        read_tensors(path)


def test_zeros_in_the_middle_of_a_model_are_refused_by_every_verb(saved, tmp_path, capsys):
    data = bytearray(saved.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 65_536] = bytes(65_536)
    saved.write_bytes(data)
    for verb in (["predict", "slide.tif"], ["export"], ["heatmap", "slide.tif"]):
        assert main([*verb, "--model", str(saved), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert f"{saved}: damaged" in said
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_refused_whoever_wrote_them(saved, tmp_path):
    state = load_file(saved)
    name = next(key for key in state if "attn.qkv.weight" in key)
    state[name][5, 5] = torch.nan
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["tapfm"])
    write_weights(saved, state, "tapfm", header)
    with pytest.raises(CheckpointError, match=rf"1 of its \d+ tensors .*not finite.*{name}"):
        models.load(saved)
    weights = backbones.load("demo_vit", "random").vit.state_dict()
    weights["norm.bias"][0] = torch.inf
    for each in ("base.safetensors", "base.pt"):
        path = tmp_path / each
        (save_file if each.endswith("s") else torch.save)(weights, path)
        with pytest.raises(SettingsError, match=r"not finite.*norm\.bias"):
            backbones.load("demo_vit", str(path))


def test_files_of_older_versions_load_and_their_fingerprint_is_compared(saved):
    expected = load_file(saved)
    without_hash(saved)
    found = models.load(saved).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    load_encoder(str(saved))
    state = load_file(saved)
    state["encoder.vit.norm.weight"] *= 1.5
    with safe_open(saved, "pt") as file:
        save_file(state, saved, file.metadata())
    with pytest.raises(CheckpointError, match=r"its encoder has the fingerprint .* damaged"):
        load_encoder(str(saved))


@pytest.mark.parametrize(
    "changed",
    [
        {"labels": "x"}, {"labels": 5}, {"tile_px": "32"}, {"tile_px": None}, {"mpp": []},
        {"aggregator": 3}, {"strategy": []}, {"task": None}, {"features": 1}, {"model": {}},
        {"strategy": {"name": "lora", "rank": -1}}, {"aggregator": {}}, {"task": {}},
        {"task": {"name": "multiclass", "classes": 1}}, {"features": {"dim": "a"}},
        {"tile_px": -32}, {"precision": 7}, {"base_digest": 5},
    ],
)  # fmt: skip
def test_a_header_that_tapfm_does_not_write_is_one_clear_error(saved, changed, capsys):
    without_hash(saved, **changed)
    assert main(["export", "--model", str(saved), "--out", str(saved.parent / "out")]) == 2
    said = capsys.readouterr().err
    assert "tapfm: " in said
    assert len(said.splitlines()) <= 2
