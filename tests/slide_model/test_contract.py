"""What every aggregator keeps: a new one is in AGGREGATORS, and all of this is asked of it.

Two passes over the tiles give the gradient of one graph: tests/training/test_objective.py.
Bounds are absolute, in float64, on numbers of size 1.
"""

from dataclasses import asdict, replace

import pytest
import torch
import yaml
from torch import nn

from slides.errors import SettingsError
from tapfm.cli import main
from tapfm.data.bag import Places
from tapfm.settings import spec_of
from tapfm.slide_model import model as models
from tapfm.slide_model.aggregators import AGGREGATORS, aggregator_options, make_aggregator
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.slide_model.model import ModelConfig
from tapfm.tasks.losses import MaskedBCE
from tests.bags import tile_set
from tests.conftest import ROOT

T, D, K, CASE = 13, 7, 3, (8, 5)
TARGET = torch.tensor([1.0, 0.0, 1.0])
SPECS = {
    **{name: {"name": name} for name in AGGREGATORS},
    "transmil, few landmarks": {"name": "transmil", "width": 16, "landmarks": 5},
    "clam, one row": {"name": "clam", "multi": False, "group": 2},
    "additive, plain mean": {"name": "additive", "attention": False},
    "additive, probabilities": {"name": "additive", "probability": True},
    "mamba, small": {"name": "mamba", "width": 32, "chunk": 5, "rate": 4},
    "mamba, local": {"name": "mamba", "width": 32, "chunk": 5, "scan": "local"},
    "ads, max": {"name": "ads", "keep": "max", "ratio": 3},
    "regions, small": {"name": "regions", "width": 16, "span": 2},
}
every = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_bag = pytest.mark.parametrize("counts", [(), CASE], ids=["slide", "case"])


def made(spec, dtype=torch.float64):
    """Return an aggregator; weights that start at 0, where gradients hide, are drawn."""
    torch.manual_seed(3)
    aggregator = make_aggregator(spec, D, K).to(dtype)
    with torch.no_grad():
        for parameter in aggregator.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_()
    return aggregator


def leaves(count=T, counts=(), dtype=torch.float64):
    """Return a tile set whose features and scores are leaves that need gradients."""
    drawn = torch.Generator().manual_seed(0)
    z_TD = torch.randn(count, D, generator=drawn, dtype=dtype)
    score_T = -torch.rand(count, generator=drawn, dtype=dtype) / 1000
    return tile_set(z_TD.requires_grad_(), score_T.requires_grad_(), counts)


def placed(tiles, where):
    """Return the same tiles at other places."""
    return TileSet.of(where, tiles.z_TD, tiles.score_T)


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@every
@every_bag
def test_shapes_and_weights(spec, counts):
    aggregator = made(spec)
    output = aggregator(leaves(counts=counts))
    assert output.logits_K.shape == (K,)
    assert output.embedding_E.ndim == 1
    assert output.weights_T.shape == (T,)
    assert (output.weights_T >= 0).all()
    close(output.weights_T.sum().item(), 1.0, 1e-12)
    assert (output.log_weights is not None) == aggregator.has_attention
    if aggregator.has_attention:
        assert output.log_weights.shape in {(T,), (K, T)}
        assert output.log_weights.requires_grad
        close(torch.atleast_2d(output.log_weights).exp().mean(0), output.weights_T, 1e-12)
    if output.tile_logits_TK is not None:
        assert output.tile_logits_TK.shape == (T, K)


@every
@every_bag
def test_gradients_are_finite_and_reach_every_parameter(spec, counts):
    aggregator, tiles = made(spec), leaves(counts=counts)
    aggregator.loss(tiles, TARGET, MaskedBCE([1.0] * K).double()).backward()
    for name, parameter in aggregator.named_parameters():
        if "slide_gate" not in name or counts:  # one slide is weighed against no other
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    assert tiles.z_TD.grad.isfinite().all()
    assert tiles.z_TD.grad.any(1).all()


