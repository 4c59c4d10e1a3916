"""`tapfm fit` leaves a whole run behind, and a run that was killed ends as one never killed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from slides.streaming.order import epoch_order
from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.encoders.checkpoints import PACKAGED
from tapfm.recipe import best_weights
from tapfm.recipe.best_weights import BestWeights
from tapfm.slide_model import model as models
from tapfm.slide_model.aggregators import AGGREGATORS
from tapfm.training import callbacks, passes
from tapfm.training.module import SlideModule
from tests.cohorts import LABELS, spoil, write_cohort
from tests.conftest import ROOT

SHARED = ["--model.pack_chunks", "true", "--model.chunk", "25"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its config."""
    folder = tmp_path_factory.mktemp("cohort")
    config = write_cohort(folder)
    assert main(["fit", "--config", str(config), "--name", "whole"]) == 0
    return folder / "runs" / "whole", config


def test_run_directory(finished):
    run, _ = finished
    assert not torch.utils.deterministic.fill_uninitialized_memory, "a fifth of an offloaded step"
    metrics = pd.read_csv(run / "metrics.csv")
    train = metrics[metrics["train/loss"].notna()]
    assert len(train) == 3 * 7
    assert metrics["val/auroc"].notna().sum() == 3
    assert {f"val/auroc_{label}" for label in LABELS} <= set(metrics)
    assert (train["train/effective_tiles"] >= 1 - 1e-6).all()
    assert (train["train/effective_tiles"] <= 11 + 1e-3).all()
    # warm-up from 0, then down to a hundredth of the peak
    assert train["lr/encoder"].max() == pytest.approx(1e-4, rel=0.05)
    assert train["lr/encoder"].iloc[-1] == pytest.approx(1e-6, rel=0.2)
    memory = pd.read_csv(run / "memory.csv")
    assert memory["tiles"].tolist() == [11] * 21
    assert (memory[["encode_s", "adapt_s"]].sum().sum()) > 0
    assert list(run.glob("tensorboard/events*"))
    model_config, facts = models.read_model_config(run / "best.safetensors")
    assert model_config.labels == LABELS
    assert facts["val_auroc"] == pytest.approx(metrics["val/auroc"].max())
    assert len(facts["cohort_sha256"]) == 64


def test_weights_moved_and_load_again(finished):
    run, _ = finished
    model = models.load(run / "best.safetensors")
    start = load_file(PACKAGED / "demo_vit.safetensors")
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(model.state_dict()[f"encoder.vit.{name}"], start[name].float())


