"""Which tiles a slide has: tissue, pen, blur, grid, the index on disk, other tools' coordinates.

    tissue.py         thumbnail -> tissue and pen, pure array functions
    focus.py          how blurred a tile is
    masks.py          your own outlines: GeoJSON or a mask image
    choose.py         from an open slide to its tiles, stage by stage
    index.py          the chosen tiles of a cohort, and its ledger
    index_file.py     their h5, which TRIDENT reads
    other_tools.py    tiles that TRIDENT, CLAM, AtlasPatch or hs2p chose
    job_folders.py    where other programs keep coordinates
    stage_picture.py  those stages as a picture

Knows open slides and nothing of cohort tables or training.
"""