@every
@every_bag
def test_the_gradient_is_that_of_finite_differences(spec, counts):
    aggregator, tiles = made(spec), leaves(counts=counts)

    def logits(z_TD, score_T):
        return aggregator(tile_set(z_TD, score_T, counts)).logits_K

    assert torch.autograd.gradcheck(logits, (tiles.z_TD, tiles.score_T), fast_mode=True)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_tiles_weigh_the_same_and_give_finite_gradients(spec, dtype):
    aggregator, tiles = made(spec, dtype), leaves(dtype=dtype)
    jitter_T = torch.finfo(dtype).eps * 0.3 * torch.arange(T, dtype=dtype) / T
    z_TD = tiles.z_TD.detach()[:1].repeat(T, 1).requires_grad_()
    score_T = (-0.3 + 0.3 * jitter_T).requires_grad_()  # a spread below rounding
    output = aggregator(tile_set(z_TD, score_T))
    if not aggregator.uses_coords:
        torch.testing.assert_close(output.weights_T, torch.full((T,), 1 / T, dtype=dtype))
    output.logits_K.sum().backward()
    assert z_TD.grad.isfinite().all()
    assert score_T.grad is None or score_T.grad.isfinite().all()


@every
def test_one_tile(spec):
    tiles = leaves(1)
    output = made(spec)(tiles)
    assert output.weights_T.item() == 1
    output.logits_K.sum().backward()
    assert tiles.z_TD.grad.isfinite().all()


@every
def test_a_tile_alone_is_a_slide_of_one_tile(spec):
    aggregator, tiles = made(spec), leaves()
    found_TK = aggregator.alone(tiles)
    if aggregator.uses_coords:
        assert found_TK is None
        return
    singles = [tile_set(tiles.z_TD[t : t + 1], tiles.score_T[t : t + 1]) for t in range(T)]
    close(found_TK, torch.stack([aggregator(each).logits_K for each in singles]))
    assert not found_TK.requires_grad


@every
@every_bag
def test_the_order_of_a_slides_tiles_does_not_matter_in_prediction(spec, counts):
    aggregator, tiles = made(spec).eval(), leaves(counts=counts)
    drawn = torch.Generator().manual_seed(1)
    firsts = [0, CASE[0]] if counts else [0]
    rows_T = torch.cat(
        [
            first + torch.randperm(count, generator=drawn)
            for first, count in zip(firsts, counts or [T], strict=True)
        ]
    )
    output, mixed = aggregator(tiles), aggregator(tiles.take(rows_T))
    close(mixed.logits_K, output.logits_K)
    close(mixed.weights_T, output.weights_T[rows_T])


@every
@every_bag
def test_the_score_is_used_where_declared_and_nowhere_else(spec, counts):
    aggregator, tiles = made(spec), leaves(counts=counts)
    output = aggregator(tiles)
    output.logits_K.sum().backward()
    assert (tiles.score_T.grad is not None) == aggregator.uses_score
    other = aggregator(replace(tiles, score_T=tiles.score_T.flip(0)))
    assert torch.equal(other.logits_K, output.logits_K) != aggregator.uses_score


@every
@every_bag
def test_places_are_used_where_declared_and_nowhere_else(spec, counts):
    aggregator, tiles = made(spec), leaves(counts=counts)
    output = aggregator(tiles)
    moved = replace(tiles, coords0_T2=tiles.coords0_T2 + torch.tensor([448 * 3, 448 * 11]))
    torch.testing.assert_close(aggregator(moved).logits_K, output.logits_K, rtol=0, atol=0)
    there_T2 = tiles.coords0_T2.clone()
    there_T2[:8] = there_T2[:8].flip(0)  # of a case: the first slide's
    other = aggregator(replace(tiles, coords0_T2=there_T2))
    assert torch.equal(other.logits_K, output.logits_K) != aggregator.uses_coords
    unknown = placed(tiles, Places.unknown(T))
    if aggregator.uses_coords:
        with pytest.raises(SettingsError, match=rf"{spec['name']} .* no coordinates"):
            aggregator(unknown)
    elif not counts:
        assert torch.equal(aggregator(unknown).logits_K, output.logits_K)


