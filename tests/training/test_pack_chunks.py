"""Small slides of an update share a chunk, and learn exactly what they would have learned alone.

The reference is plain autograd: each slide in a graph of its own, and the sum of their losses.
"""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from slides.streaming.order import Turn, epoch_order
from slides.streaming.stream import Skipped, TileBag
from tapfm.adapt.strategies import make_strategy
from tapfm.cli import main
from tapfm.data.bag import Bag, Moment
from tapfm.data.lookahead import with_behind
from tapfm.encoders.checkpoints import PACKAGED
from tapfm.slide_model.aggregators.contract import TileSet
from tapfm.slide_model.model import ModelConfig, SlideModel
from tapfm.training.passes import Passes, packed
from tests.bags import places
from tests.cohorts import spoil, write_cohort
from tests.tiny import random_tiles, tiny_encoder
from tests.training.test_objective import gradients, model_of, objective_of

COUNTS, CHUNK = (5, 7, 3), 17
TARGETS = torch.tensor([[1.0, torch.nan, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, torch.nan]])
DROPPED = [{"name": "tile_dropout", "share": 0.6}]
ARMS = {
    "full": {},
    "last blocks": {"strategy": {"name": "last_n", "n": 2}},
    "tiles left out": {"changes": DROPPED},
    "tiles drawn": {"few": 4},
    "no graph kept": {"keep": 0},
    "memory runs out": {"most": 6},
}


def slides(tiles=random_tiles):
    return [
        Bag(f"s{n}", f"c{n}", tiles(count, seed=n), places(count), target, n, turn=(0, n, n))
        for n, (count, target) in enumerate(zip(COUNTS, TARGETS, strict=True))
    ]


def moment(bag):
    return Moment(0.25, 1, seed=bag.seed, slide_id=bag.slide_id)


def model_with(strategy=None):
    model = model_of("tapfm_gated")
    if strategy:
        make_strategy(strategy).prepare(model.encoder.vit)
    return model


def one_graph(strategy=None, changes=(), bags=None, weights=None):
    """The reference; `weights` are factors of the tiles' gradients, slide by slide."""
    model = model_with(strategy)
    objective = objective_of(model, [], changes)
    for bag, weight_T in zip(bags or slides(), weights or [None] * 3, strict=False):
        z_TD, score_T = model.encoder(bag.tiles)
        if weight_T is not None:
            z_TD.register_hook(lambda grad, w_T=weight_T: grad * w_T[:, None])
            score_T.register_hook(lambda grad, w_T=weight_T: grad * w_T)
        tiles = TileSet.of(bag.places, z_TD, score_T)
        objective(model.aggregator, tiles, bag.labels_K, moment(bag)).loss.backward()
    return gradients(model)


def two_passes(strategy=None, changes=(), share=True, most=None, **how):
    """As `SlideModule` does it; also the slides after pass 2, and tiles of each call."""
    model, calls, bags = model_with(strategy), [], slides()
    ours = Passes(model, CHUNK, skip=bool(changes), **how)
    ours.find_frozen_prefix()
    objective, found = objective_of(model, [], changes), []
    plain = ours._chunk

    def chunk(tiles, *more):
        calls.append(len(tiles))
        if most and len(tiles) > most:
            raise torch.OutOfMemoryError("full")
        return plain(tiles, *more)

    ours._chunk = chunk
    for number, bag in enumerate(bags):
        encoded = ours.encode(bag, behind=bags[number + 1 :] if share else ())
        tiles = encoded.tiles
        objective(model.aggregator, tiles, bag.labels_K, moment(bag)).loss.backward()
        ours.adapt(encoded)
        found.append(encoded)
    return gradients(model), found, calls


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("arm", ARMS)
def test_features_and_gradient_are_those_of_slides_alone(arm, capsys):
    how = {"strategy": None, "changes": (), **ARMS[arm]}
    found, encoded, _ = two_passes(**how)
    _, alone, _ = two_passes(**{**how, "most": None}, share=False)
    for ours, theirs in zip(encoded, alone, strict=True):
        torch.testing.assert_close(ours.tiles.z_TD, theirs.tiles.z_TD, rtol=0, atol=1e-10)
        torch.testing.assert_close(ours.tiles.z_TD.grad, theirs.tiles.z_TD.grad, rtol=0, atol=1e-10)
        assert ours.skipped == theirs.skipped
    reference = partial(one_graph, how["strategy"], how["changes"])
    drawn = [each.weight_T for each in alone] if "few" in how else None
    expected = reference(weights=drawn)
    assert difference(found, expected) <= 1e-10
    assert difference(found, reference(bags=slides()[:2])) > 1e-3, "a slide less is another one"
    assert ("going on with" in capsys.readouterr().out) == (arm == "memory runs out")


def test_one_chunk_is_encoded_in_place_of_three_and_its_graph_is_kept():
    assert two_passes()[2] == [sum(COUNTS)]
    assert two_passes(share=False)[2] == list(COUNTS)
    assert two_passes(keep=0)[2] == [sum(COUNTS)] * 2
    _, encoded, calls = two_passes(changes=DROPPED)
    left = sum(COUNTS) - sum(each.skipped for each in encoded)
    assert calls == [sum(COUNTS), left]
    assert 0 < left < sum(COUNTS)


