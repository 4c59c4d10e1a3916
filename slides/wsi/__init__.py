"""One open slide: its levels, true mpp, tiles at (x0, y0), and why a file cannot be opened.

    reader.py        one open slide: a tile at (x0, y0), thumbnails
    slide_file.py    the file by which a slide is opened that is a folder: DICOM, MIRAX
    facts.py         sizes, levels and properties; why pixels would be wrong
    levels.py        pixels of its levels, by OpenSlide or decoded directly
    pyramid.py       each level's true downsample; whether it shows the slide
    resolution.py    microns per pixel, from the table or the file's properties
    jpeg_tiles.py    JPEG tiles decoded without OpenSlide, to the same bits
    jpeg_stream.py    a tile's bytes as a whole JPEG stream
    jpeg_colours.py  JPEG tiles that contradict the TIFF's colour tag
    tiff_image.py    a TIFF that OpenSlide does not open, part by part
    plain_image.py   a plain PNG or JPEG as a slide with one level, whole in memory
    tiff_tags.py     the directories of a TIFF
    diagnose.py      why a file was refused, or that it is cut short

Takes a path and gives pixels; does not know cohorts or tile indexes.
"""
