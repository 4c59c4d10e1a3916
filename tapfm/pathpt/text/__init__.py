"""Text towers with an image tower of the same joint space, and prompts that learn.

    towers.py   image and text tower with one joint space; `words.py` and `keep.py` build two
    words.py    the demo's text tower, over whole words
    keep.py     KEEP, read from its publisher's files
    prompts.py  class vectors: learned context tokens through the frozen text tower

Nothing here knows slides or training.
"""
