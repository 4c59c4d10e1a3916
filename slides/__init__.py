"""Slides, tables and tiles, without any model; usable on its own.

    wsi/        one open slide: levels, true mpp, a tile at (x0, y0)
    tiling/     which tiles a slide has, and their index on disk
    cohort/     the tables: slides, patients, targets, splits, labelled tiles
    labels/     cohort tables from published mutations and a GDC download
    streaming/  tiles for training: order, worker processes, prefetch, colour
    cache/      decoded tiles on disk, within a disk budget
    demo/       a painted demo cohort
    errors.py   errors about slides, tables and settings
    files.py    atomic writing, file fingerprints, damaged files
    hdf5.py     opens HDF5 files that may be damaged
    grid.py     tile size, mpp and overlap to level-0 corners
    progress.py progress of long jobs: a bar, or lines in a log file
    seeds.py    seeds that are the same in every process

No file here imports `tapfm`; only `streaming` imports torch.
"""
