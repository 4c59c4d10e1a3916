"""How much of a change is saved: weights between, the rule, and whole runs."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from tapfm.adapt.interpolation import between, learned, put
from tapfm.adapt.strategies import STRATEGIES, scaled_parts
from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.frozen import warm_heads
from tapfm.recipe import interpolation, saved_model
from tapfm.recipe.best_weights import BestWeights
from tapfm.recipe.interpolation import Point, calibrated, one_standard_error, why
from tapfm.slide_model import model as models
from tapfm.slide_model.model import ModelConfig, build
from tapfm.tasks.multilabel import Multilabel
from tapfm.training.fit import read_config
from tapfm.training.optim import Steps
from tests.cohorts import write_cohort

SCALED = [name for name, kind in STRATEGIES.items() if name != "frozen" and scaled_parts(kind)]
RUN = ["--model.steps.interpolate", "[0, 0.5, 1]", "--trainer.max_epochs", "1"]


def adapted(strategy):
    """Return a model after a change of all that learns, and its start."""
    torch.manual_seed(0)
    config = ModelConfig("demo_vit", "gated", ("A",), 32, 0.5, strategy=strategy)
    model = build(config).eval()
    start = learned(model.encoder.vit)
    with torch.no_grad():
        for parameter in model.encoder.vit.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model, start


@torch.no_grad()
def features(model):
    tiles = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    return model.encode(tiles.to(torch.uint8))[0]


@pytest.mark.parametrize("name", SCALED)
def test_the_ends_are_the_pretrained_and_the_adapted_model(name):
    model, start = adapted({"name": name})
    scaled, end = scaled_parts(model.strategy), learned(model.encoder.vit)
    adapted_z = features(model)
    put(model.encoder.vit, between(start, end, 0.0, scaled))
    plain = backbones.load("demo_vit", tile_px=32).eval()
    base = replace(model.model_config, strategy={"name": "frozen"})
    frozen = models.SlideModel(base, plain).eval()
    torch.testing.assert_close(features(model), features(frozen), rtol=1e-4, atol=1e-4)
    put(model.encoder.vit, between(start, end, 1.0, scaled))
    assert torch.equal(features(model), adapted_z)
    put(model.encoder.vit, between(start, end, 0.5, scaled))
    moved = (features(model) - features(frozen)).norm()
    assert (
        0.1 * (adapted_z - features(frozen)).norm() < moved < (adapted_z - features(frozen)).norm()
    )


def test_a_low_rank_change_is_scaled_as_a_whole():
    """Half of B A, not half of B times half of A."""
    model, start = adapted({"name": "lora"})
    vit, end = model.encoder.vit, learned(model.encoder.vit)
    name = "blocks.0.attn.qkv.weight"
    base, whole = dict(vit.named_parameters())[name].detach(), model.strategy.export(vit)[name]
    put(vit, between(start, end, 0.25, scaled_parts(model.strategy)))
    quarter = model.strategy.export(vit)[name]
    torch.testing.assert_close(quarter - base, 0.25 * (whole - base), rtol=1e-4, atol=1e-6)


def test_the_least_change_within_one_standard_error_is_taken():
    noise = np.random.default_rng(0).standard_normal(400)
    common = 0.1 * np.random.default_rng(1).standard_normal(400)

    def losses(values, spread):
        drawn = [value + common + step * spread * noise for step, value in enumerate(values)]
        return np.column_stack([values, np.stack(drawn)])

    clear, errors = one_standard_error(losses([0.7, 0.6, 0.5], 0.01))
    assert clear == 2
    assert errors == pytest.approx([0.02, 0.01, 0.0], rel=0.1), "what is common to all cancels"
    unsure, _ = one_standard_error(losses([0.8, 0.6, 0.5], 0.12))
    assert unsure == 1, "0.1 is less than its error, 0.3 is more"
    assert one_standard_error(losses([0.5, 0.6, 0.7], 0.01))[0] == 0
    tied = losses([0.6931471805671, 0.6931471805599, 0.6931471805599], 0.0)
    assert one_standard_error(tied)[0] == 0, "where nothing is learned all are at chance"
    whole = losses([0.7, 0.6, 0.5], 0.01)
    lost = np.column_stack([whole, np.zeros((3, 200)), np.full((3, 200), np.nan)])
    lost = one_standard_error(lost)
    assert lost[0] == 2
    assert np.array_equal(lost[1], one_standard_error(whole)[1]), "no event says nothing"


def test_no_point_above_the_frozen_encoder_is_taken():
    """However wide its own error is: so no saved model is worse on validation."""
    noise = np.random.default_rng(0).standard_normal(400)
    loss_P, error_P = np.array([0.652, 0.695, 0.620]), np.array([0.003, 0.080, 0.0])
    drawn_PB = loss_P[:, None] + error_P[:, None] * noise
    assert one_standard_error(np.column_stack([loss_P, drawn_PB]))[0] == 2


def test_where_all_rank_validation_without_a_fault_the_frozen_encoder_is_taken():
    """Calibrated losses are then 0, to less than a tie: what is left open decides nothing."""
    drawn = np.random.default_rng(0)
    y_N1 = torch.from_numpy(drawn.integers(0, 2, (18, 1)).astype(float))
    loss = Multilabel(("a",)).loss().eval()
    for _ in range(20):
        logits_N1 = (2 * y_N1 - 1) * torch.from_numpy(drawn.uniform(0.05, 3, y_N1.shape))
        assert float(loss(calibrated(logits_N1, y_N1, loss), y_N1)) < interpolation.TIE / 10


@pytest.mark.parametrize(
    ("of_mean", "source"), [(4e-9, "best epoch"), (-0.1, "mean of the weights")]
)
def test_ends_that_tie_are_the_best_epoch(of_mean, source):
    """By what the search for scales leaves open, neither of them is better."""

    class Measured:
        start, scaled = 0.0, ("",)

        def measure(self, end, a, strengths=()):
            loss = 0.5 - 0.4 * a + end * a
            return Point(a, loss, 0.0, 0.9, ""), end, np.full(20, loss), (1.0,)

    found, heads, end = interpolation.interpolate(
        Measured(), {"best epoch": 5e-9, "mean of the weights": of_mean}, (0.0, 0.5, 1.0)
    )
    assert (found.a, found.source) == (1.0, source)
    assert heads[1.0] == end == (5e-9 if source == "best epoch" else of_mean)


def test_the_reason_says_what_the_rule_saw():
    points = [Point(a, loss, error, 0.5, "") for a, loss, error in
              ((0.0, 0.6931471, 0.0), (0.5, 0.6931470, 0.0), (1.0, 0.6931471, 0.0))]  # fmt: skip
    assert why(points, points[0]) == "validation loss 0.693 is no more than at a = 0.5"
    assert why(points, points[1]) == "validation loss 0.693 is the least"
    wider = replace(points[0], loss=0.7, error=0.02)
    assert "is above the least (0.693 at a = 0.5) by less" in why([wider, *points[1:]], wider)


def test_losses_are_of_calibrated_logits():
    """Platt's scale and shift without a penalty; a ranking that is upside down says nothing."""
    drawn = np.random.default_rng(0)
    y_NK = drawn.integers(0, 2, (60, 2)).astype(float)
    logits_NK = 3 * (y_NK - 0.5) + drawn.normal(0, 2, y_NK.shape) + 4.0
    logits_NK[:, 1] *= -1
    loss = Multilabel(("a", "b")).loss().eval()
    both = torch.from_numpy(logits_NK), torch.from_numpy(y_NK)
    found_NK = calibrated(*both, loss).numpy()
    platt = LogisticRegression(C=np.inf, tol=1e-9).fit(logits_NK[:, :1], y_NK[:, 0])
    expected_N = platt.decision_function(logits_NK[:, :1])
    np.testing.assert_allclose(found_NK[:, 0], expected_N, atol=2e-3)
    share = y_NK[:, 1].mean()
    np.testing.assert_allclose(found_NK[:, 1], np.log(share / (1 - share)), atol=1e-3)
    again_NK = calibrated(0.1 * both[0] - 7, both[1], loss)
    np.testing.assert_allclose(again_NK, found_NK, atol=2e-3)


