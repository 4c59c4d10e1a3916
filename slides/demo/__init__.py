"""The painted demo cohort.

    cohort.py          the demo cohort
    tissue_painter.py  its tissue
    cell_stamps.py     its cells

Real pyramids on disk, read like any other slide.
"""
