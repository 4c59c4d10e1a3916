"""tapfm adapts pathology foundation models to slide-level questions, end to end, on one GPU.

    distributed.py  what several GPUs tell each other

Rooms, each of which lists its files in its own docstring:

    encoders/        foundation models: which there are, loading, a tile's feature and score
    engine/          the exact gradient of a slide at one chunk's memory
    adapt/           what of the encoder learns; one file a strategy
    tasks/           what is predicted; one file a task
    stats/           figures with intervals
    reports/         what runs said: tables, pictures, one page
    labelled/        training on labelled tiles
    pathpt/          tiles named by learned prompts, from few slides
    verbs/           the command line's flags, and what is done with them

The training step and what it meets:


Verbs:

    cli.py           the command line: the list of verbs

What all share:

    config.py        what indexing reads of a config
    settings.py      errors of settings: all at once, with near spellings

Read `training` first: its module has the training step.
"""

__version__ = "0.1.0"
