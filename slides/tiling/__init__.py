"""Which tiles a slide has: tissue, pen, blur, grid, the index on disk, other tools' coordinates.

    tissue.py         tissue and pen masks of a thumbnail, pure array functions
    focus.py          how blurred a tile is
    masks.py          the user's own outlines: GeoJSON, a mask image or an array
    segmenter.py      masks by a segmentation network that is installed
    choose.py         chooses a slide's tiles in stages
    index.py          indexes a cohort and writes its ledger
    checked.py        which indexes need no second look
    index_file.py     the h5 of a slide's tiles, readable by TRIDENT
    other_tools.py    tiles that TRIDENT, CLAM, AtlasPatch or hs2p chose
    job_folders.py    finds other programs' coordinate files
    stage_picture.py  a picture of the stages

Works on open slides; does not know cohort tables or training.
"""
