"""`tapfm fit-tiles`, from folders of pictures to a table: the whole job, and its promises."""

import csv
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import f1_score

from tapfm.adapt.strategies import StrategyError
from tapfm.cli import main
from tapfm.engine.memory import PhaseMeter
from tapfm.slide_model import model as models
from tapfm.slide_model.plain_encoder import load_encoder
from tapfm.tile_training.baselines import ProbeError, fit_probe
from tapfm.tile_training.batch import TileBatch
from tapfm.tile_training.data import TileData
from tapfm.tile_training.fit import PROBE, RGB, frozen_features, predict_tiles
from tapfm.tile_training.module import TileModule
from tests.conftest import ROOT
from tests.tile_sets import arguments, write_tiles


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Tiles, and the runs of LoRA and HiAdapter on them."""
    folder = tmp_path_factory.mktemp("tiles")
    tiles, runs = write_tiles(folder / "tiles"), folder / "runs"
    for strategy in ("lora", "hiadapter"):
        assert main(arguments(tiles, runs, "--model.strategy", strategy)) == 0
    return tiles, runs


def test_a_log_file_gets_lines_as_those_of_fit(cohort, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tapfm.training.announce.EVERY", 0.0)
    monkeypatch.setattr("slides.progress.EVERY", 0.0)
    assert main(arguments(cohort[0], tmp_path, "--model.strategy", "frozen")) == 0
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2 * (4 + 2) + 1, "a batch each, and the end"
    assert lines[0].startswith("epoch 1 of 2, batch 1 of 4, loss ")
    assert lines[4].startswith("epoch 1 of 2, validation batch 1, ")
    assert "best f1" in lines[-1]
    assert lines[-1].endswith("0 s left")
    assert "\r" not in said.out + said.err
    assert "Epoch 0" not in said.out
    facts = json.loads((tmp_path / "frozen" / "status.json").read_text())
    assert (facts["epoch"], facts["batch"], facts["batches"]) == (2, 4, 4)
    model = tmp_path / "frozen" / "best.safetensors"
    assert said.out.splitlines()[-1] == f"next: tapfm export --model {model} --out exported"


def predictions(run, split="test"):
    with (run / f"report_{split}" / f"predictions_{split}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("strategy", ["lora", "hiadapter"])
def test_a_run_says_what_it_gained(cohort, strategy):
    run = cohort[1] / strategy
    result = json.loads((run / "report_test" / "metrics_test.json").read_text())
    assert (result["tiles"], result["cases"], result["classes"]) == (12, 6, ["checked", "striped"])
    adapted = f"adapted, {strategy}"
    assert list(result["arms"]) == [RGB, PROBE, adapted]
    rows = predictions(run)
    y = [row["label"] for row in rows]
    for title, arm in result["arms"].items():  # figures are those of the written predictions
        p_NK = np.array(
            [[float(row[f"p_{k} ({title})"]) for k in result["classes"]] for row in rows]
        )
        assert p_NK.sum(1) == pytest.approx(1, abs=1e-5)
        said = np.array(result["classes"])[p_NK.argmax(1)]
        assert arm["f1"]["value"] == pytest.approx(f1_score(y, said, average="macro"))
    probe, gain = result["arms"][PROBE], result["arms"][adapted]["difference"]["f1"]
    assert gain["value"] == pytest.approx(
        result["arms"][adapted]["f1"]["value"] - probe["f1"]["value"]
    )
    assert probe["f1"]["value"] > 0.9 > result["arms"][RGB]["f1"]["value"], "patterns, not tints"
    assert probe["difference"] is None
    text = (run / "report_test" / "report.md").read_text()
    assert "12 tiles of 6 cases" in text
    assert f"## Confusions of {adapted}" in text
    metrics = pd.read_csv(run / "metrics.csv")
    assert metrics["train/loss"].notna().sum() == 2 * 4
    assert (metrics["train/encoder_grad_norm"].dropna() > 0).all()
    assert (metrics["train/ppcl"].dropna() > 0).all() == (strategy == "hiadapter")
    facts = models.read_model_config(run / "best.safetensors")[1]
    assert facts["val_f1"] == pytest.approx(metrics["val/f1"].max())


def test_a_checkpoint_holds_what_was_trained_and_predicts_what_was_reported(cohort):
    tiles, runs = cohort
    run = runs / "lora"
    state = load_file(run / "best.safetensors")
    assert all("lora_" in name or name.startswith("aggregator.head") for name in state)
    model = models.load(run / "best.safetensors")
    assert model.model_config.labels == ("checked", "striped")
    data = TileData(str(tiles), tile_px=32, batch=5, workers=0)
    rows = predictions(run)
    said = [[float(row[f"p_{k} (adapted, lora)"]) for k in data.class_names] for row in rows]
    np.testing.assert_allclose(predict_tiles(model, data, "test"), said, atol=2e-6)
    assert [row["path"] for row in rows] == [str(row.path) for row in data.tiles.part("test")]


def test_its_encoder_is_for_features_and_it_predicts_no_slide(cohort, capsys):
    best = cohort[1] / "lora" / "best.safetensors"
    encoder, facts, _ = load_encoder(str(best))
    assert facts["strategy"]["name"] == "lora"
    adapted = models.load(best)
    tiles = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(encoder(tiles)[0], adapted.encoder(tiles)[0], atol=1e-5, rtol=0)
    assert main(["predict", "slide.svs", "--model", str(best)]) == 2
    assert "was trained on labelled tiles and cannot predict a slide" in capsys.readouterr().err
    assert main(["test", "--run", str(cohort[1])]) == 2
    assert "`tapfm fit-tiles` left its report there" in capsys.readouterr().err
    with pytest.raises(StrategyError):
        load_encoder(str(cohort[1] / "hiadapter" / "best.safetensors"))


def module_of(strategy="last_n", **options):
    module = TileModule(["a", "b", "c"], [2.0, 1.0, 0.5], strategy=strategy, tile_px=32, **options)
    module.meter = PhaseMeter("cpu")
    module.trainer = SimpleNamespace(
        num_training_batches=1, max_epochs=1, is_last_batch=True, world_size=1
    )
    return module


def batch_of(classes=3):
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (classes * 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return TileBatch(tiles, torch.arange(classes * 2) % classes, seed=3, turn=(0, 0, 0))


@pytest.mark.parametrize("loss", ["ce", "ppcl"])
def test_a_step_is_one_backward_of_the_weighed_loss(loss, monkeypatch):
    """Gradients against plain autograd, with the prototypes as they are after their update."""
    module, batch = module_of(loss=loss), batch_of()
    with torch.no_grad():  # a head sure enough, at 0.91, to move prototypes
        z_CD, _ = module.slide_model.encoder(batch.tiles_CP)
        sure_CK = 3 * F.one_hot(batch.labels_C, 3).float()
        module.start_head((torch.linalg.pinv(z_CD) @ sure_CK).T, torch.zeros(3))
    old_KD = module.prototype_loss.prototypes_KD.clone() if loss == "ppcl" else None
    taken = {}

    def keep(optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        taken.update({p: p.grad.clone() for p in params})
        return torch.zeros(())

    monkeypatch.setattr(module, "update", keep)
    monkeypatch.setattr(module, "optimizers", lambda: module.configure_optimizers())
    monkeypatch.setattr(module, "manual_backward", lambda loss: loss.backward())
    monkeypatch.setattr(type(module), "trainer", module.trainer, raising=False)
    said = module.training_step(batch, 0)

    model = module.slide_model
    z_CD, _ = model.encoder(batch.tiles_CP)
    logits_CK = F.linear(z_CD, model.aggregator.head.weight, model.aggregator.head.bias)
    each_C = F.cross_entropy(logits_CK, batch.labels_C, reduction="none")
    weight_C = torch.tensor([2.0, 1.0, 0.5])[batch.labels_C]
    total = (each_C * weight_C).sum() / weight_C.sum()
    assert said["train/loss"].item() == pytest.approx(total.item(), rel=1e-5)
    if loss == "ppcl":
        towards_KD = F.normalize(F.one_hot(batch.labels_C, 3).float().T @ z_CD.detach(), dim=1)
        moved_KD = F.normalize(old_KD + towards_KD, dim=1)
        torch.testing.assert_close(module.prototype_loss.prototypes_KD, moved_KD, rtol=0, atol=1e-4)
        extra = module.prototype_loss(z_CD, batch.labels_C)
        assert said["train/ppcl"].item() == pytest.approx(extra.item(), rel=1e-3)
        total = total + extra
    expected = torch.autograd.grad(total, list(taken))
    for (_, found), wanted in zip(taken.items(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_prototype_loss_is_hiadapters_companion():
    assert module_of("hiadapter").prototype_loss is not None
    assert module_of("hiadapter", loss="ce").prototype_loss is None
    assert module_of("lora").prototype_loss is None


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_starts_as_the_probe(classes):
    rng = np.random.default_rng(0)
    module = TileModule(list("abc")[:classes], [1.0] * classes, tile_px=32)
    y_N = np.arange(40) % classes
    z_ND = rng.normal(size=(40, module.slide_model.encoder.dim)) * 3 + 5 + y_N[:, None]
    probe = fit_probe((z_ND, y_N), (z_ND, y_N), classes, [1.0] * classes)
    assert module.slide_model.aggregator.dropout.p == 0
    module.start_head(*probe.linear())
    logits = module.slide_model.aggregator(torch.from_numpy(z_ND).float())
    np.testing.assert_allclose(logits.softmax(1).detach(), probe.predict(z_ND), atol=1e-4)
    random = TileModule(["a", "b"], [1.0, 1.0], head="random", tile_px=32)
    assert random.slide_model.aggregator.dropout.p == 0.5


def test_a_killed_run_ends_as_one_never_killed(cohort, tmp_path):
    """HiAdapter: dropout, prototypes, and a resume point in the middle of an epoch."""
    tiles, runs = cohort
    killed = arguments(tiles, tmp_path, "--model.strategy", "hiadapter")
    trainer = ["--trainer.callbacks", "tests.kill.KillAfter", "--trainer.callbacks.slides", "7"]
    command = [sys.executable, "-c", "import sys; from tapfm.cli import main; sys.exit(main())"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *killed, *trainer], env=environment, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    assert main(killed) == 0
    for name in ("metrics.csv", "report_test/metrics_test.json"):
        one, other = ((run / "hiadapter" / name).read_text() for run in (runs, tmp_path))
        assert one == other
    one, other = (load_file(run / "hiadapter" / "best.safetensors") for run in (runs, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tiles_exported_anew_under_the_same_names_have_features_of_their_own(tmp_path):
    model_config = SimpleNamespace(model="demo_vit", weights=None, tile_px=32, precision="fp32")
    model = SimpleNamespace(slide_model=SimpleNamespace(model_config=model_config))

    def frozen():
        data = TileData(str(tmp_path / "tiles"), tile_px=32, workers=0)
        config = SimpleNamespace(run_dir=str(tmp_path))
        cli = SimpleNamespace(datamodule=data, model=model, config=config)
        return data.tiles, frozen_features(cli, "cpu")["z"]

    write_tiles(tmp_path / "tiles")
    tiles, z_ND = frozen()
    (kept,) = (tmp_path / "frozen").iterdir()
    made = kept.stat().st_mtime_ns
    assert torch.equal(frozen()[1], z_ND)
    assert kept.stat().st_mtime_ns == made
    first = tiles.rows[0].path
    first.write_bytes(tiles.rows[1].path.read_bytes())
    again, new_ND = frozen()
    assert again.sha256 == tiles.sha256
    torch.testing.assert_close(new_ND[0], z_ND[1])
    torch.testing.assert_close(new_ND[1:], z_ND[1:])


def test_features_that_are_nan_are_refused():
    z_ND, y_N = np.full((4, 3), np.nan), np.arange(4) % 2
    with pytest.raises(ProbeError, match="hold nan or infinity: set model"):
        fit_probe((z_ND, y_N), (z_ND, y_N), 2, [1.0, 1.0])


def test_faults_end_with_a_message(tmp_path, capsys):
    tiles = write_tiles(tmp_path / "tiles")
    assert main(arguments(tiles / "nowhere", tmp_path)) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(arguments(tiles, tmp_path, "--data.tile_px", "48")) == 2
    assert "32 x 32 px, but square tiles of 48 px" in capsys.readouterr().err
    assert main(arguments(tiles, tmp_path, "--data.batch", "0")) == 2
    assert "data.batch must be 1 or more, got 0" in capsys.readouterr().err
    assert main(arguments(tiles, tmp_path, "--trainer.devices", "2")) == 2
    assert "fit-tiles trains in one process" in capsys.readouterr().err
    assert main(arguments(tiles, tmp_path, "--model.steps.warm_start", "true")) == 2
    assert "model.steps.warm_start is of slides" in capsys.readouterr().err
