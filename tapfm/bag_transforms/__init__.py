"""Transforms of the tiles that the aggregator is given in training: one file each.

    contract.py      what a bag transform is given and returns
    tile_dropout.py  a share of the tiles is left out, and not encoded again
    mhim.py          tiles that a teacher finds easy are left out (MHIM-MIL)
    packmil.py       tiles left out of several slides make one more bag (PackMIL)
    histaug.py       features changed as an augmentation of the pixels would (HistAug)
    replay.py        regions of an earlier cohort are trained on as well (ConSlide)

Adding a transform is a file with a module and the frozen dataclass of its options, and its name
here; `configs/bag_transforms` has a YAML of each. A transform never imports another.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tapfm.bag_transforms.contract import BagTransform
from tapfm.bag_transforms.histaug import HistAug
from tapfm.bag_transforms.mhim import Mhim
from tapfm.bag_transforms.packmil import PackMil
from tapfm.bag_transforms.replay import Replay
from tapfm.bag_transforms.tile_dropout import TileDropout
from tapfm.settings import Spec, choose_each
from tapfm.slide_model.aggregators.contract import Aggregator

__all__ = ["BAG_TRANSFORMS", "BagTransform", "make_bag_transforms"]

BAG_TRANSFORMS: dict[str, type] = {
    "tile_dropout": TileDropout,
    "mhim": Mhim,
    "packmil": PackMil,
    "histaug": HistAug,
    "replay": Replay,
}


def make_bag_transforms(specs: Sequence[Spec], aggregator: Aggregator) -> nn.ModuleDict:
    """Return transforms by name, in order, each by name or by name and options.

    Raises:
        SettingsError: no such transform, an option it does not have, or not with this aggregator.
    """
    chosen = choose_each(BAG_TRANSFORMS, specs, "model.bag_transforms")
    return nn.ModuleDict({name: each.build(aggregator) for name, each in chosen.items()})
