"""Beside a slide's prediction stands what the model says of each tile alone, where that is few."""

import h5py
import numpy as np
import torch

from slides.cohort.table import SlideRow
from tapfm.inference import prediction
from tapfm.inference.prediction import predict_bag, slide_by_slide, write_weights
from tests.bags import bag_of, places
from tests.inference.test_runtimes import slide_model
from tests.tiny import random_tiles

COUNTS = (3, 2)


def test_each_tile_is_predicted_as_a_slide_of_its_own_and_split_by_slide(tmp_path):
    model, tiles = slide_model("hierarchical"), random_tiles(sum(COUNTS))
    whole = predict_bag(model, bag_of(tiles, COUNTS), chunk=2)
    alone = [predict_bag(model, bag_of(tile[None]), chunk=1).probs_K for tile in tiles]
    np.testing.assert_allclose(whole.tile_probs_TP, alone, rtol=1e-4, atol=1e-6)
    rows = [SlideRow(name, "c", name, "test", None, "", "", ()) for name in ("a", "b")]
    parts = slide_by_slide(whole, rows, COUNTS)
    np.testing.assert_array_equal(parts[1].tile_probs_TP, whole.tile_probs_TP[3:])

    class Index:
        coords0, size0 = places(2).coords0_T2.numpy(), 448

    write_weights(tmp_path / "b.h5", parts[1], Index)
    with h5py.File(tmp_path / "b.h5") as file:
        np.testing.assert_array_equal(file["predictions"][:], parts[1].tile_probs_TP)


def test_a_task_of_many_numbers_has_none(monkeypatch):
    """Of thousands of genes a tile's predictions would outweigh its slide."""
    monkeypatch.setattr(prediction, "FEW", 2)  # the model has three
    assert predict_bag(slide_model(), bag_of(random_tiles(2)), chunk=2).tile_probs_TP is None


def test_where_places_count_there_is_none():
    model = slide_model({"name": "transmil", "width": 16, "landmarks": 5})
    with torch.no_grad():
        assert predict_bag(model, bag_of(random_tiles(4)), chunk=2).tile_probs_TP is None
