"""Pixels and tables: slides, grids, tissue, cohorts, tiles. Knows nothing of models.

    errors.py          what can be wrong with a user's slide
    seeds.py           seeds that are the same in every process
    settings.py        which slides and which tiles
    grid.py            tile size, mpp, overlap <-> level-0 corners, pure arithmetic
    files.py           files that are whole or not there; damaged ones
    cache.py           decoded tiles in zarr; reads like a slide
    cache_cohort.py    those of a cohort, within a budget
    cache_room.py      which are in use, and which go
    order.py           which slide and which tiles come when: pure functions of (seed, epoch)
    chunks.py          pixels of tiles, and what may go wrong on the way
    workers.py         processes that fill slots of shared memory with them
    crew.py            slide after slide, the next one read ahead
    held.py            those tiles as often as asked, held as far as memory goes
    balance.py         an order in which what is rare is trained as often
    stream.py          the tiles of many slides, read ahead by worker processes
    augment.py         flips, rotations, slide-shared colour
    stain.py           stain normalisation, one operator a slide
    synthetic.py       the demo cohort
    tissue_painter.py  its tissue
    cell_stamps.py     its cells

Usable on its own: no file here imports `tapfm`, and torch stands in those that stream tiles.
"""
