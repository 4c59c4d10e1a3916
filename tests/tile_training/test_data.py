"""Batches of labelled tiles: every tile once an epoch, changed by a draw of its own."""

import torch

from slides.cohort.labelled_tiles import read_tiles
from slides.streaming.augment import orient
from slides.streaming.order import Turn
from slides.streaming.stream import Augment
from tapfm.adapt.pixels import STAINS, StainMaps, optical_density
from tapfm.tile_training.data import TileData, TileDataset
from tests.tile_sets import SIDE, write_tiles


def epoch_of(dataset, epoch):
    return [dataset[Turn(epoch, n, n)] for n in range(len(dataset))]


def tiles_of(batches):
    return torch.cat([batch.tiles_CP for batch in batches])


def test_every_tile_once_with_its_own_class(tmp_path):
    tiles = read_tiles(write_tiles(tmp_path))
    dataset = TileDataset(tiles.part("train"), tiles.classes, SIDE, batch=5)
    plain = tiles_of([dataset[n] for n in range(len(dataset))])
    labels = torch.cat([dataset[n].labels_C for n in range(len(dataset))])
    assert labels.tolist() == [0] * 11 + [1] * 11
    orders = []
    for epoch in (0, 1):
        batches = epoch_of(dataset, epoch)
        assert [batch.count for batch in batches] == [5, 5, 5, 5, 2]
        found = tiles_of(batches)
        place = [(found == tile).flatten(1).all(1).nonzero().item() for tile in plain]
        assert sorted(place) == list(range(22))
        assert torch.equal(torch.cat([b.labels_C for b in batches])[place], labels)
        orders.append(place)
        assert len({batch.seed for batch in batches}) == 5
    assert orders[0] != orders[1]


def test_a_tile_is_changed_by_its_own_draw_whatever_the_batch(tmp_path):
    tiles = read_tiles(write_tiles(tmp_path))
    make = (tiles.part("train"), tiles.classes, SIDE)
    how = Augment(colour=0.2)
    small, large = (
        {row: dataset.read(row, 3) for row in dataset.tiles}
        for dataset in (TileDataset(*make, 2, 1, how), TileDataset(*make, 22, 1, how))
    )
    assert all(torch.equal(small[row], large[row]) for row in small)
    other = TileDataset(*make, 2, 1, how)
    assert any(not torch.equal(other.read(row, 4), small[row]) for row in small)
    means = torch.stack([small[row].float().mean() for row in small])
    plain = torch.stack([TileDataset(*make, 2).read(row, 0).float().mean() for row in small])
    assert (means / plain).std() > 0.01, "each its own colour, not one for the batch"


def test_validation_takes_tiles_as_they_are(tmp_path):
    data = TileData(str(write_tiles(tmp_path)), tile_px=SIDE, batch=5, colour=0.3, workers=0)
    found = tiles_of(list(data.val_dataloader()))
    plain = TileDataset(data.tiles.part("val"), data.class_names, SIDE, 12)[0]
    assert torch.equal(found, plain.tiles_CP)
    assert data.class_weight == [1.0, 1.0]


def test_maps_of_a_turned_tile_are_the_turned_maps():
    """HiAdapter's are computed in the model: augmentation cannot part them from the tile."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    turns, mirror = torch.tensor([1, 3, 0]), torch.tensor([False, True, True])
    maps = StainMaps(list(STAINS)[:2], dtype=torch.float64)

    def mapped(tiles_CP):
        return maps(optical_density(tiles_CP.double() / 255))

    turned = mapped(orient(tiles, turns, mirror))
    torch.testing.assert_close(turned, orient(mapped(tiles), turns, mirror), rtol=0, atol=1e-12)
    assert (turned - mapped(tiles)).abs().max() > 0.1
