"""The demo cohort: synthetic slides, painted from a seed.

    cohort.py          plans and writes the cohort
    tissue_painter.py  paints its tissue
    cell_stamps.py     draws its cells

The slides are real pyramids on disk, read like any other slide.
"""

SLIDES = 136  # of the cohort, unless another number is asked for
