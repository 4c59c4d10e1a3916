"""Each task by itself: what it takes from the training split, what it predicts from logits."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tapfm.encoders import backbones
from tapfm.slide_model import model as models
from tapfm.tasks import TaskError, learn_task, validation_figures
from tapfm.tasks.multilabel import positive_weights

NAN = math.nan
SURVIVAL = {"name": "survival", "time": "months", "event": "dead"}
TIMES = np.array([[t, e, n] for n, (t, e) in enumerate(zip(
    [5.0, 10, 15, 20, 25, 30, 35, 40, NAN], [1.0, 1, 0, 1, 1, 1, 1, 1, NAN], strict=True
))])  # fmt: skip


def every():
    """A task of each kind, with the constants of some training split."""
    return {
        "multilabel": learn_task("multilabel", ["A", "B"], (), [[1, 0], [0, 1], [0, NAN]]),
        "multiclass": learn_task("multiclass", ["kind"], ("a", "b", "c"), [[0], [0], [1], [2]]),
        "regression": learn_task("regression", ["x", "y"], (), [[1, 5], [3, NAN], [8, 9]]),
        "hazard": learn_task({**SURVIVAL, "bins": 3}, (), (), TIMES),
        "cox": learn_task({**SURVIVAL, "loss": "cox"}, (), (), TIMES),
    }


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, NAN])] * 2), min_size=1, max_size=40))
def test_positive_weights_are_negatives_per_positive_of_the_known(labels_NK):
    labels = np.array(labels_NK)
    positives, negatives = np.nansum(labels, axis=0), np.nansum(1 - labels, axis=0)
    if positives.all() and negatives.all():
        assert positive_weights(labels, ["A", "B"]) == tuple(negatives / positives)
    else:
        with pytest.raises(ValueError, match="known positive"):
            positive_weights(labels, ["A", "B"])


def test_constants_are_those_of_the_known_training_targets():
    tasks = every()
    assert tasks["multilabel"].pos_weight == (2.0, 1.0)
    assert tasks["multiclass"].weight == pytest.approx((4 / 6, 4 / 3, 4 / 3))
    assert tasks["regression"].mean == (4.0, 7.0)
    assert tasks["regression"].std == pytest.approx((np.std([1, 3, 8]), 2.0))
    seen = [5, 10, 20, 25, 30, 35, 40]  # 15 was censored
    assert tasks["hazard"].edges == pytest.approx(tuple(np.quantile(seen, [1 / 3, 2 / 3])))
    assert tasks["hazard"].horizon == tasks["cox"].horizon == 25
    assert tasks["hazard"].labels == ("hazard_1", "hazard_2", "hazard_3")


def test_what_is_said():
    tasks = every()
    logits = torch.tensor([1.0, -1.0])
    values = tasks["regression"].predict(logits)
    assert values.tolist() == pytest.approx([4 + np.std([1, 3, 8]), 5.0])
    hazards = torch.tensor([0.0, math.log(3), 0.0])  # chances 1/2, 3/4, 1/2
    risk, first, second = tasks["hazard"].predict(hazards).tolist()
    assert (first, second) == pytest.approx((1 / 2, 1 / 8))
    assert risk == pytest.approx((1 - 1 / 2) + (1 - 1 / 8) + (1 - 1 / 16))
    assert tasks["multiclass"].format_target(np.array([2.0])) == ["c"]
    assert tasks["hazard"].format_target(np.array([12.5, 1.0, 3.0])) == ["12.5", "1"]


def test_perfect_predictions_are_perfect():
    tasks = every()
    y = np.array([[0.0], [1], [2], [1], [NAN]])
    said = np.eye(3)[[0, 1, 2, 1, 0]]
    assert validation_figures(tasks["multiclass"], y, said) == {
        "auroc": 1, "balanced_accuracy": 1, "accuracy": 1, "auroc_a": 1, "auroc_b": 1, "auroc_c": 1
    }  # fmt: skip
    values = np.array([[1.0, 5], [3, NAN], [8, 9]])
    assert validation_figures(tasks["regression"], values, np.nan_to_num(values))["r2"] == 1
    assert validation_figures(tasks["cox"], TIMES, -np.nan_to_num(TIMES[:, :1]))["concordance"] == 1


@pytest.mark.parametrize(
    ("task", "target", "said"),
    [
        ({"name": "multiclass", "bins": 3}, TIMES, "multiclass: unknown bins; there are no option"),
        ({**SURVIVAL, "loss": "aft"}, TIMES, "loss 'aft' is none of hazard, cox"),
        ({**SURVIVAL, "bins": 1}, TIMES, "bins must be 2 or more"),
        ({**SURVIVAL, "bins": 4}, TIMES[[0, 0, 0, 0, 2]], "4 events fall into 1 of 4 bins"),
        ({**SURVIVAL, "bins": 9}, TIMES, "7 events fall into 7 of 9 bins"),
        ({"name": "survival", "bins": 2}, TIMES, "time is missing: add it\n.*event is missing"),
        ({"name": "rank"}, TIMES, "data.task 'rank' is none of multilabel, multiclass"),
        ({"name": "survival", "tme": "t"}, TIMES, r"unknown tme; there are .*Did you mean time\?"),
        (SURVIVAL, TIMES[2:3], "no event was seen"),
        ("regression", [[1, 2], [1, 3]], "x does not vary"),
        ("multilabel", [[0, 1], [0, 0]], "x has 0 known positive and 2 known negative"),
    ],
)
def test_what_cannot_be_learned_is_said(task, target, said):
    with pytest.raises(TaskError, match=said):
        learn_task(task, ["x", "y"], ("a", "b"), target)


def test_a_file_from_before_there_were_tasks_is_multilabel(tmp_path):
    model_config = models.ModelConfig("demo_vit", "gated", ("A", "B"), 32, 0.5, weights="random")
    model = models.SlideModel(model_config, backbones.load("demo_vit", "random", tile_px=32))
    models.save(model, tmp_path / "new.safetensors")
    _, header = models.read_model_config(tmp_path / "new.safetensors")
    from dataclasses import asdict

    old = {k: v for k, v in asdict(model_config).items() if k != "task"}
    state = load_file(tmp_path / "new.safetensors")
    save_file(state, tmp_path / "old.safetensors", {"tapfm": json.dumps({**old, **header})})
    loaded = models.load(tmp_path / "old.safetensors")
    assert loaded.task.predictions == ("p_A", "p_B")
    assert loaded.task.predict(torch.zeros(2)).tolist() == [0.5, 0.5]
