"""What stands between the passes is exact, and what is off is as if it were absent.

The reference is plain autograd: all tiles in one forward, and the same objective on its features.
Bounds are of the norm of the difference, in float64.
"""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from slides.errors import SettingsError
from tapfm import regularisers
from tapfm.bag_transforms import BAG_TRANSFORMS, make_bag_transforms
from tapfm.cli import main
from tapfm.data.bag import Bag, Moment
from tapfm.regularisers import REGULARISERS, make_regularisers
from tapfm.regularisers.contract import Regulariser
from tapfm.slide_model.aggregators import AGGREGATORS
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.slide_model.model import ModelConfig, SlideModel
from tapfm.tasks.losses import MaskedBCE
from tapfm.training.objective import Objective
from tapfm.training.passes import Passes
from tests.bag_transforms.examples import example
from tests.bags import places
from tests.cohorts import write_cohort
from tests.tiny import random_tiles, tiny_encoder

TILES, MOMENT = 23, Moment(0.25, 1, seed=11, slide_id="s")
TARGET = torch.tensor([1.0, torch.nan, 0.0])
EVERY = {"none": [], **{name: [{"name": name}] for name in REGULARISERS}}
CHANGES = {"none": [], **{name: [example(name, 24)] for name in BAG_TRANSFORMS}}


def model_of(aggregator):
    torch.manual_seed(3)
    config = ModelConfig("demo_vit", aggregator, ("A", "B", "C"), 32, 0.5)
    model = SlideModel(config, tiny_encoder("5 prefix", torch.float64)).double().train()
    with torch.no_grad():
        for name, parameter in model.aggregator.named_parameters():
            if "gate.last" in name:  # which starts at 0, where its gradient hides
                parameter.normal_()
    return model


def objective_of(model, terms, changes):
    loss = MaskedBCE([1.0, 2.0, 3.0]).double()
    transforms = make_bag_transforms(changes, model.aggregator)
    regularisers = make_regularisers(terms, model.aggregator)
    dim = model.encoder.dim
    for each in regularisers.values():
        each.see_frozen(["s"], [torch.zeros(dim).double()], torch.ones(dim).double())
        each.before = {"s": torch.ones(3).double()}  # the first of two views
    return Objective(loss, transforms, regularisers).double()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def one_graph(name, terms, changes):
    model = model_of(name)
    z_TD, score_T = model.encoder(random_tiles(TILES))
    tiles = TileSet.of(places(TILES, (12, 11)), z_TD, score_T)
    objective_of(model, terms, changes)(model.aggregator, tiles, TARGET, MOMENT).loss.backward()
    return gradients(model)


def two_passes(name, terms, changes, chunk=4):
    """As `SlideModule` does it."""
    model = model_of(name)
    bag = Bag("s", "c", random_tiles(TILES), places(TILES, (12, 11)), TARGET, seed=5)
    passes = Passes(model, chunk, skip=bool(changes))
    encoded = passes.encode(bag)
    objective = objective_of(model, terms, changes)
    objective(model.aggregator, encoded.tiles, TARGET, MOMENT).loss.backward()
    passes.adapt(encoded)
    return gradients(model), encoded


def serves(name, terms, changes):
    try:
        objective_of(model_of(name), EVERY[terms], CHANGES[changes])
    except SettingsError:
        return False
    return True


def served():
    """Return each aggregator with each part that takes it, and one aggregator with each pair."""
    return [
        (name, terms, changes) for name in AGGREGATORS for terms in EVERY for changes in CHANGES
        if ("none" in (terms, changes) or name == "tapfm_gated") and serves(name, terms, changes)
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "terms", "changes"), served())
def test_the_gradient_is_that_of_one_graph(name, terms, changes):
    expected = one_graph(name, EVERY[terms], CHANGES[changes])
    found, _ = two_passes(name, EVERY[terms], CHANGES[changes])
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-10


@pytest.mark.parametrize("terms", sorted(REGULARISERS))
def test_a_regulariser_has_a_gradient_and_at_weight_0_none_to_the_bit(terms):
    without, _ = two_passes("gated", [], [])
    on, _ = two_passes("gated", [{"name": terms}], [])
    off, _ = two_passes("gated", [{"name": terms, "weight": 0.0}], [])
    assert not torch.equal(on, without)
    assert torch.equal(off, without)


