"""Decoded tiles on disk, and their room.

    tiles.py      decoded tiles in zarr; reads like a slide
    cohort.py     those of a cohort, within a budget
    disk_room.py  which are in use, and which go

A cached slide reads like an open one.
"""
