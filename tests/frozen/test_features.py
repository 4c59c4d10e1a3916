"""Features are the encoder's, in TRIDENT's layout; a file is whole or absent, and kept if right."""

from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from slides.errors import SettingsError
from slides.files import WriteError
from slides.grid import Grid
from slides.streaming.chunks import read_tiles
from slides.tiling.index import index_slide
from slides.tiling.tissue import Tissue
from slides.wsi.reader import Slide
from tapfm.cli import main
from tapfm.data.feature_files import read_slide
from tapfm.encoders import backbones
from tapfm.encoders.fingerprint import fingerprint
from tapfm.frozen import features
from tapfm.frozen.features import Extraction, FeatureError
from tapfm.frozen.other_formats import write_slide
from tapfm.slide_model import model as models
from tests.cohorts import LABELS, write_cohort
from tests.conftest import stained_picture, write_pyramid

TAG = "20x_32px_0px_overlap"
CONFIG_SLIDES = 14


@pytest.fixture
def slide(tmp_path):
    return write_pyramid(tmp_path / "one.x.svs", stained_picture(811, 631), 0.25)


def extract(slide, out, *more):
    given = ["--model", "demo_vit", "--out", str(out), "--workers", "0", "--tile-px", "32"]
    return main(["features", str(slide), *given, *more])


def test_layout_is_tridents_and_numbers_are_the_encoders(slide, tmp_path, capsys):
    job = tmp_path / "job"
    assert extract(slide, job) == 0
    path = job / TAG / "features_demo_vit" / "one.x.h5"
    encoder = backbones.load("demo_vit", tile_px=32).eval()
    with Slide(slide) as opened:
        index = index_slide(opened, Grid(32, 0.5), Tissue())
        tiles = read_tiles(opened, index, None)
    with torch.no_grad():
        expected, scores = (each.numpy() for each in encoder(tiles))
    with h5py.File(path) as file, h5py.File(job / TAG / "patches" / "one.x_patches.h5") as patches:
        assert set(file) == {"features", "coords", "scores"}
        assert file["features"].dtype == np.float32
        np.testing.assert_allclose(file["features"][:], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file["scores"][:], scores, rtol=1e-4, atol=1e-5)
        assert np.ptp(expected, axis=0).max() > 0.1  # tiles differ: their order is tested
        np.testing.assert_array_equal(file["coords"][:], index.coords0)
        np.testing.assert_array_equal(file["coords"][:], patches["coords"][:])
        assert set(file["coords"].attrs) == set(patches["coords"].attrs)
        for key, value in patches["coords"].attrs.items():
            assert np.array_equal(file["coords"].attrs[key], value), key
        attrs = dict(file["features"].attrs)
    assert (attrs["encoder"], attrs["name"], attrs["licence"]) == (
        "demo_vit",
        "one.x",
        "Apache-2.0",
    )
    assert attrs["savetodir"] == str(path.parent)
    assert attrs["fingerprint"] == fingerprint(encoder)
    assert attrs["fingerprint"] in capsys.readouterr().out


def test_long_slides_are_stored_in_chunks_of_1024_rows(slide, tmp_path):
    encoder = backbones.load("demo_vit", "random", tile_px=32).eval()
    encoder.encode = lambda tiles, _: (torch.zeros(len(tiles), 128), torch.zeros(len(tiles)))
    with Slide(slide) as opened:
        index = index_slide(opened, Grid(32, 0.5), Tissue())
    long = type(index)(**{**vars(index), "coords0": np.zeros((2053, 2), np.int64),
                          "tissue_fraction": np.ones(2053, np.float32)})  # fmt: skip
    pixels = torch.zeros(2053, 3, 32, 32, dtype=torch.uint8)
    extraction = Extraction(encoder, "long", "f", chunk=501)
    extraction.write(tmp_path / "long.h5", pixels, long, Tissue())
    with h5py.File(tmp_path / "long.h5") as file:
        assert file["features"].shape == (2053, 128)
        assert file["features"].chunks == (1024, 128)
        assert file["coords"].chunks == (1024, 2)
    assert extraction.fault(tmp_path / "long.h5", long) is None


