"""An exported graph gives the model's numbers, by its README's lines, on any number of tiles."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tapfm.cli import main
from tapfm.encoders.backbones import BackboneError, load
from tapfm.inference import runtimes
from tapfm.inference.export import FILES, provenance_of
from tapfm.inference.runtime_texts import fast_pipeline
from tapfm.slide_model import model as models
from tapfm.slide_model.aggregators import AGGREGATORS, TILES
from tests.bags import bag_of
from tests.conftest import stained_picture

TILE = 32
TILES_OF_A_SLIDE = 5


def slide_model(aggregator="tapfm_gated", strategy="full", weights=None):
    """A model whose trained parts are not as they started, so that what is left out shows."""
    torch.manual_seed(0)
    config = models.ModelConfig(
        "demo_vit", aggregator, ("EGFR", "KRAS", "TP53"), TILE, 0.5, weights=weights,
        strategy={"name": strategy},
    )  # fmt: skip
    model = models.SlideModel(config, load("demo_vit", weights, tile_px=TILE))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape)
        model.aggregator.scale_D.fill_(0.7) if aggregator != TILES else None
    return model.eval()


def saved(folder, **how):
    model = slide_model(**how)
    models.save(model, folder / "best.safetensors", mpp=0.5)
    return model, str(folder / "best.safetensors")


def tiles_of(folder):
    """Real tiles, a corner of each: (T, 3, TILE, TILE) uint8."""
    files = sorted((folder / "tiles" / "images").iterdir())
    files = files[:: len(files) // TILES_OF_A_SLIDE][:TILES_OF_A_SLIDE]
    pictures = [np.asarray(Image.open(each).convert("RGB"))[:TILE, :TILE] for each in files]
    return np.stack(pictures).transpose(0, 3, 1, 2)


@pytest.fixture
def made_tiles():
    picture = stained_picture(TILE * TILES_OF_A_SLIDE, TILE)
    return np.stack(np.split(picture, TILES_OF_A_SLIDE, axis=1)).transpose(0, 3, 1, 2)


def run_readme(folder, tiles):
    names = {"tiles": np.array(tiles)}
    for block in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S):
        exec(block, names)
    return names


def assert_same(names, model, tiles):
    tiles_TP = torch.from_numpy(np.array(tiles))
    with torch.no_grad():
        z_TD, score_T = model.encode(tiles_TP)
        output = model(bag_of(tiles_TP), chunk=2)
        expected = {
            "features": z_TD, "scores": score_T, "weights": output.weights_T,
            "predictions": model.task.predict(output.logits_K),
        }  # fmt: skip
    for name, value in expected.items():
        found = names[name][0] if name == "weights" else names[name]
        np.testing.assert_allclose(np.asarray(found), value, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def exported_onnx(tmp_path_factory):
    """A model whose prompts no timm weights can hold, as ONNX."""
    pytest.importorskip("onnxruntime", reason="needs `pip install 'tapfm[onnx]'`")
    folder = tmp_path_factory.mktemp("onnx")
    model, path = saved(folder, strategy="vpt_deep")
    assert main(["export", "--model", path, "--format", "onnx", "--out", str(folder / "o")]) == 0
    return model, folder / "o"


def test_onnx_on_made_tiles(exported_onnx, made_tiles):
    model, folder = exported_onnx
    assert {path.name for path in folder.iterdir()} == set(FILES["onnx"])
    assert_same(run_readme(folder, made_tiles), model, made_tiles)
    facts = json.loads((folder / "provenance.json").read_text())
    assert (facts["format"], facts["opset"], facts["precision"]) == ("onnx", 18, "fp32")
    assert 0 < facts["max_difference"] < 1e-4
    assert facts["fingerprint"] is None  # nothing that timm could load


def test_onnx_on_real_tiles(exported_onnx, shared_data):
    model, folder = exported_onnx
    tiles = tiles_of(shared_data)
    assert tiles.shape == (TILES_OF_A_SLIDE, 3, TILE, TILE)
    assert_same(run_readme(folder, tiles), model, tiles)


def test_onnx_says_its_opset_and_takes_any_number_of_tiles(exported_onnx, made_tiles):
    import onnx
    import onnxruntime

    model, folder = exported_onnx
    graph = onnx.load(folder / "slide.onnx")
    assert {each.domain: each.version for each in graph.opset_import}[""] == runtimes.OPSET
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    session = onnxruntime.InferenceSession(folder / "slide.onnx")
    for count in (1, 5):
        tiles_TP = torch.from_numpy(np.array(made_tiles[:count]))
        (found,) = session.run(None, {"tiles": tiles_TP.float().numpy()})
        with torch.no_grad():
            expected = model.task.predict(model(bag_of(tiles_TP), chunk=9).logits_K)
        np.testing.assert_allclose(found, expected[None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_torchscript_of_every_aggregator(name, tmp_path, made_tiles, capsys):
    model, path = saved(tmp_path, aggregator=name, strategy="lora")
    out = tmp_path / "out"
    assert main(["export", "--model", path, "--format", "torchscript", "--out", str(out)]) == 0
    names = run_readme(out, made_tiles)
    if model.aggregator.uses_coords:
        assert f"aggregator {name}: looks at where tiles lie" in capsys.readouterr().err
        assert not (out / "aggregator.pt").exists()
        assert "predictions" not in names
    else:
        assert_same(names, model, made_tiles)


@pytest.mark.parametrize("strategy", ["pathotune", "hiadapter", "adaptformer", "dora"])
def test_torchscript_of_what_timm_cannot_hold(strategy, tmp_path, made_tiles):
    """Adapters stay as they are; no number of tiles is written down in the graph."""
    model, path = saved(tmp_path, aggregator="mean", strategy=strategy)
    out = tmp_path / "out"
    assert main(["export", "--model", path, "--format", "torchscript", "--out", str(out)]) == 0
    assert_same(run_readme(out, made_tiles), model, made_tiles)


def test_a_model_of_labelled_tiles_names_each_tile(tmp_path, made_tiles):
    model, path = saved(tmp_path, aggregator=TILES)
    out = tmp_path / "out"
    assert main(["export", "--model", path, "--format", "torchscript", "--out", str(out)]) == 0
    with torch.no_grad():
        z_TD, _ = model.encode(torch.from_numpy(np.array(made_tiles)))
        expected = model.task.predict(model.aggregator(z_TD))
    found = run_readme(out, made_tiles)["predictions"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spoilt", [lambda z: z * 1.001, lambda z: z[:1], lambda z: z * np.nan])
def test_a_file_that_gives_other_numbers_is_refused(spoilt, tmp_path):
    model = slide_model()
    graphs = runtimes.parts(model.encoder, model, whole=False)

    def run(tiles):
        with torch.no_grad():
            z_TD, score_T = model.encoder(torch.from_numpy(tiles))
        return [spoilt(z_TD.numpy()), score_T.numpy()]

    (path := tmp_path / "encoder.onnx").write_bytes(b"0")
    with pytest.raises(BackboneError, match="gives other numbers than the model, by"):
        runtimes.check(path, run, graphs["encoder"], graphs, TILE)
    assert not path.exists()
    path.write_bytes(b"0")
    with pytest.raises(BackboneError, match="does not run on 1 tiles: division by zero"):
        runtimes.check(path, lambda tiles: 1 / 0, graphs["encoder"], graphs, TILE)


def test_peft_loads_the_adapter_by_the_readme(tmp_path, made_tiles):
    pytest.importorskip("peft", reason="needs `pip install peft`")
    model, path = saved(tmp_path, strategy="lora")
    out = tmp_path / "out"
    assert main(["export", "--model", path, "--format", "peft", "--out", str(out)]) == 0
    assert {each.name for each in out.iterdir()} == set(FILES["peft"])
    names = run_readme(out, made_tiles)
    tiles_TP = torch.from_numpy(np.array(made_tiles))
    with torch.no_grad():
        found = names["model"](model.encoder.normalise(tiles_TP))
        expected, plain = model.encode(tiles_TP)[0], load("demo_vit", tile_px=TILE)(tiles_TP)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2  # the adapter does something


@pytest.mark.parametrize(
    ("how", "given", "said"),
    [
        ({"strategy": "full"}, ["--format", "peft"], "no LoRA or DoRA to write"),
        ({"strategy": "lora", "weights": "random"}, ["--format", "peft"], "was random and is in"),
        ({}, ["--format", "torchscript", "--weights", "hub"], "has its own weights"),
    ],
)
def test_faults(how, given, said, tmp_path, capsys):
    _, path = saved(tmp_path, **how)
    assert main(["export", "--model", path, "--out", str(tmp_path / "out"), *given]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_faults_of_a_plain_model(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["export", "--model", "demo_vit", "--format", "peft", *out]) == 2
    assert "demo_vit has no adapter to write" in capsys.readouterr().err
    assert main(["export", "--model", "demo_vit", "--format", "torchscript", *out]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "encoder.pt", "provenance.json", "README.md",
    }  # fmt: skip
    assert main(["export", "--model", "demo_vit", *out]) == 2
    assert "has an export of --format torchscript" in capsys.readouterr().err


STATEMENTS = re.compile(
    r"""PipelineName\ ".+" | PipelineDescription\ ".+" | PipelineInputData\ (?P<data>\w+)\ ".+"
    | PipelineOutputData\ \w+\ (?P<output>\w+)\ \d+ | ProcessObject\ (?P<object>\w+)\ \w+
    | Renderer\ (?P<renderer>\w+)\ \w+ | View\ \w+(?P<views>(\ \w+)+)
    | Input\ \d+\ (?P<input>\w+)(\ \d+)? | Attribute\ (?P<key>[\w-]+)\ (?P<value>.+)""",
    re.X,
)


def test_the_fast_pipeline_has_the_documented_form():
    """FAST's text pipelines: known statements, every input named above, every view a renderer."""
    model = slide_model()
    facts = {**provenance_of(model.encoder, {}, None, "onnx"), "name": 'a "b"', "title": "t"}
    facts |= {"mpp": 0.5, "predictions": "p_EGFR, p_KRAS"}
    known, renderers, attributes = set(), set(), {}
    for line in fast_pipeline(facts).splitlines():
        if not line or line.startswith("#"):
            continue
        said = STATEMENTS.fullmatch(line)
        assert said, line
        assert said["input"] is None or said["input"] in known, line
        assert {*(said["views"] or "").split()} <= renderers, line
        known |= {said["data"], said["object"]} - {None}
        renderers |= {said["renderer"]} - {None}
        attributes[said["key"]] = said["value"]
    assert {"WSI", "tissue", "tiles", "network", "stitcher"} == known
    assert attributes["patch-size"] == f"{TILE} {TILE}"
    assert attributes["patch-magnification"] == "20"
    assert attributes["model"] == '"$CURRENT_PATH$/slide.onnx"'
