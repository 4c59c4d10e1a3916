"""The recipe's parts in whole runs: mean of the weights, L2-SP, the head solved each epoch."""

import json

import pytest
import torch

from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.recipe import solved_head, weight_average
from tapfm.recipe.saved_model import looks_to_choose
from tapfm.recipe.solved_head import SolvedHead
from tapfm.recipe.weight_average import WeightAverage
from tapfm.training import fit as training_fit
from tapfm.training.module import SlideModule
from tapfm.training.optim import Steps
from tests.cohorts import write_cohort

PARTS = ["--model.steps.average", "0.3", "--model.steps.pull", "0.5", "--model.steps.solve_head",
         "true", "--model.steps.warm_start", "true", "--model.steps.interpolate", "[0, 1]",
         "--model.strategy", "lora"]  # fmt: skip


def fit(config, *more):
    assert main(["fit", "--config", str(config), *more]) == 0
    return config.parent / "runs"


def test_all_parts_are_resumed_to_the_bit(tmp_path, monkeypatch):
    class StopError(RuntimeError):
        pass

    config = write_cohort(tmp_path)
    fit(config, "--name", "whole", *PARTS)
    steps, step = [], SlideModule.training_step

    def stopping(self, bag, index):
        steps.append(index)
        if len(steps) == 12:
            raise StopError
        return step(self, bag, index)

    monkeypatch.setattr(SlideModule, "training_step", stopping)
    with pytest.raises(StopError):
        fit(config, "--name", "stopped", *PARTS)
    monkeypatch.setattr(SlideModule, "training_step", step)
    runs = fit(config, "--name", "stopped", *PARTS)
    for name in ("metrics.csv", "best.safetensors", "control.safetensors", "interpolation.json"):
        whole, resumed = ((runs / run / name).read_bytes() for run in ("whole", "stopped"))
        assert whole == resumed, name
    sources = {json.loads((runs / "whole" / "interpolation.json").read_text())["source"]}
    assert sources <= {"best epoch", "mean of the weights"}


def test_the_mean_is_of_the_weights_after_each_update(tmp_path, monkeypatch):
    """Computed again from the weights after every update, by the formula of the docstring."""
    seen, kept = [], {}
    real = WeightAverage.follow

    def noting(self, module):
        real(self, module)
        seen.append(dict(weight_average.learning(module))["norm.weight"].detach().clone())
        kept["mean"] = self.mean["norm.weight"].clone()

    monkeypatch.setattr(WeightAverage, "follow", noting)
    config = write_cohort(tmp_path)
    fit(config, "--model.steps.interpolate", "[0, 1]", "--model.steps.average", "0.5")
    start, after = backbones.load("demo_vit", tile_px=32).vit.norm.weight.detach(), seen
    window, mean = 0.5 * 21 / 2, start  # 21 slides, two an update
    for update, weight in enumerate(after, 1):
        keep = min(1 - 1 / window, update / (update + 9))
        mean = keep * mean + (1 - keep) * weight
    assert len(after) == 12, "four updates an epoch: the last is of one slide"
    torch.testing.assert_close(kept["mean"], mean)
    assert not torch.equal(kept["mean"], after[-1])


def test_an_update_that_a_skipped_slide_completes_is_in_the_mean(tmp_path, monkeypatch):
    """Leave out the last of seven slides, four an update: what waits is still learned from."""
    steps, updates, step = [], [], SlideModule.training_step
    update = SlideModule.update

    def skipping(self, bag, index):
        steps.append(index)
        return None if index == 6 else step(self, bag, index)

    def counting(self, optimizer):
        completes = self.completes_update
        norm = update(self, optimizer)
        if completes and optimizer is self.optimizers()[1]:
            updates.append(self.slides_seen)
        return norm

    monkeypatch.setattr(SlideModule, "training_step", skipping)
    monkeypatch.setattr(SlideModule, "update", counting)
    config = write_cohort(tmp_path)
    runs = fit(config, "--name", "run", "--model.steps.accumulate", "4",
               "--model.steps.interpolate", "[0, 1]")  # fmt: skip
    kept = torch.load(runs / "run" / "last.ckpt", weights_only=True)["callbacks"]
    assert steps[-1] == 6
    assert kept["WeightAverage"]["updates"] == len(updates)
    assert len(updates) > len(steps) // 7 * (6 // 4), "some are completed by the skipped slide"