def test_every_share_has_the_strength_that_the_frozen_features_chose(tmp_path, monkeypatch):
    """Training cases flatter an encoder that learned from them: its own folds would choose more."""
    solved, real = [], warm_heads.solve_head

    def noting(aggregator, train, val, task, strengths=()):
        probe = real(aggregator, train, val, task, strengths)
        solved.append((tuple(strengths), probe.chosen))
        return probe

    monkeypatch.setattr(warm_heads, "solve_head", noting)
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--model.aggregator", "mean", "--model.strategy", "lora"]
    assert main([*fit, *RUN]) == 0
    frozen, *others = solved
    assert frozen[0] == ()
    assert others == [(frozen[1], frozen[1])] * len(others)
    assert len(others) >= 2


@pytest.mark.parametrize("strategy", ["full", "lora", "dora", "vpt_deep"])
def test_a_run_saves_the_chosen_share_and_the_frozen_model(tmp_path, capsys, strategy):
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--model.strategy", strategy, *RUN]
    assert main(fit) == 0
    printed = capsys.readouterr().out
    assert "choosing how much of the encoder's change is saved\n" in printed
    run = next((tmp_path / "runs").iterdir())
    choice = json.loads((run / "interpolation.json").read_text())
    shares = [point["a"] for point in choice["curve"]]
    assert shares == ([0, 1] if strategy == "vpt_deep" else [0, 0.5, 1])
    assert f"saved: a = {choice['a']:g}" in printed
    assert ("has no scale" in choice["reason"]) == (strategy == "vpt_deep")
    saved, facts = models.read_model_config(run / "best.safetensors")
    assert facts["interpolation"] == choice
    assert facts["trained"]["name"] == strategy
    control, _ = models.read_model_config(run / "control.safetensors")
    assert control.strategy["name"] == "frozen"
    assert saved.strategy["name"] == ("frozen" if choice["a"] == 0 else strategy)
    least = min(point["loss"] for point in choice["curve"])
    taken = next(point for point in choice["curve"] if point["a"] == choice["a"])
    assert taken["loss"] <= choice["curve"][0]["loss"], "never worse than frozen on validation"
    assert taken["loss"] - least <= taken["error"]

    adapted, facts = models.read_model_config(run / "adapted.safetensors")
    assert adapted.strategy["name"] == strategy, "whatever was chosen, it is not lost"
    assert "interpolation" not in facts

    before = (run / "best.safetensors").read_bytes()
    assert main(fit) == 0
    assert (run / "best.safetensors").read_bytes() == before, "chosen once"


