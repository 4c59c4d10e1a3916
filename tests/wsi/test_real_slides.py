"""Index, predict and heatmap run on every real slide at hand, whole IHC slides included.

The encoder's weights are random: the test shows that real files pass through, not that results
are good.
"""

import json
import re

import pandas as pd
import pytest
import torch

from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.slide_model import model as models

MPP = 2.0  # coarser than every scan, so that one model reads them all
OPENS = {  # slide: microns per pixel to give where it does not say
    "atlas/PDACtc3_20x.tif": None,
    "atlas/EROS_20x.tif": None,
    "atlas/BS9_HE2_20x.tif": None,
    "atlas/BS25_SYN_10x.tif": None,
    "atlas/LNMET_CK.tif": 0.5,
    "fixtures/CMU-1-Small-Region.svs": None,
    "fixtures/tcga-cr-7395-01a-01-ts1.svs": 0.5,
}
BROKEN = {
    "fixtures/unreadable.svs": "unreadable",
    "fixtures/unopenable.tiff": "unopenable",
    "fixtures/broken.svs": "broken",
    "fixtures/smalltif.tif": "smalltif",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    model_config = models.ModelConfig("demo_vit", "tapfm_gated", ("KRAS",), 112, MPP)
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    models.save(models.SlideModel(model_config, backbones.load("demo_vit", "random")), path)
    return path


@pytest.mark.parametrize("slide", OPENS)
def test_heatmap_of_a_real_slide(slide, model, shared_data, tmp_path):
    path, mpp = shared_data / "slides" / slide, OPENS[slide]
    given = ["--slide-mpp", str(mpp)] if mpp else []
    out = ["--model", str(model), "--out", str(tmp_path), "--workers", "1"]
    assert main(["heatmap", str(path), *out, *given]) == 0
    assert pd.read_csv(tmp_path / "predictions.csv")["p_KRAS"].between(0, 1).all()
    features = json.loads((tmp_path / f"{path.stem}.geojson").read_text())["features"]
    assert len(features) > 5
    assert (tmp_path / f"{path.stem}.png").stat().st_size > 20_000


def test_index_of_all_real_slides(shared_data, tmp_path, capsys):
    slides = [str(shared_data / "slides" / slide) for slide, mpp in OPENS.items() if mpp is None]
    options = ["--out", str(tmp_path), "--mpp", str(MPP), "--workers", "0"]
    assert main(["index", *slides, *options]) == 0
    ledger = pd.read_csv(next(tmp_path.glob("*/ledger.csv")))
    assert len(ledger) == len(slides)
    assert (ledger["tiles"] > 0).all()
    assert set(ledger["status"]) == {"indexed"}


def test_each_broken_slide_has_its_own_error(shared_data, tmp_path, model, capsys):
    slides = [str(shared_data / "slides" / slide) for slide in BROKEN]
    arguments = ["predict", *slides, "--model", str(model), "--out", str(tmp_path)]
    assert main([*arguments, "--slide-mpp", "0.5"]) == 2
    faults = re.findall("tapfm: (.*)", capsys.readouterr().err)
    assert len(faults) == len(BROKEN)
    for name in BROKEN.values():  # as they are found, by any process
        assert any(f" {name}:" in fault for fault in faults)
    reasons = [fault.split(":", 2)[2] for fault in faults]
    assert len(set(reasons)) == len(reasons)


def test_a_slide_without_resolution_says_so(shared_data, tmp_path, model, capsys):
    slides = [str(shared_data / "slides" / slide) for slide, mpp in OPENS.items() if mpp]
    slides.append(str(shared_data / "slides" / "fixtures" / "boxes.tiff"))  # a 72 dpi default
    assert main(["predict", *slides, "--model", str(model), "--out", str(tmp_path)]) == 2
    output = capsys.readouterr().err
    for name in ("LNMET_CK", "tcga-cr-7395", "boxes"):
        assert name in output
    assert "352.778" in output
