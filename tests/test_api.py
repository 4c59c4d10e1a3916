"""The five functions give what the command line gives, and cost nothing until they are used."""

import subprocess
import sys
from inspect import signature

import h5py
import numpy as np
import pytest
import torch

import tapfm
from slides.errors import SettingsError, SlideError
from slides.grid import Grid
from slides.wsi.reader import Slide
from tapfm.cli import main
from tests.cohorts import write_cohort
from tests.conftest import ROOT

TINY = {"trainer.max_epochs": 1, "model.aggregator": "mean"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    config = write_cohort(folder)
    return folder, tapfm.fit(config, TINY)


def test_importing_is_light():
    code = "import sys, tapfm; assert not {'torch', 'timm', 'slides'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="has no attribute 'openslide'"):
        _ = tapfm.openslide
    for name in tapfm.__all__:
        assert getattr(tapfm, name).__doc__
        hints = signature(getattr(tapfm, name))
        if name in ("features", "fit", "load_encoder", "open_slide", "predict"):
            assert hints.return_annotation is not hints.empty
            assert all(each.annotation is not each.empty for each in hints.parameters.values())


def test_a_slide_and_its_tiles(small_slide):
    path = small_slide("one.tif", mpp=0.25)
    slide = tapfm.open_slide(path, tile_px=32, mpp=0.5)
    assert (slide.name, slide.mpp, slide.side0) == ("one", 0.25, 64)
    assert slide.coords0.shape == (len(slide), 2)
    chunks = list(slide.chunks(7))
    assert [len(each) for each in chunks[:-1]] == [7] * (len(chunks) - 1)
    tiles = torch.cat(chunks).numpy().transpose(0, 2, 3, 1)
    assert len(tiles) == len(slide)
    last = len(slide) - 1
    with Slide(path) as whole:
        expected = whole.read(*slide.coords0[last].tolist(), Grid(32, 0.5))
    np.testing.assert_array_equal(slide.tile(last), expected)
    np.testing.assert_array_equal(tiles[last], expected)
    with pytest.raises(IndexError):
        slide.tile(len(slide))


def test_features_are_those_of_the_command_line(run, tmp_path):
    folder, trained = run
    path, model = folder / "slides" / "s0.tif", trained / "best.safetensors"
    found = tapfm.features(path, model, chunk=5)
    job = ["features", str(path), "--model", str(model), "--out", str(tmp_path), "--name", "x"]
    assert main(job) == 0
    (written,) = tmp_path.rglob("features_x/s0.h5")
    with h5py.File(written) as file:
        np.testing.assert_allclose(found.features, file["features"][:], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found.coords0, file["coords"][:])
        np.testing.assert_allclose(found.scores, file["scores"][:], rtol=1e-5, atol=1e-6)
    encoder = tapfm.load_encoder(model)
    with Slide(path) as slide, torch.no_grad():
        tile = slide.read(*found.coords0[3].tolist(), Grid(32, 0.5))
        z_CD, _ = encoder(torch.from_numpy(tile.copy()).permute(2, 0, 1)[None])
    np.testing.assert_allclose(z_CD[0], found.features[3], rtol=1e-4, atol=1e-4)


def test_fit_and_predict(run, tmp_path):
    folder, trained = run
    assert trained.parent == folder / "runs"
    assert (trained / "best.safetensors").is_file()
    slides = [folder / "slides" / "s0.tif", folder / "slides" / "s1.svs"]
    table = tapfm.predict(slides, trained / "best.safetensors", out=tmp_path)
    assert list(table.slide_id) == ["s0", "s1"]
    assert {"p_EGFR", "p_KRAS"} <= {*table.columns}
    assert (tmp_path / "s0_weights.h5").is_file()
    assert tapfm.fit(folder / "config.yaml", TINY) == trained  # finished: nothing is done again


def test_faults_are_the_programs(tmp_path, run):
    (tmp_path / "bad.tif").write_bytes(b"no slide")
    with pytest.raises(SlideError, match="bad"):
        tapfm.open_slide(tmp_path / "bad.tif")
    with pytest.raises(SlideError, match="bad: none could be predicted"):
        tapfm.predict([tmp_path / "bad.tif"], run[1] / "best.safetensors")
    with pytest.raises(SettingsError, match="uny"):
        tapfm.load_encoder("uny")
