"""Exported models and written features, in the programs that the README names, where they are.

    pip install --no-deps kaiko-eva slide2vec     beside tapfm: their own pins differ

TRIDENT, Patho-Bench, CLAM and STAMP are not on PyPI; for them the tests of the writers compare
with each program's documented layout (tests/frozen/test_features.py).
"""

import importlib
import re

import pytest
import timm
import torch
import yaml

from tapfm.cli import main
from tests.inference.test_export import TILE, saved


def program(name):
    """Import a module of another program, or skip with what is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error})")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a folder, its README, tiles, the same by its transform, and what is computed."""
    folder = tmp_path_factory.mktemp("other")
    encoder, path = saved(folder)
    assert main(["export", "--model", str(path), "--out", str(folder / "exported")]) == 0
    tiles = torch.randint(0, 256, (3, 3, TILE, TILE), dtype=torch.uint8)
    mean, std = (torch.tensor(each)[:, None, None] for each in encoder.row.stats)
    with torch.no_grad():
        expected = encoder(tiles)[0]
    readme = (folder / "exported" / "README.md").read_text()
    return folder / "exported", readme, tiles, (tiles / 255 - mean) / std, expected


def test_eva_builds_the_model_of_the_readmes_config(exported):
    wrappers = program("eva.core.models.wrappers")
    _, readme, _, pixels, expected = exported
    (block,) = re.findall(r"```yaml\n(.*?)```", readme, re.S)
    said = yaml.safe_load(block)["backbone"]
    assert said["class_path"].rpartition(".")[2] == wrappers.ModelFromFunction.__name__
    assert said["init_args"]["path"] == "timm.create_model"
    model = wrappers.ModelFromFunction(timm.create_model, said["init_args"]["arguments"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), expected, rtol=1e-5, atol=1e-5)


def test_slide2vec_makes_the_same_features_by_the_readmes_name(exported):
    base = program("slide2vec.encoders.base")
    _, readme, tiles, _, expected = exported
    (name,) = re.findall(r"create_model\('(local-dir:[^']+)'", readme)
    encoder = base.TimmTileEncoder(name)
    transform = encoder.get_normalization_transform()
    batch = torch.stack([transform(tile) for tile in tiles])
    with torch.no_grad():
        found = encoder.encode_tiles(batch)
    assert encoder.encode_dim == expected.shape[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