def test_tiles_that_are_left_out_are_not_encoded_again(monkeypatch):
    model, taken = model_of("tapfm_gated"), []
    encode = SlideModel.encode
    monkeypatch.setattr(
        SlideModel, "encode", lambda self, tiles: taken.append(len(tiles)) or encode(self, tiles)
    )
    bag = Bag("s", "c", random_tiles(TILES), places(TILES), TARGET, seed=5)
    passes = Passes(model, 4, skip=True)
    encoded = passes.encode(bag)
    assert sum(taken) == TILES
    objective = objective_of(model, [], [{"name": "tile_dropout", "share": 0.7}])
    objective(model.aggregator, encoded.tiles, TARGET, MOMENT).loss.backward()
    left_T = (encoded.tiles.z_TD.grad != 0).any(1)
    assert left_T.sum() == 7
    taken.clear()
    passes.adapt(encoded)
    assert sum(taken) == 7
    assert encoded.skipped == 16


def fit(config, *options):
    assert main(["fit", "--config", str(config), *options]) == 0


def test_a_run_with_a_term_of_weight_0_is_the_run_without(tmp_path):
    config = write_cohort(tmp_path)
    fit(config, "--name", "without")
    fit(config, "--name", "zero", "--model.regularisers", "[{name: aem, weight: 0.0}]")
    runs = tmp_path / "runs"
    without, zero = (pd.read_csv(runs / name / "metrics.csv") for name in ("without", "zero"))
    assert zero["train/attention_entropy"].dropna().between(0, 1).all()
    pd.testing.assert_frame_equal(zero[without.columns], without)
    one, other = (load_file(runs / name / "best.safetensors") for name in ("without", "zero"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


class Pull(Regulariser):
    """Pulls the embedding to a place that is learned, and remembers how far it was."""

    columns = ("distance",)

    def __init__(self, dim):
        super().__init__()
        self.place_E = nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean", torch.zeros(()))

    def weight(self, moment):
        return 0.5 * (1 - moment.progress)

    def forward(self, tiles, output, moment):
        distance = (output.embedding_E - self.place_E + self.mean).square().mean()
        self.mean = 0.9 * self.mean + 0.1 * distance.detach()
        return distance, {"distance": distance}


def test_parameters_and_state_of_a_term_are_trained_saved_and_resumed_to_the_bit(
    tmp_path, monkeypatch
):
    import dataclasses

    options = dataclasses.make_dataclass("Options", [], frozen=True)
    options.build = lambda self, aggregator: Pull(aggregator.head.in_features)
    monkeypatch.setitem(regularisers.REGULARISERS, "pull", options)
    config = write_cohort(tmp_path)
    changes = "[{name: mhim, warm_up: 0.2}, {name: packmil, slides: 3}]"
    own = ["--model.regularisers", "[pull]", "--model.bag_transforms", changes]
    fit(config, "--name", "whole", *own)

    class StopError(RuntimeError):
        pass

    steps = []
    from tapfm.training.module import SlideModule

    step = SlideModule.training_step

    def stopping(self, bag, index):
        steps.append(index)
        if len(steps) == 12:
            raise StopError
        return step(self, bag, index)

    monkeypatch.setattr(SlideModule, "training_step", stopping)
    with pytest.raises(StopError):
        fit(config, "--name", "stopped", *own)
    monkeypatch.setattr(SlideModule, "training_step", step)
    fit(config, "--name", "stopped", *own)
    runs = tmp_path / "runs"
    for name in ("metrics.csv", "best.safetensors"):
        whole, resumed = ((runs / run / name).read_bytes() for run in ("whole", "stopped"))
        assert whole == resumed, name
    whole, resumed = (
        torch.load(runs / run / "last.ckpt", weights_only=True) for run in ("whole", "stopped")
    )
    for state in (whole, resumed):
        kept = state["state_dict"]
        assert kept["objective.regularisers.pull.place_E"].norm() > 0
        assert kept["objective.regularisers.pull.mean"] > 0
    for key, value in whole["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed["state_dict"][key]), key
    assert pd.read_csv(runs / "whole" / "metrics.csv")["train/distance"].dropna().gt(0).all()
