"""tapfm adapts pathology foundation models to slide-level questions, end to end, on one GPU.

Packages in the order of a run; each lists its files in its own docstring:

    data/            slides to bags: the data module and the batch
    encoders/        foundation models: which there are, loading, a tile's feature and score
    adapt/           what of the encoder learns; one file a strategy
    slide_model/     encoder and aggregator as one model; one file an aggregator
    bag_transforms/  which tiles the aggregator is given in training; one file a transform
    regularisers/    terms beside the task's loss; one file a regulariser
    tasks/           what is predicted; one file a task
    engine/          the exact gradient of a slide at one chunk's memory
    training/        one run: the step, the two passes, callbacks, `tapfm fit`
    frozen/          what the frozen encoder gives: features, and slide models fitted to them
    inference/       slides to predictions, heatmaps, exported models
    evaluation/      runs against each other: test, study, probe, drift
    stats/           figures with intervals
    viewer/          a run's slides in the browser
    reports/         what runs said: tables, pictures, one page
    planning/        what fits on which card, and whether this installation is sound
    preflight/       what can go wrong with a run, before it
    tile_training/   training on labelled tiles
    pathpt/          tiles named by learned prompts, from few slides
    verbs/           the command line's flags, and what is done with them

and beside them:

    api.py           what people do in Python, in five functions, which this package gives
    cli.py           the command line: the list of verbs
    config_lines.py  says where in the configs a key stands, for errors
    config_paths.py  finds configs by name, and resolves the paths in them
    config.py        what indexing reads of a config
    weights.py       files of weights: hashed when written, read whole and finite
    autocast.py      a part of a model without autocast
    following.py     the command that usually follows each verb
    yaml_files.py    reads YAML that people write
    settings.py      settings: what is wrong with them, all at once; things chosen by name
    distributed.py   what several GPUs tell each other

Read the room `training` first.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tapfm.api import Features, TiledSlide, features, fit, load_encoder, open_slide, predict

__version__ = "0.1.0"
__all__ = ["Features", "TiledSlide", "features", "fit", "load_encoder", "open_slide", "predict"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: `import tapfm` alone loads no torch."""
    if name in __all__:
        return getattr(import_module("tapfm.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
