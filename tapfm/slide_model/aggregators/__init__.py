"""From tiles to a slide or a case: one file an aggregator, one small contract.

    contract.py      what an aggregator is given, what it returns, what every one has
    tapfm.py         w = softmax(minmax(s) / T), T = 0.1: the paper's, how CLS looks
    gated.py         w = softmax(g(z)): learned attention (ABMIL)
    tapfm_gated.py   w = softmax(minmax(s) / T + g(z)), T = 1: the default
    mean.py          all tiles alike: a linear probe whose encoder learns
    hierarchical.py  the same within each slide of a case, then over its slides
    pooling.py       what tapfm, gated, tapfm_gated and hierarchical share: the weighted mean
    dsmil.py         a critical tile for each label, and all tiles by their likeness to it
    transmil.py      tiles attend to each other and to their neighbours on the slide
    clam.py          attention, and tile classifiers taught by what it looks at
    additive.py      a value for each tile in the label's unit, whose mean is the slide's
    mamba.py         tiles in a row, each with a decaying memory of those before it
    otsurv.py        tiles transported to learned prototypes, the surest first
    ads.py           groups of tiles stand for them in training: PackMIL's downsampler
    graph.py         tiles take in those that touch them
    case_transformer.py  each slide pooled, then a transformer over the slides of a case
    regions.py       tiles of several magnifications meet region by region
    madeleine.py     several heads of gated attention: the slide encoder Madeleine
    moozy.py         tiles look at each other, then slides do: the slide encoder MOOZY

Adding an aggregator is a file with a module and the frozen dataclass of its options, and its name
here. An aggregator never imports another; what they share is in `tapfm.slide_model.layers`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tapfm.settings import SettingsError, Spec, choose, spec_of
from tapfm.slide_model.aggregators.additive import Additive
from tapfm.slide_model.aggregators.ads import Ads
from tapfm.slide_model.aggregators.case_transformer import CaseTransformer
from tapfm.slide_model.aggregators.clam import Clam
from tapfm.slide_model.aggregators.contract import Aggregator, AggregatorOptions
from tapfm.slide_model.aggregators.dsmil import Dsmil
from tapfm.slide_model.aggregators.gated import Gated
from tapfm.slide_model.aggregators.graph import Graph
from tapfm.slide_model.aggregators.hierarchical import Hierarchical
from tapfm.slide_model.aggregators.madeleine import Madeleine
from tapfm.slide_model.aggregators.mamba import Mamba
from tapfm.slide_model.aggregators.mean import Mean
from tapfm.slide_model.aggregators.moozy import Moozy
from tapfm.slide_model.aggregators.otsurv import OtSurv
from tapfm.slide_model.aggregators.regions import Regions
from tapfm.slide_model.aggregators.tapfm import Tapfm
from tapfm.slide_model.aggregators.tapfm_gated import TapfmGated
from tapfm.slide_model.aggregators.transmil import TransMil
from tapfm.slide_model.layers.tile_head import TileHead

__all__ = [
    "AGGREGATORS",
    "TILES",
    "aggregator_options",
    "as_of_0_1",
    "make_aggregator",
    "name_of",
    "with_temperature",
]

TILES = "tiles"
"""Name of `TileHead` in a model's config."""
AGGREGATORS: dict[str, type] = {
    "tapfm": Tapfm,
    "gated": Gated,
    "tapfm_gated": TapfmGated,
    "mean": Mean,
    "hierarchical": Hierarchical,
    "dsmil": Dsmil,
    "transmil": TransMil,
    "clam": Clam,
    "additive": Additive,
    "mamba": Mamba,
    "otsurv": OtSurv,
    "ads": Ads,
    "graph": Graph,
    "case_transformer": CaseTransformer,
    "regions": Regions,
    "madeleine": Madeleine,
    "moozy": Moozy,
}


def aggregator_options(spec: Spec) -> AggregatorOptions:
    """Return the options of an aggregator by name, or by name and options.

    Raises:
        SettingsError: no such aggregator, an option it does not have, or one of another type.
    """
    return choose(AGGREGATORS, spec, "model.aggregator")


def make_aggregator(spec: Spec, dim: int, labels: int) -> Aggregator | TileHead:
    """Return an aggregator, or the head of `TILES`.

    Args:
        spec: which, and its options.
        dim: feature width D.
        labels: number of logits K.

    Raises:
        SettingsError: as `aggregator_options`.
    """
    if name_of(spec) == TILES:
        return TileHead(dim, labels)
    made = aggregator_options(spec).build(dim, labels)
    made.key = name_of(spec)
    return made


def with_temperature(spec: Spec, temperature: float | None) -> dict[str, Any]:
    """Return name and all options of an aggregator; `temperature` is the old key of that option.

    Raises:
        SettingsError: as `aggregator_options`, or the aggregator has no temperature.
    """
    if name_of(spec) == TILES:
        return {"name": TILES}
    options = aggregator_options(spec)
    if temperature is not None:
        name = name_of(spec)
        if not hasattr(options, "temperature"):
            raise SettingsError(
                f"model.temperature is of the CLS score, and {name} does not look at it. Leave it "
                "out, or take tapfm_gated."
            )
        options = replace(options, temperature=temperature)
    return spec_of(AGGREGATORS, options)


def as_of_0_1(name: str, temperature: float | None) -> dict[str, Any]:
    """Return the spec of an aggregator as version 0.1 saved it; `gated` ignored the number."""
    known = temperature is not None and name not in (TILES, "gated")
    return {"name": name, **({"temperature": temperature} if known else {})}


def name_of(spec: Spec) -> str:
    """Return the name in a spec."""
    return spec if isinstance(spec, str) else spec.get("name", "")