def stopping_after(epochs, monkeypatch):
    """Have a run end after so many epochs, as `trainer.max_time` does."""

    def stop(self, trainer, module):
        trainer.should_stop = trainer.current_epoch + 1 == epochs

    monkeypatch.setattr(BestWeights, "on_train_epoch_end", stop, raising=False)


def adapted_of(run):
    return (run / "adapted.safetensors").read_bytes()


def test_a_run_that_goes_on_after_its_choice_ends_like_one_that_never_stopped(
    tmp_path, monkeypatch
):
    """Its choice is made anew, of the best epoch of all, better than those before or not."""
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--model.strategy", "lora"]
    fit += ["--model.steps.interpolate", "[0, 1]", "--trainer.max_epochs", "3"]
    assert main([*fit, "--name", "whole"]) == 0
    for epochs in (1, 2):
        with monkeypatch.context() as patched:
            stopping_after(epochs, patched)
            assert main([*fit, "--name", f"after_{epochs}"]) == 0
        assert (tmp_path / "runs" / f"after_{epochs}" / "interpolation.json").exists()
        assert main([*fit, "--name", f"after_{epochs}"]) == 0
        for name in ("best", "adapted", "control"):
            whole, stopped = (
                (tmp_path / "runs" / run / f"{name}.safetensors").read_bytes()
                for run in ("whole", f"after_{epochs}")
            )
            assert whole == stopped, (epochs, name)