def test_of_two_models_that_rank_alike_the_surer_one_is_kept(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(models, "save", lambda model, path, **facts: saved.append(facts["epoch"]))
    monkeypatch.setattr(best_weights, "adapted_fingerprint", lambda model: "0123")
    module = SimpleNamespace(slide_model=None, provenance={})
    best = BestWeights(tmp_path)
    for epoch, (auroc, loss) in enumerate(
        [(0.8, 0.5), (1.0, 0.9), (1.0, 0.4), (1.0, 0.6), (0.9, 0.1), (float("nan"), 0.1)]
    ):
        found = {"val/auroc": torch.tensor(auroc), "val/loss": torch.tensor(loss)}
        trainer = SimpleNamespace(callback_metrics=found, current_epoch=epoch, is_global_zero=True)
        best.on_validation_end(trainer, module)
        best.path.touch()
        resumed = BestWeights(tmp_path)  # at every epoch: what is to be beaten is remembered
        resumed.load_state_dict(best.state_dict())
        best = resumed
    assert saved == [0, 1, 2]


def test_resume_points_go_by_the_clock_of_the_first_process(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    trainer = SimpleNamespace(is_last_batch=False, is_global_zero=True)
    trainer.save_checkpoint = lambda path, weights_only: saved.append(now[0]) or path.touch()
    trainer.datamodule = SimpleNamespace(trained=lambda turn: None)
    module = SimpleNamespace(slides_seen=0, steps=SimpleNamespace(accumulate=2))
    point = callbacks.ResumePoint(tmp_path, minutes=5)
    for _ in range(16):
        now[0] += 60
        module.slides_seen += 1
        point.on_train_batch_end(trainer, module, {"loss": 0}, SimpleNamespace(turn=None), 0)
    assert saved == [360, 720], "five minutes, and then the end of an update"
    assert [callbacks.ResumePoint(tmp_path, 0, every).due(20) for every in (0, 3, 10)] == [
        False, False, True,
    ]  # fmt: skip


def test_the_head_goes_first(tmp_path):
    """Two epochs of 7 slides, the encoder from the second on: exactly as it came until then."""
    config = write_cohort(tmp_path)
    steps = ["--model.steps.head_first", "0.5", "--trainer.max_epochs", "2"]
    assert main(["fit", "--config", str(config), *steps]) == 0
    train = pd.read_csv(tmp_path / "runs" / "tapfm_gated" / "metrics.csv")
    train = train[train["train/loss"].notna()]
    assert (train["train/encoder_grad_norm"][:7] == 0).all()
    assert (train["train/encoder_grad_norm"][7:] > 0).all()
    assert (train["train/head_grad_norm"] > 0).all()
    assert (train["lr/encoder"][:6] == 0).all()
    assert train["lr/encoder"].iloc[-1] == pytest.approx(1e-6, rel=0.5)


def tapfm(*arguments, check=True):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import sys; from tapfm.cli import main; sys.exit(main())"]
    return subprocess.run(
        [*command, *arguments], env=environment, check=check, capture_output=True, text=True
    )


def test_a_lora_run_keeps_what_it_trained_and_predicts(tmp_path, capsys):
    config = write_cohort(tmp_path)
    slide = tmp_path / "slides" / "s1.svs"
    fit = ["fit", "--config", str(config), "--trainer.max_epochs", "1"]
    assert main([*fit, "--model.strategy.name", "lora", "--model.strategy.rank", "2"]) == 0
    assert "LoRA of rank 2 in 6 layers (q, k, v): 6,144 of" in capsys.readouterr().out
    run = tmp_path / "runs" / "tapfm_gated_lora"
    best, point = run / "best.safetensors", run / "last.ckpt"
    for file in (best, point):  # the encoder's 1.3 M numbers are 5 MB
        assert file.stat().st_size < 1e6
    state = torch.load(point, weights_only=True)["state_dict"]
    assert all("lora_" in key or ".aggregator." in key for key in state)

    model, base = models.load(best), backbones.load("demo_vit", tile_px=32)
    for name, value in base.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
    vit = model.encoder.vit
    assert all(block.attn.qkv.lora_B.weight.abs().max() > 0 for block in vit.blocks)
    out = ["--out", str(tmp_path / "out")]
    assert main(["predict", str(slide), "--model", str(best), *out]) == 0
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 1


@pytest.mark.parametrize("scheme", ["master", "residual", "offload"])
def test_bfloat16_weights_learn_and_predict_as_they_were_trained(tmp_path, scheme):
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--trainer.max_epochs", "1"]
    bf16 = ["--model.precision", "bf16-true", "--model.optimizer", scheme]
    assert main([*fit, *bf16, "--model.strategy", "{name: last_n, n: 2}"]) == 0
    run = tmp_path / "runs" / "tapfm_gated_last_n"
    state = load_file(run / "best.safetensors")
    assert {v.dtype for k, v in state.items() if k.startswith("encoder")} == {torch.bfloat16}
    model, base = models.load(run / "best.safetensors"), backbones.load("demo_vit", tile_px=32)
    moved = 0
    for name, parameter in model.encoder.vit.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
        moved += not torch.equal(parameter, base.vit.get_parameter(name).bfloat16())
    assert moved > 20
    slide, out = tmp_path / "slides" / "s1.svs", ["--out", str(tmp_path / "out")]
    assert main(["predict", str(slide), "--model", str(run / "best.safetensors"), *out]) == 0


def test_bfloat16_weights_without_their_exact_values_are_refused(tmp_path, capsys):
    fit = ["fit", "--config", str(write_cohort(tmp_path)), "--model.precision", "bf16-true",
           "--model.optimizer", "adamw"]  # fmt: skip
    assert main(fit) == 2
    assert "bf16-true takes master, residual or offload" in capsys.readouterr().err


def test_an_optimizer_of_the_strategys_own_has_no_masters(tmp_path, capsys):
    fit = ["fit", "--config", str(write_cohort(tmp_path)), "--model.strategy", "pathotune"]
    assert main([*fit, "--model.precision", "bf16-true", "--model.optimizer", "master"]) == 2
    assert "pathotune has an optimizer of its own" in capsys.readouterr().err
    assert main([*fit, "--trainer.max_epochs", "1"]) == 0
    state = torch.load(tmp_path / "runs" / "tapfm_gated_pathotune" / "last.ckpt", weights_only=True)
    head, encoder = (each["param_groups"][0] for each in state["optimizer_states"])
    assert "amsgrad" in head, "AdamW's"
    assert "amsgrad" not in encoder, "RAdam has none"


def test_graphs_that_are_kept_change_nothing(tmp_path, monkeypatch, capsys):
    """Nor does memory that ends meanwhile: one is kept from then on."""
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--trainer.max_epochs", "1"]
    for name, keep in (("none", "0"), ("one", "1"), ("all", "9")):
        assert main([*fit, "--name", name, "--model.keep_chunks", keep]) == 0
    real = passes.encode_bag

    def small(*args, keep, **kwargs):
        if keep > 1:
            raise torch.OutOfMemoryError("no room for two")
        return real(*args, keep=keep, **kwargs)

    monkeypatch.setattr(passes, "encode_bag", small)
    assert main([*fit, "--name", "tight", "--model.keep_chunks", "9"]) == 0
    assert capsys.readouterr().out.count("with 9 graphs kept: going on with 1") == 1
    runs = [load_file(tmp_path / "runs" / n / "best.safetensors") for n in ("none", "all", "tight")]
    one = load_file(tmp_path / "runs" / "one" / "best.safetensors")
    assert all(torch.equal(run[key], one[key]) for run in runs for key in one)
    assert set(pd.read_csv(tmp_path / "runs" / "tight" / "memory.csv")["chunk"]) == {5}
    assert main([*fit, "--model.keep_chunks", "-1"]) == 2


def test_a_backward_of_some_tiles(tmp_path, capsys):
    """All of them drawn is the exact run; a few is another run; noise is refused."""
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--trainer.max_epochs", "1", "--model.drop_path", "0"]
    for name, tiles in (("exact", "null"), ("all", "11"), ("few", "3")):
        assert main([*fit, "--name", name, "--model.backward_tiles", tiles]) == 0
    exact, every, few = (
        load_file(tmp_path / "runs" / name / "best.safetensors") for name in ("exact", "all", "few")
    )
    name = "encoder.vit.blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(exact[name], every[name], rtol=0, atol=1e-6)
    assert not torch.allclose(exact[name], few[name], rtol=0, atol=1e-6)
    assert main([*fit, "--model.drop_path", "0.1", "--model.backward_tiles", "3"]) == 2
    assert "needs an encoder without noise" in capsys.readouterr().err
    assert main([*fit, "--model.backward_tiles", "0"]) == 2
    assert "must be 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("aggregator", sorted({*AGGREGATORS} - {"hierarchical"}))
def test_every_aggregator_takes_a_backward_of_some_tiles(tmp_path, aggregator):
    config = write_cohort(tmp_path)
    some = ["--model.backward_tiles", "4", "--model.drop_path", "0", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", str(config), "--model.aggregator", aggregator, *some]) == 0


@pytest.mark.parametrize("when", ["train", "validation"])
def test_what_is_not_finite_any_more_ends_the_run_and_keeps_the_best(
    tmp_path, capsys, monkeypatch, when
):
    """AUROC would rank nan by the order of rows, and the best weights could be nan."""
    config = write_cohort(tmp_path)

    def spoil_head(module, *_):
        if module.current_epoch == 1:
            module.slide_model.aggregator.head.weight.data.fill_(float("nan"))

    monkeypatch.setattr(SlideModule, f"on_{when}_epoch_start", spoil_head)
    assert main(["fit", "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert {"train": "train/loss is nan", "validation": "a logit of the val split"}[when] in said
    assert "training has diverged" in said
    best = load_file(next(tmp_path.rglob("best.safetensors")))
    assert all(value.isfinite().all() for value in best.values())


def test_a_cohort_without_validation_is_refused(tmp_path, capsys):
    """Nothing would say which weights are best, and none would be kept."""
    config = write_cohort(tmp_path)
    table = tmp_path / "cohort.csv"
    table.write_text(table.read_text().replace(",val,", ",train,"))
    assert main(["fit", "--config", str(config)]) == 2
    assert "the val split has no slide" in capsys.readouterr().err


def test_an_unknown_strategy_or_option_is_named(finished, capsys):
    _, config = finished
    fit = ["fit", "--config", str(config), "--model.strategy"]
    assert main([*fit, "{name: lora, ranks: 2}"]) == 2
    assert "lora has no option ranks; there are rank (8)" in capsys.readouterr().err
    assert main([*fit, "{name: lorra}"]) == 2
    assert "name 'lorra' is none of full, last_n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("killed_after", "options"),
    [
        (5, []),
        (11, ["--model.strategy", "{name: lora, dropout: 0.1}"]),
        (5, ["--model.precision", "bf16-true", "--model.optimizer", "residual"]),
        (5, [*SHARED, "--model.drop_path", "0", "--trainer.max_epochs", "1"]),
    ],
    ids=["first epoch", "second epoch", "16-bit residual", "between two slides of a chunk"],
)
def test_killed_and_resumed_equals_never_killed(tmp_path, killed_after, options):
    """Bit for bit, in another process. 5 and 11 are mid-epoch, one slide after a resume point."""
    config = str(write_cohort(tmp_path, workers=1))
    fit = ("fit", "--config", config, *options)
    tapfm(*fit, "--name", "whole")
    callback = [{"class_path": "tests.kill.KillAfter", "init_args": {"slides": killed_after}}]
    killed = tapfm(
        *fit, "--name", "killed",
        "--trainer.callbacks", yaml.safe_dump(callback, default_flow_style=True), check=False,
    )  # fmt: skip
    assert killed.returncode == -9, killed.stderr
    runs = tmp_path / "runs"
    stopped = torch.load(runs / "killed" / "last.ckpt", weights_only=True)
    assert 0 < stopped["slides_seen"] < killed_after
    assert stopped["slides_seen"] % 7 != 0, "the point of this test is to stop mid-epoch"
    rows = (runs / "killed" / "metrics.csv").read_text().count("\n")

    tapfm(*fit, "--name", "killed")
    assert rows < (runs / "killed" / "metrics.csv").read_text().count("\n")
    for name in ("metrics.csv", "best.safetensors"):
        whole, resumed = ((runs / run / name).read_bytes() for run in ("whole", "killed"))
        assert whole == resumed, name
    whole, resumed = (
        torch.load(runs / run / "last.ckpt", weights_only=True) for run in ("whole", "killed")
    )
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key]), key


def test_other_settings_are_refused_by_name(finished, capsys):
    _, config = finished
    code = main(["fit", "--config", str(config), "--name", "whole", "--model.steps.clip", "0.5"])
    assert code == 2
    assert "model.steps.clip was 1.0, is 0.5" in capsys.readouterr().err


def test_unknown_key_is_named(finished, capsys):
    _, config = finished
    assert main(["fit", "--config", str(config), "--model.chunks", "4"]) == 2
    assert (
        "model.chunks: there is no such key. Did you mean model.chunk?" in capsys.readouterr().err
    )


def test_a_users_logger_stays_beside_tensorboard(tmp_path):
    config = write_cohort(tmp_path)
    further = tmp_path / "logger.yaml"
    where = {"save_dir": str(tmp_path), "name": "csv", "version": "mine"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": where}
    further.write_text(yaml.safe_dump({"trainer": {"max_epochs": 1, "logger": logger}}))
    assert main(["fit", "--config", str(config), "--config", str(further)]) == 0
    run = tmp_path / "runs" / "tapfm_gated"
    assert list(run.glob("tensorboard/events*"))
    logged = pd.read_csv(tmp_path / "csv" / "mine" / "metrics.csv")
    ours = pd.read_csv(run / "metrics.csv")
    for name in ("train/loss", "val/loss"):
        one, other = (table[name].dropna().tolist() for table in (logged, ours))
        assert one == pytest.approx(other)
        assert len(one) == {"train/loss": 7, "val/loss": 1}[name]


def test_a_run_without_a_progress_bar(tmp_path, capsys):
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"]
    assert main(["fit", "--config", str(write_cohort(tmp_path)), *quiet]) == 0
    assert "Epoch 0" not in capsys.readouterr().out


@pytest.mark.parametrize(("epochs", "validated"), [(1, [0]), (3, [1, 2])])
def test_the_last_epoch_is_validated(tmp_path, epochs, validated):
    """A run shorter than what `check_val_every_n_epoch` says would end with nothing saved."""
    seldom = ["--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", str(epochs)]
    assert main(["fit", "--config", str(write_cohort(tmp_path)), *seldom]) == 0
    (run,) = (tmp_path / "runs").glob("tapfm_gated*")
    metrics = pd.read_csv(run / "metrics.csv")
    assert metrics[metrics["val/auroc"].notna()]["epoch"].tolist() == validated
    assert (run / "best.safetensors").is_file()


def test_a_run_without_time_for_an_epoch_says_so_and_goes_on(tmp_path, capsys):
    command = ["fit", "--config", str(write_cohort(tmp_path)), "--trainer.max_epochs", "1"]
    assert main([*command, "--trainer.max_time", "00:00:00:00"]) == 2
    said = capsys.readouterr().err
    assert "ended before an epoch was validated" in said
    assert main(command) == 0


def test_checkpoint_of_another_model_is_refused(finished):
    run, _ = finished
    other = models.load(run / "best.safetensors")
    other.aggregator.gate = None
    with pytest.raises(
        models.CheckpointError, match=r"not those of demo_vit.*first aggregator.gate"
    ):
        models.load_weights(other, run / "best.safetensors")
    with pytest.raises(models.CheckpointError, match="not a model that tapfm saved"):
        models.read_model_config(run / "last.ckpt")


def test_a_broken_slide_is_skipped_when_asked_and_stops_otherwise(tmp_path, capsys):
    config = write_cohort(tmp_path, on_error="skip")
    (tmp_path / "slides" / "s1.svs").write_bytes(b"no slide")
    arguments = ["fit", "--config", str(config), "--trainer.max_epochs", "1"]
    assert main([*arguments, "--name", "skip"]) == 0
    skipped = json.loads((tmp_path / "runs" / "skip" / "skipped.json").read_text())
    assert list(skipped) == ["s1"]
    assert "NotASlideError" in skipped["s1"], "what indexing found, and not that there is no index"
    assert len(pd.read_csv(tmp_path / "runs" / "skip" / "memory.csv")) == 6
    assert main([*arguments, "--name", "stop", "--data.on_error", "stop"]) == 2
    assert "s1" in capsys.readouterr().err
    for number in (7, 8, 9):
        spoil(next((tmp_path / "slides").glob(f"s{number}.*")))
    assert main([*arguments, "--name", "none"]) == 2
    said = capsys.readouterr().err
    assert "no slide of the val split could be read" in said
    assert all(f"s{number}: " in said for number in (7, 8, 9))
    for number in (7, 8, 9):  # of another size: their indexes are theirs no more
        next((tmp_path / "slides").glob(f"s{number}.*")).write_bytes(b"no slide %d" % number)
    assert main([*arguments, "--name", "none"]) == 2
    said = capsys.readouterr().err
    assert "split val, no slide of which can be read: 3 faults" in said
    assert all(f"s{number}: " in said for number in (7, 8, 9))


@pytest.mark.parametrize("scheme", ["adamw", "master"])
def test_what_was_learned_before_a_skipped_last_slide_is_not_lost(tmp_path, scheme):
    config = write_cohort(tmp_path, on_error="skip")
    assert main(["index", "--config", str(config)]) == 0
    last = epoch_order(7, 0, 0)[-1]
    spoil(tmp_path / f"slides/s{last}.{'svs' if last % 2 else 'tif'}")
    once = ["--trainer.max_epochs", "1", "--model.steps.accumulate", "100"]  # at its very end
    precision = ["--model.precision", "bf16-true" if scheme == "master" else "fp32"]
    how = ["--model.optimizer", scheme, *precision]
    assert main(["fit", "--config", str(config), "--name", "run", *once, *how]) == 0
    metrics = pd.read_csv(tmp_path / "runs" / "run" / "metrics.csv")
    assert metrics["slide_id"].count() == 6
    learned = load_file(tmp_path / "runs" / "run" / "best.safetensors")
    start = load_file(PACKAGED / "demo_vit.safetensors")
    moved = 0
    for key, value in start.items():
        found = learned.get(f"encoder.vit.{key}", value)
        moved += found.shape == value.shape and not torch.equal(found, value.to(found.dtype))
    assert moved > 20


def test_memory_for_tiles_changes_no_weight(finished, capsys):
    """Of 11 tiles a slide 7 are held, the others read anew in both passes."""
    run, config = finished
    assert main(["fit", "--config", str(config), "--name", "few", "--data.host_gb", "4.4e-5"]) == 0
    assert "hold 7 tiles of each of 2 slides" in capsys.readouterr().out
    for file in ("metrics.csv", "best.safetensors"):
        few, whole = ((folder / file).read_bytes() for folder in (run.parent / "few", run))
        assert few[-10_000:] == whole[-10_000:]  # the header names the run's command


@pytest.mark.parametrize(
    "length", [["max_epochs", "-1"], ["max_epochs", "0"], ["max_steps", "5"], ["max_steps", "0"]]
)
def test_a_run_without_a_number_of_epochs_has_no_schedule(tmp_path, length, capsys):
    """Its rate would be the last and least of the cosine from the first slide on."""
    key, value = length
    fit = ["fit", "--config", str(write_cohort(tmp_path)), f"--trainer.{key}", value]
    assert main([*fit, "--trainer.max_time", "00:00:00:09"]) == 2  # or -1 would never end
    said = capsys.readouterr().err
    assert "the schedule is over trainer.max_epochs" in said
    assert f"(it is {value})" in said
