"""A run on features equals the frozen run that encodes each epoch; a frozen run encodes once."""

import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from tapfm.cli import main
from tapfm.encoders.backbones import Encoder
from tapfm.evaluation import study
from tapfm.slide_model import model as models
from tapfm.training import fit
from tapfm.training.callbacks import RunLog
from tapfm.training.fit import read_config
from tests.cohorts import LABELS, write_cohort

TAG = "20x_32px_0px_overlap"
SAME = {"turns": False, "colour": 0.0, "tiles_per_slide": None}
TOLERANCE, EPOCHS = 1e-6, 2


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A cohort whose data do not vary, its config, and its features by `tapfm features`."""
    folder = tmp_path_factory.mktemp("cohort")
    config = write_cohort(folder, **SAME)
    said = yaml.safe_load(config.read_text())
    said["model"]["drop_path"], said["trainer"]["max_epochs"] = 0.0, EPOCHS
    said["model"]["steps"]["head_lr"] = 1e-2
    config.write_text(yaml.safe_dump(said))
    assert main(["features", "--config", str(config), "--model", "demo_vit", "--chunk", "5"]) == 0
    return folder, config, folder / "index" / TAG / "features_demo_vit"


@pytest.fixture(autouse=True)
def one_start(monkeypatch):
    """Slide models begin alike: building an encoder draws random numbers in front of theirs."""
    real = models.make_aggregator

    def seeded(*args):
        torch.manual_seed(7)
        return real(*args)

    monkeypatch.setattr(models, "make_aggregator", seeded)


def run(config, name, *more):
    return main(["fit", "--config", str(config), "--name", name, *more])


@pytest.fixture
def encoded(monkeypatch):
    """Counts tiles that an encoder was given."""
    counted = []
    real = Encoder.encode

    def encode(self, tiles_CP, precision="fp32"):
        counted.append(len(tiles_CP))
        return real(self, tiles_CP, precision)

    monkeypatch.setattr(Encoder, "encode", encode)
    return counted


def metrics(folder, name):
    return pd.read_csv(folder / "runs" / name / "metrics.csv")


def assert_same_run(folder, one, other):
    within = {"rtol": TOLERANCE, "atol": TOLERANCE}  # chunks of tiles are cut elsewhere
    pd.testing.assert_frame_equal(metrics(folder, one), metrics(folder, other), **within)


def each_epoch(monkeypatch):
    """Encode in every epoch, as frozen runs did."""
    monkeypatch.setattr(fit, "splits_to_encode", lambda *_: ())


MANY = [
    ["--model.aggregator", "tapfm_gated"],
    ["--model.aggregator", "tapfm"],
    ["--model.aggregator", "transmil"],
    ["--model.aggregator", "gated", "--model.regularisers", "[{name: aem, weight: 0.1}]",
     "--model.bag_transforms", "[{name: tile_dropout, share: 0.5}]"],
    ["--model.aggregator", "hierarchical", "--data.bags", "case"],
    ["--data.tiles_per_slide", "11", "--data.sampling", "spatial", "--data.sampler", "balanced"],
    ["--data.labels", "[KRAS]", "--data.task", "multiclass", "--model.steps.warm_start", "true"],
]  # fmt: skip


@pytest.mark.parametrize("options", MANY, ids=lambda each: each[1])
def test_a_run_on_features_is_the_frozen_run(cohort, monkeypatch, encoded, options):
    folder, config, features = cohort
    name = "_".join(each.strip("[]{}-") for each in options[:2]).replace(".", "_")
    with monkeypatch.context() as patch:
        each_epoch(patch)
        assert run(config, f"slow_{name}", "--model.strategy", "frozen", *options) == 0
    assert sum(encoded) > 0
    encoded.clear()
    assert run(config, f"fast_{name}", "--data.features_dir", str(features), *options) == 0
    assert not encoded
    assert_same_run(folder, f"slow_{name}", f"fast_{name}")
    moved = metrics(folder, f"fast_{name}")["val/loss"].dropna()
    assert moved.nunique() == len(moved) == EPOCHS, "something was learned, or nothing is compared"


def test_a_frozen_run_encodes_each_slide_once(cohort, monkeypatch, encoded, capsys):
    """The same numbers as encoding each epoch, in the files that `tapfm test` looks for."""
    folder, config, _ = cohort
    with monkeypatch.context() as patch:
        each_epoch(patch)
        assert run(config, "each", "--model.strategy", "frozen") == 0
    passes = sum(encoded)
    encoded.clear()
    assert run(config, "once", "--model.strategy", "frozen", "--run_dir", str(folder / "o")) == 0
    assert EPOCHS * sum(encoded) == passes
    shutil.copytree(folder / "o" / "once", folder / "runs" / "once")
    assert (folder / "runs" / "once" / "metrics.csv").read_text() == (
        folder / "runs" / "each" / "metrics.csv"
    ).read_text()
    encoded.clear()
    assert run(config, "again", "--model.strategy", "frozen", "--run_dir", str(folder / "o")) == 0
    assert not encoded
    assert "0 tiles encoded once, 10 slides were there already" in capsys.readouterr().out
    assert main(["test", "--run", str(folder / "o"), "--overlays", "0"]) == 0
    assert len(list((folder / "o" / "frozen" / TAG).glob("features_demo_vit_*"))) == 1


def test_where_training_tiles_vary_validation_is_encoded_once(cohort, monkeypatch, encoded):
    folder, config, features = cohort
    vary = ["--model.strategy", "frozen", "--data.turns", "true"]
    with monkeypatch.context() as patch:
        each_epoch(patch)
        assert run(config, "vary_each", *vary) == 0
    passes = sum(encoded)
    encoded.clear()
    assert run(config, "vary_once", "--run_dir", str(folder / "v"), *vary) == 0
    tiles = {}
    for path in features.glob("*.h5"):
        with h5py.File(path) as file:
            tiles[path.stem] = len(file["features"])
    val = tiles["s7"] + tiles["s8"] + tiles["s9"]
    assert sum(encoded) == passes - (EPOCHS - 1) * val
    shutil.copytree(folder / "v" / "vary_once", folder / "runs" / "vary_once")
    assert_same_run(folder, "vary_each", "vary_once")


def test_from_fit_to_report_without_slides(cohort, tmp_path, capsys):
    """Slides need not exist; what needs them is left out, and a frozen row stands beside."""
    folder, config, features = cohort
    table = pd.read_csv(folder / "cohort.csv").drop(columns="slide_path")
    table.to_csv(tmp_path / "cohort.csv", index=False)
    here = ["--data.table", str(tmp_path / "cohort.csv"), "--run_dir", str(tmp_path / "runs"),
            "--data.features_dir", str(features), "--data.index_dir", "none"]  # fmt: skip
    assert run(config, "known", *here) == 0
    assert "features of demo_vit in" in capsys.readouterr().out
    assert main(["test", "--run", str(tmp_path / "runs")]) == 0
    done = tmp_path / "runs" / "known"
    figures = json.loads((tmp_path / "runs" / "report_test" / "metrics_test.json").read_text())
    assert {"frozen, linear probe", "frozen, gated attention"} <= set(figures["arms"])
    assert not any("RGB" in title for title in figures["arms"])
    assert (tmp_path / "runs" / "report_test" / "report.html").stat().st_size > 1000
    assert not list((done / "overlays_test").glob("*"))
    with (h5py.File(done / "weights_test" / "s10.h5") as weights,
          h5py.File(features / "s10.h5") as file):  # fmt: skip
        np.testing.assert_array_equal(weights["coords"], file["coords"])
        assert weights["weights"][:].sum() == pytest.approx(1, abs=1e-5)

    model = models.load(done / "best.safetensors")
    assert model.model_config.features["dim"] == 128
    data = read_config(["--config", str(done / "config.yaml")]).datamodule
    rows = pd.read_csv(done / "predictions_test.csv").set_index("slide_id")
    for bag in data.test_dataloader():
        said_K = model.task.predict(model(bag, 16).logits_K).numpy()
        expected = rows.loc[bag.slide_id, [f"p_{label}" for label in LABELS]]
        np.testing.assert_allclose(said_K, expected.to_numpy(float), atol=1e-6)


def test_a_model_on_features_reads_no_slide(cohort, tmp_path, capsys):
    folder, config, features = cohort
    assert run(config, "blind", "--data.features_dir", str(features)) == 0
    best, slide = str(folder / "runs/blind/best.safetensors"), str(folder / "slides" / "s1.svs")
    out = ["--out", str(tmp_path / "out")]
    for verb in (["predict", slide], ["heatmap", slide], ["export"], ["features", slide]):
        assert main([*verb, "--model", best, *out]) == 2
        said = capsys.readouterr().err
        assert f"{best}: was trained on features ({features}) and has no encoder" in said, verb


def test_slides_that_are_there_are_drawn(cohort, tmp_path):
    _, config, features = cohort
    here = ["--run_dir", str(tmp_path / "runs"), "--data.features_dir", str(features)]
    assert run(config, "drawn", *here) == 0
    assert main(["test", "--run", str(tmp_path / "runs"), "--overlays", "1"]) == 0
    assert len(list((tmp_path / "runs" / "drawn" / "overlays_test").glob("*.png"))) == 1


def test_features_without_scores_and_without_coordinates(cohort, tmp_path, capsys):
    """Score-using aggregators are refused by name; `tapfm features` makes such files anew."""
    folder, config, features = cohort
    bare = tmp_path / "bare"
    shutil.copytree(features, bare)
    for path in bare.glob("*.h5"):
        with h5py.File(path, "r+") as file:
            del file["scores"], file["coords"]
    here = ["--data.features_dir", str(bare), "--run_dir", str(tmp_path / "runs")]
    for name in ("tapfm", "tapfm_gated"):
        assert run(config, name, *here, "--model.aggregator", name) == 2
        said = capsys.readouterr().err
        assert f"aggregator {name} weighs tiles by the encoder's CLS score" in said
        assert "have no scores. Extract them with `tapfm features`" in said
    assert run(config, "spread", *here, "--data.sampling", "spatial") == 2
    assert "have no coordinates. Take data.sampling: uniform" in capsys.readouterr().err
    assert run(config, "transmil", *here, "--model.aggregator", "transmil") == 2
    assert "aggregator transmil looks at where tiles lie" in capsys.readouterr().err
    gated = ["--model.aggregator", "gated"]
    assert run(config, "gated", *here, *gated) == 0
    assert main(["test", "--run", str(tmp_path / "runs"), "--overlays", "1"]) == 0
    assert run(config, "gated_with", "--data.features_dir", str(features), *gated) == 0
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "runs" / "gated" / "metrics.csv"), metrics(folder, "gated_with")
    )
    with h5py.File(features / "s3.h5", "r+") as file:
        was = file["scores"][:]
        del file["scores"]
    make = ["features", "--config", str(config), "--model", "demo_vit", "--chunk", "5"]
    capsys.readouterr()
    assert main(make) == 0
    assert "s3: the features there are without scores: made anew" in capsys.readouterr().out
    with h5py.File(features / "s3.h5") as file:
        np.testing.assert_array_equal(file["scores"][:], was)


def test_what_is_of_pixels_or_of_an_encoder_is_refused_by_name(cohort, tmp_path, capsys):
    _, config, features = cohort
    here = ["--data.features_dir", str(features)]
    pixels = ["--data.colour", "0.1", "--data.stain", "macenko", "--data.cache_dir", "cache"]
    assert run(config, "no", *here, *pixels) == 2
    said = capsys.readouterr().err
    assert (
        "data.colour 0.1, data.stain macenko, data.cache_dir cache can only change pixels" in said
    )
    encoder = ["--model.drop_path", "0.1", "--model.compile", "true"]
    assert run(config, "no", *here, *encoder, "--model.strategy", "lora") == 2
    said = capsys.readouterr().err
    assert "model.strategy lora trains an encoder" in said
    assert "model.compile, model.drop_path: options of an encoder" in said
    probe = tmp_path / "probe.yaml"
    probe.write_text(yaml.safe_dump({"data": {"features_dir": str(features)}}))
    both = ["--config", str(config), "--config", str(probe), "--out", str(tmp_path)]
    assert main(["probe", *both]) == 2
    assert "blocks of an encoder, and with data.features_dir there" in capsys.readouterr().err
    assert run(config, "no", "--data.features_dir", "nowhere") == 2
    assert "data.features_dir: there is no folder nowhere" in capsys.readouterr().err


def test_all_faults_are_told_at_once_or_skipped(cohort, tmp_path, capsys):
    _, config, features = cohort
    some = tmp_path / "some"
    shutil.copytree(features, some)
    (some / "s1.h5").unlink()
    (some / "s4.h5").write_bytes(b"no file")
    with h5py.File(some / "s8.h5", "r+") as file:
        wide = np.zeros((3, 99), np.float32)
        del file["features"], file["scores"], file["coords"]
        file["features"] = wide
    here = ["--data.features_dir", str(some), "--run_dir", str(tmp_path / "runs")]
    assert run(config, "stop", *here) == 2
    said = capsys.readouterr().err
    assert f"features in {some}: 3 faults" in said
    assert "s1: there is no s1.h5 or .pt in" in said
    assert f"s4: {some / 's4.h5'} is damaged, or no feature file" in said
    assert "s8.h5 has 99 features a tile, and 11 other slides have 128" in said
    skip = ["--data.on_error", "skip", "--data.max_skipped", "0.3", "--model.aggregator", "gated"]
    assert run(config, "skip", *here, *skip) == 0
    skipped = json.loads((tmp_path / "runs" / "skip" / "skipped.json").read_text())
    assert sorted(skipped) == ["s1", "s4", "s8"]
    rows = pd.read_csv(tmp_path / "runs" / "skip" / "memory.csv")
    assert set(rows["slide_id"]) == {"s0", "s2", "s3", "s5", "s6"}


def test_a_run_on_features_resumes_where_it_was(cohort, tmp_path, monkeypatch):
    """Stopped in its second epoch, features read anew for each bag: no memory to keep them in."""
    _, config, features = cohort
    here = ["--run_dir", str(tmp_path / "runs"), "--data.features_dir", str(features),
            "--data.tiles_per_slide", "7"]  # fmt: skip
    assert run(config, "whole", *here) == 0
    real = RunLog.on_train_batch_end

    def stop(self, trainer, module, *others):
        if module.slides_seen == 11:
            raise OSError("the power went")
        real(self, trainer, module, *others)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "on_train_batch_end", stop)
        with pytest.raises(OSError, match="power"):
            run(config, "broken", *here, "--data.host_gb", "0")
    assert run(config, "broken", *here, "--data.host_gb", "0") == 0
    whole, broken = (tmp_path / "runs" / name / "metrics.csv" for name in ("whole", "broken"))
    assert whole.read_text() == broken.read_text()


def test_a_study_on_features_needs_no_index(cohort, tmp_path, monkeypatch, capsys):
    _, config, features = cohort
    known = tmp_path / "known.yaml"
    known.write_text(yaml.safe_dump({"data": {"features_dir": str(features)}}))
    monkeypatch.setattr(study, "index_and_cache", lambda *_: pytest.fail("slides were indexed"))
    monkeypatch.setattr(study, "run_cell", lambda *_: "not run here")
    both = ["--config", str(config), "--config", str(known), "--out", str(tmp_path / "out")]
    assert main(["study", *both]) == 2
    assert "not run here" in capsys.readouterr().out


def test_a_run_on_several_magnifications(cohort, tmp_path, capsys):
    """Coarse tiles are made here as the mean of the fine ones on them, and shifted to be told."""
    folder, config, features = cohort
    coarse = tmp_path / "coarse"
    coarse.mkdir()
    for path in features.glob("*.h5"):
        with h5py.File(path) as file, h5py.File(coarse / path.name, "w") as out:
            z_TD, coords0 = file["features"][:], file["coords"][:]
            facts = dict(file["coords"].attrs)
            size0 = 2 * int(facts["patch_size_level0"])
            cells, at_T = np.unique(coords0 // size0, axis=0, return_inverse=True)
            means = [z_TD[at_T.ravel() == n].mean(0) + 1 for n in range(len(cells))]
            out["features"] = np.stack(means)
            out["coords"] = cells * size0
            out["coords"].attrs.update({**facts, "patch_size_level0": size0})
    both = ["--data.features_dir", f"{features},{coarse}", "--run_dir", str(tmp_path / "runs")]
    regions = ["--model.aggregator", "{name: regions, span: 2, scales: 2, width: 16}"]
    assert run(config, "both", *both, *regions) == 0
    assert run(config, "fine", "--data.features_dir", str(features), *regions) == 0
    two, one = pd.read_csv(tmp_path / "runs" / "both" / "metrics.csv"), metrics(folder, "fine")
    assert (two["val/loss"].dropna() != one["val/loss"].dropna()).all()
    assert two["val/loss"].dropna().nunique() == EPOCHS
    assert main(["test", "--run", str(tmp_path / "runs"), "--overlays", "1"]) == 0
    assert run(config, "mamba", *both, "--model.aggregator", "mamba") == 2
    assert "mamba looks at one lattice of tiles" in capsys.readouterr().err
    missing = ["--data.features_dir", f"{features},{tmp_path / 'nowhere'}"]
    assert run(config, "missing", *missing, *regions) == 2
    assert f"there is no folder {tmp_path / 'nowhere'}. Correct it." in capsys.readouterr().err
