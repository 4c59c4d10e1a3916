"""A new run may start from the aggregator of another one, and says what it does not take."""

import pytest
import torch

from slides.errors import SettingsError
from tapfm.slide_encoders.published import read_published
from tapfm.slide_model import model as models
from tapfm.slide_model.feature_encoder import FeatureEncoder
from tapfm.slide_model.start import start_from
from tapfm.tasks import learn_task, task_config
from tapfm.training.module import SlideModule
from tapfm.training.optim import Steps
from tests.slide_encoders.twins import write_moozy

FEATURES = {"dim": 8, "scores": True, "coords": True, "encoder": "uni", "folder": "f"}
HEAD = {"head.weight", "head.bias"}


def model_of(labels=("A", "B"), aggregator="gated", seed=0, dim=8, encoder="uni"):
    features = {**FEATURES, "dim": dim, "encoder": encoder}
    config = models.ModelConfig(
        "features", aggregator, labels, 224, 0.5, strategy={"name": "frozen"}, features=features
    )
    torch.manual_seed(seed)
    model = models.SlideModel(config, FeatureEncoder(features))
    for each in (*model.aggregator.parameters(), *model.aggregator.buffers()):
        torch.nn.init.normal_(each)
    return model


@pytest.fixture
def run(tmp_path):
    models.save(model_of(), tmp_path / "best.safetensors")
    return tmp_path


def equal(model, other):
    """Return the names of the aggregator's tensors that are alike."""
    there = other.aggregator.state_dict()
    return {k for k, v in model.aggregator.state_dict().items() if torch.equal(v, there[k])}


def test_all_of_it_is_taken_for_the_same_labels_and_standardisation_too(run):
    source, model = model_of(), model_of(seed=1)
    assert equal(model, source) == set()
    assert start_from(model, run) == []
    assert equal(model, source) == set(source.aggregator.state_dict())
    assert "center_D" in equal(model, source)


@pytest.mark.parametrize("labels", [("A", "C"), ("A",), ("A", "B", "C")])
def test_the_head_is_left_out_for_other_labels(run, labels):
    source, model = model_of(), model_of(labels, seed=1)
    before = model.aggregator.head.weight.clone()
    assert set(start_from(model, run / "best.safetensors")) == HEAD
    assert torch.equal(model.aggregator.head.weight, before)
    alike = {k for k in source.aggregator.state_dict() if k not in HEAD}
    own = model.aggregator.state_dict()
    assert all(torch.equal(own[k], source.aggregator.state_dict()[k]) for k in alike)


def test_other_aggregators_and_features_are_refused(run):
    for other in (model_of(aggregator="dsmil"), model_of(dim=9)):
        with pytest.raises(SettingsError, match=r"model\.start_from: .*Take the same aggregator"):
            start_from(other, run)


def test_a_run_takes_it_and_not_a_warm_start_as_well(run, capsys):
    task = learn_task("multilabel", ["A", "B"], (), [[1, 0], [0, 1]])
    given = {"labels": ["A", "B"], "task": task_config(task), "aggregator": "gated",
             "features": FEATURES, "strategy": "frozen", "start_from": str(run)}  # fmt: skip
    module = SlideModule(**given)
    assert equal(module.slide_model, model_of()) == set(model_of().aggregator.state_dict())
    assert f"aggregator from {run}; new: nothing" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="both say how the aggregator starts"):
        SlideModule(**given, steps=Steps(warm_start=True))


def published(tmp_path, **options):
    """A MOOZY of 8 features and a model that is to start from it."""
    write_moozy(tmp_path / "moozy.pt", dim=8, width=24, heads=4, layers=1)
    sizes = {"name": "moozy", "width": 24, "heads": 4, "layers": 1, "case_layers": 1}
    return tmp_path / "moozy.pt", model_of(aggregator={**sizes, **options}, encoder="lunit-vits8")


def test_a_published_slide_encoder_is_a_start_for_its_aggregator(tmp_path):
    path, model = published(tmp_path)
    before = model.aggregator.head.weight.clone()
    assert set(start_from(model, path)) == {*HEAD, "center_D", "scale_D"}
    options, state = read_published(path)
    own = model.aggregator.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())
    assert options.items() <= {**model.model_config.aggregator, **options}.items()
    assert torch.equal(model.aggregator.head.weight, before)


def test_a_published_slide_encoder_of_other_sizes_says_which_to_set(tmp_path):
    path, model = published(tmp_path, layers=2, registers=3)
    with pytest.raises(SettingsError, match=r"Set in model.aggregator: layers: 1, registers: 4"):
        start_from(model, path)
    with pytest.raises(SettingsError, match=r"Set in model.aggregator: name: moozy"):
        start_from(model_of(encoder=""), path)
    with pytest.raises(
        SettingsError, match=r"for 384 features of lunit_s8, .* has features of uni"
    ):
        start_from(model_of(), path)
    write_moozy(path, dim=9, width=24, heads=4, layers=1)
    with pytest.raises(SettingsError, match=r"has shape \(24, 9\), and this run has 8 features"):
        start_from(published(tmp_path / "other")[1], path)
