"""?.

    keep.py     ?
    prompts.py  class vectors: learned context tokens through the frozen text tower
    towers.py   image and text tower with one joint space; `words.py` and `keep.py` are two
    words.py    ?

?
"""
