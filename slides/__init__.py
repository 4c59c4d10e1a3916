"""Pixels and tables: slides, grids, tissue, cohorts, tiles. Knows nothing of models.

    errors.py          what can be wrong with a user's slide
    seeds.py           seeds that are the same in every process
    grid.py            tile size, mpp, overlap <-> level-0 corners, pure arithmetic
    files.py           files that are whole or not there; damaged ones

Usable on its own: no file here imports `tapfm`, and torch stands in those that stream tiles.
"""
