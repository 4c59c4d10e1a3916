"""Decoded tiles on disk, within a disk budget.

    tiles.py      the cache of one slide, a zarr array; reads like an open slide
    cohort.py     builds the caches of a cohort, within a budget
    disk_room.py  locks caches in use, removes others to free space

Knows open slides and their indexes; does not know training.
"""
