"""Tiles to whoever trains: order, worker processes, prefetch, colour.

    stream.py         the tiles of many slides, read ahead by worker processes
    workers.py        processes that fill slots of shared memory with them
    prefetch.py       slide after slide, the next one read ahead
    chunks.py         pixels of tiles, and what may go wrong on the way
    bounded_tiles.py  those tiles as often as asked, held as far as memory goes
    order.py          which slide and which tiles come when: pure functions of (seed, epoch)
    balance.py        an order in which what is rare is trained as often
    augment.py        flips, rotations, slide-shared colour
    stain.py          stain normalisation, one operator a slide
    tile_source.py    a row to its pixels and tiles, slide after slide
    settings.py       which slides and which tiles

The only room of `slides` where torch stands.
"""