class Streamed:
    """Tiles that are not in memory."""

    def __init__(self, count, seed):
        self.tiles = random_tiles(count, seed)

    def split(self, size):
        return self.tiles.split(size)


def test_slides_are_packed_in_order_while_they_fit_and_are_in_memory():
    bags = slides()
    assert [len(packed(bags, chunk)) for chunk in (1, 5, 11, 12, 14, 15)] == [1, 1, 1, 2, 2, 3]
    assert packed(slides(Streamed), 99)[0].slide_id == "s0"
    assert len(packed(slides(Streamed), 99)) == 1
    assert len(packed([bags[0], slides(Streamed)[1], bags[2]], 99)) == 1


def test_a_slide_out_of_turn_is_a_fault_of_ours():
    ours, bags = Passes(model_with(), CHUNK), slides()
    ours.encode(bags[0], behind=bags[1:])
    with pytest.raises(AssertionError, match="one after the other"):
        ours.encode(bags[2])


def test_each_slide_comes_with_those_behind_it_that_fit():
    drawn = np.random.default_rng(0)
    for room in (1, 7, 20, 10**6):
        items = []
        for n, count in enumerate(drawn.integers(1, 12, 23)):
            turn = Turn(0, n, n)
            tiles = torch.zeros(int(count), 3, 1, 1, dtype=torch.uint8)
            tiles = Streamed(3, 0) if n % 9 == 4 else tiles
            bag = TileBag(f"s{n}", "c", tiles, np.zeros((0, 2)), torch.zeros(1), turn)
            items.append(Skipped(f"s{n}", "broken", turn) if n % 7 == 3 else bag)
        found = list(with_behind(items, room))
        assert [each.item for each in found] == items
        for number, each in enumerate(found):
            expected, taken = [], 0
            for item in items[number:]:
                if isinstance(item, TileBag):
                    whole = isinstance(item.tiles, torch.Tensor)
                    taken += len(item.tiles) if whole else room + 1
                    expected += [item] * (taken <= room and item is not items[number])
            assert each.behind == expected


def test_read_ahead_is_a_chunk_and_one_more():
    read = []

    def items():
        for n in range(20):
            read.append(n)
            tiles = torch.zeros(4, 3, 1, 1)
            yield TileBag(f"s{n}", "c", tiles, np.zeros((0, 2)), torch.zeros(1), Turn(0, n, n))

    for number, _ in enumerate(with_behind(items(), room=10)):
        assert read == list(range(min(20, number + 3)))


FIT = ["--model.drop_path", "0", "--model.chunk", "16", "--model.steps.accumulate", "3"]


def test_a_run_learns_the_same_beside_a_broken_slide_and_in_a_short_epoch(tmp_path):
    """Trains on five of seven slides, three an update: one is broken, one beyond the limit."""
    config = write_cohort(tmp_path, on_error="skip", tiles_per_slide=5)
    assert main(["index", "--config", str(config)]) == 0
    broken = epoch_order(7, 0, 0)[1]
    spoil(tmp_path / f"slides/s{broken}.{'svs' if broken % 2 else 'tif'}")
    fit = ["fit", "--config", str(config), *FIT, "--trainer.max_epochs", "1"]
    fit += ["--trainer.limit_train_batches", "6"]
    for name, pack in (("alone", "false"), ("packed", "true")):
        assert main([*fit, "--name", name, "--model.pack_chunks", pack]) == 0
    alone, ours = (tmp_path / "runs" / name for name in ("alone", "packed"))
    one, other = (load_file(run / "best.safetensors") for run in (alone, ours))
    start = load_file(PACKAGED / "demo_vit.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=2e-6)
    assert (one[f"encoder.vit.{name}"] - start[name]).abs().max() > 1e-5, "they learned"
    rows = [pd.read_csv(run / "metrics.csv") for run in (alone, ours)]
    assert rows[0]["slide_id"].tolist() == rows[1]["slide_id"].tolist()
    np.testing.assert_allclose(rows[0]["train/loss"], rows[1]["train/loss"], atol=1e-5)
    norm = rows[1]["train/encoder_grad_norm"].dropna()
    assert (norm > 0).tolist() == [False, False, True, False, True], (
        "comes with the last of a chunk"
    )
    last = [2, 4]
    theirs = rows[0]["train/encoder_grad_norm"].dropna()
    np.testing.assert_allclose(norm.iloc[last], theirs.iloc[last], rtol=1e-3)


def test_what_it_cannot_go_with_is_refused(tmp_path, capsys):
    fit = ["fit", "--config", str(write_cohort(tmp_path)), *FIT, "--model.pack_chunks", "true"]
    cosine = ["--model.backward_tiles", "3", "--model.cosine_every", "2"]
    assert main([*fit, *cosine, "--model.steps.accumulate", "1"]) == 2
    said = capsys.readouterr().err
    assert "an update has one slide" in said
    assert "model.cosine_every 2 compares gradients of one slide" in said
    assert main([*fit, "--model.drop_path", "0.1"]) == 2
    assert "model.pack_chunks needs an encoder without noise" in capsys.readouterr().err


def test_batch_statistics_are_noise():
    config = ModelConfig("demo_vit", "gated", ("A",), 32, 0.5)
    model = SlideModel(config, tiny_encoder())
    assert not Passes(model, 4).noisy
    model.encoder.vit.stem = nn.Sequential(nn.BatchNorm2d(3))
    assert Passes(model, 4).noisy
