"""Bag transforms as a config names them; of those that need a file, with one of random weights."""

import tempfile
from functools import cache
from pathlib import Path

import torch

from tapfm.bag_transforms.histaug import FeatureChange, save_network
from tapfm.bag_transforms.replay import Memory, save_memory


def example(name, dim, **options):
    """A transform's name and options, for features of width `dim`."""
    needs = {}
    if name == "histaug":
        needs = {"weights": network_file(dim)}
    if name == "replay":
        needs = {"memory": memory_file(dim)}
    return {"name": name, **needs, **options}


@cache
def network_file(dim):
    path = Path(tempfile.mkdtemp()) / "histaug.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FeatureChange(dim, blocks=2)
        torch.nn.init.normal_(network.out.weight, std=0.1)
    save_network(network, path, "tiny", 0.2)
    return str(path)


@cache
def memory_file(dim, labels=3):
    path = Path(tempfile.mkdtemp()) / "memory.safetensors"
    save_memory(memory(dim, labels), path)
    return str(path)


def memory(dim, labels=3, regions=6, tiles=4):
    """Regions of tiles in a square, of two targets in turn; of the last nothing is known."""
    drawn = torch.Generator().manual_seed(0)
    target_RY = (torch.arange(regions)[:, None] % 2).float().expand(-1, labels).clone()
    target_RY[-1] = torch.nan
    number = torch.arange(tiles)
    corners = (torch.stack([number % 2, number // 2], 1) * 448).repeat(regions, 1)
    return Memory(
        z_ND=torch.randn(regions * tiles, dim, generator=drawn),
        score_N=torch.rand(regions * tiles, generator=drawn),
        coords0_N2=corners, step0_N=torch.full((regions * tiles,), 448.0).double(),
        region_N=torch.arange(regions).repeat_interleave(tiles), target_RY=target_RY,
        targets=tuple("ABC"[:labels]), encoder="tiny", mpp=0.5,
    )  # fmt: skip
