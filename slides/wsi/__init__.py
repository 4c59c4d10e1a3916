"""One open slide: levels, true mpp, a tile at (x0, y0); why a file will not open.

    reader.py       one open slide: a tile at (x0, y0), thumbnails
    levels.py       its levels as pixels, whoever decodes them
    resolution.py   microns per pixel: who says so, and whether to believe it
    jpeg_tiles.py   JPEG tiles decoded without OpenSlide, to the same bits
    plain_image.py  a plain PNG, JPEG or TIFF as a slide of one level
    tiff_tags.py    the directories of a TIFF
    diagnose.py     why a file was refused, or that it was cut short

Knows no cohort and no tile index: a path in, pixels out.
"""
