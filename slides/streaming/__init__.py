"""Tiles for training and inference: order, worker processes, prefetch, colour.

    stream.py         bags of tiles for training, read ahead by a DataLoader
    workers.py        processes that read chunks of tiles into shared memory
    prefetch.py       reads slide after slide ahead of the training loop
    chunks.py         reads tiles one by one, and names the slide in errors
    bounded_tiles.py  a slide's tiles in chunks, with a bounded number in memory
    order.py          order of slides and choice of tiles: pure functions of (seed, epoch)
    balance.py        an order in which rare labels come as often as common ones
    augment.py        flips, rotations, colour shared by a slide
    stain.py          stain normalisation, one colour transform a slide
    tile_source.py    opens a cohort row's pixels and tiles
    loose_slides.py   slides outside any cohort as rows of a table
    settings.py       settings of slides and tiles

The only room of `slides` that imports torch.
"""
