"""Bag transforms as a config names them; of those that need a file, with one of random weights."""

import tempfile
from functools import cache
from pathlib import Path

import torch

from tapfm.bag_transforms.histaug import FeatureChange, save_network


def example(name, dim, **options):
    """A transform's name and options, for features of width `dim`."""
    needs = {"weights": network_file(dim)} if name == "histaug" else {}
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