def test_a_run_that_begins_anew_saves_nothing_of_the_one_before(tmp_path):
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--model.strategy", "lora", *RUN, "--name", "run"]
    run = tmp_path / "runs" / "run"
    assert main([*fit, "--model.steps.encoder_lr", "1e-3"]) == 0
    other = adapted_of(run)
    for name in ("last.ckpt", "before.ckpt"):
        (run / name).unlink(missing_ok=True)
    assert main([*fit, "--model.steps.encoder_lr", "1e-4"]) == 0
    again = adapted_of(run)
    assert again != other
    assert main([*fit[:-1], "fresh", "--model.steps.encoder_lr", "1e-4"]) == 0
    fresh = load_file(tmp_path / "runs" / "fresh" / "adapted.safetensors")
    assert all(torch.equal(value, fresh[name])
               for name, value in load_file(run / "adapted.safetensors").items())  # fmt: skip


@pytest.mark.parametrize("at", ["interpolation.json", "control.safetensors", "best.safetensors"])
def test_a_choice_that_was_cut_off_is_made_again(tmp_path, monkeypatch, at):
    """Killed before any of its files: the same command writes them all."""
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--model.strategy", "lora", *RUN]

    def kill(real):
        def writing(*given, **facts):
            path = next(each for each in given if isinstance(each, Path))
            if path.name == at:
                raise KeyboardInterrupt
            return real(*given, **facts)

        return writing

    with monkeypatch.context() as patched:
        for name in ("save", "write_text"):
            patched.setattr(saved_model, name, kill(getattr(saved_model, name)))
        assert main(fit) != 0
    assert main(fit) == 0
    run = next((tmp_path / "runs").iterdir())
    choice = json.loads((run / "interpolation.json").read_text())
    for name in ("best", "control"):
        assert models.read_model_config(run / f"{name}.safetensors")[1]["interpolation"] == choice


def test_the_control_knows_nothing_of_the_run(tmp_path):
    """However long attention was trained with an encoder that moved, the control is the same."""
    config, controls = write_cohort(tmp_path), {}
    for rate in ("1e-4", "1e-2"):
        fit = ["fit", "--config", str(config), "--model.aggregator", "gated", "--name", rate, *RUN]
        assert main([*fit, "--model.steps.head_lr", rate, "--trainer.max_epochs", "1"]) == 0
        run = next((tmp_path / "runs").glob(f"*{rate}*"))
        controls[rate] = load_file(run / "control.safetensors")
        best = load_file(run / "adapted.safetensors")
        gate = "aggregator.gate.tanh.weight"
        assert not torch.equal(best[gate], controls[rate][gate])
    first, second = controls.values()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("average", "source", "shares"),
    [(0.0, "best epoch", [0.0]), (0.1, "mean of the weights", [0.0, 0.5, 1.0])],
)
def test_a_warm_start_is_no_change_of_the_encoder(tmp_path, monkeypatch, average, source, shares):
    """Judge the mean of the weights, or keep a = 0, where no epoch beats the warm start."""
    monkeypatch.setattr(BestWeights, "on_validation_end", lambda *_: None)
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--model.strategy", "full", *RUN, "--name", "run"]
    steps = ["--model.steps.warm_start", "true", "--model.steps.average", str(average)]
    assert main([*fit, *steps]) == 0
    run = tmp_path / "runs" / "run"
    choice = json.loads((run / "interpolation.json").read_text())
    assert choice["source"] == source
    assert [point["a"] for point in choice["curve"]] == shares
    if not average:
        assert choice["a"] == 0
        assert choice["reason"] == interpolation.UNMOVED
        saved, control = (load_file(run / f"{name}.safetensors") for name in ("best", "control"))
        assert all(torch.equal(saved[name], value) for name, value in control.items())
    assert main(["test", "--run", str(tmp_path / "runs")]) == 0


