"""The exact gradient of a slide at one chunk's memory, and what a run meets on the way.

    frozen_prefix.py   frozen blocks in front are computed once a slide
    master_weights.py  AdamW for bfloat16 weights, their exact values kept elsewhere
    chunked.py    two passes over the tiles: the whole algorithm
    sampling.py   an unbiased backward of a few of the slide's tiles
    dither.py     weights from a float16 file, about to be trained in bfloat16
    memory.py     seconds and peak memory by phase

Read `chunked.py` first; `tapfm.training.module` has the training step that calls it.
"""
