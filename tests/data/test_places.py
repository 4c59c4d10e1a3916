"""Coordinates travel with the tiles: through drawing, augmentation and cases to the aggregator."""

import numpy as np
import pytest
import torch

from slides.streaming.order import Turn
from tapfm.data.bag import Places
from tapfm.data.datamodule import SlideData
from tapfm.data.streamed import chunk_seed
from tapfm.training.fit import read_config
from tests.bags import STEP0, places, tile_set
from tests.cohorts import write_cohort


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SlideData:
    config = write_cohort(tmp_path_factory.mktemp("places"), colour=0.0, turns=False)
    data = read_config(["--config", str(config)]).datamodule
    data.prepare_data()
    return data


def test_a_training_bag_says_where_its_tiles_lie(data):
    """Each tile, read again at the place that the bag names, is the tile of the bag."""
    rows = data.rows("train")[:2]
    for item in data.training_bags(rows):
        bag = data.on_before_batch_transfer(item, 0)
        row = next(row for row in rows if row.slide_id == bag.slide_id)
        source, index = data.tile_source(row)
        assert len(bag.places) == bag.count == 11
        tiles = torch.cat(list(bag.tiles.split(4)))
        for (x0, y0), tile in zip(bag.places.coords0_T2.tolist(), tiles, strict=True):
            np.testing.assert_array_equal(source.read(x0, y0, index.grid).transpose(2, 0, 1), tile)
        assert (bag.places.grid_px0_T == index.step0).all()
        assert bag.places.mpp == 0.5


def test_a_validation_bag_has_the_places_of_its_index(data):
    row = data.rows("val")[0]
    bag, index = data.bag(row), data.tile_source.index(row)
    np.testing.assert_array_equal(bag.places.coords0_T2, index.coords0)
    assert bag.count == len(index)
    lattice = bag.places.lattice()
    assert lattice.amin(0).tolist() == [0, 0]
    np.testing.assert_array_equal(
        lattice.flip(1) * index.step0 + index.coords0.min(0), index.coords0
    )


def test_slides_of_a_case_keep_their_own_lattices():
    found = Places.of([np.array([[40, 7], [60, 7]]), np.array([[5, 90]])], [20, 30], 0.5)
    assert found.slide_of_T.tolist() == [0, 0, 1]
    assert found.counts == [2, 1]
    assert found.lattice().tolist() == [[0, 0], [0, 1], [0, 0]]
    assert found.grid_px0_T.tolist() == [20, 20, 30]


def test_some_of_the_tiles_keep_what_belongs_to_them():
    tiles = tile_set(torch.arange(8.0)[:, None], torch.arange(8.0), (5, 3))
    for rows in (torch.tensor([1, 4, 6]), torch.tensor([0, 1, 0, 0, 1, 0, 1, 0]).bool()):
        some = tiles.take(rows)
        assert some.z_TD.squeeze().tolist() == some.score_T.tolist() == [1, 4, 6]
        assert some.slide_of_T.tolist() == [0, 0, 1]
        assert some.coords0_T2.tolist() == [[STEP0, 0], [4 * STEP0, 0], [STEP0, 0]]


def test_where_tiles_lie_may_be_unknown():
    found = Places.unknown(4)
    assert len(found) == 4
    assert found.counts == [4]
    assert found.take(torch.tensor([0, 2])).coords0_T2 is None


def test_it_can_fail():
    assert (
        places(7).lattice().tolist() != places(7).take(torch.arange(6, -1, -1)).lattice().tolist()
    )


def test_a_slide_that_comes_again_in_an_epoch_has_another_seed():
    seeds = {
        chunk_seed(0, Turn(3, position, 5, visit), "s") for position, visit in ((1, 0), (4, 1))
    }
    assert len(seeds) == 2
    assert chunk_seed(0, Turn(3, 1, 5), "s") in seeds