@pytest.mark.parametrize(
    ("epoch", "head_first", "moved"),
    [(-1, 0.0, False), (0, 0.0, True), (0, 0.2, False), (1, 0.2, False), (2, 0.2, True)],
)
def test_while_the_head_learns_alone_the_encoder_does_not_move(epoch, head_first, moved):
    module = SimpleNamespace(
        steps=Steps(head_first=head_first), trainer=SimpleNamespace(max_epochs=10)
    )
    assert saved_model.encoder_moved(module, epoch) == moved


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_the_saved_models_have_the_losses_of_the_curve(tmp_path, strategy):
    """Loaded from their files, both give validation the calibrated loss that the curve says."""
    config = write_cohort(tmp_path, tiles_per_slide=None, turns=False, colour=0.0)
    assert main(["fit", "--config", str(config), "--model.strategy", strategy, *RUN]) == 0
    run = next((tmp_path / "runs").iterdir())
    choice = json.loads((run / "interpolation.json").read_text())
    data = read_config(["--config", str(run / "config.yaml")]).datamodule
    for file, a in (("control", 0.0), ("best", choice["a"])):
        model = models.load(run / f"{file}.safetensors")
        outputs = [(model(bag, 5).logits_K, bag.labels_K) for bag in data.val_dataloader()]
        logits, targets = map(torch.stack, zip(*outputs, strict=True))
        task_loss = data.weighted_task.loss()
        loss = float(task_loss(calibrated(logits, targets, task_loss), targets))
        said = next(point["loss"] for point in choice["curve"] if point["a"] == a)
        assert loss == pytest.approx(said, rel=1e-4)


def test_a_model_without_an_encoder_is_refused(tmp_path):
    """Not completed by random weights; facts of another model do not say whose encoder it is."""
    frozen = build(ModelConfig("demo_vit", "gated", ("A",), 32, 0.5, strategy={"name": "frozen"}))
    path = tmp_path / "best.safetensors"
    models.save(frozen, path, base_digest=None)
    loaded = models.load(path).encoder.vit.state_dict()
    for name, value in frozen.encoder.vit.state_dict().items():
        assert torch.equal(loaded[name], value), name
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["tapfm"])
    del header["sha256"]  # older versions wrote none
    header["base_digest"] = None
    save_file(load_file(path), path, {"tapfm": json.dumps(header)})
    with pytest.raises(models.CheckpointError, match="neither holds an encoder nor names one"):
        models.load(path)


def test_without_shares_the_best_epoch_is_saved(tmp_path):
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--trainer.max_epochs", "1"]
    assert main([*fit, "--model.steps.interpolate", "[]"]) == 0
    run = next((tmp_path / "runs").iterdir())
    assert "interpolation" not in models.read_model_config(run / "best.safetensors")[1]
    assert not (run / "control.safetensors").exists()


@pytest.mark.parametrize("place", [0, 1])
def test_the_verdict_is_of_what_was_saved(tmp_path, monkeypatch, capsys, place):
    """A run to its end, then `tapfm test`: whatever share was saved, it is compared with frozen."""
    monkeypatch.setattr(
        interpolation, "one_standard_error", lambda losses_PB: (place, np.zeros(len(losses_PB)))
    )
    config = write_cohort(tmp_path)
    fit = ["fit", "--config", str(config), "--model.strategy", "lora", *RUN]
    assert main([*fit, "--model.steps.interpolate", "[0, 1]"]) == 0
    capsys.readouterr()
    assert main(["test", "--run", str(tmp_path / "runs"), "--overlays", "0"]) == 0
    first = capsys.readouterr().out.strip().splitlines()[0]
    assert first.startswith("tapfm_gated_lora: ")
    assert ("nothing was kept (a = 0)" in first) == (place == 0)
    report = json.loads((tmp_path / "runs" / "report_test" / "metrics_test.json").read_text())
    titles = set(report["arms"])
    assert {"frozen encoder, same head, tapfm_gated_lora", "end to end, tapfm_gated_lora"} <= titles