def test_half_precision_on_disk(slide, tmp_path):
    assert extract(slide, tmp_path / "a") == 0
    assert extract(slide, tmp_path / "b", "--dtype", "fp16") == 0
    a, b = (tmp_path / x / TAG / "features_demo_vit" / "one.x.h5" for x in "ab")
    with h5py.File(a) as full, h5py.File(b) as half:
        assert half["features"].dtype == np.float16
        np.testing.assert_allclose(half["features"][:], full["features"][:], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(
        features.read_features(b), features.read_features(a).half().float()
    )


def test_run_again_it_keeps_what_is_right_and_remakes_what_is_not(slide, tmp_path, capsys):
    job = tmp_path / "job"
    path = job / TAG / "features_demo_vit" / "one.x.h5"
    assert extract(slide, job) == 0
    made = path.stat().st_mtime_ns
    assert extract(slide, job, "--chunk", "3") == 0
    assert path.stat().st_mtime_ns == made
    assert "0 tiles encoded in fp32, 1 slides were there already" in capsys.readouterr().out
    assert extract(slide, job, "--dtype", "fp16") == 0  # other numbers
    with h5py.File(path) as file:
        assert file["features"].dtype == np.float16
    with h5py.File(path, "r+") as file:  # other tiles
        file["coords"][0] = 7
    assert extract(slide, job, "--dtype", "fp16") == 0
    with h5py.File(path) as file:
        assert file["coords"][0, 0] != 7
    path.write_bytes(path.read_bytes()[:999])  # cut short
    assert extract(slide, job, "--dtype", "fp16") == 0
    said = capsys.readouterr()
    for why in ("in other numbers", "of other tiles", "damaged"):
        assert f"one.x: the features there are {why}" in said.out + said.err
    with h5py.File(path) as file:
        assert np.isfinite(file["features"][:]).all()


def test_features_as_clam_and_stamp_lay_them_out(slide, tmp_path, capsys):
    job = tmp_path / "job"
    assert extract(slide, job, "--format", "trident", "clam", "stamp", "pt", "csv") == 0
    with h5py.File(job / TAG / "features_demo_vit" / "one.x.h5") as file:
        z_TD, coords0 = file["features"][:], file["coords"][:]
    clam, stamp = (job / TAG / f"features_demo_vit_{name}" for name in ("clam", "stamp"))
    with h5py.File(clam / "h5_files" / "one.x.h5") as file:
        np.testing.assert_array_equal(file["features"][:], z_TD)
        np.testing.assert_array_equal(file["coords"][:], coords0)
    z = torch.load(clam / "pt_files" / "one.x.pt", weights_only=True)
    np.testing.assert_array_equal(z, z_TD)
    plain = torch.load(job / TAG / "features_demo_vit_pt" / "one.x.pt", weights_only=True)
    np.testing.assert_array_equal(plain, z_TD)
    # as SlideChat reads a slide, and MOTCat the slides of a case
    table = pd.read_csv(job / TAG / "features_demo_vit_csv" / "one.x.csv").iloc[:, :512]
    np.testing.assert_allclose(table.to_numpy(), z_TD, rtol=1e-6)
    case = torch.cat([torch.load(clam / "pt_files" / f"{'one.x.svs'.removesuffix('.svs')}.pt")])
    assert case.shape == z_TD.shape
    with h5py.File(stamp / "one.x.h5") as file:
        np.testing.assert_array_equal(file["feats"][:], z_TD.astype(np.float16))
        np.testing.assert_allclose(file["coords"][:], coords0 * 0.25)
        assert dict(file.attrs) == {
            "extractor": "demo_vit", "unit": "um", "tile_size_um": 16.0, "tile_size_px": 32,
            "feat_type": "tile",
        }  # fmt: skip
    for folder, writer in ((clam, "CLAM"), (stamp, "STAMP")):
        found = read_slide(folder, "one.x", lambda: 0.25)
        assert found.writer == writer
        np.testing.assert_array_equal(found.coords0, coords0)
        assert (found.size0, found.step0) == (64, 64)


def test_features_beyond_half_precision_are_not_written_for_stamp(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.full((1, 2), 1e5, np.float32)
        file["features"].attrs["encoder"] = "big"
    with pytest.raises(SettingsError, match="s: features of big exceed 65504"):
        write_slide(["stamp"], tmp_path / "a.h5", SimpleNamespace(slide_id="s"))


def test_features_of_other_weights_are_not_overwritten(slide, tmp_path, capsys):
    job = tmp_path / "job"
    assert extract(slide, job) == 0
    path = job / TAG / "features_demo_vit" / "one.x.h5"
    before = path.read_bytes()
    assert extract(slide, job, "--weights", "random") == 2
    said = capsys.readouterr().err
    assert "one.x: " in said
    assert "features of other weights" in said
    assert path.read_bytes() == before
    assert extract(slide, job, "--weights", "random", "--name", "trial") == 0
    assert (job / TAG / "features_trial" / "one.x.h5").exists()


def test_features_of_another_program_are_not_overwritten(slide, tmp_path, capsys):
    job = tmp_path / "job"
    path = job / TAG / "features_demo_vit" / "one.x.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:  # as TRIDENT writes it
        file["features"] = np.ones((5, 128), np.float32)
        file["features"].attrs.update(encoder="demo_vit", name="one.x", savetodir="x")
        file["coords"] = np.zeros((5, 2), np.int64)
    before = path.read_bytes()
    assert extract(slide, job) == 2
    said = capsys.readouterr().err
    assert f"one.x: {path} was not written by tapfm" in said
    assert "Give another --name or --out" in said
    assert path.read_bytes() == before
    assert extract(slide, job, "--name", "ours") == 0


def test_an_adapted_encoder_has_a_folder_of_its_own(slide, tmp_path, capsys):
    torch.manual_seed(0)
    model_config = models.ModelConfig("demo_vit", "gated", LABELS, 32, 0.5)
    model = models.SlideModel(model_config, backbones.load("demo_vit", "random", tile_px=32))
    models.save(model, tmp_path / "best.safetensors", tissue={"min_area_um2": 1000.0})
    given = ["--model", str(tmp_path / "best.safetensors"), "--out", str(tmp_path / "job")]
    assert main(["features", str(slide), *given, "--workers", "0"]) == 0
    (path,) = (tmp_path / "job" / TAG).glob("features_demo_vit_*/one.x.h5")
    mark = fingerprint(model.encoder.eval())
    assert path.parent.name == f"features_demo_vit_{mark[:8]}"
    with Slide(slide) as opened:  # by the tissue it was trained with
        index = index_slide(opened, Grid(32, 0.5), Tissue(min_area_um2=1000.0))
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["coords"][:], index.coords0)
        assert file["features"].attrs["fingerprint"] == mark
    assert main(["features", str(slide), *given, "--tile-px", "48"]) == 2
    assert "was trained on tiles of 32 px, not 48" in capsys.readouterr().err


def test_a_cohort_and_its_bad_slide(tmp_path, capsys):
    config = write_cohort(tmp_path, on_error="skip", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "slides" / "s3.svs").write_text("no slide")
    arguments = ["features", "--config", str(config), "--model", "demo_vit"]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert "s3" in said.err
    folder = tmp_path / "index" / TAG / "features_demo_vit"
    assert len(list(folder.iterdir())) == CONFIG_SLIDES - 1
    assert f"{folder}: {CONFIG_SLIDES - 1} slides, 128 numbers a tile in fp32" in said.out
    assert main(arguments) == 2
    assert f"0 tiles encoded in fp32, {CONFIG_SLIDES - 1} slides" in capsys.readouterr().out


def test_nothing_half_written_stays(slide, tmp_path, monkeypatch):
    encoder = backbones.load("demo_vit", "random", tile_px=32).eval()
    with Slide(slide) as opened:
        index = index_slide(opened, Grid(32, 0.5), Tissue())
        tiles = read_tiles(opened, index, None)
    path, extraction = tmp_path / "f" / "one.h5", Extraction(encoder, "a", "f")

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(WriteError, match=r"one.h5: .*No space left on device.*run the same"):
            extraction.write(path, tiles, index, Tissue())
    assert list(path.parent.iterdir()) == []
    with torch.no_grad():
        encoder.vit.norm.bias.fill_(1e6)  # beyond half precision
    half = Extraction(encoder, "a", "f", dtype="fp16")
    with pytest.raises(FeatureError, match=r"one.x: features of a .* not finite in fp16"):
        half.write(path, tiles, index, Tissue())
    assert list(path.parent.iterdir()) == []


def test_slides_or_config(capsys):
    assert main(["features", "--model", "demo_vit"]) == 2
    assert "give either slides or --config" in capsys.readouterr().err