@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_a_strong_pull_leaves_the_encoder_as_it_came(tmp_path, strategy):
    """At lr x strength = 1 every update ends where it began; without a pull it does not."""
    config = write_cohort(tmp_path, turns=False)
    moved = {}
    for name, pull in (("held", "1e4"), ("free", "0")):
        own = ["--model.strategy", strategy, "--model.steps.pull", pull, "--name", name,
               "--model.steps.warmup", "0", "--trainer.max_epochs", "1"]  # fmt: skip
        runs = fit(config, *own)
        state = torch.load(runs / name / "last.ckpt", weights_only=True)["state_dict"]
        vit = {key: value for key, value in state.items() if ".encoder.vit." in key}
        if strategy == "lora":
            moved[name] = sum(float(v.norm()) for k, v in vit.items() if "lora_B" in k)
        else:
            base = backbones.load("demo_vit", tile_px=32).vit.state_dict()
            moved[name] = sum(
                float((v - base[k.split(".encoder.vit.")[1]]).norm()) for k, v in vit.items()
            )
    assert moved["held"] < 0.6 * moved["free"]


def test_each_epoch_but_the_first_begins_with_a_solve(tmp_path, monkeypatch):
    """Held as strongly as frozen features chose; before the first slide the head stays."""
    solves, heads, real = [], [], solved_head.solve_head

    def noting(aggregator, train, val, task, strengths):
        before = aggregator.head.weight.detach().clone()
        found = real(aggregator, train, val, task, strengths)
        change = float((aggregator.head.weight.detach() - before).norm())
        solves.append((tuple(strengths), found.chosen, change))
        return found

    class Looking(SolvedHead):
        def on_train_epoch_start(self, trainer, module):
            weight = module.slide_model.aggregator.head.weight
            before = weight.detach().clone()
            super().on_train_epoch_start(trainer, module)
            heads.append(torch.equal(weight, before))

    monkeypatch.setattr(solved_head, "solve_head", noting)
    monkeypatch.setattr(training_fit, "SolvedHead", Looking)
    config = write_cohort(tmp_path)
    fit(config, "--model.steps.solve_head", "true")
    (nothing, chosen, _), *others = solves
    assert nothing == ()
    assert [each[:2] for each in others] == [(chosen, chosen)] * 2
    assert all(change > 0 for *_, change in solves)
    assert heads == [True, False, False]


def test_a_pull_needs_the_weights_themselves(tmp_path, capsys):
    config = write_cohort(tmp_path)
    own = ["--model.steps.pull", "0.1", "--model.precision", "bf16-true"]
    assert main(["fit", "--config", str(config), *own, "--model.optimizer", "master"]) == 2
    assert "model.steps.pull 0.1 draws weights themselves" in capsys.readouterr().err


def test_a_pull_needs_a_change_that_has_a_scale(tmp_path, capsys):
    config = write_cohort(tmp_path)
    own = ["--model.steps.pull", "0.1", "--model.strategy", "vpt_deep"]
    assert main(["fit", "--config", str(config), *own]) == 2
    assert "that of model.strategy vpt_deep has no scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "steps", "looks"),
    [
        ("lora", {}, 6),
        ("lora", {"average": 0.0}, 5),
        ("lora", {"interpolate": (0.0, 1.0)}, 3),
        ("vpt_deep", {}, 3),
        ("lora", {"interpolate": ()}, 0),
        ("frozen", {}, 0),
    ],
)
def test_passes_after_the_last_epoch_are_foretold(strategy, steps, looks):
    kept = {"labels": ["a"], "task": {"name": "multilabel"}, "tile_px": 32, "strategy": strategy}
    assert looks_to_choose(SlideModule(**kept, steps=Steps(**steps))) == looks


@pytest.mark.parametrize(
    ("key", "value"), [("average", "2"), ("pull", "-1"), ("interpolate", "[0, 0.5]")]
)
def test_values_that_cannot_be_are_refused(tmp_path, capsys, key, value):
    config = write_cohort(tmp_path)
    assert main(["fit", "--config", str(config), f"--model.steps.{key}", value]) == 2
    assert f"{key} must be" in capsys.readouterr().err
