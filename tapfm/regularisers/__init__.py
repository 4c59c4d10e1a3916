"""Terms of the objective beside the task's loss: one file a regulariser, one small contract.

    contract.py     what a regulariser is given and returns
    aem.py          entropy of the tile weights
    consistency.py  difference of the logits of two views of a slide
    anchor.py       distance of a slide's mean feature to the frozen encoder's

Adding a regulariser is a file with a module and the frozen dataclass of its options, and its name
here; `configs/regularisers` has a YAML of each. A regulariser never imports another.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tapfm.regularisers.aem import Aem
from tapfm.regularisers.anchor import Anchor
from tapfm.regularisers.consistency import Consistency
from tapfm.regularisers.contract import Regulariser
from tapfm.settings import Spec, choose_each
from tapfm.slide_model.aggregators.contract import Aggregator

__all__ = ["REGULARISERS", "Regulariser", "make_regularisers"]

REGULARISERS: dict[str, type] = {"aem": Aem, "anchor": Anchor, "consistency": Consistency}


def make_regularisers(specs: Sequence[Spec], aggregator: Aggregator) -> nn.ModuleDict:
    """Return regularisers by name, each by name or by name and options.

    Raises:
        SettingsError: no such regulariser, an option it does not have, or not with this aggregator.
    """
    chosen = choose_each(REGULARISERS, specs, "model.regularisers")
    return nn.ModuleDict({name: each.build(aggregator) for name, each in chosen.items()})
