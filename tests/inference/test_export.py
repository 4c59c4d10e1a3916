"""The exported model is the adapted one, and loads by the lines in its README."""

import functools
import json
import re

import pytest
import timm
import torch
from torch import nn

from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.encoders.registry import ROWS
from tapfm.inference import export
from tapfm.inference.export import arguments, readme, to_python
from tapfm.slide_model import model as models
from tapfm.slide_model import plain_encoder
from tests.cohorts import LABELS

TILE = 32


def saved(folder, model="demo_vit", **facts):
    torch.manual_seed(0)
    model_config = models.ModelConfig(model, "tapfm_gated", LABELS, TILE, 0.25)
    whole = models.SlideModel(model_config, backbones.load(model, "random", tile_px=TILE))
    models.save(whole, folder / "best.safetensors", **facts)
    return whole.encoder.eval(), folder / "best.safetensors"


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.mark.parametrize("model", ["demo_vit", "demo-vit-cls-mean"])
def test_the_readme_loads_it(model, tmp_path, capsys):
    """The lines as they stand, on float pixels through timm's transform."""
    encoder, path = saved(tmp_path, model, cohort_sha256="c0ffee", commit="abc1234")
    out = tmp_path / 'it\'s "exported"'
    assert main(["export", "--model", str(path), "--out", str(out)]) == 0
    blocks = python_blocks((out / "README.md").read_text())
    tiles = torch.randint(0, 256, (3, 3, TILE, TILE), dtype=torch.uint8)
    from PIL import Image

    names = {}
    exec(blocks[0], names)
    pictures = [Image.fromarray(tile.permute(1, 2, 0).numpy()) for tile in tiles]
    names["tiles"] = torch.stack([names["transform"](picture) for picture in pictures])
    with torch.no_grad():
        found = names["model"](names["tiles"])
        if model != "demo_vit":
            exec(blocks[1], names)
            found = names["feature"]
        expected = encoder(tiles)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (local,) = [block for block in blocks if "local-dir" in block]
    exec(local, names)
    with torch.no_grad():
        again = names["model"].eval()(names["tiles"])
    torch.testing.assert_close(again, expected[:, : again.shape[1]], rtol=1e-5, atol=1e-5)
    data = timm.data.resolve_model_data_config(names["model"])
    assert data["input_size"] == (3, TILE, TILE)
    assert tuple(data["mean"]) == encoder.row.stats[0]
    assert data["crop_pct"] == 1.0


def test_provenance(tmp_path, capsys):
    _, path = saved(tmp_path, cohort_sha256="c0ffee", commit="abc1234", stain="macenko")
    out = tmp_path / "exported"
    assert main(["export", "--model", str(path), "--out", str(out)]) == 0
    facts = json.loads((out / "provenance.json").read_text())
    assert (facts["model"], facts["licence"], facts["mpp"]) == ("demo_vit", "Apache-2.0", 0.25)
    assert facts["adapted"]["cohort_sha256"] == "c0ffee"
    assert facts["adapted"]["labels"] == list(LABELS)
    assert len(facts["fingerprint"]) == 16
    assert "per pixel, their stains normalised by macenko." in (out / "README.md").read_text()
    assert "licence Apache-2.0, which goes with the weights" in capsys.readouterr().err
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tapfm"])["fingerprint"] == facts["fingerprint"]
        assert not any(key.startswith(("encoder.", "aggregator.")) for key in file.keys())  # noqa: SIM118


def test_a_plain_model_is_exported_too(tmp_path):
    assert main(["export", "--model", "demo_vit", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "provenance.json").read_text())
    assert facts["adapted"] is None
    assert "microns per pixel. Fingerprint" in (tmp_path / "README.md").read_text()
    assert (facts["tile_px"], facts["mpp"]) == (112, 0.5)


@pytest.mark.parametrize("name", export.FILES["timm"])
def test_what_was_not_exported_stays(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    arguments = ["export", "--model", "demo_vit", "--out"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert f"{tmp_path}: has {name} from another source" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"
    for _ in range(2):  # an earlier export makes room
        assert main([*arguments, str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(export.FILES["timm"])


EXPORTED = [row for row in ROWS if row.feature != "head"]  # timm has no heads: refused


@pytest.mark.parametrize("row", EXPORTED, ids=lambda row: row.key)
def test_every_rows_readme_builds_its_model(row, tmp_path, monkeypatch):
    """The spelt-out call makes the row's model: the same parameters, at the same size."""
    if not timm.is_model(row.arch) or row.parameters > 4e8:
        pytest.skip("not in this timm, or of the same make as a smaller one")
    with torch.device("meta"):
        encoder = backbones.Encoder(backbones.build(row), row)
    provenance = {"adapted": None, "fingerprint": "f" * 16, "mpp": row.mpp}
    block = python_blocks(readme(encoder, provenance, tmp_path))[0]
    call = re.search(r"timm\.create_model\((.*), checkpoint_path", block).group(1)
    with torch.device("meta"):
        vit = eval(
            f"timm.create_model({call})", {"timm": timm, "torch": torch, "functools": functools}
        )
    assert sum(p.numel() for p in vit.parameters()) == row.parameters
    shapes = {k: v.shape for k, v in encoder.vit.state_dict().items()}
    assert {k: v.shape for k, v in vit.state_dict().items()} == shapes


def test_kwargs_of_the_large_rows_can_be_spelt():
    for row in ROWS:
        for value in row.kwargs.values():
            assert isinstance(to_python(value), str)
    with pytest.raises(TypeError, match="has no Python name yet"):
        to_python(object())
    assert to_python(nn.SiLU) == "torch.nn.SiLU"


def test_more_than_timm_is_refused(tmp_path, monkeypatch):
    """Weights with an adapter still in them are no timm model, and are not exported as one."""
    _, path = saved(tmp_path)
    whole = models.load(path)
    whole.encoder.vit.blocks[0].attn.proj.extra = nn.Parameter(torch.zeros(3))
    monkeypatch.setattr(plain_encoder, "load", lambda _: whole)
    with pytest.raises(backbones.BackboneError, match=r"unknown 1 \(blocks.0.attn.proj.extra\)"):
        export.run_export(str(path), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--weights", "hub"], "has its own weights"),
        ([], "there is no such file"),
    ],
)
def test_faults(given, said, tmp_path, capsys):
    _, path = saved(tmp_path)
    path = path if given else tmp_path / "none.safetensors"
    assert main(["export", "--model", str(path), "--out", str(tmp_path / "out"), *given]) == 2
    assert said in capsys.readouterr().err


def test_arguments_hold_the_tile_size():
    encoder = backbones.load("demo_vit", tile_px=48)
    assert arguments(encoder)["img_size"] == 48