@every
@every_bag
def test_a_linear_head_is_one_and_what_is_in_front_of_it_learns_where_declared(spec, counts):
    aggregator, tiles = made(spec), leaves(counts=counts)
    output = aggregator(tiles)
    if aggregator.linear_head:
        close(output.logits_K, aggregator.head(output.embedding_E))
    else:
        assert not hasattr(aggregator, "head"), "which a linear probe would be put into"
    output.embedding_E.square().sum().backward()
    learned = {
        name for name, parameter in aggregator.named_parameters() if parameter.grad is not None
    }
    in_front = {name for name in learned if not name.startswith(("norm.", "head."))}
    assert bool(in_front) == aggregator.learns_weights


@every
def test_features_are_centred_and_scaled_first(spec):
    """A warm start sets these two."""
    aggregator, tiles = made(spec), leaves()
    plain = aggregator(tiles)
    aggregator.center_D.copy_(torch.linspace(-1, 2, D))
    aggregator.scale_D.copy_(torch.linspace(0.5, 3, D))
    z_TD = tiles.z_TD * aggregator.scale_D + aggregator.center_D
    shifted = aggregator(replace(tiles, z_TD=z_TD))
    close(shifted.logits_K, plain.logits_K)
    close(shifted.weights_T, plain.weights_T)


@every
def test_losses_are_the_declared_terms_of_the_declared_number_of_calls(spec):
    class Counted(MaskedBCE):
        calls = 0

        def forward(self, logits, target):
            self.calls += 1
            return super().forward(logits, target)

    loss = Counted([1.0] * K).double()
    aggregator, tiles = made(spec), leaves()
    terms = aggregator.losses(aggregator(tiles), TARGET, loss)
    assert tuple(terms) == (aggregator.terms or ("loss",))
    assert loss.calls == aggregator.loss_calls
    close(aggregator.loss(tiles, TARGET, loss), sum(terms.values()))


def other(value):
    """Return another value of an option that is a number or a truth value; a word stays."""
    return not value if isinstance(value, bool) else value if isinstance(value, str) else 2 * value


@pytest.mark.parametrize("name", AGGREGATORS)
def test_options_come_back_from_yaml_and_from_the_command_line(name, capsys):
    default = aggregator_options(name)
    changed = replace(default, **{key: other(value) for key, value in asdict(default).items()})
    spec = spec_of(AGGREGATORS, changed)
    assert aggregator_options(yaml.safe_load(yaml.safe_dump(spec))) == changed
    assert changed != default or not asdict(default)
    config = ROOT / "configs" / "cohorts" / "demo.yaml"
    for given, expected in ((name, default), (yaml.safe_dump(spec), changed)):
        with pytest.raises(SystemExit) as end:
            options = ["--model.aggregator", given, "--print_config"]
            main(["fit", "--config", str(config), *options])
        assert end.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)["model"]["aggregator"]
        assert aggregator_options(printed) == expected


@every
def test_a_saved_model_says_the_same(spec, tmp_path):
    torch.manual_seed(0)
    config = ModelConfig("demo_vit", spec, ("A", "B"), 32, 0.5, weights="random")
    model = models.build(config).eval()
    for parameter in model.aggregator.parameters():
        nn.init.normal_(parameter, std=0.1)
    models.save(model, tmp_path / "best.safetensors")
    loaded = models.load(tmp_path / "best.safetensors")
    tiles = tile_set(torch.randn(T, model.encoder.dim), torch.rand(T))
    assert torch.equal(loaded.aggregator(tiles).logits_K, model.aggregator(tiles).logits_K)
    config = loaded.model_config.aggregator
    assert aggregator_options(config) == aggregator_options(spec)
