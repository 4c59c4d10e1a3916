"""The recipe's parts in whole runs: mean of the weights, L2-SP, the head solved each epoch."""

import json

import pytest
import torch

from tapfm.cli import main
from tapfm.encoders import backbones
from tapfm.recipe import solved_head, weight_average
from tapfm.recipe.weight_average import WeightAverage
from tapfm.training.module import SlideModule
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
    real = WeightAverage.on_train_batch_end

    def noting(self, trainer, module, outputs, batch, index):
        real(self, trainer, module, outputs, batch, index)
        if not seen or self.updates > len(seen) - 1:
            seen.append(dict(weight_average.learning(module))["norm.weight"].detach().clone())
            kept["mean"] = self.mean["norm.weight"].clone()

    monkeypatch.setattr(WeightAverage, "on_train_batch_end", noting)
    config = write_cohort(tmp_path)
    fit(config, "--model.steps.interpolate", "[0, 1]", "--model.steps.average", "0.5")
    start, *after = seen
    window, mean = 0.5 * 21 / 2, start  # 21 slides, two an update
    for update, weight in enumerate(after, 1):
        keep = min(1 - 1 / window, update / (update + 9))
        mean = keep * mean + (1 - keep) * weight
    assert len(after) == 12, "four updates an epoch: the last is of one slide"
    torch.testing.assert_close(kept["mean"], mean)
    assert not torch.equal(kept["mean"], after[-1])


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
    solves, real = [], solved_head.solve_head

    def noting(aggregator, train, val, task):
        before = aggregator.head.weight.detach().clone()
        found = real(aggregator, train, val, task)
        solves.append(float((aggregator.head.weight.detach() - before).norm()))
        return found

    monkeypatch.setattr(solved_head, "solve_head", noting)
    config = write_cohort(tmp_path)
    fit(config, "--model.steps.solve_head", "true")
    assert len(solves) == 2
    assert all(change > 0 for change in solves)


def test_a_pull_needs_the_weights_themselves(tmp_path, capsys):
    config = write_cohort(tmp_path)
    own = ["--model.steps.pull", "0.1", "--model.precision", "bf16-true"]
    assert main(["fit", "--config", str(config), *own, "--model.optimizer", "master"]) == 2
    assert "model.steps.pull 0.1 draws weights themselves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"), [("average", "2"), ("pull", "-1"), ("interpolate", "[0, 0.5]")]
)
def test_values_that_cannot_be_are_refused(tmp_path, capsys, key, value):
    config = write_cohort(tmp_path)
    assert main(["fit", "--config", str(config), f"--model.steps.{key}", value]) == 2
    assert f"{key} must be" in capsys.readouterr().err
