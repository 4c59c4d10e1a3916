"""Exact gradients of a slide's loss at the memory of one chunk of tiles, and their helpers.

    chunked.py         the whole algorithm: two passes over a slide's tiles
    frozen_prefix.py   frozen blocks before the first that learns, computed once a slide
    sampling.py        an unbiased backward over a few of the slide's tiles
    master_weights.py  AdamW for bfloat16 weights, with exact fp32 values kept elsewhere
    packed.py          fp32 values in few bits, for the scheme `residual`
    dither.py          noise for weights stored as float16, before bfloat16 training
    memory.py          seconds and peak memory by phase

Read `chunked.py` first; `tapfm.training.module` has the training step that calls it.
"""
